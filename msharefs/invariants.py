"""The host mm's own checker: what must hold between any two calls (compare mm/debug.c, mm/vma.c:validate_mm)."""

from __future__ import annotations

import itertools

from msharefs.addr import PAGE_SHIFT, PMD_SIZE, AddrRange
from msharefs.errors import InternalError
from msharefs.frames import StoreNo, index_of, store_of
from msharefs.host_mm import HostMm
from msharefs.lineage import Lineage
from msharefs.perms import PROT_RW, Prot
from msharefs.pte import FRAMES_IN_PMD, Pte, PteFlag
from msharefs.tables import hanging
from msharefs.vma import Arming, Vma


def check_mm(mm: HostMm) -> None:
    """Raise InternalError with the first thing that is wrong.

    VMAs: whole pages, inside the region, ordered, apart, merged, and found by address. Tables: counts as recounted.
    Installed is within asked: every page lies in a VMA that may be touched, writable only where the VMA is, in the
    frame of its index; a 2 MiB leaf has a frame at a border of 2 MiB. Dirty are pages of shared files only, and those
    of them that are writable. Clean are pages of reference pages only, protected, and in their own store. Frames of
    others' stores are for members that have their first touches reported, and not for shared files.
    """
    _check_vmas(mm)
    _check_counts(mm)
    _check_pages(mm)


def check_lineage(lineage: Lineage) -> None:
    """Raise InternalError with the first thing that is wrong between the members.

    Tables: as many references as recounted. Frames, of which no references are counted: whoever refers to one is found
    by looking, each page once, the oldest of several. Of whose page others refer to, stores are reported, and it has
    the page still; and nobody may store to a page of another's, that another refers to, or in a table that is shared.
    """
    _check_references(lineage)
    for number, mm in lineage.members.items():
        if mm.store != number or mm.lineage is not lineage:
            raise InternalError(f"the member of store {number} is that of store {mm.store}")
        for run, pte in mm.table.runs(mm.ar):
            owner = store_of(pte.frame)
            if pte.flags & PteFlag.WRITE and mm.table.shared_at(run.start):
                raise InternalError(f"pages {run} are writable in store {mm.store}, in a table that others share")
            if owner == mm.store:
                continue
            if owner not in mm.borrowed:
                raise InternalError(f"store {mm.store} refers to pages {run} of store {owner}, and does not know it")
            _check_protected(mm, run)
            if owner in lineage.members:
                _check_owner(lineage.members[owner], run, mm)
    for mm in lineage.members.values():
        _check_claims(lineage, mm)


def _check_references(lineage: Lineage) -> None:
    for table, refs in hanging(mm.table.top for mm in lineage.members.values()).items():
        if table.refs != refs:
            raise InternalError(f"a table of level {table.level} counts {table.refs} references and hangs in {refs}")


def _check_claims(lineage: Lineage, mm: HostMm) -> None:
    """What others refer to of a member's store, recounted page by page, is what it finds when it looks."""
    heirs: dict[int, StoreNo] = {}
    for other in reversed([each for each in lineage.members.values() if each is not mm]):
        for run, pte in other.table.runs(mm.ar):
            if store_of(pte.frame) == mm.store:
                heirs |= dict.fromkeys(range(run.start, run.end, mm.page), other.store)
    found: list[tuple[int, StoreNo]] = []
    for copy in lineage.claims(mm, mm.ar):
        found += zip(range(copy.ar.start, copy.ar.end, mm.page), itertools.repeat(copy.target))
    if sorted(found) != sorted(heirs.items()):
        raise InternalError(f"{len(heirs)} pages of store {mm.store} are referred to, and {len(found)} are found")


def _check_owner(owner: HostMm, run: AddrRange, other: HostMm) -> None:
    """What ``other`` refers to, ``owner`` has, protected."""
    if not owner.rule.shielded:
        raise InternalError(f"store {other.store} refers to pages {run} of store {owner.store}, which is not shielded")
    for page in run.pieces(owner.page):
        if owner.table.frame_at(page.start) != owner.frame_at(page.start):
            raise InternalError(f"store {other.store} refers to page {page} of store {owner.store}, which is gone")
    _check_protected(owner, run)


