"""The kinds of shared memory that are compared, and how their pages are touched, in the process that measures."""

from __future__ import annotations

import enum
import mmap
import os
from collections.abc import Callable, Sized
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Final

import attrs

import mshare

PAGE: Final = 4096


class Kind(enum.StrEnum):
    """What is measured, and what it is called in tables."""

    THP = "thp"
    SMALL = "4k"
    SHM = "shm"
    MEMFD = "memfd"

    @property
    def label(self) -> str:
        """For people."""
        return {
            Kind.THP: "msharefs, thp",
            Kind.SMALL: "msharefs, 4k",
            Kind.SHM: "multiprocessing.shared_memory",
            Kind.MEMFD: "memfd + mmap",
        }[self]

    @property
    def is_region(self) -> bool:
        """Whether it is ours."""
        return self in (Kind.THP, Kind.SMALL)


@attrs.frozen
class Memory:
    """Memory mapped into this process. ``handle`` is what another process attaches to it by."""

    view: memoryview
    handle: str
    detach: Callable[[], None]
    remove: Callable[[], None]


def create(kind: Kind, name: str, size: int) -> Memory:
    """New memory of ``size`` bytes, no page of it present."""
    if kind.is_region:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        return _of_region(mshare.mshare(name, None, size, flags, backing=kind.value))
    if kind is Kind.SHM:
        return _of_shm(SharedMemory(name, create=True, size=size))
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return _of_file(fd, f"/proc/{os.getpid()}/fd/{fd}")


def attach(kind: Kind, handle: str) -> Memory:
    """The memory that another process has created."""
    if kind.is_region:
        return _of_region(mshare.mshare(handle, None, 0, os.O_RDWR))
    if kind is Kind.SHM:
        return _of_shm(SharedMemory(handle))
    return _of_file(os.open(handle, os.O_RDWR | os.O_CLOEXEC), handle)


def write_pages(view: memoryview) -> None:
    """Store one byte into every page, in order: one assignment to a slice with a stride, a loop in C."""
    view[::PAGE] = b"\1" * (len(view) // PAGE)


def read_pages(view: memoryview) -> None:
    """Load one byte of every page, in order: one copy of a slice with a stride. They must be what was written."""
    if view[::PAGE].tobytes().count(1) != len(view) // PAGE:
        raise RuntimeError("what was read is not what another process wrote")


def leave_cleanup_to_us() -> None:
    """Keep the resource tracker out: it is one more process, and it takes away a block that others still use.

    Attaching to a block then costs the two system calls and nothing else.
    """
    resource_tracker.register = _ignore
    resource_tracker.unregister = _ignore


def _ignore(name: Sized, rtype: str) -> None:
    """Do as if a resource were tracked."""


def _of_region(region: mshare.Region) -> Memory:
    return Memory(region.buf, region.name, region.detach, lambda: mshare.remove(region.name))


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
