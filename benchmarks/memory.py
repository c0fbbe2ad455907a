"""The kinds of shared memory that are compared, and how their pages are touched, in the process that measures."""

from __future__ import annotations

import ctypes
import enum
import mmap
import operator
import os
import random
from array import array
from collections import deque
from collections.abc import Callable, Sized
from itertools import repeat
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Final

import attrs

import mshare
from benchmarks.work import bare

PAGE: Final = 4096
_PIECE: Final = 8192 * PAGE


class Kind(enum.StrEnum):
    """What is measured, and what it is called in tables."""

    THP = "thp"
    HUGETLB = "hugetlb"
    SMALL = "4k"
    SHM = "shm"
    MEMFD = "memfd"
    BARE = "bare"

    @property
    def label(self) -> str:
        """For people."""
        return {
            Kind.THP: "msharefs, thp",
            Kind.HUGETLB: "msharefs, hugetlb",
            Kind.SMALL: "msharefs, 4k",
            Kind.SHM: "multiprocessing.shared_memory",
            Kind.MEMFD: "memfd + mmap",
            Kind.BARE: "the system calls alone, thp",
        }[self]

    @property
    def is_region(self) -> bool:
        """Whether it is ours."""
        return self in (Kind.THP, Kind.HUGETLB, Kind.SMALL)


@attrs.frozen
class Memory:
    """Memory mapped into this process. ``handle`` is what another process attaches to it by; ``region`` if ours.

    ``change`` gives all of it another protection, in every process, where there is such a call.
    """

    view: memoryview
    handle: str
    detach: Callable[[], None]
    remove: Callable[[], None]
    region: mshare.Region | None = None
    change: Callable[[int], None] | None = None

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view))


def create(kind: Kind, name: str, size: int) -> Memory:
    """New memory of ``size`` bytes, no page of it present."""
    if kind.is_region:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        return of_region(mshare.mshare(name, None, size, flags, backing=kind.value))
    if kind is Kind.BARE:
        file = bare.place(Kind.THP.value, name)
        end = bare.serve(file, size)
        return _of_window(bare.attach(str(file)), end)
    if kind is Kind.SHM:
        return _of_shm(SharedMemory(name, create=True, size=size))
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return _of_file(fd, f"/proc/{os.getpid()}/fd/{fd}")


def attach(kind: Kind, handle: str) -> Memory:
    """The memory that another process has created."""
    if kind.is_region:
        return of_region(mshare.mshare(handle, None, 0, os.O_RDWR))
    if kind is Kind.BARE:
        return _of_window(bare.attach(handle))
    if kind is Kind.SHM:
        return _of_shm(SharedMemory(handle))
    return _of_file(os.open(handle, os.O_RDWR | os.O_CLOEXEC), handle)


def write_pages(view: memoryview) -> None:
    """Store one byte into every page, in order: assignments to slices with a stride, loops in C.

    Python copies what it assigns. In pieces, so that the copy is small: large memory of its own would take faults, too.
    """
    ones = b"\1" * (_PIECE // PAGE)
    for start in range(0, len(view), _PIECE):
        piece = view[start : start + _PIECE : PAGE]
        piece[:] = ones[: len(piece)]


def read_pages(view: memoryview) -> None:
    """Load one byte of every page, in order: copies of slices with a stride. They must be what was written."""
    pieces = (view[start : start + _PIECE : PAGE].tobytes() for start in range(0, len(view), _PIECE))
    _check(sum(piece.count(1) for piece in pieces), len(view) // PAGE)


def shuffled(pages: int, seed: int, first: int = 0) -> list[int]:
    """Offsets of as many pages, from page ``first`` on, in an order that is random but always the same."""
    order = list(range(first * PAGE, (first + pages) * PAGE, PAGE))
    random.Random(seed).shuffle(order)
    return list(array("Q", order))  # New numbers, which lie in memory in the order in which they are used.


def write_at(view: memoryview, offsets: list[int]) -> None:
    """Store one byte at each offset: an iterator written in C, about 35 ns of it the loop."""
    deque(map(view.__setitem__, offsets, repeat(1)), maxlen=0)


def read_at(view: memoryview, offsets: list[int]) -> None:
    """Load one byte at each offset: one call in C, about 10 ns of it the loop. They must be what was written."""
    found: tuple[int, ...] = operator.itemgetter(*offsets)(view)
    _check(found.count(1), len(offsets))


def _check(ones: int, pages: int) -> None:
    if ones != pages:
        raise RuntimeError("what was read is not what another process wrote")


def leave_cleanup_to_us() -> None:
    """Keep the resource tracker out: it is one more process, and it takes away a block that others still use.

    Attaching to a block then costs the two system calls and nothing else.
    """
    resource_tracker.register = _ignore
    resource_tracker.unregister = _ignore


def _ignore(name: Sized, rtype: str) -> None:
    """Do as if a resource were tracked."""


def of_region(region: mshare.Region) -> Memory:
    """The memory of a region that is attached."""
    size = region.size
    return Memory(
        region.buf,
        region.name,
        region.detach,
        lambda: mshare.remove(region.name),
        region,
        lambda prot: region.mprotect(0, size, prot),
    )


def _of_window(window: bare.Window, remove: Callable[[], None] = lambda: None) -> Memory:
    return Memory(window.view, window.handle, window.detach, remove, change=window.change)


def _of_shm(block: SharedMemory) -> Memory:
    assert block.buf is not None
    return Memory(block.buf, block.name, block.close, block.unlink)


def _of_file(fd: int, handle: str) -> Memory:
    mapped = mmap.mmap(fd, os.fstat(fd).st_size)
    view = memoryview(mapped)

    def detach() -> None:
        view.release()
        mapped.close()
        os.close(fd)

    return Memory(view, handle, detach, lambda: None)