def _check_protected(mm: HostMm, ar: AddrRange) -> None:
    """No page in ``ar`` may be stored to."""
    for run, pte in mm.table.runs(ar):
        if pte.flags & PteFlag.WRITE:
            raise InternalError(f"pages {run} are writable in store {mm.store}, and shared with relatives")


def _check_vmas(mm: HostMm) -> None:
    below = None
    for vma in mm.vmas:
        if not vma.ar.is_aligned(mm.page) or not mm.ar.covers(vma.ar):
            raise InternalError(f"VMA {vma.ar} is not made of pages of {mm.ar}")
        if below is not None and below.ar.end > vma.ar.start:
            raise InternalError(f"VMAs {below.ar} and {vma.ar} overlap")
        if below is not None and below.merges_with(vma):
            raise InternalError(f"VMAs {below.ar} and {vma.ar} are not merged")
        below = vma
    for vma in mm.vmas:
        if mm.vmas.overlapping(vma.ar) != [vma]:
            raise InternalError(f"VMA {vma.ar} is not found where it is")


def _check_counts(mm: HostMm) -> None:
    counted = mm.table.recount()
    kept = (mm.table.tables, mm.table.pages, mm.table.huge_pages)
    if counted != kept:
        raise InternalError(f"page tables count {kept} and hold {counted}")


def _check_pages(mm: HostMm) -> None:
    inside = 0
    for run, pte in mm.table.runs(mm.ar):
        inside += run.size
        if mm.page == PMD_SIZE and not pte.is_huge:
            raise InternalError(f"pages {run} are small, in a region of 2 MiB pages")
        if mm.vmas.holes(run):
            raise InternalError(f"pages {run} lie in a hole")
        if index_of(pte.frame) != (run.start - mm.ar.start) >> PAGE_SHIFT:
            raise InternalError(f"page {run.start:#x} has frame {index_of(pte.frame)}")
        foreign = store_of(pte.frame) != mm.store
        if foreign and not mm.rule.forked & Arming.MISSING:
            raise InternalError(f"pages {run} lie in store {store_of(pte.frame)}, and first touches are not reported")
        if pte.flags & PteFlag.HUGE and (pte.frame - (run.start >> PAGE_SHIFT)) % FRAMES_IN_PMD:
            raise InternalError(f"2 MiB leaf at {run.start:#x} has frame {pte.frame}, which is at no border")
        for vma in mm.vmas.overlapping(run):
            if not vma.prot & PROT_RW:
                raise InternalError(f"pages {run} are installed in {vma.ar}, which nobody may touch")
            if pte.flags & PteFlag.WRITE and not vma.prot & Prot.WRITE:
                raise InternalError(f"pages {run} are writable in the read-only {vma.ar}")
            if foreign and vma.reaches_file:
                raise InternalError(f"pages {run} of a shared file lie in store {store_of(pte.frame)}")
            _check_dirty(run, pte, vma)
            if pte.flags & PteFlag.CLEAN and (vma.refpage is None or foreign or not pte.flags & PteFlag.UFFD_WP):
                raise InternalError(f"pages {run} count as clean in {vma.ar}, and may be stored to or show no refpage")
    if inside != mm.table.resident:
        raise InternalError(f"{mm.table.resident - inside} bytes are installed outside {mm.ar}")


def _check_dirty(run: AddrRange, pte: Pte, vma: Vma) -> None:
    dirty = bool(pte.flags & PteFlag.DIRTY)
    if dirty and not vma.tracks_stores:
        raise InternalError(f"pages {run} are dirty in {vma.ar}, which reaches no file")
    if vma.tracks_stores and dirty != bool(pte.flags & PteFlag.WRITE):
        raise InternalError(f"pages {run} of a shared file are dirty or writable, and not both")
