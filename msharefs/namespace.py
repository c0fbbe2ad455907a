"""The names of one mount: who may create, find and end regions, and where they lie."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import attrs

from msharefs.addr import PMD_SIZE, PUD_SIZE, WINDOW_END, WINDOW_START, Address, AddrRange, round_up
from msharefs.effects import Signal
from msharefs.errors import (
    AccessDeniedError,
    BusyError,
    ExistsError,
    InternalError,
    InvalidArgumentError,
    NoMemoryError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    QuotaError,
)
from msharefs.file_sharing import FileKey, SharedFile
from msharefs.host_mm import HostMm
from msharefs.names import check_name
from msharefs.perms import Credentials, FileAccess, Ownership
from msharefs.region import Attachment, AttachmentId, BackingKind, Region, RegionId
from msharefs.rules import check_user_range
from msharefs.units import format_size

STICKY = 0o1000


@attrs.frozen
class Limits:
    """What the daemon gives out at most; None is no limit. Bytes count region sizes, not resident memory."""

    max_regions: int | None = None
    max_bytes: int | None = None
    max_regions_per_uid: int | None = 4096
    max_bytes_per_uid: int | None = None


@attrs.frozen
class Policy:
    """How regions of this mount are made."""

    align: int = PMD_SIZE
    paging_all: bool = False
    hole_signal: Signal = Signal.SIGBUS
    limits: Limits = Limits()


@attrs.define
class _Held:
    """What a user has: regions, and the bytes of their sizes."""

    regions: int = 0
    size: int = 0


class Namespace:
    """All regions of a mount, with and without names. Calls that raise have changed nothing."""

    def __init__(self, root: Ownership, policy: Policy) -> None:
        self.root = root
        self.policy = policy
        self._by_name: dict[str, Region] = {}
        self._by_id: dict[RegionId, Region] = {}
        self._by_file: dict[FileKey, Region] = {}
        self._held: defaultdict[int, _Held] = defaultdict(_Held)
        """By uid."""
        self._next_region = RegionId(1)
        self._next_attachment = AttachmentId(1)
        self._next_free = Address(WINDOW_START)

    def __iter__(self) -> Iterator[Region]:
        """Regions that have a name and are ready, by name."""
        return (region for _, region in sorted(self._by_name.items()) if region.ready)

    def all(self) -> list[Region]:
        """Every region that still exists, nameless ones included."""
        return list(self._by_id.values())

    def files(self) -> list[Region]:
        """Regions of files that are shared without a name, by file."""
        return [region for _, region in sorted(self._by_file.items()) if region.ready]

    def find_file(self, key: FileKey) -> Region | None:
        """The region by which processes share that file, ready or not."""
        return self._by_file.get(key)

    @property
    def counters(self) -> tuple[RegionId, AttachmentId]:
        """The numbers that the next region and the next attachment get."""
        return self._next_region, self._next_attachment

    def restore(self, regions: Iterable[Region], counters: tuple[RegionId, AttachmentId]) -> None:
        """Have regions again that there were before, with their attachments; those that have neither have ended."""
        for region in regions:
            self._take_in(region)
            if WINDOW_START <= region.ar.start < WINDOW_END:
                self._next_free = max(self._next_free, Address(region.ar.end))
        self._next_region, self._next_attachment = counters

    def find(self, name: str) -> Region:
        """The region of that name, ready or not."""
        region = self._by_name.get(name)
        if region is None:
            raise NotFoundError(f"no region is named {name!r}")
        return region

    def get(self, region_id: RegionId) -> Region | None:
        """The region with that number, if it still exists."""
        return self._by_id.get(region_id)

    def create(
        self,
        name: str,
        addr: int | None,
        size: int,
        mode: int,
        backing: BackingKind,
        who: Credentials,
        *,
        empty: bool = False,
        used: int | None = None,
        kept: bool = False,
    ) -> Region:
        """A new region, not ready yet: it takes its name, and its range when the daemon chooses the address.

        Without ``empty`` it starts as one anonymous read-write mapping. ``mode`` is what umask left. With ``kept`` it
        is transient; ``release`` says when it is not kept any more.
        """
        self._check_new(name, mode, who)
        if used is not None and not 0 < used <= size:
            raise InvalidArgumentError(f"{used} bytes cannot be used of a region of {size}")
        align = max(self.policy.align, backing.align)
        why = "mshared --align" if align == self.policy.align else f"backing {backing}"
        ar = check_user_range(WINDOW_START if addr is None else addr, size, align, why)
        self._check_limits([size], who)
        if addr is None:
            ar = self._free_range(size)
        mm = HostMm(
            ar,
            page=backing.page,
            granule=backing.granule,
            paging_all=self.policy.paging_all,
            hole_signal=self.policy.hole_signal,
        )
        if not empty:
            mm.mmap(ar, size, fixed=True)
        owner = Ownership(who.uid, who.gid, mode)
        region = Region(self.next_region(), name, owner, backing, mm, used=used, transient=kept, kept=kept)
        self._take_in(region)
        return region

    def share(self, file: SharedFile, addr: int | None, size: int, owner: Ownership, backing: BackingKind) -> Region:
        """A region without a name for a file that nobody shares, not ready yet: one hole, at the first mapper's range.

        The limits are those of ``owner.uid``. Preconditions: ``find_file`` finds none.
        """
        self._check_limits([size], Credentials(owner.uid, owner.gid))
        ar = self._free_range(size) if addr is None else check_user_range(addr, size, PMD_SIZE)
        mm = HostMm(
            ar,
            page=backing.page,
            granule=backing.granule,
            paging_all=self.policy.paging_all and not file.resident,
            hole_signal=self.policy.hole_signal,
        )
        region = Region(self.next_region(), None, owner, backing, mm, file=file)
        self._take_in(region)
        return region

    def check_forks(self, wanted: Sequence[tuple[Region, str | None, int]], who: Credentials) -> None:
        """Whether ``fork`` may be called for all of these (origin, name, mode); raises what ``create`` raises.

        Without a name it needs no permission.
        """
        names: set[str] = set()
        for _, name, mode in wanted:
            if name is not None:
                self._check_new(name, mode, who)
                if name in names:
                    raise ExistsError(f"two regions cannot both be named {name!r}")
                names.add(name)
        self._check_limits([origin.ar.size for origin, _, _ in wanted], who)

    def fork(self, number: RegionId, origin: Region, mm: HostMm, name: str | None, owner: Ownership) -> Region:
        """A region with a fork of the host mm of ``origin``, ready from the start. It keeps its name.

        Preconditions: ``check_forks`` has passed, and ``next_region`` gave the number.
        """
        region = Region(number, name, owner, origin.backing, mm, ready=True, origin=origin.name or "", used=origin.used)
        self._take_in(region)
        return region

    def attach(
        self, region: Region, addr: int, pid: int | None, *, readonly: bool, forked_from: AttachmentId | None = None
    ) -> Attachment:
        """A new reference to ``region``, which is ready from now on."""
        window = check_window(region, addr)
        attachment = Attachment(self._next_attachment, pid, window, readonly, forked_from)
        self._next_attachment = AttachmentId(attachment.id + 1)
        region.attachments[attachment.id] = attachment
        region.ready = True
        return attachment

    def detach(self, region: Region, attachment: Attachment) -> bool:
        """Drop a reference; whether the region is gone with it, because it had no name any more."""
        del region.attachments[attachment.id]
        return self._forget_if_unused(region)

    def release(self, region: Region) -> bool:
        """The process that has kept a transient region is gone; whether the region is gone with it."""
        region.kept = False
        return self._forget_if_unused(region)

    def check_unlink(self, region: Region, pid: int, *, may_write: bool) -> None:
        """Refuse an unlink by ``pid`` that would take the region from others (EBUSY) or is not its to make (EACCES)."""
        if pid in region.pids:
            return
        if not may_write:
            raise AccessDeniedError(f"unlinking the orphan {region.name!r} needs write permission on it")
        if region.attachments:
            raise BusyError(
                f"{region.process_count} processes are attached to {region.name!r} and this one is not; attach first, "
                "or use mshare.remove() to take the name away at once"
            )

    def unlink(self, region: Region, *, may_write: bool) -> bool:
        """End the name if nobody is attached and the caller may write; whether the region is gone."""
        if region.attachments or not may_write:
            return False
        self._drop_name(region)
        return self._forget_if_unused(region)

    def remove(self, region: Region, who: Credentials) -> bool:
        """Take the name away, as unlink(2) does; whether the region is gone at once."""
        if not self.root.allows(who, FileAccess.WRITE | FileAccess.EXEC):
            raise AccessDeniedError("removing a name needs write permission on the mount's root")
        if self.root.mode & STICKY and who.uid not in (0, self.root.uid, region.owner.uid):
            raise NotPermittedError(f"only its owner or root may remove {region.name!r}: the mount is sticky")
        self._drop_name(region)
        return self._forget_if_unused(region)

    def abandon(self, region: Region) -> None:
        """Undo ``create``: its creator failed before the region was ready."""
        if region.attachments:
            raise InternalError(f"region {region.name!r} abandoned while attached")
        self._drop_name(region)
        self._forget_if_unused(region)

    def change_owner(
        self, region: Region, *, mode: int | None = None, uid: int | None = None, gid: int | None = None
    ) -> None:
        """Carry out chmod and chown; whether the caller may is checked by the kernel before it asks."""
        changes = {"mode": mode, "uid": uid, "gid": gid}
        self._count(region, -1)
        region.owner = attrs.evolve(region.owner, **{k: v for k, v in changes.items() if v is not None})
        self._count(region, 1)

    def _take_in(self, region: Region) -> None:
        self._by_id[region.id] = region
        if region.name is not None:
            self._by_name[region.name] = region
        if region.file is not None:
            self._by_file[region.file.key] = region
        self._count(region, 1)

    def _count(self, region: Region, by: int) -> None:
        """One more region of its owner's, or one less."""
        held = self._held[region.owner.uid]
        held.regions += by
        held.size += by * region.ar.size
        if not held.regions:
            del self._held[region.owner.uid]

    def next_region(self) -> RegionId:
        """The number of a region that is to be made; no other gets it."""
        number = self._next_region
        self._next_region = RegionId(number + 1)
        return number

    def _check_new(self, name: str, mode: int, who: Credentials) -> None:
        check_name(name)
        if name in self._by_name:
            raise ExistsError(f"region {name!r} exists")
        if not self.root.allows(who, FileAccess.WRITE | FileAccess.EXEC):
            raise AccessDeniedError("creating a region needs write permission on the mount's root (mshared --mode)")
        if mode & ~0o777:
            raise InvalidArgumentError(f"mode {mode:#o} has bits other than the nine of rwxrwxrwx")

    def _drop_name(self, region: Region) -> None:
        if region.name is not None:
            del self._by_name[region.name]
            region.name = None

    def _forget_if_unused(self, region: Region) -> bool:
        """The last reference and the name are both gone: so is the region. A transient one does not keep its name."""
        if region.attachments:
            return False
        if region.transient and not region.kept:
            self._drop_name(region)
        if region.name is not None:
            return False
        del self._by_id[region.id]
        if region.file is not None:
            del self._by_file[region.file.key]
        self._count(region, -1)
        return True

    def _check_limits(self, sizes: Sequence[int], who: Credentials) -> None:
        """Whether there may be regions of these sizes, too."""
        limits, mine = self.policy.limits, self._held.get(who.uid, _Held())
        more, size = len(sizes), sum(sizes)
        _check_limit(NoSpaceError, "--max-regions", limits.max_regions, len(self._by_id) + more)
        _check_limit(QuotaError, "--max-regions-per-user", limits.max_regions_per_uid, mine.regions + more)
        total = sum(held.size for held in self._held.values())
        _check_limit(NoSpaceError, "--max-bytes", limits.max_bytes, total + size)
        _check_limit(QuotaError, "--max-bytes-per-user", limits.max_bytes_per_uid, mine.size + size)

    def _free_range(self, size: int) -> AddrRange:
        """The next range that no region has (next fit: a pointer gone stale finds nothing new at its address)."""
        align = max(self.policy.align, PUD_SIZE if size >= PUD_SIZE else PMD_SIZE)
        regions = self._by_id.values()
        for first in (self._next_free, WINDOW_START):
            start = round_up(first, align)
            for taken, end in sorted((region.ar.start, region.ar.end) for region in regions if region.ar.end > start):
                if taken < start + size and start < end:
                    start = round_up(end, align)
            if start + size <= WINDOW_END:
                self._next_free = Address(start + size)
                return AddrRange.sized(start, size)
        raise NoMemoryError(f"no {format_size(size)} of addresses are free between 32 TiB and 64 TiB; name an address")


def check_window(region: Region, addr: int) -> AddrRange:
    """The window of ``region`` at ``addr``, which need not be the region's own address."""
    if addr == region.ar.start:
        return region.ar
    return check_user_range(addr, region.ar.size, region.backing.align, f"backing {region.backing}")


def _check_limit(error: type[NoSpaceError | QuotaError], what: str, limit: int | None, wanted: int) -> None:
    if limit is not None and wanted > limit:
        raise error(f"{what}: the limit is {limit}, this would make {wanted} ({errno.errorcode[error.errno]})")
