"""How much of what forks have in common a touch has copied at once (compare break_cow_pte_range, and do_fault_around).

Each page is copied on its own, as long as few of a leaf table are touched. The more have been touched there one by one,
the more of what lies around the next comes along, if some of that, or what borders on it, came before. So memory that
is read, or stored to, from end to end takes some twenty faults for each 2 MiB and not 512, in whatever order; five
where huge pages are what memory is made of anyhow. Who goes on where all of a leaf table has come has what follows
sooner: in order it takes ever fewer, and one in the end. Where few pages are touched, or far from each other, no others
come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msharefs.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Copy
from msharefs.frames import StoreNo, frame_in, store_of
from msharefs.perms import Advice
from msharefs.pte import PteFlag
from msharefs.tables import Leaf, entry_index
from msharefs.vma import Arming, Vma

if TYPE_CHECKING:
    from msharefs.host_mm import HostMm

_NEIGHBOURHOODS: Final = (PMD_SIZE, PMD_SIZE // 4, PMD_SIZE // 32)
"""Bytes that come at once, and the multiples of them that one begins at: of one leaf table, no more."""
FIRST: Final = 4
"""Pages of a leaf table that are touched before others come along."""
SHARE: Final = 8
SHARE_OF_HUGE: Final = 128
"""How many pages come at most for each that was touched, and where huge pages are what memory is made of."""
_MOST_REACHED: Final = 64
"""How many ends of pieces are remembered."""


def to_preserve(mm: HostMm, page: AddrRange, vma: Vma) -> AddrRange:
    """Of what relatives are to have its contents before that page may be stored to."""
    return _around(mm, page, vma, stored_to=True)


def to_bring(mm: HostMm, page: AddrRange, vma: Vma) -> list[Copy]:
    """What is to be had from relatives where that page is touched."""
    return foreign(mm, _around(mm, page, vma, stored_to=False))


def foreign(mm: HostMm, ar: AddrRange) -> list[Copy]:
    """What only relatives have of ``ar``, as it is to be copied."""
    runs = mm.table.runs(ar)
    return [Copy(run, store_of(pte.frame), mm.store) for run, pte in runs if store_of(pte.frame) != mm.store]


def preserved(mm: HostMm, ar: AddrRange) -> None:
    """Relatives have got what they referred to in ``ar``: it may be stored to, as far as its mappings allow that."""
    for vma in mm.vmas.overlapping(ar):
        if vma.prot.writable and not vma.reaches_file and vma.refpage is None:
            part = vma.clipped(ar).ar
            mm.table.change_flags(part, add=PteFlag.WRITE, drop=PteFlag.UFFD_WP)
            mm.storable.note(part)


def allowed(mm: HostMm, page: AddrRange, vma: Vma) -> AddrRange:
    """Where who is allowed to store to a page may do so as well: no relative refers to what lies around it.

    That is where the tables say so: it was stored to, or relatives have got theirs.
    """
    leaf = mm.table.own_leaf(page.start)
    if mm.page != PAGE_SIZE or vma.reaches_file or mm.rule.forked is Arming.NATIVE or leaf is None:
        return page
    near = AddrRange.page_at(page.start, PMD_SIZE).intersect(vma.ar) or page
    here, least, most = (entry_index(addr, 0) for addr in (page.start, near.start, near.end - PAGE_SIZE))
    writable = leaf.writable()
    if not writable[here]:
        return page
    first = writable.rfind(0, least, here) + 1 or least
    last = writable.find(0, here, most + 1)
    start = page.start & ~(PMD_SIZE - 1)
    return AddrRange(Address(start + first * PAGE_SIZE), Address(start + (most + 1 if last < 0 else last) * PAGE_SIZE))


def _around(mm: HostMm, page: AddrRange, vma: Vma, *, stored_to: bool) -> AddrRange:
    """What comes with a page, itself included. Preconditions: it is touched, and it is relatives', too."""
    if mm.page != PAGE_SIZE or vma.advice is Advice.RANDOM:
        return page
    if vma.advice is Advice.SEQUENTIAL:
        return AddrRange.page_at(page.start, _NEIGHBOURHOODS[0]).intersect(vma.ar) or page
    leaf = mm.table.own_leaf(page.start)
    behind = mm.reached.pop(page.start, 0)
    touched = max(behind, leaf.touched + 1 if leaf else 0)  # The first one has made it ours.
    if leaf:
        leaf.touched = touched
    if touched < FIRST:
        return page
    most = (touched + 1) * (SHARE_OF_HUGE if mm.granule >= PMD_SIZE else SHARE)
    for size in _NEIGHBOURHOODS:
        near = AddrRange.page_at(page.start, size).intersect(vma.ar) or page
        first, count = entry_index(near.start, 0), near.size // PAGE_SIZE
        if count <= most and (behind or (leaf and _is_used(leaf, first, count, None if stored_to else mm.store))):
            if len(mm.reached) >= _MOST_REACHED:
                mm.reached.clear()
            mm.reached[near.end] = touched + 1
            return near
    return page


def _is_used(leaf: Leaf, first: int, count: int, store: StoreNo | None) -> bool:
    """Whether some entries of a leaf table, or one that borders on these, are of a store, or may be stored to."""
    entries = slice(max(first - 1, 0), first + count + 1)
    if store is None:
        return 1 in leaf.writable()[entries]
    least, end = (frame_in(number, 0) << PAGE_SHIFT for number in (store, StoreNo(store + 1)))
    return any(least < word < end for word in leaf.words[entries])
