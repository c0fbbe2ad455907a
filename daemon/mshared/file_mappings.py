"""Mappings of files that processes share without a name: each file is found by its device and inode.

A file in memory (tmpfs, memfd, hugetlbfs) is mapped as it is, each process by its own descriptor; the daemon only knows
who does, and changes protections for all. For a file of a disk a backing stands in, filled from the file and written
back to it as any shared file of a region.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Final

import attrs
import trio

from mshared import comparing, libc
from mshared.answers import Caller, Pending
from mshared.backing import Backing, BackingStore
from mshared.book import file_is, region_is
from mshared.changes import Opened, checked_prot, open_file
from mshared.files import TMPFS_MAGIC, filesystem, is_writable, let_go
from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from msharefs import protocol
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange, round_up
from msharefs.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    MshareError,
    NoMemoryError,
    NoSpaceError,
    NotSupportedError,
    QuotaError,
)
from msharefs.file_sharing import FileKey, SharedFile, Wanted
from msharefs.namespace import Namespace
from msharefs.perms import PROT_RW, Ownership, Prot
from msharefs.region import BackingKind, Region
from msharefs.rules import check_prot
from msharefs.units import format_size
from msharefs.vma import FileSource

_HUGETLBFS_MAGIC: Final = 0x958458F6
_F_GET_SEALS: Final = 1034
_SEALS_AGAINST_STORES: Final = 0x08 | 0x10  # F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
_OWNER_READS: Final = 0o400
_OTHERS_READ: Final = 0o044


@attrs.frozen
class File:
    """A client's file as the kernel describes it. ``memory``: how the file lies in memory, None for one of a disk.

    Owns ``fd``; ``magic`` is its filesystem's. ``why_not`` says why nobody can share it.
    """

    fd: int
    magic: int
    writable: bool
    key: FileKey
    gid: int
    mode: int
    size: int
    memory: BackingKind | None
    why_not: str | None


class FileMappings:
    """Finds who shares a file, or makes the first one's region, and offers a window."""

    def __init__(
        self,
        namespace: Namespace,
        lifetimes: Lifetimes,
        store: BackingStore,
        backing_kind: Callable[[str | None], BackingKind],
        end_unused: Callable[[LiveRegion], None],
    ) -> None:
        self._namespace = namespace
        self._lifetimes = lifetimes
        self._store = store
        self._backing_kind = backing_kind
        self._end_unused = end_unused
        self._regions: dict[FileKey, LiveRegion] = {}

    async def map(self, caller: Caller, request: protocol.MapFile, fd: int) -> tuple[LiveRegion, Pending] | str:
        """The region to offer a window on, or why there is none. Raises MshareError."""
        wanted = Wanted(request.addr, request.length, request.offset, checked_prot(request.prot))
        check_prot(wanted.prot)
        if request.length <= 0 or request.offset < 0:
            raise InvalidArgumentError(f"no file has {request.length} bytes at {request.offset}")
        kind = self._backing_kind(request.backing)
        why_not = wanted.why_unaligned()
        if why_not is not None:
            return why_not
        opened = await open_file(fd)
        file = await _examined(opened)
        with contextlib.ExitStack() as stack:
            stack.callback(let_go, file.fd, opened.magic)
            if wanted.prot & Prot.WRITE and not file.writable:
                raise AccessDeniedError("the file was not opened for writing, or is sealed; open it O_RDWR")
            if file.why_not is not None:
                return file.why_not
            try:
                return await self._ready(caller, wanted, file, file.memory or kind)
            except (NoMemoryError, NoSpaceError, QuotaError, NotSupportedError) as error:
                if request.backing is not None:
                    raise
                return str(error)

    def restore(self, live: LiveRegion) -> None:
        """Have a file's region again that an earlier daemon had."""
        if live.model.file is not None:
            self._regions[live.model.file.key] = live

    def check(self, live: LiveRegion, request: protocol.Changing) -> None:
        """Refuse what would change a part of a shared mapping, or is not to be had. Raises MshareError."""
        match request:
            case protocol.Msync():
                return
            case protocol.Mprotect(_, 0, length, prot) if length == live.model.ar.size:
                file = live.model.file
                check_prot(checked_prot(prot))
                if not prot & PROT_RW and file is not None and (file.resident or live.model.mm.page > PAGE_SIZE):
                    raise NotSupportedError(
                        "PROT_NONE: the pages of this file cannot be hidden from everybody; use PROT_READ, or munmap"
                    )
            case _:
                raise InvalidArgumentError("a shared mapping of a file is changed as a whole, by mprotect and munmap")

    def attached(self, live: LiveRegion, *, readonly: bool) -> None:
        """Note that somebody has a window."""
        if live.digests is not None and not readonly:
            live.digests.writers = True

    async def _ready(
        self, caller: Caller, wanted: Wanted, file: File, kind: BackingKind
    ) -> tuple[LiveRegion, Pending] | str:
        """The region, such that its descriptor can be handed out."""
        while True:
            await self._settled(file.key)
            found = self._found_or_made(caller, wanted, file, kind)
            if isinstance(found, str) or found[0].digests is None:
                return found
            live, pending = found
            try:
                async with live.lock:
                    await (comparing.let_write(live) if file.writable else comparing.read_in(live))
                    if not live.ended:
                        return live, pending
            except BaseException:
                self._end_unused(live)
                raise
            finally:
                if not live.attachments and not live.closed:
                    self._lifetimes.settling.request(live)

    async def _settled(self, key: FileKey) -> None:
        """Wait until what was stored by a mapping that has ended is in the file."""
        self._regions = {key: live for key, live in self._regions.items() if not live.closed}
        live = self._regions.get(key)
        if live is not None and live.ended:
            await live.gone.wait()

    def _found_or_made(
        self, caller: Caller, wanted: Wanted, file: File, kind: BackingKind
    ) -> tuple[LiveRegion, Pending] | str:
        region = self._namespace.find_file(file.key)
        if region is not None and region.file is not None:
            live = self._lifetimes.region(region)
            self._lifetimes.sweep(live.attachments)
            region = self._namespace.find_file(file.key)
        if region is not None and region.file is not None:
            why_not = region.file.why_not(region.ar, wanted)
            if why_not is not None:
                return why_not
            if file.writable:
                keep_better(live, file.fd)
        else:
            live = self._make(caller, wanted, file, kind)
        unarmed = not file.writable and (file.memory is not None or live.digests is not None)
        return live, Pending(live, readonly=not file.writable, creator=False, unarmed=unarmed)

    def _make(self, caller: Caller, wanted: Wanted, file: File, kind: BackingKind) -> LiveRegion:
        shared = SharedFile(file.key, wanted.offset, wanted.prot, resident=file.memory is not None)
        owner = Ownership(caller.who.uid, file.gid, _OWNER_READS | file.mode & _OTHERS_READ)
        model = self._namespace.share(shared, wanted.addr, wanted.length, owner, kind)
        try:
            backing = self._backing(model, file, kind, wanted)
        except BaseException:
            self._namespace.abandon(model)
            raise
        live = self._lifetimes.add_region(model, backing)
        live.settled.set()
        self._regions[file.key] = live
        try:
            self._map(live, file, wanted.offset)
        except MshareError:
            self._namespace.abandon(model)
            self._lifetimes.forget(live)
            raise
        return live

    def _map(self, live: LiveRegion, file: File, offset: int) -> None:
        """Have the file mapped over all of a new region."""
        ar, source = live.model.ar, None
        compared = file.memory is None and live.model.backing is BackingKind.HUGETLB
        if compared:
            live.digests = comparing.Digests()
            live.backing.reserve(AddrRange.sized(0, os.fstat(live.backing.fd).st_size))
        if file.memory is None:
            number = live.add_file(os.dup(file.fd), file.magic)
            source = FileSource(number, offset, shared=True, writable=True, compared=compared)
        live.model.mm.mmap(ar, ar.size, PROT_RW, fixed=True, source=source)

    def _backing(self, model: Region, file: File, kind: BackingKind, wanted: Wanted) -> Backing:
        if file.memory is None:
            size = wanted.length
            if kind is BackingKind.HUGETLB:  # Past the file's end the kernel itself is to refuse.
                size = min(size, round_up(file.size - wanted.offset, PMD_SIZE))
            if size <= 0:
                raise NoMemoryError(f"the file has nothing from offset {wanted.offset:#x} on")
            return self._store.create(model.id, kind, size)
        return Backing.of_file(os.dup(file.fd), kind, wanted.offset)


