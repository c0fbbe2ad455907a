"""Touching memory whose faults come to the daemon, and its peers; reading a file in several ways."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from typing import Final

import mshare
from benchmarks import memory
from benchmarks.work.held import Held

_PIECE: Final = 1 << 20


class Paging:
    """Durations are in seconds; moments those of the machine's monotonic clock."""

    REQUESTS = ("map_file", "served", "touch_each", "prepare", "touch_prepared", "read_mapped", "read_copied")

    def __init__(self, held: Held) -> None:
        self._held = held
        self._offsets: list[int] = []

    def map_file(self, name: str, path: str, *, shuffled: bool) -> str:
        """Create a region that shows a file, shared, and hold it; its handle. ``shuffled``: advise RANDOM."""
        with Path(path).open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            region = mshare.mshare(name, None, size, os.O_CREAT | os.O_EXCL | os.O_RDWR, empty=True)
            region.mmap(size, flags=mmap.MAP_SHARED, fd=file.fileno())
            if shuffled:
                region.madvise(0, size, mmap.MADV_RANDOM)
        return self._held.keep(memory.of_region(region))

    def served(self) -> int:
        """How many faults of the region the daemon has served."""
        region = self._held.memory.region
        assert region is not None
        return region.stat().faults

    def touch_each(self, pages: int, seed: int, *, store: bool) -> list[float]:
        """Touch the first ``pages`` pages in random order; how long each touch took, 0.1 us of it the clock."""
        view, times, clock = self._held.memory.view, [], time.perf_counter
        offsets = memory.shuffled(pages, seed)
        if store:
            for offset in offsets:
                start = clock()
                view[offset] = 1
                times.append(clock() - start)
        else:
            for offset in offsets:
                start = clock()
                view[offset]
                times.append(clock() - start)
        return times

    def prepare(self, first: int, pages: int, seed: int) -> None:
        """Decide in which order to touch ``pages`` pages from page ``first`` on."""
        self._offsets = memory.shuffled(pages, seed, first)

    def touch_prepared(self, *, store: bool) -> dict[str, float]:
        """Do it: when it began and when it ended."""
        touch = memory.write_at if store else memory.read_at
        start = time.monotonic()
        touch(self._held.memory.view, self._offsets)
        return {"start": start, "end": time.monotonic()}

    def read_mapped(self, path: str) -> float:
        """Map a file as anybody would, and load from each page, in order: how long that took."""
        start = time.perf_counter()
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as view,
        ):
            memory.read_pages(view)
        return time.perf_counter() - start

    def read_copied(self, path: str) -> float:
        """Read a file into fresh memory, a mebibyte at once, and load from each page: how long that took."""
        start = time.perf_counter()
        with (
            Path(path).open("rb", buffering=0) as file,
            mmap.mmap(-1, os.fstat(file.fileno()).st_size) as fresh,
            memoryview(fresh) as view,
        ):
            for at in range(0, len(view), _PIECE):
                with view[at : at + _PIECE] as piece:
                    file.readinto(piece)
            memory.read_pages(view)
        return time.perf_counter() - start
