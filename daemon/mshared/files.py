"""Files that are mapped into regions, as the daemon holds them."""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import struct
import time
from functools import partial
from typing import Final

import trio

from mshared import libc
from msharefs.addr import PAGE_SIZE

TMPFS_MAGIC: Final = 0x01021994
_LOCAL: Final = {TMPFS_MAGIC, 0x958458F6, 0xEF53, 0x58465342, 0x9123683E, 0x794C7630, 0x9FA0, 0x62656572}
"""Filesystems that the kernel answers for alone: tmpfs, hugetlbfs, ext4, xfs, btrfs, overlayfs, proc, sysfs."""
_SYSINFO: Final = struct.Struct("=8x24x32xQQ32x")
"""struct sysinfo of x86-64: of all its fields totalswap and freeswap are read."""


SWAP_NEWS: Final = 0.01
"""Seconds for which what the system said of its swap is believed: asking takes longer than reading a page."""


class Buffer:
    """Memory through which pages pass from a file into a region: ``view``, which starts at ``address``.

    ``page`` is the first small page of it, as preadv(2) takes it.
    """

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.page = [self.view[:PAGE_SIZE]]


class MappedFile:
    """One opened file. Owns the descriptor. ``magic`` is its filesystem's; None: it is asked, which may take long."""

    def __init__(self, fd: int, magic: int | None = None) -> None:
        self.fd = fd
        self.magic = filesystem(fd)[0] if magic is None else magic
        # tmpfs does not know RWF_NOWAIT; it waits for what was swapped out, and for that only.
        self._flags = 0 if self.magic == TMPFS_MAGIC else os.RWF_NOWAIT

    def read_now(self, buffer: Buffer, length: int, offset: int) -> bool:
        """Read into ``buffer`` what is in memory; False when reading might wait, or reaches past the end."""
        if not self._flags and _swap.in_use(time.monotonic()):
            return False
        into = buffer.page if length == PAGE_SIZE else [buffer.view[:length]]
        try:
            return os.preadv(self.fd, into, offset, self._flags) == length
        except OSError:
            return False  # Reading off the loop tells what is wrong, if anything is.

    def close(self) -> None:
        """Close it."""
        let_go(self.fd, self.magic)

    def copy_of(self, fd: int) -> MappedFile:
        """Another descriptor of the same file, duplicated."""
        return MappedFile(os.dup(fd), self.magic)


def let_go(fd: int, magic: int) -> None:
    """Close a descriptor of somebody else's file; in a thread, where the file's server may be theirs, or far away.

    Closing asks it (FUSE_FLUSH, say), it need not answer, and its death is an error of close(2).
    """
    if magic in _LOCAL:
        os.close(fd)
    else:
        trio.lowlevel.start_thread_soon(partial(os.close, fd), _ignored)


def _ignored(_outcome: object) -> None:
    """A close that has failed has closed."""


def read(fd: int, length: int, offset: int) -> tuple[bytes, int, bytes]:
    """What a file holds from ``offset`` on, and its size; in a worker thread, since it may take a while.

    Beside it are no digests: those are ``mshared.comparing``'s.
    """
    return os.pread(fd, length, offset), os.fstat(fd).st_size, b""


def write_within(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write to a file, no further than it reaches. Raises OSError."""
    left = memoryview(data)[: max(0, os.fstat(fd).st_size - offset)]
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def is_writable(fd: int) -> bool:
    """Whether a descriptor was opened for writing, too."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def filesystem(fd: int) -> tuple[int, int]:
    """The magic number of a file's filesystem, and the size of its blocks (statfs(2))."""
    found = ctypes.create_string_buffer(128)
    libc.call("fstatfs", fd, found)
    return int.from_bytes(found.raw[:8], "little"), int.from_bytes(found.raw[8:16], "little")


def _anything_swapped() -> bool:
    """Whether some memory of the machine lies on a disk (sysinfo(2))."""
    total, free = _SYSINFO.unpack(libc.sysinfo())
    return bool(total != free)


class Swap:
    """Whether some memory of the machine lies on a disk, as of a moment ago."""

    def __init__(self) -> None:
        self._in_use = True
        self._until = -math.inf

    def in_use(self, now: float) -> bool:
        """``now`` is in seconds."""
        if now >= self._until:
            self._in_use, self._until = _anything_swapped(), now + SWAP_NEWS
        return self._in_use


_swap: Final = Swap()
