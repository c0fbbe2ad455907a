"""Snapshots of the memory that is held, and of private memory for comparison. Durations are in seconds."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Final

import mshare
from benchmarks.memory import PAGE, read_pages, shuffled, write_at, write_pages
from benchmarks.work.held import Held

_NO_HUGE_PAGES: Final = 15  # MADV_NOHUGEPAGE
_APART: Final = 2 << 20
"""Bytes between pages that are stored to: each has a leaf table, or a huge page, of its own."""
_STORES: Final = 8
_BATCH: Final = 64
_STEP: Final = 0.1
_ELSEWHERE: Final = 0x5000_0000_0000
"""Where a fork is mapped beside its origin."""

Figures = dict[str, list[float]]
Fork = Callable[[], contextlib.AbstractContextManager[float]]
"""Makes a snapshot that lasts as long as the context; how long that took."""


class Snapshots:
    """Forks what a worker holds, and its process."""

    REQUESTS = (
        "fork_region",
        "first_fork",
        "odfork",
        "write_on",
        "read_on",
        "store_all",
        "read_all",
        "fork_process",
        "process_goes_on",
        "process_from_end_to_end",
    )

    def __init__(self, held: Held) -> None:
        self._held = held

    def first_fork(self, name: str) -> float:
        """Fork the region, which was never forked; how long it took."""
        with self._forked(name) as took:
            return took

    def fork_region(self, name: str, count: int) -> Figures:
        """Fork the region over and over, then so with stores to pages each time: how long each took."""
        return _forked(self._held.memory.view, count, lambda: self._forked(name))

    def odfork(self) -> float:
        """Fork the process with a snapshot of the region; how long until the parent goes on."""
        start = time.perf_counter()
        pid = mshare.odfork()
        if pid == 0:
            os._exit(0)
        took = time.perf_counter() - start
        os.waitpid(pid, 0)
        return took

    def write_on(self, name: str, hot: int, steps: int) -> list[float]:
        """Store to random pages of the first ``hot`` bytes: stores a second before a fork, and in steps after it."""
        return _written(self._held.memory.view, hot, steps, lambda: self._forked(name))

    def read_on(self, name: str) -> list[float]:
        """Load from every page, before a fork, after it, and again: seconds a page."""
        return _read(self._held.memory.view, lambda: self._forked(name))

    def store_all(self, name: str) -> float:
        """Store to every page of the region while there is a fork of it: seconds a page."""
        with self._forked(name):
            return _each(write_pages, self._held.memory.view)

    def read_all(self, name: str) -> float:
        """Load from every page of a fork of the region: seconds a page."""
        with self._forked(name), mshare.mshare(name, _ELSEWHERE, 0, os.O_RDONLY) as twin:
            return _each(read_pages, twin.buf)

    def fork_process(self, size: int, count: int) -> Figures:
        """As ``fork_region``, with os.fork() and so much private memory."""
        with _private(size) as view:
            return _forked(view, count, _with_child)

    def process_goes_on(self, size: int, hot: int, steps: int) -> Figures:
        """As ``write_on`` and ``read_on``, with os.fork() and so much private memory."""
        with _private(size) as view:
            return {"written": _written(view, hot, steps, _with_child), "read": _read(view, _with_child)}

    def process_from_end_to_end(self, size: int) -> dict[str, float]:
        """As ``store_all`` and ``read_all``, with os.fork() and so much private memory."""
        with _private(size) as view:
            with _with_child():
                stored = _each(write_pages, view)
            return {"store all": stored, "read all": _in_child(lambda: _each(read_pages, view))}

    @contextlib.contextmanager
    def _forked(self, name: str) -> Iterator[float]:
        """While there is a fork of the region; how long that took to make."""
        region = self._held.memory.region
        assert region is not None
        start = time.perf_counter()
        region.fork(name)
        took = time.perf_counter() - start
        try:
            yield took
        finally:
            mshare.mshare_unlink(name)


@contextlib.contextmanager
def _private(size: int) -> Iterator[memoryview]:
    """Private memory of small pages, all of it touched."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory, memoryview(memory) as view:
        with contextlib.suppress(OSError):  # A kernel without huge pages has none to forbid.
            memory.madvise(_NO_HUGE_PAGES)
        write_pages(view)
        yield view


@contextlib.contextmanager
def _with_child() -> Iterator[float]:
    """While there is a child that os.fork() has made, and that does nothing; how long that took."""
    ours, theirs = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.read(ours, 1)
        os._exit(0)
    took = time.perf_counter() - start
    try:
        yield took
    finally:
        os.write(theirs, b"x")
        os.waitpid(pid, 0)
        os.close(ours)
        os.close(theirs)


def _in_child(work: Callable[[], float]) -> float:
    """What a child finds that os.fork() has made."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(theirs, str(work()).encode())
        os._exit(0)
    os.close(theirs)
    found = os.read(ours, 100)
    os.waitpid(pid, 0)
    os.close(ours)
    return float(found)


def _each(touch: Callable[[memoryview], object], view: memoryview) -> float:
    """Seconds it takes to touch a page, over all of them."""
    start = time.perf_counter()
    touch(view)
    return (time.perf_counter() - start) / (len(view) // PAGE)


def _forked(view: memoryview, count: int, fork: Fork) -> Figures:
    found: Figures = {"fork": [], "very first store": [], "first store": []}
    for _ in range(count):
        with fork() as took:
            found["fork"].append(took)
    for _ in range(count):
        with fork():
            stores = [_store(view, at) for at in range(PAGE, min(len(view), _APART * (_STORES + 1)), _APART)]
        found["very first store"].append(stores[0])
        found["first store"] += stores[1:]
    return found


def _store(view: memoryview, at: int) -> float:
    start = time.perf_counter()
    view[at] = 1
    return time.perf_counter() - start


def _written(view: memoryview, hot: int, steps: int, fork: Fork) -> list[float]:
    offsets = shuffled(hot // PAGE, seed=1)
    batches = [offsets[at : at + _BATCH] for at in range(0, len(offsets), _BATCH)]
    done = 0

    def rate(until: float) -> float:
        nonlocal done
        start, stored = time.perf_counter(), 0
        while time.perf_counter() < until:
            write_at(view, batches[done % len(batches)])
            stored, done = stored + _BATCH, done + 1
        return stored / (time.perf_counter() - start)

    before = rate(time.perf_counter() + _STEP)
    with fork():
        forked = time.perf_counter()
        return [before, *(rate(forked + number * _STEP) for number in range(1, steps + 1))]


def _read(view: memoryview, fork: Fork) -> list[float]:
    _each(read_pages, view)
    before = _each(read_pages, view)
    with fork():
        return [before, _each(read_pages, view), _each(read_pages, view)]
