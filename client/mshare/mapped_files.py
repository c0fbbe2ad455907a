"""The files behind this process's mappings: the kernel tells their names, and a region needs them opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mshare import syscalls as sc
from mshare.syscalls import Mapping
from msharefs.addr import PAGE_SIZE
from msharefs.protocol import MAX_DONATED_FILES

_HUGETLBFS: Final = 0x958458F6
_DELETED: Final = " (deleted)"
_HARMLESS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
"""Whatever a path may lead to by now, opening it waits for nobody and changes nothing."""


def shows_file(mapping: Mapping) -> bool:
    """Whether a mapping shows a file. Shared anonymous memory, and that of System V, has an inode too."""
    return bool(mapping.inode) and not mapping.path.startswith(("/dev/zero", "/SYSV", "[anon"))


class MappedFiles:
    """Descriptors of mapped files, each file once. Closes them."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._places: dict[tuple[str, int, int], int] = {}

    def place_of(self, mapping: Mapping) -> int:
        """Which of ``fds`` is the file that a whole mapping shows, opened as it was, or for reading if it is private.

        Raises OSError: EINVAL when there is no way to open it, E2BIG when there are too many files.
        """
        access = os.O_RDWR if mapping.shared and sc.may_be_written(mapping) else os.O_RDONLY
        key = (mapping.device, mapping.inode, access)
        if key not in self._places:
            if len(self.fds) == MAX_DONATED_FILES:
                text = f"the range shows more than {MAX_DONATED_FILES} files, which is the most that can be donated at "
                raise OSError(errno.E2BIG, text + "once; map the others with Region.mmap(fd=...) afterwards")
            self.fds.append(_opened(mapping, access))
            self._places[key] = len(self.fds) - 1
        return self._places[key]

    def close(self) -> None:
        """Close them."""
        while self.fds:
            os.close(self.fds.pop())
        self._places.clear()


def _opened(mapping: Mapping, access: int) -> int:
    """A descriptor of the file that a mapping shows: by the kernel's link to it, by its path, or one that is open."""
    for find in (_linked, _by_path, _open_already):
        for fd in find(mapping, access):
            if _is_shown(fd, mapping):
                return fd
            os.close(fd)
    way = "reading and writing" if access == os.O_RDWR else "reading"
    text = f"{mapping.path or 'a file'} at {mapping.start:#x} cannot be donated, as it cannot be opened again; "
    raise OSError(errno.EINVAL, text + f"keep a descriptor of it open for {way}, or use another range")


def _linked(mapping: Mapping, access: int) -> Iterator[int]:
    """By /proc/self/map_files, which takes a privilege."""
    with contextlib.suppress(OSError):
        link = f"/proc/self/map_files/{mapping.start:x}-{mapping.end:x}"
        yield os.open(link, access | os.O_CLOEXEC)


def _by_path(mapping: Mapping, access: int) -> Iterator[int]:
    if mapping.path.endswith(_DELETED):
        return
    for path in (mapping.path, mapping.path.replace("\\012", "\n")):  # The one letter that the kernel writes otherwise.
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                yield os.open(path, access | _HARMLESS)


def _open_already(mapping: Mapping, access: int) -> Iterator[int]:
    """Among the descriptors of this process."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            fd = int(entry.name)
            about, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
            enough = flags & os.O_ACCMODE in (access, os.O_RDWR) and not flags & os.O_PATH
            if enough and stat.S_ISREG(about.st_mode) and about.st_ino == mapping.inode:
                yield fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def _is_shown(fd: int, mapping: Mapping) -> bool:
    """Whether it is that very file: a mapping of it must look alike, since stat(2) does not say what maps shows."""
    with contextlib.suppress(OSError):
        if sc.filesystem(fd) == _HUGETLBFS:
            return False
        page = sc.mmap(None, PAGE_SIZE, sc.PROT_NONE, sc.MAP_PRIVATE, fd)
        try:
            (alike,) = sc.own_mappings(page, page + 1)
        finally:
            sc.munmap(page, PAGE_SIZE)
        return (alike.device, alike.inode) == (mapping.device, mapping.inode)
    return False
