"""The VMAs of one host mm, ordered by address (compare the maple tree in struct mm_struct)."""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedDict

from msharefs.addr import Address, AddrRange, round_up
from msharefs.errors import InternalError
from msharefs.vma import Vma


class VmaSet:
    """VMAs that never overlap and are merged wherever two neighbours mean the same."""

    def __init__(self) -> None:
        self._by_start: SortedDict[Address, Vma] = SortedDict()
        self._found: Vma | None = None
        """What ``find`` came upon last: faults come in crowds (compare the vmacache of kernels before 6.1)."""
        self._full: tuple[int, int, int, int] | None = None
        """From where to where, and for which size and alignment, no gap is left (compare mm->free_area_cache)."""

    def fork(self) -> VmaSet:
        """The same VMAs for another host mm."""
        twin = VmaSet()
        twin._by_start.update((start, vma.counted_anew()) for start, vma in self._by_start.items())
        return twin

    def __iter__(self) -> Iterator[Vma]:
        """All VMAs, by address."""
        return iter(self._by_start.values())

    def __len__(self) -> int:
        """How many VMAs there are (compare mm->map_count)."""
        return len(self._by_start)

    def find(self, addr: Address) -> Vma | None:
        """The VMA that holds ``addr`` (compare mm/mmap.c:vma_lookup), or None in a hole."""
        found = self._found
        if found is not None and found.ar.start <= addr < found.ar.end:
            return found
        below = self._by_start.bisect_right(addr) - 1
        if below < 0:
            return None
        vma = self._by_start.peekitem(below)[1]
        if addr not in vma.ar:
            return None
        self._found = vma
        return vma

    def overlapping(self, ar: AddrRange) -> list[Vma]:
        """The VMAs with an address in ``ar``, whole, in order (compare for_each_vma_range)."""
        first = self.find(ar.start)
        found = [first] if first is not None and first.ar.start < ar.start else []
        found += [self._by_start[start] for start in self._by_start.irange(ar.start, ar.end, (True, False))]
        return found

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
        below = self.find(Address(end))
        if below is not None:
            end = below.ar.end
        for vma_start in self._by_start.irange(Address(end)):
            start = round_up(end, align)
            if vma_start >= within.end or start + size <= vma_start:
                break
            end = self._by_start[vma_start].ar.end
        start = round_up(end, align)
        if start + size > within.end:
            return None
        self._full = within.start, start, size, align
        return AddrRange.sized(start, size)

    def insert(self, vma: Vma) -> None:
        """Add ``vma``, merged with its neighbours. Preconditions: nothing is mapped there."""
        if self.overlapping(vma.ar):
            raise InternalError(f"VMA {vma.ar} inserted over others")
        below = self.find(Address(vma.ar.start - 1)) if vma.ar.start else None
        if below is not None and below.merges_with(vma):
            del self._by_start[below.ar.start]
            vma = below.joined(vma)
        above = self._by_start.get(vma.ar.end)
        if above is not None and vma.merges_with(above):
            del self._by_start[above.ar.start]
            vma = vma.joined(above)
        self._by_start[vma.ar.start] = vma
        self._found = None

    def remove(self, ar: AddrRange) -> list[Vma]:
        """Take ``ar`` out, splitting what sticks out; the pieces taken, in order (compare do_vmi_munmap)."""
        taken = []
        if self._full is not None and ar.start < self._full[1]:
            self._full = None
        for vma in self.overlapping(ar):
            self._found = None
            del self._by_start[vma.ar.start]
            if vma.ar.start < ar.start:
                kept, vma = vma.split(ar.start)
                self._by_start[kept.ar.start] = kept
            if vma.ar.end > ar.end:
                vma, kept = vma.split(ar.end)
                self._by_start[kept.ar.start] = kept
            taken.append(vma)
        return taken
