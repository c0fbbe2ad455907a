"""The machine's pool of huge pages as tests see it, and what they do with a region in it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from conftest import Client

MIB, GIB = 1 << 20, 1 << 30
HUGE = 2 * MIB
SIGBUS, SIGSEGV = 7, 11
ELSEWHERE = 0x6000_0000_0000


@attrs.frozen
class Pool:
    """Pages that are in use, and pages that are promised to somebody and not in use yet."""

    used: int
    promised: int

    def with_region(self, *, mapped: int, touched: int) -> Pool:
        """As it is when a region has so many pages mapped, and has so many of them."""
        return Pool(self.used + touched, self.promised + mapped - touched)


def pool() -> Pool:
    """As it is now."""
    total, free, promised = (_meminfo(f"HugePages_{name}") for name in ("Total", "Free", "Rsvd"))
    return Pool(total - free, promised)


def pool_size() -> int:
    """Pages of the pool, in use or not."""
    return int(Path("/proc/sys/vm/nr_hugepages").read_text())


def pages_left() -> int:
    """Pages that nobody has and nobody was promised."""
    return _meminfo("HugePages_Free") - _meminfo("HugePages_Rsvd")


def need_memory(size: int) -> None:
    """Skip the test where the machine has not got that much free."""
    free = _meminfo("MemAvailable") << 10
    if free < size + GIB:
        pytest.skip(f"needs {size >> 20} MiB for huge pages and 1024 more, MemAvailable is {free >> 20} MiB")


def touch(c: Client, offset: int, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    status: int = -c.ask(f"fork('r.buf[{offset}] = 2')" if store else f"fork('r.buf[{offset}]')")
    return status


def layout(c: Client) -> list[tuple[int, int, int]]:
    """Offset, length and protection of each mapping, in huge pages."""
    return [tuple(v) for v in c.ask("[(v.offset // H, v.length // H, v.prot) for v in r.maps()]")]


def _meminfo(field: str) -> int:
    """A number of /proc/meminfo as it stands there."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
