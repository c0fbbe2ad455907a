"""Holding off the threads that store to memory while it is given away: the system calls for it, as steps of one run."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from mshare import syscalls as sc
from mshare.syscalls import Mapping, Step
from msharefs import uffd_abi as abi

MAYMOVE_FIXED: Final = 1 | 2
_MOST_AT_ONCE: Final = 1 << 30


def open_userfaultfd(device: int | None) -> int:
    """A userfaultfd of this process for memory that is given away, ready to be used."""
    uffd = sc.userfaultfd(device)
    features = abi.Feature.PAGEFAULT_FLAG_WP | abi.Feature.WP_HUGETLBFS_SHMEM | abi.Feature.MISSING_SHMEM
    fcntl.ioctl(uffd, abi.UFFDIO_API, abi.API_STRUCT.pack(abi.API_VERSION, features, 0))
    return uffd


def uffd_step(uffd: int, request: int, layout: struct.Struct, *values: int) -> Step:
    """An ioctl of a userfaultfd."""
    packed = layout.pack(*values)
    return Step(0, sc.SYS_IOCTL, (uffd, request, ctypes.create_string_buffer(packed, len(packed))))


def protect_steps(part: Mapping, uffd: int) -> list[Step]:
    """Write-protect a mapping of memory that is a file's; nothing, where its filesystem cannot report stores."""
    length = part.end - part.start
    register = abi.REGISTER_STRUCT.pack(part.start, length, int(abi.Mode.WP), 0)
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_REGISTER, register)
    except OSError:
        return []
    mode = abi.WRITEPROTECT_MODE_WP
    return [uffd_step(uffd, abi.UFFDIO_WRITEPROTECT, abi.WRITEPROTECT_STRUCT, part.start, length, mode)]


def copy_steps(backing: int, runs: Iterable[tuple[int, int]], *, source: int, target: int) -> Iterator[Step]:
    """Write runs of addresses to a file: what lies ``source`` further on goes to the address plus ``target``."""
    for start, end in runs:
        for at in range(start, end, _MOST_AT_ONCE):
            size = min(_MOST_AT_ONCE, end - at)
            yield Step(size, sc.SYS_PWRITE64, (backing, at + source, size, at + target))


def huge_copy_steps(uffd: int, runs: Iterable[tuple[int, int]], *, source: int, target: int) -> Iterator[Step]:
    """As ``copy_steps``, for a file of huge pages, which takes no write: through a mapping of it that is armed."""
    for start, end in runs:
        copy = (start + target, start + source, end - start, 0, 0)
        yield uffd_step(uffd, abi.UFFDIO_COPY, abi.COPY_STRUCT, *copy)


def wake_step(part: Mapping, uffd: int) -> Step:
    """Let whoever waits for a part go on, whatever stands there now."""
    return uffd_step(uffd, abi.UFFDIO_WAKE, abi.RANGE_STRUCT, part.start, part.end - part.start)


def disarm_step(part: Mapping, uffd: int) -> Step:
    """The kernel alone serves a part again, and whoever waits for it."""
    return uffd_step(uffd, abi.UFFDIO_UNREGISTER, abi.RANGE_STRUCT, part.start, part.end - part.start)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """A collection could run finalizers, which are bytecode."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def no_room(error: OSError, length: int) -> OSError:
    """Why a copy cannot be made, with the cure."""
    text = f"no memory for the region's copy of {length} donated bytes; free some, or raise mshared --max-bytes"
    return OSError(error.errno, text)
