"""What sparse files hold, and moving it from one to another."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial

from mshared import hugetlb, libc
from mshared.killpoints import point
from msharefs.addr import PMD_SIZE, AddrRange
from msharefs.region import BackingKind


def punch(fd: int, ar: AddrRange) -> None:
    """FALLOC_FL_PUNCH_HOLE over a range of offsets."""
    libc.punch(fd, ar.start, ar.size)


def new_file(name: str, size: int) -> int:
    """A file in memory that nobody else can open, all of it holes; ``name`` is for people. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def resident(fd: int) -> int:
    """Bytes of memory a file takes."""
    return os.fstat(fd).st_blocks * 512


def extents(fd: int) -> Iterator[AddrRange]:
    """Where a file holds data, by SEEK_DATA and SEEK_HOLE."""
    end = os.fstat(fd).st_size
    at = 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        if start < at:
            yield AddrRange.sized(start, at - start)


def held(fd: int, ar: AddrRange, kind: BackingKind, device: int | None) -> list[AddrRange]:
    """Where a file of that kind holds data in a range of offsets, in order."""
    status = os.fstat(fd)
    if status.st_blocks * 512 == status.st_size:
        return [ar]
    if kind is BackingKind.HUGETLB:
        return hugetlb.present(fd, ar, device)
    return [part for extent in extents(fd) if (part := extent.intersect(ar)) is not None]


def copy_all(source: int, parts: list[AddrRange], write: Callable[[bytes, int], None]) -> None:
    """Have ``write`` put what ``source`` holds in ``parts`` somewhere else. Raises OSError."""
    for part in parts:
        copy(source, part, write)
        point()


def punch_all(fd: int, parts: list[AddrRange]) -> None:
    """Give the memory of several ranges of offsets back."""
    for part in parts:
        punch(fd, part)
        point()


def copy(source: int, part: AddrRange, write: Callable[[bytes, int], None]) -> None:
    """Have ``write`` put what ``source`` holds in a range of offsets somewhere else."""
    for piece in part.pieces(PMD_SIZE):
        write(os.pread(source, piece.size, piece.start), piece.start)


def write_to(fd: int) -> Callable[[bytes, int], None]:
    """What puts data at an offset of a file, by pwrite(2)."""
    return partial(write_all, fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite(2) until all is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
