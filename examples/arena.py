"""Memory that shows whether it was initialised: an arena full of 0xAA, from a reference page and by memset.

    python examples/arena.py [MIB]

A program that takes memory from an arena and reads before it has stored anything finds 0xAA, and not a zero that looks
right by chance. Filling the arena beforehand costs all of its memory, and the time to store it. Mapped with a reference
page it is full of 0xAA at once, and only what is stored to takes memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import time

import mshare

PATTERN = 0xAA
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mshare.MAP_REFPAGE
MIB = 1 << 20
RECORD = struct.Struct("=QQ")  # number, balance
POISON = int.from_bytes(bytes([PATTERN]) * 8, "little")


class Arena:
    """Gives out pieces of a buffer, one after the other."""

    def __init__(self, buf: memoryview) -> None:
        self.buf = buf
        self._next = 0

    def take(self, size: int) -> memoryview:
        """The next piece, of which nothing has been stored yet."""
        start, self._next = self._next, self._next + size
        return self.buf[start : self._next]


def fill_some(buf: memoryview) -> int:
    """Take 1000 records, and forget to initialise the balance of every tenth; how many are found out."""
    arena = Arena(buf)
    records = [arena.take(RECORD.size) for _ in range(1000)]
    for number, record in enumerate(records):
        struct.pack_into("=Q", record, 0, number)
        if number % 10:
            struct.pack_into("=Q", record, 8, 100)
    return sum(RECORD.unpack(record)[1] == POISON for record in records)


def by_memset(size: int) -> tuple[float, int, int]:
    """An arena in memory of this process's own: seconds until it is filled, bytes it takes, mistakes found."""
    start = time.perf_counter()
    memory = mmap.mmap(-1, size)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), PATTERN, size)
    took = time.perf_counter() - start
    return took, size, fill_some(memoryview(memory))


def by_reference_page(size: int) -> tuple[float, int, int]:
    """The same in a region; any process that opens it has the same arena."""
    with mshare.mshare("arena", None, size, os.O_CREAT | os.O_EXCL | os.O_RDWR, empty=True) as region:
        try:
            start = time.perf_counter()
            region.mmap(size, flags=FLAGS, offset=0, refpage=mshare.refpage_create(bytes([PATTERN])))
            took = time.perf_counter() - start
            found = fill_some(region.buf)
            return took, region.stat().resident, found
        finally:
            mshare.remove("arena")


def main() -> None:
    """Make both, and compare them."""
    size = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 256 * MIB
    for how, make in (("memset", by_memset), ("reference page", by_reference_page)):
        took, memory, found = make(size)
        print(f"{how}: {size // MIB} MiB of 0xAA in {took * 1e3:.2f} ms, {memory // 1024} KiB taken after some use")
        print(f"{how}: {found} records were used before they were initialised")


if __name__ == "__main__":
    main()
