"""Addresses, half-open ranges of them, and the page sizes of x86-64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NewType

import attrs

from msharefs.errors import InvalidArgumentError

Address = NewType("Address", int)
"""A virtual address, in bytes."""
Offset = NewType("Offset", int)
"""Bytes from the start of a region; also the offset in its backing file."""
FrameNo = NewType("FrameNo", int)
"""A page frame: the number of a 4 KiB page in the backing file (compare the kernel's pfn)."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
TABLE_SHIFT = 9
TABLE_ENTRIES = 1 << TABLE_SHIFT
PMD_SIZE = 1 << 21
PUD_SIZE = 1 << 30
PGDIR_SIZE = 1 << 39

USER_MIN = Address(1 << 16)
"""The lowest address handed out or accepted (compare vm.mmap_min_addr)."""
USER_MAX = Address((1 << 47) - PAGE_SIZE)
"""One past the last user address with 4-level tables (compare TASK_SIZE)."""
WINDOW_START = Address(32 << 40)
WINDOW_END = Address(64 << 40)
"""Where the daemon places regions: ordinary processes leave 32 TiB .. 64 TiB free."""


def round_down(value: int, to: int) -> int:
    """The largest multiple of ``to`` (a power of two) that is at most ``value``."""
    return value & ~(to - 1)


def round_up(value: int, to: int) -> int:
    """The smallest multiple of ``to`` (a power of two) that is at least ``value``."""
    return (value + to - 1) & ~(to - 1)


@attrs.define(order=True, init=False, unsafe_hash=True)
class AddrRange:
    """The addresses ``start <= a < end``; abbreviated ``ar``. Never empty, and never changed.

    Raises InvalidArgumentError when ``start >= end`` or ``start`` is negative.
    """

    start: Final[Address]
    end: Final[Address]

    def __init__(self, start: Address, end: Address) -> None:
        """Refuse ranges that hold nothing: an empty range has no meaning to any caller.

        Each fault makes some, so it is by hand, and the type checker alone sees to it that they stay as they are.
        """
        if not 0 <= start < end:
            raise InvalidArgumentError(f"not a range: {start:#x}..{end:#x}")
        self.start = start
        self.end = end

    @classmethod
    def sized(cls, start: int, size: int) -> AddrRange:
        """The range of ``size`` bytes at ``start``."""
        return cls(Address(start), Address(start + size))

    @classmethod
    def page_at(cls, addr: int, size: int = PAGE_SIZE) -> AddrRange:
        """The page of ``size`` bytes that holds ``addr``."""
        start = addr & -size
        return cls(Address(start), Address(start + size))

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    def __contains__(self, addr: object) -> bool:
        """Whether an address lies inside."""
        return isinstance(addr, int) and self.start <= addr < self.end

    def covers(self, other: AddrRange) -> bool:
        """Whether every address of ``other`` lies inside."""
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: AddrRange) -> bool:
        """Whether the two have an address in common."""
        return self.start < other.end and other.start < self.end

    def intersect(self, other: AddrRange) -> AddrRange | None:
        """The addresses in both, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return AddrRange(start, end) if start < end else None

    def is_aligned(self, to: int) -> bool:
        """Whether both ends are multiples of ``to`` (a power of two)."""
        return (self.start | self.end) & (to - 1) == 0

    def inner(self, to: int) -> AddrRange | None:
        """The largest part of which both ends are multiples of ``to`` (a power of two), or None."""
        start, end = round_up(self.start, to), round_down(self.end, to)
        return AddrRange(Address(start), Address(end)) if start < end else None

    def moved(self, by: int) -> AddrRange:
        """The same range, ``by`` bytes further up."""
        return AddrRange(Address(self.start + by), Address(self.end + by))

    def pieces(self, size: int) -> Iterator[AddrRange]:
        """The range cut at every multiple of ``size`` (a power of two), in order."""
        start = self.start
        while start < self.end:
            end = Address(min(self.end, round_down(start, size) + size))
            yield AddrRange(start, end)
            start = end

    def __str__(self) -> str:
        """As in /proc/PID/maps."""
        return f"{self.start:012x}-{self.end:012x}"


def united(ranges: Iterable[AddrRange]) -> list[AddrRange]:
    """The same addresses in ranges that neither overlap nor touch. Preconditions: ``ranges`` are in order."""
    found: list[AddrRange] = []
    for ar in ranges:
        if found and ar.start <= found[-1].end:
            last = found.pop()
            found.append(AddrRange(last.start, max(last.end, ar.end)))
        else:
            found.append(ar)
    return found
