"""Memory full of a pattern: mapped from a reference page, or private and filled. Durations are in seconds."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import mshare
from benchmarks.memory import write_pages
from benchmarks.work import bare
from msharefs.addr import round_up

_TRIES: Final = 3
_NO_HUGE_PAGES: Final = 15  # MADV_NOHUGEPAGE
_PATTERN: Final = 0xAA
_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mshare.MAP_REFPAGE
_HUGE: Final = 2 << 20
_BLOCK: Final = 512

Figures = dict[str, float]
"""``map`` and ``touch`` are durations, ``memory`` bytes, each for one of the maps."""


class RefPages:
    """Makes maps one after the other, stores to the start of each, and keeps them all."""

    REQUESTS = ("fill_private", "map_each", "map_all", "map_bare")

    def fill_private(self, count: int, size: int, touched: int) -> Figures:
        """Private memory of small pages, filled with memset."""
        return _quickest(lambda _: self._fill_private(count, size, touched))

    def map_each(self, name: str, kind: str, count: int, size: int, touched: int) -> Figures:
        """A mapping each in a region."""
        return _quickest(lambda number: self._map_each(f"{name}-{number}", kind, count, size, touched))

    def map_all(self, name: str, kind: str, count: int, size: int, touched: int) -> Figures:
        """Parts of one mapping, which is made by one call."""
        return _quickest(lambda number: self._map_all(f"{name}-{number}", kind, count, size, touched))

    def map_bare(self, name: str, kind: str, count: int, size: int, touched: int) -> Figures:
        """A mapping each from a server that does nothing but system calls, and fills the page that is touched."""
        return _quickest(lambda number: self._map_bare(f"{name}-{number}", kind, count, size, touched))

    def _fill_private(self, count: int, size: int, touched: int) -> Figures:
        kept: list[mmap.mmap] = []
        before = _own_memory()

        def filled() -> memoryview:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            kept.append(memory)
            with contextlib.suppress(OSError):  # A kernel without huge pages has none to forbid.
                memory.madvise(_NO_HUGE_PAGES)
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), _PATTERN, size)
            return memoryview(memory)

        found = {**_measured(count, touched, filled), "memory": (_own_memory() - before) / count}
        for memory in kept:
            memory.close()
        return found

    def _map_each(self, name: str, kind: str, count: int, size: int, touched: int) -> Figures:
        refpage = mshare.refpage_create(bytes([_PATTERN]))
        with _region(name, kind, count * round_up(size, _HUGE)) as region:

            def mapped() -> memoryview:
                offset = region.mmap(size, flags=_FLAGS, refpage=refpage)
                return region.buf[offset : offset + size]

            return {**_measured(count, touched, mapped), "memory": region.stat().resident / count}

    def _map_all(self, name: str, kind: str, count: int, size: int, touched: int) -> Figures:
        refpage = mshare.refpage_create(bytes([_PATTERN]))
        with _region(name, kind, count * round_up(size, _HUGE)) as region:
            start = time.perf_counter()
            region.mmap(count * size, flags=_FLAGS, refpage=refpage)
            call = (time.perf_counter() - start) / count
            offsets = iter(range(0, count * size, size))

            def part() -> memoryview:
                offset = next(offsets)
                return region.buf[offset : offset + size]

            found = _measured(count, touched, part)
            return {**found, "map": found["map"] + call, "memory": region.stat().resident / count}

    def _map_bare(self, name: str, kind: str, count: int, size: int, touched: int) -> Figures:
        whole = round_up(size, _HUGE)
        offsets = iter(range(0, count * whole, whole))
        path = bare.place(kind, name)
        end = bare.serve(path, count * whole)
        try:
            window = bare.attach(str(path))

            def mapped() -> memoryview:
                offset = next(offsets)
                window.show(offset, size)
                return window.view[offset : offset + size]

            found = _measured(count, touched, mapped)
            memory = path.stat().st_blocks * _BLOCK / count
            window.detach()
        finally:
            end()
        return {**found, "memory": memory}


def _quickest(measure: Callable[[int], Figures]) -> Figures:
    """Of some in a row the one that took least.

    The host of a virtual machine takes back memory that is free, seconds later. So the first may measure how long it
    takes to give some again, which is ten times what is to be measured; the next ones have the same memory.
    """
    return min((measure(number) for number in range(_TRIES)), key=lambda found: found["map"] + found["touch"])


def _measured(count: int, touched: int, mapped: Callable[[], memoryview]) -> Figures:
    """Map and store to a byte of each of the first pages, ``count`` times."""
    mapping = touching = 0.0
    for _ in range(count):
        start = time.perf_counter()
        with mapped() as view:
            there = time.perf_counter()
            write_pages(view[:touched])
            touching += time.perf_counter() - there
        mapping += there - start
    return {"map": mapping / count, "touch": touching / count}


@contextlib.contextmanager
def _region(name: str, kind: str, size: int) -> Iterator[mshare.Region]:
    whole = round_up(size, 1 << 30) if kind == "hugetlb" else size
    region = mshare.mshare(name, None, whole, os.O_CREAT | os.O_EXCL | os.O_RDWR, backing=kind, empty=True)
    try:
        yield region
    finally:
        mshare.remove(name)
        region.detach()


def _own_memory() -> int:
    """Bytes of anonymous memory that this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
