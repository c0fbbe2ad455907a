"""Huge pages of the machine's pool: raising it, reserving from it, and seeing which pages a file has.

hugetlbfs keeps its own books. Pages are promised to a file when a part of it is mapped, at no cost, and stay promised
when the mapping goes; a page that is punched out takes its promise along. A file can neither be written by pwrite(2)
nor asked for its holes.

A page that is to be missing for a while, and promised all the time, has to be punched and promised again, and whoever
else takes pages may be faster. Not on a hugetlbfs of its own whose ``min_size`` is one page: the first page that any
of its files lets go stays with the mount, and is what the next promise there is made of (hugepage_subpool_put_pages).
Meanwhile nobody may touch it: a fault that finds no promise, and then no page, is a SIGBUS also if the promise came in
between.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mshared import libc, mounts, uffd
from msharefs import uffd_abi as abi
from msharefs.addr import PMD_SIZE, Address, AddrRange, united
from msharefs.errors import NoMemoryError
from msharefs.units import format_size

log = logging.getLogger(__name__)

POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
CURE: Final = "raise vm.nr_hugepages (pages of 2 MiB), or start mshared as root with --hugetlb-pool SIZE"
_TRIES: Final = 3


class Pool:
    """Pages added to the machine's pool of 2 MiB pages for as long as the daemon runs.

    How many is written to the file ``note``, so that a daemon that follows one that was killed can give them back.
    """

    def __init__(self, size: int, note: Path, *, in_use: bool = False) -> None:
        """Add ``size`` bytes, rounded up to whole pages. Raises NoMemoryError, with the pool as it was.

        ``in_use``: what a daemon before has added is not given back, at first, but counts.
        """
        wanted = -(-size // PMD_SIZE)
        self._note = note
        self._added = int(note.read_text()) if note.exists() else 0
        if self._added and not in_use:
            log.warning("giving back %d huge pages, added by a daemon that was killed", self._added)
            self.close()
        had = self._added
        if had and had >= wanted:
            return
        if size - had * PMD_SIZE > available():
            raise NoMemoryError(f"only {format_size(available())} of memory are free; ask for less")
        before = _pages()
        note.write_text(str(wanted))
        POOL.write_text(str(before + wanted - had))
        self._added = _pages() - before + had
        if self._added < wanted:
            got = format_size(max(0, self._added) * PMD_SIZE)
            self._added -= had
            self.close()
            if had:
                note.write_text(str(had))
            raise NoMemoryError(
                f"the kernel finds {got} of {format_size(size)} for the pool of huge pages; free memory,"
                " or reserve the pages when the machine starts (hugepages= on the kernel command line)"
            )

    def close(self) -> None:
        """Give back what was added; pages that are in use leave the pool when they are freed."""
        if self._added > 0:
            with contextlib.suppress(OSError):
                POOL.write_text(str(max(0, _pages() - self._added)))
        self._note.unlink(missing_ok=True)
        self._added = 0


def available() -> int:
    """Bytes of memory that the machine could give now: asked for more, the pool would swallow what is left."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def _pages() -> int:
    return int(POOL.read_text())


def mount_for_one(place: Path) -> None:
    """Mount a hugetlbfs for one region, that keeps a page. Raises NoMemoryError, with nothing there."""
    place.mkdir(mode=0o700)
    try:
        mounts.mount_hugetlbfs(place, least=PMD_SIZE)
    except OSError as error:
        place.rmdir()
        if error.errno != errno.ENOMEM:
            raise
        raise NoMemoryError(f"not even one huge page is free; {CURE}") from error


def reserve(fd: int, ar: AddrRange) -> None:
    """Have pages promised for a range of a file's offsets, those that it has already aside. Raises NoMemoryError."""
    try:
        libc.unmap(libc.map_shared(fd, ar.size, ar.start), ar.size)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise NoMemoryError(f"not enough huge pages for {format_size(ar.size)}; {CURE}") from error


def present(fd: int, ar: AddrRange, device: int | None) -> list[AddrRange]:
    """Which parts of a range of offsets the file has pages for, in order; a system call for each page it lacks.

    Only the page cache knows, and only UFFDIO_CONTINUE asks it without making pages; of a file that cannot be written
    by the descriptor, nobody can ask.
    """
    if not os.fstat(fd).st_blocks:
        return []
    start = libc.map_shared(fd, ar.size, ar.start, reserve=False)
    try:
        asking = uffd.new(device)
        try:
            asking.open_api(abi.Feature(0))
            try:
                asking.mark(ar.moved(start - ar.start))
            except PermissionError:
                return []
            return united(part.moved(ar.start - start) for part in _mapped(asking, ar.moved(start - ar.start)))
        finally:
            asking.close()
    finally:
        libc.unmap(start, ar.size)


def _mapped(asking: uffd.Uffd, whole: AddrRange) -> Iterator[AddrRange]:
    """Map what is there of a range of addresses; the parts that are."""
    at = whole.start
    while at < whole.end:
        try:
            done = asking.continue_all(AddrRange(at, whole.end))
        except FileExistsError:  # Mapped already: the kernel shares this table with other mappings of the daemon's.
            done = PMD_SIZE
        if done:
            yield AddrRange.sized(at, done)
        at = Address(at + (done or PMD_SIZE))


def overwrite(fd: int, offset: int, data: bytes) -> None:
    """Put ``data`` where the file has pages already. Raises OSError EFAULT when they went, and none are to be had."""
    address = libc.map_shared(fd, len(data), offset, reserve=False, writable=True)
    try:
        libc.store(address, data)
    finally:
        libc.unmap(address, len(data))


def zero(fd: int, ar: AddrRange) -> None:
    """Put zeros where the file has pages already: 0.1 s a GiB. Pages that went meanwhile need none."""
    address = libc.map_shared(fd, ar.size, ar.start, reserve=False, writable=True)
    zeros = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for page in ar.pieces(PMD_SIZE):
            with contextlib.suppress(OSError):  # EFAULT, where a store of ours would be a SIGBUS.
                libc.call("read", zeros, address + page.start - ar.start, page.size)
    finally:
        os.close(zeros)
        libc.unmap(address, ar.size)


def allocate(fd: int, ar: AddrRange) -> None:
    """Make all pages of a range of offsets, zeroed where there are none: 0.1 s a GiB. Raises OSError ENOSPC."""
    os.posix_fallocate(fd, ar.start, ar.size)


def empty(fd: int, ar: AddrRange) -> int:
    """Take the pages of a range of offsets out of a file, each promised again before the next goes.

    How many could not be promised again, since others have them; see above for where that cannot be.
    """
    return sum(not _emptied(fd, page) for page in ar.pieces(PMD_SIZE))


def _emptied(fd: int, page: AddrRange) -> bool:
    libc.punch(fd, page.start, page.size)
    for _ in range(_TRIES):  # A touch in that instant has got the page, and is about to enter it as promised.
        with contextlib.suppress(NoMemoryError):
            reserve(fd, page)
            return True
    return False


def use_promises(fd: int, ar: AddrRange) -> None:
    """Make the pages of a range of offsets as far as there are any: punching them then gives their promises back.

    One by one: what somebody has punched has no promise left, and another user of the pool may have the page.
    """
    for page in ar.pieces(PMD_SIZE):
        try:
            allocate(fd, page)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
