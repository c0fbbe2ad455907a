"""The memory that a worker holds, and touching it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import memory
from benchmarks.memory import PAGE, Kind, Memory
from mshare import syscalls as sc

_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE: take a write fault on every page that is not mapped for stores yet."""


class Held:
    """Creates, attaches and touches; holds one memory at a time. Durations are in seconds."""

    REQUESTS = (
        *("create", "attach", "detach", "remove"),
        *("write", "read", "write_shuffled", "read_shuffled", "populate", "enter"),
    )

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._created: Memory | None = None

    @property
    def memory(self) -> Memory:
        """What is held. Raises RuntimeError if nothing is."""
        if self._memory is None:
            raise RuntimeError("no memory is open")
        return self._memory

    def create(self, kind: str, name: str, size: int) -> str:
        """Create memory; its handle."""
        return self.keep(memory.create(Kind(kind), name, size))

    def keep(self, made: Memory) -> str:
        """Hold what this process has made, and take it away in the end; its handle."""
        self._memory = self._created = made
        return made.handle

    def attach(self, kind: str, handle: str) -> float:
        """Attach to memory; how long it took."""
        start = time.perf_counter()
        self._memory = memory.attach(Kind(kind), handle)
        return time.perf_counter() - start

    def detach(self) -> None:
        """Unmap the memory."""
        if self._memory is not None:
            self._memory.detach()
            self._memory = None

    def remove(self) -> None:
        """Unmap, and take the name away of what this process created."""
        self.detach()
        if self._created is not None:
            self._created.remove()
            self._created = None

    def write(self) -> dict[str, float]:
        """Store into every page, in order: how long, how many faults, by how many bytes page tables grew."""
        return self._measured(partial(memory.write_pages, self.memory.view))

    def read(self) -> dict[str, float]:
        """Load from every page, in order: the same."""
        return self._measured(partial(memory.read_pages, self.memory.view))

    def write_shuffled(self, seed: int) -> dict[str, float]:
        """Store into every page, in random order: the same."""
        return self._measured(partial(memory.write_at, self.memory.view, self._all_pages(seed)))

    def read_shuffled(self, seed: int) -> dict[str, float]:
        """Load from every page, in random order: the same."""
        return self._measured(partial(memory.read_at, self.memory.view, self._all_pages(seed)))

    def populate(self) -> dict[str, float]:
        """Have the kernel map every page for stores, as touching each would: the same."""
        address, size = self.memory.address, len(self.memory.view)
        return self._measured(lambda: sc.madvise(address, size, _POPULATE_WRITE))

    def enter(self, kind: str, handle: str) -> dict[str, float]:
        """Attach, then populate: the same of the latter, and how long attaching took."""
        attach = self.attach(kind, handle)
        return {**self.populate(), "attach": attach}

    def _all_pages(self, seed: int) -> list[int]:
        return memory.shuffled(len(self.memory.view) // PAGE, seed)

    def _measured(self, touch: Callable[[], None]) -> dict[str, float]:
        self.memory  # noqa: B018 - fails before the clock runs
        tables, faults = page_table_bytes(), minor_faults()
        start = time.perf_counter()
        touch()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "faults": minor_faults() - faults, "tables": page_table_bytes() - tables}


def minor_faults() -> int:
    """Faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def page_table_bytes() -> int:
    """What the kernel uses for the page tables of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) << 10
    return 0
