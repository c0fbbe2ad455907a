"""The fault handler (compare mm/memory.c:handle_mm_fault)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from msharefs import breaking, clean_pages
from msharefs.addr import Address, AddrRange
from msharefs.effects import Allow, Answer, Bring, Deliver, Fill, FillPattern, Preserve, Signal, ZeroFill
from msharefs.frames import store_of
from msharefs.perms import Access
from msharefs.pte import pte_flags
from msharefs.refpage import RefPage
from msharefs.vma import Arming, Vma

if TYPE_CHECKING:
    from msharefs.host_mm import HostMm
_NATIVE: Final = Arming.NATIVE
_READ: Final = Access.READ


@attrs.define
class Fault:
    """What the kernel reported: where (a host address), what the instruction tried, and why it stopped.

    ``protected``: the page is there and write-protected; otherwise it is missing. ``alone``: what forks have in common
    is copied page by page.
    """

    addr: Address
    access: Access
    protected: bool = False
    alone: bool = False


@attrs.define
class Resolution:
    """What to do about a fault (compare vm_fault_t), and in which VMA it was, if in one."""

    effect: Answer
    vma: Vma | None = attrs.field(default=None, eq=False, repr=False)

    @property
    def signal(self) -> Signal | None:
        """The signal it ends in, or None when the thread goes on."""
        return self.effect.signal if isinstance(self.effect, Deliver) else None


def handle_fault(mm: HostMm, fault: Fault) -> Resolution:
    """Decide one fault and install what it brings.

    1. Find the VMA, or give the hole's signal. 2. Check the access, or give SIGSEGV. 3. A page that is there and
    protected may be stored to from now on; one that forks refer to is theirs first. 4. Make the page: one that the
    kernel misses is missing, whatever the tables say. 5. Install it and go on; what comes from a file, a reference page
    or a relative is installed when it is there.
    """
    vma = mm.vmas.find(fault.addr)
    if vma is None:
        return Resolution(Deliver(mm.hole_signal, fault.addr))
    if not fault.access.allowed_by(vma.prot):
        return Resolution(Deliver(Signal.SIGSEGV, fault.addr), vma)
    page = AddrRange.page_at(fault.addr, mm.page)
    if fault.protected:
        claims = () if mm.lineage.alone else tuple(mm.lineage.claims(mm, page))
        if claims:
            piece = page if fault.alone else breaking.to_preserve(mm, page, vma)
            return Resolution(Preserve(claims if piece == page else tuple(mm.lineage.claims(mm, piece))), vma)
        if vma.refpage is not None:
            return Resolution(Allow(clean_pages.stored_to(mm, page, vma)), vma)
        mm.stored_to(page)
        return Resolution(Allow(breaking.allowed(mm, page, vma)), vma)
    frame = mm.table.frame_at(page.start) if mm.rule.forked is not _NATIVE else None
    if frame is not None and store_of(frame) != mm.store:
        copies = breaking.foreign(mm, page) if fault.alone else breaking.to_bring(mm, page, vma)
        return Resolution(Bring(tuple(copies)), vma)
    if isinstance(vma.source, RefPage):
        clean = fault.access is _READ
        ahead = () if clean else clean_pages.missing_ahead(mm, page, vma)
        around = clean_pages.missing_from(mm, page, vma, fault.access)
        return Resolution(FillPattern(around, vma.source, clean, ahead), vma)
    if vma.source is not None:
        there = not mm.missed(page)
        return Resolution(Fill(page, vma.source.file, vma.source.offset + page.start - vma.ar.start, there), vma)
    if frame is None:  # Else it came while the thread stopped, and relatives may refer to it by now.
        mm.enter(page, pte_flags(vma.prot))
    mm.storable.note(page)
    return Resolution(ZeroFill(page, vma.reports_stores), vma)
