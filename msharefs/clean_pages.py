"""Pages of reference pages: which are clean, and what a touch of them comes to.

A page that was only read is *clean*: it holds what its reference page says, every process that stores to it is
reported, and it can go at any time. What the tables hold beside those counts as written, and is never let go. That
includes what a store has brought along beside its own page, and what came back from the stash.

Of pages that were there when a daemon ended the next one does not know which were written (``HostMm.unsure``). They
count as written, until somebody looks: what is protected, and holds what its reference page says, is clean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange, united
from msharefs.armings import cut
from msharefs.effects import Punch
from msharefs.perms import Access, Advice, Prot
from msharefs.pte import Pte, PteFlag, pte_flags
from msharefs.vma import Arming, Vma

if TYPE_CHECKING:
    from msharefs.host_mm import HostMm
    from msharefs.refpage import RefPage


FLAGS: Final = pte_flags(Prot.READ) | PteFlag.CLEAN
"""Of a clean page."""


def clean(mm: HostMm, ar: AddrRange) -> list[AddrRange]:
    """The clean pages in ``ar``, in order, neighbours as one."""
    parts = [vma.clipped(ar).ar for vma in mm.vmas.overlapping(ar) if vma.refpage is not None]
    return united(run for part in parts for run, pte in mm.table.runs(part) if pte.flags & PteFlag.CLEAN)


def unsure(mm: HostMm, ar: AddrRange) -> list[AddrRange]:
    """The parts of ``ar`` in which it is not known what was written, in order. Those with relatives must wait."""
    found = [] if mm.rule.forked else [part for each in mm.unsure if (part := each.intersect(ar)) is not None]
    return united(sorted(found))


def look(mm: HostMm, ar: AddrRange) -> list[tuple[AddrRange, RefPage]]:
    """What is to be protected in ``ar``, and looked at then: pages that count as written, and what they may hold."""
    mm.unsure = [part for each in mm.unsure for part in cut(each, [ar.start, ar.end]) if not ar.covers(part)]
    found = []
    for vma in mm.vmas.overlapping(ar):
        if vma.refpage is not None:
            runs = mm.table.runs(vma.clipped(ar).ar)
            found += [(run, vma.refpage) for run, pte in runs if not pte.flags & PteFlag.CLEAN]
    return found


def found_clean(mm: HostMm, ar: AddrRange) -> None:
    """Note that pages hold what their reference page says. Preconditions: they have been protected since before."""
    mm.enter(ar, FLAGS)


def drop(mm: HostMm, ar: AddrRange) -> list[Punch]:
    """Let the clean pages in ``ar`` go; they come again when they are touched."""
    runs = clean(mm, ar)
    for run in runs:
        mm.table.clear_range(run)
        mm.storable.note(run)
    return [Punch(run) for run in runs]


def came(mm: HostMm, ar: AddrRange, *, clean: bool, huge: bool = False) -> None:
    """Enter pages that were filled from their reference page; ``huge``: as one of 2 MiB.

    Preconditions: they lie in one VMA, and were missing.
    """
    vma = mm.vmas.find(ar.start)
    assert vma is not None
    flags = FLAGS if clean else pte_flags(vma.prot)
    if huge:
        mm.table.set(ar.start, Pte(mm.frame_at(ar.start), flags | PteFlag.HUGE))
    else:
        mm.enter(ar, flags)
    mm.storable.note(ar)


def missing_from(mm: HostMm, page: AddrRange, vma: Vma, access: Access) -> AddrRange:
    """What a touch of a missing page brings along: what follows it, as far as that is missing, too."""
    beyond = AddrRange.sized(page.start, PMD_SIZE).intersect(vma.ar)
    assert beyond is not None
    free = page
    if beyond.end > page.end:
        rest = mm.table.holes(AddrRange(page.end, beyond.end))
        if rest and rest[0].start == page.end:
            free = AddrRange(page.start, rest[0].end)
    return mm.streams[access].piece(page, free, vma.advice)


def missing_ahead(mm: HostMm, page: AddrRange, vma: Vma) -> tuple[AddrRange, ...]:
    """What the store to a missing page brings elsewhere: pages of the same reference page, touched in steps."""
    if vma.advice is not Advice.NORMAL or mm.page != PAGE_SIZE:
        return ()
    streams = mm.streams[Access.WRITE]
    found = []
    for other in streams.steps(page):
        there = mm.vmas.find(other.start)
        shows = there is not None and there.source == vma.source and there.prot & Prot.WRITE
        if shows and mm.table.walk(other.start) is None:
            streams.came(other)
            found.append(other)
    return tuple(found)


def stored_to(mm: HostMm, page: AddrRange, vma: Vma) -> AddrRange:
    """Note a store to a page that was protected: the pages that may be stored to from now on.

    Preconditions: no relative refers to it.
    """
    around = AddrRange.page_at(page.start, PMD_SIZE).intersect(vma.ar)
    assert around is not None
    if mm.rule.forked is not Arming.NATIVE:
        around = page
    protected = clean(mm, around)
    here = next((run for run in protected if run.covers(page)), None)
    if here is None:  # It has been written to since it came: so have all up to the next clean ones.
        _written(mm, page, vma)
        start = max((run.end for run in protected if run.end <= page.start), default=around.start)
        end = min((run.start for run in protected if run.start >= page.end), default=around.end)
        piece = AddrRange(start, end)
    else:
        piece = mm.streams[Access.WRITE].piece(page, here, vma.advice)
        mm.enter(piece, pte_flags(vma.prot))
    mm.storable.note(piece)
    return piece


def _written(mm: HostMm, page: AddrRange, vma: Vma) -> None:
    """Of a page that forks had in common, the entry is protected."""
    if mm.rule.forked is not Arming.NATIVE and mm.table.frame_at(page.start) == mm.frame_at(page.start):
        mm.enter(page, pte_flags(vma.prot))
