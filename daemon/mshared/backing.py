"""Where the pages of regions come from: one sparse file a region, offset in the file = offset in the region.

As root the files lie on mounts of the daemon's own: a tmpfs with huge=always (``thp``), one without (``4k``), and a
hugetlbfs (``hugetlb``), in which each region that is no fork has another for itself; an ordinary user gets sealed
memfds (``4k``, ``hugetlb``). Either way clients hold descriptors that cannot shrink the file, and those of read-only
clients cannot be opened again for writing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import attrs

from mshared import hugetlb, landlock, libc, mounts
from mshared.spares import Opener, Spares
from mshared.sparse import held, punch, write_all
from mshared.undo import Undo
from msharefs.addr import AddrRange
from msharefs.errors import MshareError, NoSpaceError, NotSupportedError
from msharefs.region import BackingKind, RegionId

log = logging.getLogger(__name__)


FILE_PREFIX: Final = "memory-"
"""How the names of files of memory start."""
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 1 | 2 | 4  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


@attrs.frozen
class Backing:
    """The file of one region. Owns its descriptors.

    ``fd`` is the daemon's own, ``writable`` and ``readonly`` are what clients get a copy of. Ranges are offsets in the
    region, which starts at ``start`` of the file.
    ``mount`` is the filesystem that it has for itself, where no page that is to be missing is lost to others.
    """

    fd: int
    writable: int
    readonly: int
    path: Path | None
    kind: BackingKind = BackingKind.SMALL
    start: int = 0
    mount: Path | None = None

    @classmethod
    def of_file(cls, fd: int, kind: BackingKind, start: int) -> Backing:
        """Somebody's file in memory; its descriptor is the daemon's alone."""
        return cls(fd, fd, fd, None, kind, start)

    def punch(self, ar: AddrRange) -> None:
        """Give the memory of ``ar`` back and take it out of every process, with no event."""
        punch(self.fd, ar)

    def reserve(self, ar: AddrRange) -> None:
        """Have memory promised for ``ar``, where the kind can do so. Raises NoMemoryError."""
        if self.kind is BackingKind.HUGETLB:
            hugetlb.reserve(self.fd, ar)

    def empty(self, ar: AddrRange) -> int:
        """Take pages that are there out of every process; how many are promised no more, since others were faster."""
        if self.kind is BackingKind.HUGETLB:
            return hugetlb.empty(self.fd, ar)
        self.punch(ar)
        return 0

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write over what is there. What is not there comes with its whole granule."""
        if self.kind is BackingKind.HUGETLB:
            hugetlb.overwrite(self.fd, self.start + offset, bytes(data))
        else:
            write_all(self.fd, data, self.start + offset)

    def read(self, size: int, offset: int) -> bytes:
        """What is there, and zeros where nothing is."""
        return os.pread(self.fd, size, self.start + offset)

    def holds(self, offset: int) -> bool:
        """Whether there is something at an offset. Not for huge pages, whose files do not tell."""
        try:
            return os.lseek(self.fd, self.start + offset, os.SEEK_DATA) == self.start + offset
        except OSError:  # ENXIO: there is nothing from there to the end.
            return False

    def is_empty(self, ar: AddrRange) -> bool:
        """Whether there is nothing in a range of offsets. Not for huge pages, either."""
        try:
            return os.lseek(self.fd, self.start + ar.start, os.SEEK_DATA) >= self.start + ar.end
        except OSError:
            return True

    def held(self, ar: AddrRange, device: int | None) -> list[AddrRange]:
        """Where there is something in a range of offsets, in order."""
        return self.held_by(self.fd, ar, device)

    def held_by(self, fd: int, ar: AddrRange, device: int | None) -> list[AddrRange]:
        """The same, asked by a duplicate of the descriptor."""
        return [part.moved(-self.start) for part in held(fd, ar.moved(self.start), self.kind, device)]

    @contextlib.contextmanager
    def duplicate(self) -> Iterator[int]:
        """A descriptor of the file that outlives this backing, for a worker thread to read."""
        fd = os.dup(self.fd)
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """Take the name away and close; the memory lives on in whatever still maps it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        if self.mount is not None:
            _take_away(self.mount)
        for fd in {self.fd, self.writable, self.readonly}:
            os.close(fd)


class BackingStore:
    """Makes backings. ``kinds`` says which, the first being the default; ``notes`` what is less than it should be."""

    kinds: tuple[BackingKind, ...]
    notes: tuple[str, ...] = ()

    def create(self, region: RegionId, kind: BackingKind, size: int, *, fork: bool = False) -> Backing:
        """A sparse file of ``size`` bytes. Raises NotSupportedError for a kind that is not here.

        Nothing is promised for a ``fork``, and nothing has to be kept.
        """
        if kind not in self.kinds:
            raise NotSupportedError(self.why_not(kind))
        try:
            if kind is BackingKind.HUGETLB and not fork:
                return self._make_promised(region, size)
            return self._make(region, kind, size)
        except OSError as error:
            raise _no_room(error, size) from error

    def prepare(self, kind: BackingKind) -> None:
        """Have the next fork of that kind take less time, where it takes much. For a worker thread."""

    def why_not(self, kind: BackingKind) -> str:
        """Why a kind cannot be had, and the cure."""
        if kind is BackingKind.HUGETLB:
            return f"backing hugetlb needs a kernel with hugetlb pages; use one of {', '.join(self.kinds)}"
        return (
            f"backing {kind} needs a daemon run by root; use one of {', '.join(self.kinds)}, or start mshared as root"
        )

    def reopen(self, path: Path, kind: BackingKind, mount: Path | None) -> Backing:
        """A backing that was made before, and of which nobody has kept descriptors. Raises OSError when it is gone."""
        raise FileNotFoundError(errno.ENOENT, f"nobody has kept the memory {path} ({kind}, {mount})")

    def capacity(self) -> tuple[int, int]:
        """Bytes of memory for regions, in all and free."""
        raise NotImplementedError

    def sweep(self, known: Iterable[Path]) -> None:
        """Take away what a daemon that was killed has left, but for these files and mounts; before any are made."""

    def close(self) -> None:
        """Take away what the store mounted."""

    def _make(self, region: RegionId, kind: BackingKind, size: int) -> Backing:
        raise NotImplementedError

    def _make_promised(self, region: RegionId, size: int) -> Backing:
        """One of huge pages that stay promised, as far as that is possible."""
        return self._make(region, BackingKind.HUGETLB, size)


class MountedStore(BackingStore):
    """Named files on mounts of its own below ``root``, for a daemon run by root: tmpfs twice, and hugetlbfs."""

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        """Mount what is needed; what an earlier daemon has mounted there is taken over."""
        self._root = root
        self._readonly: dict[BackingKind, int | None] = {}
        self._landlock = landlock.is_available()
        self._spares = Spares(self._open, landlocked=self._landlock)
        if not self._landlock:
            self._note("no Landlock (Linux 6.2): a client that may write a region can also truncate its memory")
        try:
            self._mount_all(f"size={'90%' if max_bytes is None else max_bytes}")
        except BaseException:
            self.close()
            raise
        self.kinds = tuple(self._readonly)

    def why_not(self, kind: BackingKind) -> str:
        """Why a kind cannot be had, and the cure."""
        if kind is BackingKind.THP:
            return "backing thp needs huge pages for tmpfs, which this kernel does not have; use 4k"
        return super().why_not(kind)

    def capacity(self) -> tuple[int, int]:
        """As the mount of the default kind tells."""
        fs = os.statvfs(self._root / self.kinds[0])
        return fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize

    def close(self) -> None:
        """Unmount; memory that is still mapped somewhere stays until that ends."""
        self._spares.close()
        for kind, tree in self._readonly.items():
            if tree is not None:
                os.close(tree)
            mounts.unmount(self._root / kind)
            (self._root / kind).rmdir()

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes += (text,)

    def _mount_all(self, size: str) -> None:
        try:
            self._mount(BackingKind.THP, f"{size},huge=always")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._note("this kernel has no huge pages for tmpfs: the default backing is 4k")
        self._mount(BackingKind.SMALL, size)
        try:
            self._mount(BackingKind.HUGETLB, "")
        except OSError as error:
            self._note(f"no hugetlbfs ({error.strerror}): there is no backing hugetlb")

    def _mount(self, kind: BackingKind, options: str) -> None:
        """Mount one filesystem. Raises OSError; what is mounted then is in ``_readonly``."""
        place = self._root / kind
        place.mkdir(mode=0o700, exist_ok=True)
        try:
            if mounts.mount_at(place) is not None:
                log.info("taking over %s", place)
            elif kind is BackingKind.HUGETLB:
                mounts.mount_hugetlbfs(place)
            else:
                mounts.mount_tmpfs(place, options)
        except OSError:
            place.rmdir()
            raise
        self._readonly[kind] = None
        self._readonly[kind] = mounts.readonly_copy(place)

    def prepare(self, kind: BackingKind) -> None:
        """Have some files of that kind ready."""
        self._spares.prepare(kind)

    def _make(self, region: RegionId, kind: BackingKind, size: int) -> Backing:  # noqa: ARG002 - as of other stores
        made = self._spares.take(kind) or self._open(kind)
        try:
            os.ftruncate(made.fd, size)
        except BaseException:
            made.close()
            raise
        return made

    def _make_promised(self, region: RegionId, size: int) -> Backing:
        """On a mount of its own, which keeps a page. Raises NoMemoryError."""
        mount = self._root / BackingKind.HUGETLB / str(region)
        with contextlib.ExitStack() as undo, Undo() as for_now:
            hugetlb.mount_for_one(mount)
            undo.callback(_take_away, mount)
            tree = mounts.readonly_copy(mount)
            if tree is not None:
                for_now.open(tree)
            made = self._open_at(mount / "memory", BackingKind.HUGETLB, tree)
            undo.callback(made.close)
            os.ftruncate(made.fd, size)
            undo.pop_all()
        return attrs.evolve(made, mount=mount)

    def _open(self, kind: BackingKind, opener: Opener | None = None) -> Backing:
        """A file without size: it is no region's yet. Its name is its own for good; to rename it takes time."""
        path = self._root / kind / f"{FILE_PREFIX}{secrets.token_hex(8)}"
        return self._open_at(path, kind, self._readonly[kind], opener)

    def reopen(self, path: Path, kind: BackingKind, mount: Path | None) -> Backing:
        """By its name."""
        tree = self._readonly[kind] if mount is None else mounts.readonly_copy(mount)
        with Undo() as undo, Undo() as for_now:
            if mount is not None and tree is not None:
                for_now.open(tree)
            fd = undo.open(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            made = self._opened(path, kind, tree, fd, undo)
        return attrs.evolve(made, mount=mount)

    def sweep(self, known: Iterable[Path]) -> None:
        """Files and mounts that a daemon which was killed had made for nobody yet, or had just let go."""
        spared = set(known)
        for kind in self.kinds:
            for path in (self._root / kind).iterdir():
                if path in spared:
                    continue
                if path.is_dir():
                    _take_away(path)
                else:
                    path.unlink()

    def _open_at(self, path: Path, kind: BackingKind, tree: int | None, opener: Opener | None = None) -> Backing:
        """A new file, of whose directory ``tree`` is a copy that cannot be written. ``opener``: see ``landlock``."""
        with Undo() as undo:
            fd = undo.open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            undo.path = path
            return self._opened(path, kind, tree, fd, undo, opener)

    def _opened(
        self, path: Path, kind: BackingKind, tree: int | None, fd: int, undo: Undo, opener: Opener | None = None
    ) -> Backing:
        """The file behind ``fd``, with what clients get."""
        opener = opener or (landlock.open_without_truncate if self._landlock else os.open)
        writable = undo.open(opener(str(path), os.O_RDWR | os.O_CLOEXEC))
        readonly = os.O_RDONLY | os.O_CLOEXEC
        name = path if tree is None else path.name
        reader = undo.open(os.open(name, readonly, dir_fd=tree))
        undo.keep()
        return Backing(fd, writable, reader, path, kind)


class MemfdStore(BackingStore):
    """Sealed memfds, for a daemon without privileges."""

    kinds = (BackingKind.SMALL, BackingKind.HUGETLB)

    def capacity(self) -> tuple[int, int]:
        """What the machine has and could give now."""
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
        return total, free

    def _make(self, region: RegionId, kind: BackingKind, size: int) -> Backing:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if kind is BackingKind.HUGETLB:
            flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
        with Undo() as undo:
            fd = undo.open(os.memfd_create(f"msharefs-{region}", flags))
            os.ftruncate(fd, size)
            libc.call("fcntl", fd, _F_ADD_SEALS, _SEALS)
            readonly = undo.open(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
            os.fchmod(fd, 0)  # So that the read-only descriptor is not simply opened again for writing.
            undo.keep()
        return Backing(fd, fd, readonly, None, kind)


def _take_away(mount: Path) -> None:
    if mounts.mount_at(mount) is not None:
        mounts.unmount(mount)
    mount.rmdir()


def _no_room(error: OSError, size: int) -> MshareError:
    """The model's words for an OSError of the filesystem."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG):
        return NoSpaceError(
            f"no room for a region of {size} bytes: {error.strerror}; unlink some, or raise --max-bytes"
        )
    raise error
