"""What the type checker must know of the client. Never run: ``test_typing.py`` has mypy read it.

A line with ``type: ignore`` is one that must be an error; mypy complains when it is none.
"""

from __future__ import annotations

import ctypes
import os
import threading
from multiprocessing import shared_memory
from pathlib import Path
from typing import assert_type

import mshare
from mshare.connection import Connection, reply_of
from msharefs import protocol


def regions_are_made_by_name(path: Path) -> None:
    region = mshare.mshare("name", None, 2 << 20, os.O_CREAT | os.O_RDWR)
    assert_type(region, mshare.Region)
    mshare.mshare(b"name", 1 << 40, 0, os.O_RDONLY, 0o640, backing="4k", empty=True, mount=path)
    mshare.mshare("name", None, 0, os.O_RDWR, 0o600, "4k")  # type: ignore[call-arg]
    mshare.mshare(5, None, 0, os.O_RDWR)  # type: ignore[arg-type]
    mshare.mshare("name", "0x1000", 0, os.O_RDWR)  # type: ignore[arg-type]
    mshare.mshare("name", None, 0)  # type: ignore[call-arg]
    assert_type(mshare.mshare_unlink("name", mount="/run/mshare"), None)
    mshare.remove("name", "/run/mshare")  # type: ignore[call-arg]


def a_region_says_what_it_is(region: mshare.Region) -> None:
    assert_type(region.buf, memoryview)
    assert_type((region.name, region.address, region.size), tuple[str, int, int])
    assert_type((region.readonly, region.closed), tuple[bool, bool])
    region.name = "other"  # type: ignore[misc]
    region.buf = b""  # type: ignore[assignment, misc]
    with region as same:
        assert_type(same, mshare.Region)


def what_is_inside_is_changed_by_offset(region: mshare.Region) -> None:
    assert_type(region.mmap(4096), int)
    region.mmap(4096, 3, 0x21, offset=8192)
    region.mmap(4096, 3, 0x21, 8192)  # type: ignore[call-arg]
    assert_type(region.munmap(0, 4096), None)
    region.munmap(0)  # type: ignore[call-arg]
    region.mprotect(0, 4096, "r")  # type: ignore[arg-type]


def numbers_have_types(region: mshare.Region) -> None:
    stat = region.stat()
    assert_type(stat, mshare.RegionStat)
    assert_type((stat.attached, stat.tables_shared), tuple[int, bool])
    stat.attached = 0  # type: ignore[misc]
    assert_type(region.maps(), list[mshare.Vma])


def blocks_take_the_place_of_the_standard_librarys(block: mshare.SharedMemory) -> None:
    theirs: shared_memory.SharedMemory = block
    assert_type(mshare.SharedMemory("name", create=True, size=5, track=False, reserve=False), mshare.SharedMemory)
    assert_type((theirs.name, block.size), tuple[str, int])
    mshare.SharedMemory("name", True, 5, False)  # type: ignore[call-arg]
    mshare.SharedMemory(5)  # type: ignore[arg-type]
    with mshare.SharedMemoryManager() as manager:
        assert_type(manager.SharedMemory(size=5), mshare.SharedMemory)
        assert_type(manager.ShareableList([1, "a"]), mshare.ShareableList)
        manager.SharedMemory("5")  # type: ignore[arg-type]


def what_an_arena_makes_has_its_type(region: mshare.Region) -> None:
    arena = mshare.Arena(region, threading.Lock())
    assert_type(arena.new(Pair), Pair)
    assert_type((arena.alloc(5), arena.root), tuple[int, int])
    arena.new(int)  # type: ignore[type-var]


class Pair(ctypes.Structure):
    """Something to be put into an arena."""


def a_call_gives_what_is_expected_of_it(link: Connection, reply: protocol.Message) -> None:
    assert_type(link.call(protocol.Remove("name"), protocol.Done), protocol.Done)
    assert_type(reply_of(reply, protocol.Offer), protocol.Offer)
    link.call("remove", protocol.Done)  # type: ignore[arg-type]


def a_file_is_mapped_by_its_descriptor(path: Path) -> None:
    mapping = mshare.mmap(3, 2 << 20, addr=None, prot=1, flags=mshare.MAP_SHARED_PT | 1, offset=0, mount=path)
    assert_type(mapping, mshare.FileMapping)
    assert_type((mapping.address, mapping.size, mapping.shared), tuple[int, int, bool])
    assert_type(mapping.why, str | None)
    assert_type(mapping.buf, memoryview)
    mapping.munmap(0, mapping.size)
    mapping.mprotect("r")  # type: ignore[arg-type]
    mshare.mmap(3, 2 << 20, 0x1000)  # type: ignore[call-arg]
