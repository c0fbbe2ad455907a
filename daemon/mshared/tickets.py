"""Descriptors that clients send: checking them without asking anybody, and closing them without waiting for anybody.

The opened file of the mount is the ticket: the kernel checked the file's mode when it was opened. Asking our own mount
about it would wait for ourselves, and asking a filesystem that a client serves would wait for the client.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from collections import deque
from typing import Final

import attrs
import trio

from mshared import libc
from msharefs.errors import BadDescriptorError

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_SIZE: Final = 256
_STATX_INO_AT: Final = 32
_STATX_DEV_AT: Final = 136
CLOSE_PATIENCE: Final = 5.0
"""Seconds to wait for descriptors to be closed before the thread that does it is left alone."""
_LOOK_AGAIN: Final = 0.05
MOST_WAITING: Final = 16
"""Descriptors of one connection that may wait to be closed before it is heard again."""


@attrs.frozen
class Ticket:
    """An opened file of our mount: which inode, and whether it was opened for writing too."""

    inode: int
    writable: bool


def read_ticket(fd: int, device: tuple[int, int]) -> Ticket:
    """What ``fd`` stands for. Raises BadDescriptorError unless it is an opened file of the filesystem ``device``."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise BadDescriptorError("a descriptor opened with O_PATH proves nothing; open the file O_RDWR or O_RDONLY")
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise BadDescriptorError("a region cannot be attached for writing only; open the file O_RDWR")
    found_device, inode = _identify(fd)
    if found_device != device:
        raise BadDescriptorError("the descriptor is not of a file in this mount; open the region's file there")
    return Ticket(inode, flags & os.O_ACCMODE == os.O_RDWR)


def _identify(fd: int) -> tuple[tuple[int, int], int]:
    """Device and inode of a descriptor as the kernel has them cached (AT_STATX_DONT_SYNC)."""
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    libc.call("statx", fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, answer)
    (inode,) = struct.unpack_from("=Q", answer, _STATX_INO_AT)
    major, minor = struct.unpack_from("=II", answer, _STATX_DEV_AT)
    return (major, minor), inode


class Closer:
    """Closes descriptors of one connection off the loop: the last close of a FUSE file waits for its server.

    One at a time, so that a client that sends descriptors which never close holds one thread and itself. A thread that
    was left alone closes the rest when it can go on.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(1)
        self._waiting: deque[int] = deque()

    async def until_at_most(self, count: int) -> None:
        """Wait while more descriptors than that are to be closed still."""
        while len(self._waiting) > count:  # noqa: ASYNC110 - it is a thread that closes, which may have been left alone
            await trio.sleep(_LOOK_AGAIN)

    def close(self, fds: list[int]) -> None:
        """Have them closed soon."""
        if fds:
            self._waiting.extend(fds)
            self._nursery.start_soon(self._close)

    async def _close(self) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_PATIENCE):
            await trio.to_thread.run_sync(self._close_waiting, abandon_on_cancel=True, limiter=self._limiter)

    def _close_waiting(self) -> None:
        while self._waiting:
            with contextlib.suppress(OSError):
                os.close(self._waiting[0])
            self._waiting.popleft()
