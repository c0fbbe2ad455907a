"""Snapshots of the memory that is held, and of private memory for comparison. Durations are in seconds."""

from __future__ import annotations

import contextlib
import mmap
import os
import time

import mshare
from benchmarks.memory import PAGE
from benchmarks.work.held import Held

_NO_HUGE_PAGES = 15  # MADV_NOHUGEPAGE


class Snapshots:
    """Forks what a worker holds, and its process."""

    REQUESTS = ("fork_region", "odfork", "fork_process")

    def __init__(self, held: Held) -> None:
        self._held = held

    def fork_region(self, name: str) -> dict[str, float]:
        """Fork the region, store to a page, and end the fork: how long each took."""
        region = self._held.memory.region
        assert region is not None
        start = time.perf_counter()
        region.fork(name)
        forked = time.perf_counter()
        region.buf[PAGE] = 1
        stored = time.perf_counter()
        region.buf[PAGE] = 2
        again = time.perf_counter()
        mshare.mshare_unlink(name)
        return {"fork": forked - start, "first store": stored - forked, "second store": again - stored}

    def odfork(self) -> float:
        """Fork the process with a snapshot of the region; how long until the parent goes on."""
        start = time.perf_counter()
        pid = mshare.odfork()
        if pid == 0:
            os._exit(0)
        took = time.perf_counter() - start
        os.waitpid(pid, 0)
        return took

    def fork_process(self, size: int) -> dict[str, float]:
        """os.fork() with so much private memory, all of it touched, and the first store to a page of it then."""
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with contextlib.suppress(OSError):  # A kernel without huge pages has none to forbid.
                memory.madvise(_NO_HUGE_PAGES)
            for at in range(0, size, PAGE):
                memory[at] = 1
            ours, theirs = os.pipe()
            start = time.perf_counter()
            pid = os.fork()
            if pid == 0:
                os.read(ours, 1)
                os._exit(0)
            forked = time.perf_counter()
            memory[PAGE] = 2
            stored = time.perf_counter()
            os.write(theirs, b"x")
            os.waitpid(pid, 0)
            os.close(ours)
            os.close(theirs)
        return {"fork": forked - start, "first store": stored - forked}
