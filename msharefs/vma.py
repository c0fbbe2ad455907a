"""A VMA: one stretch of a region that was mapped in one way (compare struct vm_area_struct)."""

from __future__ import annotations

import enum
import functools
from typing import Final, NewType

import attrs

from msharefs.addr import Address, AddrRange
from msharefs.perms import PROT_RW, Advice, Prot
from msharefs.refpage import RefPage

FileId = NewType("FileId", int)
"""Number of a file that is mapped into a region, never given twice in it."""


class Arming(enum.IntFlag):
    """What the kernel reports to the daemon for a range (compare UFFDIO_REGISTER_MODE_*).

    With WP every page is protected at once, with WP_CLEAN one by one, as clean ones come.
    """

    NATIVE = 0
    MISSING = 1
    WP = 2
    WP_CLEAN = 8

    def __or__(self, other: int) -> Arming:
        """Both. As below, by looking it up: an enum's own way takes four times as long."""
        return _ARMINGS[int.__or__(self, other)]

    def __and__(self, other: int) -> Arming:
        """What both report."""
        return _ARMINGS[int.__and__(self, other)]


_ARMINGS: Final = [Arming(bits) for bits in range(sum(Arming) + 1)]


@attrs.frozen
class FileSource:
    """The file that a VMA shows: ``offset`` is what lies at its start, in bytes.

    ``shared``: stores reach the file (MAP_SHARED); otherwise they stay in the region. ``writable``: the descriptor was
    opened for writing. ``compared``: which pages were stored to is found by looking at them, not by faults.
    """

    file: FileId
    offset: int
    shared: bool
    writable: bool
    compared: bool = False


Source = FileSource | RefPage
"""What a VMA shows where nobody has stored to it, if that is not zeros."""


@attrs.define(eq=False)
class FaultCount:
    """How many faults of a VMA the daemon has served. A split leaves them with the lower part; joined, they add up."""

    served: int = 0


@attrs.frozen
class Vma:
    """What was *asked* for ``ar``. What is *installed* there is the page table's business.

    Anonymous memory of a region is shared by its processes, whichever of MAP_SHARED and MAP_PRIVATE was asked for.
    ``advice`` is RANDOM, SEQUENTIAL or NORMAL: what a fault reads of the file (compare VM_RAND_READ, VM_SEQ_READ).
    """

    ar: AddrRange
    prot: Prot = PROT_RW
    source: Source | None = None
    advice: Advice = Advice.NORMAL
    count: FaultCount = attrs.field(factory=FaultCount, eq=False, repr=False)
    tracks_stores: bool = attrs.field(init=False, eq=False, repr=False)
    """Whether the first store to each page makes it dirty."""
    reports_stores: bool = attrs.field(init=False, eq=False, repr=False)
    """Whether the first store to each page is reported: it is not allowed, or must reach a file. That to a clean page
    of a reference page is, too."""

    @tracks_stores.default
    def _tracks_stores(self) -> bool:
        return isinstance(self.source, FileSource) and self.source.shared and not self.source.compared

    @reports_stores.default
    def _reports_stores(self) -> bool:
        return self.tracks_stores or not self.prot.writable

    @property
    def file(self) -> FileSource | None:
        """The file that it shows."""
        return self.source if isinstance(self.source, FileSource) else None

    @property
    def refpage(self) -> RefPage | None:
        """The reference page that it shows."""
        return self.source if isinstance(self.source, RefPage) else None

    @property
    def reaches_file(self) -> bool:
        """Whether stores have to reach a file."""
        return isinstance(self.source, FileSource) and self.source.shared

    def counted_anew(self) -> Vma:
        """The same in another host mm."""
        return Vma(self.ar, self.prot, self.source, self.advice)

    def clipped(self, ar: AddrRange) -> Vma:
        """This VMA, cut to ``ar``. Preconditions: the two overlap."""
        if ar.start <= self.ar.start and self.ar.end <= ar.end:
            return self
        start, end = max(self.ar.start, ar.start), min(self.ar.end, ar.end)
        return attrs.evolve(self, ar=AddrRange(start, end), source=self.source_at(start))

    def protected(self, prot: Prot) -> Vma:
        """The same with another protection."""
        return Vma(self.ar, prot, self.source, self.advice, self.count)

    def split(self, addr: Address) -> tuple[Vma, Vma]:
        """The parts below and from ``addr`` (compare mm/vma.c:split_vma). Preconditions: strictly inside."""
        above = attrs.evolve(self.clipped(AddrRange(addr, self.ar.end)), count=FaultCount())
        return self.clipped(AddrRange(self.ar.start, addr)), above

    def joined(self, above: Vma) -> Vma:
        """This VMA and ``above`` as one. Preconditions: they merge."""
        served = FaultCount(self.count.served + above.count.served)
        return attrs.evolve(self, ar=AddrRange(self.ar.start, above.ar.end), count=served)

    def source_at(self, addr: Address) -> Source | None:
        """What it shows from ``addr`` on: of a file, what lies there (compare vma->vm_pgoff)."""
        return self.file_at(addr) or self.source

    def file_at(self, addr: Address) -> FileSource | None:
        """The file, and what of it lies at ``addr``."""
        of = self.source
        if not isinstance(of, FileSource):
            return None
        return FileSource(of.file, of.offset + addr - self.ar.start, of.shared, of.writable, of.compared)

    def merges_with(self, above: Vma) -> bool:
        """Whether ``above`` goes on where this ends, in the same way (compare mm/vma.c:can_vma_merge_after)."""
        if self.ar.end != above.ar.start or self.prot != above.prot or self.advice != above.advice:
            return False
        return self.source_at(self.ar.end) == above.source

    def arming(self) -> Arming:
        """Which faults the daemon must see for this VMA to mean what it says.

        Read-write memory needs none. Of a file, or a reference page, it fills each page; of a shared file it must know
        which were stored to, and of a reference page which were not.
        """
        if not self.prot.accessible:
            return Arming.MISSING
        return _arming(self.reports_stores, self.source is not None, isinstance(self.source, RefPage))


@functools.cache
def _arming(reports_stores: bool, shows: bool, refpage: bool) -> Arming:  # noqa: FBT001 - the key of a cache
    protected = Arming.WP if reports_stores else Arming.WP_CLEAN if refpage else Arming.NATIVE
    return protected | (Arming.MISSING if shows else Arming.NATIVE)
