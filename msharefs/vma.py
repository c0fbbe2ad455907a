"""A VMA: one stretch of a region that was mapped in one way (compare struct vm_area_struct)."""

from __future__ import annotations

import enum

import attrs

from msharefs.addr import Address, AddrRange
from msharefs.perms import PROT_RW, Prot


class Arming(enum.IntFlag):
    """What the kernel reports to the daemon for a range (compare UFFDIO_REGISTER_MODE_*)."""

    NATIVE = 0
    MISSING = 1
    WP = 2


@attrs.frozen
class Vma:
    """What was *asked* for ``ar``. What is *installed* there is the page table's business.

    All memory of a region is shared by its processes, so a VMA needs no copy of MAP_PRIVATE's meaning.
    """

    ar: AddrRange
    prot: Prot = PROT_RW

    def clipped(self, ar: AddrRange) -> Vma:
        """This VMA, cut to ``ar``. Preconditions: the two overlap."""
        return attrs.evolve(self, ar=AddrRange(max(self.ar.start, ar.start), min(self.ar.end, ar.end)))

    def split(self, addr: Address) -> tuple[Vma, Vma]:
        """The parts below and from ``addr`` (compare mm/vma.c:split_vma). Preconditions: strictly inside."""
        return (
            attrs.evolve(self, ar=AddrRange(self.ar.start, addr)),
            attrs.evolve(self, ar=AddrRange(addr, self.ar.end)),
        )

    def extended(self, end: Address) -> Vma:
        """This VMA, going on to ``end``."""
        return attrs.evolve(self, ar=AddrRange(self.ar.start, end))

    def merges_with(self, above: Vma) -> bool:
        """Whether ``above`` goes on where this ends, in the same way (compare mm/vma.c:can_vma_merge_after)."""
        return self.ar.end == above.ar.start and attrs.evolve(above, ar=self.ar) == self

    def arming(self) -> Arming:
        """Which faults the daemon must see for this VMA to mean what it says; read-write memory needs none."""
        if self.prot & Prot.WRITE:
            return Arming.NATIVE
        return Arming.WP if self.prot & Prot.READ else Arming.MISSING
