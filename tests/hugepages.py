"""The machine's pool of huge pages as tests see it, and what they do with a region in it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
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

    def with_region(self, *, mapped: int, touched: int, kept: int = 0) -> Pool:
        """As it is when a region has so many pages mapped, and has so many of them.

        ``kept``: in the mount that root's daemon makes for it one more waits for the next mapping.
        """
        return Pool(self.used + touched, self.promised + mapped - touched + kept)


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


_RIVAL = f"""
import ctypes, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
held, since, told = [], time.monotonic(), False
while True:
    page = libc.mmap(None, ctypes.c_size_t({HUGE}), 3, 0x40022, -1, ctypes.c_long(0))
    if page != ctypes.c_void_p(-1).value:
        held.append(page)
        continue
    if not told:
        told = bool(print("ready", flush=True)) or True
    if time.monotonic() > since + 0.1:
        for page in held[::2]:
            libc.munmap(ctypes.c_void_p(page), ctypes.c_size_t({HUGE}))
        held, since = held[1::2], time.monotonic()
"""


@contextlib.contextmanager
def rival() -> Iterator[None]:
    """Have a process take every huge page that becomes free, at once, and now and then give half of them back."""
    with subprocess.Popen([sys.executable, "-c", _RIVAL], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()
