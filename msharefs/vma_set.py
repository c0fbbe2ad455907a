"""The VMAs of one host mm, ordered by address (compare the maple tree in struct mm_struct)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from msharefs.addr import Address, AddrRange, round_up
from msharefs.errors import InternalError
from msharefs.vma import Vma


class VmaSet:
    """VMAs that never overlap and are merged wherever two neighbours mean the same.

    Two lists in step, of starts and of VMAs: to move some thousand words at an insertion takes less time than a tree
    would in Python, and there are few insertions for each look.
    """

    def __init__(self) -> None:
        self._starts: list[Address] = []
        self._vmas: list[Vma] = []
        self._found: Vma | None = None
        """What ``find`` came upon last: faults come in crowds (compare the vmacache of kernels before 6.1)."""
        self._full: tuple[int, int, int, int] | None = None
        """From where to where, and for which size and alignment, no gap is left (compare mm->free_area_cache)."""

    def fork(self) -> VmaSet:
        """The same VMAs for another host mm."""
        twin = VmaSet()
        twin._starts = self._starts.copy()
        twin._vmas = [vma.counted_anew() for vma in self._vmas]
        return twin

    def __iter__(self) -> Iterator[Vma]:
        """All VMAs, by address."""
        return iter(self._vmas)

    def __len__(self) -> int:
        """How many VMAs there are (compare mm->map_count)."""
        return len(self._vmas)

    def find(self, addr: Address) -> Vma | None:
        """The VMA that holds ``addr`` (compare mm/mmap.c:vma_lookup), or None in a hole."""
        found = self._found
        if found is not None and found.ar.start <= addr < found.ar.end:
            return found
        below = bisect_right(self._starts, addr) - 1
        if below < 0:
            return None
        vma = self._vmas[below]
        if addr >= vma.ar.end:
            return None
        self._found = vma
        return vma

    def overlapping(self, ar: AddrRange) -> list[Vma]:
        """The VMAs with an address in ``ar``, whole, in order (compare for_each_vma_range)."""
        return self._vmas[self._within(ar)]

    def holes(self, ar: AddrRange) -> list[AddrRange]:
        """The parts of ``ar`` that no VMA covers, in order."""
        found, start = [], ar.start
        for vma in self.overlapping(ar):
            if start < vma.ar.start:
                found.append(AddrRange(start, vma.ar.start))
            start = max(start, vma.ar.end)
        if start < ar.end:
            found.append(AddrRange(start, ar.end))
        return found

    def find_gap(self, within: AddrRange, size: int, align: int) -> AddrRange | None:
        """The lowest free ``size`` bytes at a multiple of ``align`` (compare vm_unmapped_area), or None."""
        end: int = within.start
        if self._full is not None:
            first, full, least, alignment = self._full
            if first == end and size >= least and align % alignment == 0:
                end = full
        for index in range(self._first(Address(end)), len(self._vmas)):
            vma = self._vmas[index]
            start = round_up(end, align)
            if vma.ar.start >= within.end or start + size <= vma.ar.start:
                break
            end = vma.ar.end
        start = round_up(end, align)
        if start + size > within.end:
            return None
        self._full = within.start, start, size, align
        return AddrRange.sized(start, size)

    def insert(self, vma: Vma) -> None:
        """Add ``vma``, merged with its neighbours. Preconditions: nothing is mapped there."""
        at = self._within(vma.ar)
        if at.start < at.stop:
            raise InternalError(f"VMA {vma.ar} inserted over others")
        first, last = at.start, at.stop
        if first and self._vmas[first - 1].merges_with(vma):
            first -= 1
            vma = self._vmas[first].joined(vma)
        if last < len(self._vmas) and vma.merges_with(self._vmas[last]):
            vma = vma.joined(self._vmas[last])
            last += 1
        self._replace(slice(first, last), [vma])

    def remove(self, ar: AddrRange) -> list[Vma]:
        """Take ``ar`` out, splitting what sticks out; the pieces taken, in order (compare do_vmi_munmap)."""
        if self._full is not None and ar.start < self._full[1]:
            self._full = None
        at = self._within(ar)
        taken = self._vmas[at]
        kept = []
        if taken and taken[0].ar.start < ar.start:
            below, taken[0] = taken[0].split(ar.start)
            kept.append(below)
        if taken and taken[-1].ar.end > ar.end:
            taken[-1], above = taken[-1].split(ar.end)
            kept.append(above)
        self._replace(at, kept)
        return taken

    def _first(self, addr: Address) -> int:
        """The index of the first VMA that ends above ``addr``."""
        first = bisect_right(self._starts, addr)
        return first - 1 if first and self._vmas[first - 1].ar.end > addr else first

    def _within(self, ar: AddrRange) -> slice:
        """Where the VMAs with an address in ``ar`` are, or would be."""
        first = self._first(ar.start)
        return slice(first, bisect_left(self._starts, ar.end, first))

    def _replace(self, at: slice, vmas: list[Vma]) -> None:
        self._starts[at] = [vma.ar.start for vma in vmas]
        self._vmas[at] = vmas
        self._found = None
