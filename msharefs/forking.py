"""Forking a host mm, and what comes before a page of one with relatives changes or goes (compare COW PTE).

Three steps make a fork: ``shield`` has every store to the origin seen; when its effects are carried out, in every
process, nothing changes unseen any more, and the tables are brought up to date; then ``fork`` shares them. From then
on, before a page changes or goes that relatives refer to, they are to have it (``to_preserve``), and before a page is
moved that only a relative has, it is to be brought (``to_bring``). Whoever makes such a copy says so (``copied``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msharefs import breaking, clean_pages
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange, united
from msharefs.effects import Arm, Change, Copy, Protect
from msharefs.frames import StoreNo, frame_in, index_of, store_of
from msharefs.host_mm import HostMm
from msharefs.lineage import Lineage
from msharefs.perms import PROT_RW, Prot
from msharefs.pte import FRAMES_IN_PMD, Pte, PteFlag, pte_flags
from msharefs.vma import Arming


def shield(mm: HostMm) -> list[Change]:
    """Have every store seen from now on that does not go to a file: the effects.

    Where that was so already, only what may be stored to since is protected again: cost follows that, not the region.
    """
    effects: list[Change] = []
    if not mm.rule.shielded:
        before = mm.rule.over(mm.vmas, mm.ar)
        mm.rule = mm.rule.with_forks(mm.rule.forked | Arming.WP)
        effects = mm.rule.rearm(mm.vmas, mm.ar, before, [])
    armed = {effect.ar for effect in effects if isinstance(effect, Arm)}
    for part in _stores(mm, mm.storable.parts(mm.ar)):
        mm.table.change_flags(part, add=PteFlag.UFFD_WP, drop=PteFlag.WRITE)
        if not any(ar.covers(part) for ar in armed):
            effects.append(Protect(part))  # It was armed before, and stores have been allowed since.
    mm.storable.clear()
    mm.reached.clear()
    return effects


def _stores(mm: HostMm, parts: Iterable[AddrRange]) -> Iterator[AddrRange]:
    """Where in some parts somebody may store to what is no file's."""
    for part in parts:
        for vma in mm.vmas.overlapping(part):
            if vma.prot.writable and not vma.reaches_file:
                yield vma.clipped(part).ar


def fork(mm: HostMm, store: StoreNo | None = None) -> HostMm:
    """A host mm with the same mappings and contents (compare kernel/fork.c:dup_mmap).

    ``store`` is the number of its own, if the lineage has given one already; else NoSpaceError where it has none.

    Preconditions: ``mm`` and all its relatives are shielded; shared files have every store; what nobody may touch is
    copied by the caller; the tables are up to date. What lies in shared files, both have from there, and what is clean
    from its reference page.
    """
    twin = HostMm(
        mm.ar,
        levels=mm.table.levels,
        page=mm.page,
        granule=mm.granule,
        paging_all=mm.paging_all,
        hole_signal=mm.hole_signal,
        lineage=mm.lineage,
        store=store,
    )
    twin.rule = mm.rule.with_forks(Arming.MISSING)
    twin.table = mm.table.fork(mm.storable.parts(mm.ar))
    twin.borrowed = {*mm.borrowed, mm.store}
    twin.vmas = mm.vmas.fork()
    for vma in twin.vmas:
        if vma.reaches_file:
            twin.table.clear_range(vma.ar)
        elif vma.refpage is not None:
            for run in clean_pages.clean(mm, vma.ar):
                twin.table.clear_range(run)
    return twin


def own_pages(mm: HostMm) -> list[AddrRange]:
    """Where what is installed lies in its own store, in order."""
    if not mm.borrowed:
        return mm.table.present(mm.ar)
    return united(run for run, pte in mm.table.runs(mm.ar) if store_of(pte.frame) == mm.store)


def relax(mm: HostMm) -> list[Change]:
    """Have memory native again of which nobody else has anything any more: the effects.

    Preconditions: it is alone in its lineage, and so are its pages in its store.
    """
    before = mm.rule.over(mm.vmas, mm.ar)
    mm.rule = mm.rule.with_forks(Arming.NATIVE)
    mm.storable.forget()
    mm.borrowed.clear()
    for part in _stores(mm, [mm.ar]):
        mm.table.change_flags(part, add=PteFlag.WRITE, drop=PteFlag.UFFD_WP)
    for part in clean_pages.clean(mm, mm.ar):
        mm.table.change_flags(part, add=PteFlag.UFFD_WP, drop=PteFlag.WRITE)
    return mm.rule.rearm(mm.vmas, mm.ar, before, [])


def to_preserve(mm: HostMm, ar: AddrRange) -> list[Copy]:
    """What relatives refer to of the pages in ``ar``, and who shall have it, before these change or go."""
    return [] if mm.lineage.alone else list(mm.lineage.claims(mm, ar))


def to_bring(mm: HostMm, ar: AddrRange) -> list[Copy]:
    """What only relatives have of ``ar``."""
    return breaking.foreign(mm, ar) if mm.rule.forked else []


def copied(mm: HostMm, copy: Copy) -> None:
    """Note that a copy was made. Preconditions: ``mm`` asked for it, and nothing has changed since."""
    mm.lineage.copies += 1
    if copy.source == mm.store:
        mm.lineage.moved(copy)
        breaking.preserved(mm, copy.ar)
    else:
        for vma in mm.vmas.overlapping(copy.ar):
            mm.filled(vma.clipped(copy.ar).ar)


def restore_pages(mm: HostMm, present: list[AddrRange], foreign: Iterable[tuple[AddrRange, StoreNo]]) -> None:
    """Install what was installed, for all that can be known: what its own store has (``present``), else ``foreign``.

    A page that was brought is a member's own from then on, and so is one that was inherited.
    """
    huge = mm.granule > PAGE_SIZE
    mm.sync(present, huge=huge)
    for ar, store in foreign:
        for vma in mm.vmas.overlapping(ar):
            if vma.reaches_file or not vma.prot & PROT_RW:
                continue
            for hole in mm.table.holes(vma.clipped(ar).ar):
                _refer(mm, hole, store, huge=huge)


def _refer(mm: HostMm, ar: AddrRange, store: StoreNo, *, huge: bool) -> None:
    """Have pages of a relative's store installed, protected."""
    flags = pte_flags(Prot.READ)
    mm.borrowed.add(store)
    for piece in ar.pieces(PMD_SIZE):
        frame = frame_in(store, index_of(mm.frame_at(piece.start)))
        if huge and piece.size == PMD_SIZE and frame % FRAMES_IN_PMD == 0:
            mm.table.set(piece.start, Pte(frame, flags | PteFlag.HUGE))
        else:
            mm.table.set_range(piece, frame, flags)


def restore_protection(lineage: Lineage) -> None:
    """Have pages protected that members refer to in each other's stores. Preconditions: all pages are restored."""
    for mm in lineage.members.values():
        for run, pte in list(mm.table.runs(mm.ar)) if mm.borrowed else ():
            owner = lineage.members.get(store_of(pte.frame))
            if owner is not None and owner is not mm:
                owner.table.change_flags(run, add=PteFlag.UFFD_WP, drop=PteFlag.WRITE)


def shared_bytes(mm: HostMm) -> int:
    """How much of what is installed relatives have in common with ``mm``, in bytes."""
    if mm.lineage.alone and not mm.rule.forked:
        return 0
    claimed = sum(copy.ar.size for copy in to_preserve(mm, mm.ar))
    return claimed + sum(copy.ar.size for copy in to_bring(mm, mm.ar))