def keep_better(live: LiveRegion, fd: int) -> None:
    """Keep a copy of a descriptor by which a shared file can be written, if there was none."""
    if live.shows_own_file:
        old = live.backing
        if not is_writable(old.fd):
            better = Backing.of_file(os.dup(fd), old.kind, old.start)
            live.backing = live.family.backings[live.model.mm.store] = better
            live.note(region_is(live))
            old.close()
        return
    for number, file in list(live.files.items()):
        if not is_writable(file.fd):
            live.files[number] = file.copy_of(fd)
            live.note(file_is(live.model.id, number, live.files[number]))
            file.close()


async def _examined(opened: Opened) -> File:
    """What a file is. Takes the descriptor. Its filesystem may be served by the client: that holds one thread."""
    own = trio.CapacityLimiter(1)
    try:
        return await trio.to_thread.run_sync(_examine, opened, abandon_on_cancel=True, limiter=own)
    except OSError as error:
        let_go(opened.fd, opened.magic)
        raise InvalidArgumentError(f"the file cannot be looked at: {error.strerror}") from error


def _examine(opened: Opened) -> File:
    about = os.fstat(opened.fd)
    key = FileKey(os.major(about.st_dev), os.minor(about.st_dev), about.st_ino)
    magic, block = filesystem(opened.fd)
    memory, why_not = None, None
    if magic == TMPFS_MAGIC:
        memory = BackingKind.SMALL
    elif magic == _HUGETLBFS_MAGIC:
        memory = BackingKind.HUGETLB
        if block != PMD_SIZE:
            why_not = f"the file has pages of {format_size(block)}, not of {format_size(PMD_SIZE)}"
    else:
        why_not = _why_unmappable(opened.fd)
    writable = opened.writable and not (memory and _is_sealed(opened.fd))
    return File(opened.fd, magic, writable, key, about.st_gid, about.st_mode, about.st_size, memory, why_not)


def _is_sealed(fd: int) -> bool:
    """Whether no new mapping of a file in memory can ever write, however it was opened (F_SEAL_WRITE)."""
    try:
        return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS_AGAINST_STORES)
    except OSError:  # EINVAL: a file with a name.
        return False


def _why_unmappable(fd: int) -> str | None:
    """Whether a file can be mapped at all: not all filesystems let theirs, and their files are no memory."""
    try:
        libc.unmap(libc.map_shared(fd, PAGE_SIZE), PAGE_SIZE)
    except OSError as error:
        return f"the file cannot be mapped: {os.strerror(error.errno or 0)}"
    return None
