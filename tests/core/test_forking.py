"""Forking a host mm: what is shared, what is seen, and what happens before a page changes or goes."""

from __future__ import annotations

import pytest

from msharefs import forking
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Allow, Arm, Bring, Copy, Deliver, Fill, Preserve, Protect, Punch, Signal, Stash, ZeroFill
from msharefs.fault import Fault
from msharefs.frames import StoreNo, store_of
from msharefs.host_mm import HostMm
from msharefs.invariants import check_lineage, check_mm
from msharefs.perms import PROT_RW, Access, Advice, Prot
from msharefs.pte import PteFlag
from msharefs.vma import Arming, FileId, FileSource, Vma

BASE = 32 << 40
WP, MISSING, NATIVE = Arming.WP, Arming.MISSING, Arming.NATIVE


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def page(number: int) -> AddrRange:
    return pages(number, number + 1)


def source(number: int, *, shared: bool) -> FileSource:
    return FileSource(FileId(number), 0, shared, writable=True)


def mapped(first: int = 0, end: int = 20, *, size: int = 1024, paging_all: bool = False) -> HostMm:
    """A region of read-write memory of which some pages are present."""
    mm = HostMm(pages(0, size), paging_all=paging_all)
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    if first < end:
        mm.sync([pages(first, end)], huge=False)
    return mm


def fork(mm: HostMm) -> HostMm:
    """A fork, after everybody's stores are seen."""
    for member in mm.lineage.members.values():
        forking.shield(member)
    return forking.fork(mm)


def copy(first: int, end: int, source: int, target: int) -> Copy:
    return Copy(pages(first, end), StoreNo(source), StoreNo(target))


def store(mm: HostMm, number: int) -> list[Copy]:
    """Store to a page that is there and protected: the copies that had to be made."""
    fault = Fault(page(number).start, Access.WRITE, protected=True)
    made: list[Copy] = []
    effect = mm.fault(fault).effect
    while isinstance(effect, Preserve):
        made += effect.copies
        for each in effect.copies:
            forking.copied(mm, each)
        effect = mm.fault(fault).effect
    assert isinstance(effect, Allow)
    assert effect.ar.covers(page(number))
    check(mm)
    return made


def touch(mm: HostMm, number: int, access: Access = Access.READ) -> object:
    """A touch of a page that is missing: the effect."""
    return mm.fault(Fault(page(number).start, access)).effect


def check(mm: HostMm) -> None:
    """What must hold of a whole family."""
    check_lineage(mm.lineage)
    for member in mm.lineage.members.values():
        check_mm(member)


def store_at(mm: HostMm, number: int) -> StoreNo | None:
    frame = mm.table.frame_at(page(number).start)
    return None if frame is None else store_of(frame)


def flags_at(mm: HostMm, number: int) -> PteFlag:
    pte = mm.table.walk(page(number).start)
    assert pte is not None
    return pte.flags & (PteFlag.WRITE | PteFlag.UFFD_WP)


# Shielding.


def test_native_memory_has_its_stores_seen() -> None:
    mm = mapped()
    assert forking.shield(mm) == [Arm(mm.ar, WP)]
    assert list(mm.armings()) == [(mm.ar, WP)]


def test_what_was_shielded_before_is_protected_anew_where_stores_may_go_unseen_since() -> None:
    """Where one was allowed, where pages came anew, and where they have gone with their marks."""
    mm = mapped(0, 1024)
    forking.shield(mm)
    assert forking.shield(mm) == []
    mm.fault(Fault(pages(7, 8).start, Access.WRITE, protected=True))
    mm.madvise_remove(pages(8, 10))
    mm.mmap(pages(20, 22), 2 * PAGE_SIZE, fixed=True, replace=True, source=source(2, shared=False))
    mm.filled(pages(20, 21))
    mm.mmap(pages(30, 31), PAGE_SIZE, fixed=True, replace=True)
    mm.mprotect(pages(8, 9), Prot.READ)
    mm.munmap(pages(40, 41))
    expected = [pages(7, 8), pages(9, 10), pages(20, 22), pages(30, 31)]
    assert forking.shield(mm) == [Protect(ar) for ar in expected]
    assert [run for run, pte in mm.table.runs(mm.ar) if pte.flags & PteFlag.WRITE] == []
    assert forking.shield(mm) == []


def test_so_is_what_the_kernel_had_filled_by_itself_when_the_store_was_allowed() -> None:
    mm = mapped()
    forking.shield(mm)
    mm.fault(Fault(pages(7, 8).start, Access.WRITE, protected=True))
    assert forking.shield(mm) == [Protect(pages(7, 8))]


def test_where_they_are_many_all_is_protected_at_once() -> None:
    mm = mapped(0, 1024)
    forking.shield(mm)
    for page in range(0, 40, 2):
        mm.fault(Fault(pages(page, page + 1).start, Access.WRITE, protected=True))
    mm.mprotect(pages(500, 510), Prot.READ)
    assert forking.shield(mm) == [Protect(pages(0, 500)), Protect(pages(510, 1024))]
    assert [run for run, pte in mm.table.runs(mm.ar) if pte.flags & PteFlag.WRITE] == []


def test_what_the_kernel_fills_where_stores_are_seen_is_protected() -> None:
    mm = mapped()
    forking.shield(mm)
    mm.sync([pages(0, 600)], huge=True)
    assert [pte.flags & PteFlag.WRITE for _, pte in mm.table.runs(mm.ar)] == [PteFlag(0)] * 2


def test_memory_that_is_paged_has_its_stores_seen_too() -> None:
    mm = mapped(paging_all=True)
    assert forking.shield(mm) == [Arm(mm.ar, MISSING | WP)]


def test_holes_what_nobody_may_touch_what_nobody_may_write_and_shared_files_stay_as_they_are() -> None:
    mm = mapped()
    mm.munmap(pages(0, 100))
    mm.mprotect(pages(100, 200), Prot.NONE)
    mm.mprotect(pages(200, 300), Prot.READ)
    mm.mmap(pages(300, 400), 100 * PAGE_SIZE, fixed=True, replace=True, source=source(1, shared=True))
    mm.mmap(pages(400, 500), 100 * PAGE_SIZE, fixed=True, replace=True, source=source(2, shared=False))
    kept = [(pages(0, 200), MISSING), (pages(200, 300), WP)]
    assert list(mm.armings())[:4] == [*kept, (pages(300, 400), MISSING | WP), (pages(400, 500), MISSING)]
    assert forking.shield(mm) == [Arm(pages(400, 500), MISSING | WP), Arm(pages(500, 1024), WP)]
    assert list(mm.armings()) == [*kept, (pages(300, 500), MISSING | WP), (pages(500, 1024), WP)]


def test_a_twin_reports_first_touches_and_its_stores_once_it_is_shielded() -> None:
    mm = mapped()
    twin = fork(mm)
    assert list(twin.armings()) == [(mm.ar, MISSING)]
    assert forking.shield(twin) == [Arm(mm.ar, MISSING | WP)]


# The fork.


def test_a_twin_has_the_same_mappings_and_pages_and_a_store_of_its_own() -> None:
    mm = mapped()
    mm.munmap(pages(100, 200))
    mm.mprotect(pages(200, 300), Prot.READ)
    mm.madvise_reading(pages(400, 500), Advice.RANDOM)
    twin = fork(mm)
    assert list(twin.vmas) == list(mm.vmas)
    assert (twin.store, twin.ar, twin.page, twin.granule) == (1, mm.ar, mm.page, mm.granule)
    assert [store_at(twin, number) for number in (0, 19, 20)] == [0, 0, None]
    assert twin.table.resident == mm.table.resident
    check(mm)


def test_a_twin_is_of_its_origins_kind() -> None:
    mm = HostMm(
        AddrRange.sized(BASE, 2 << 30),
        levels=5,
        page=PMD_SIZE,
        granule=1 << 30,
        paging_all=True,
        hole_signal=Signal.SIGSEGV,
    )
    twin = fork(mm)
    assert (twin.table.levels, twin.page, twin.granule) == (5, PMD_SIZE, 1 << 30)
    assert (twin.paging_all, twin.hole_signal) == (True, Signal.SIGSEGV)


def test_all_tables_are_shared_and_cost_a_reference() -> None:
    mm = mapped(0, 1024)
    twin, other = fork(mm), fork(mm)
    assert [each.table.shared_tables() for each in (mm, twin, other)] == [2, 2, 2]
    assert mm.table.top is twin.table.top is other.table.top
    assert mm.table.top.refs == 3
    assert twin.table.table_bytes == mm.table.table_bytes


def test_a_twin_counts_its_faults_from_the_start() -> None:
    mm = mapped()
    vma = mm.vmas.find(mm.ar.start)
    assert vma is not None
    vma.count.served = 7
    assert [each.count.served for each in fork(mm).vmas] == [0]
    assert vma.count.served == 7


def test_pages_of_shared_files_both_have_from_the_file() -> None:
    mm = mapped()
    mm.mmap(pages(5, 10), 5 * PAGE_SIZE, fixed=True, replace=True, source=source(1, shared=True))
    mm.filled(pages(5, 8))
    twin = fork(mm)
    assert [store_at(twin, number) for number in (4, 5, 7, 10)] == [0, None, None, 0]
    assert [store_at(mm, number) for number in (4, 5, 7, 10)] == [0, 0, 0, 0]
    assert touch(twin, 6) == Fill(page(6), FileId(1), PAGE_SIZE)
    check(mm)


def test_pages_of_private_files_that_were_touched_are_the_origins_and_others_the_files() -> None:
    mm = mapped(0, 0)
    mm.mmap(pages(5, 10), 5 * PAGE_SIZE, fixed=True, replace=True, source=source(1, shared=False))
    mm.filled(page(5))
    twin = fork(mm)
    assert touch(twin, 5) == Bring((copy(5, 6, 0, 1),))
    assert touch(twin, 6) == Fill(page(6), FileId(1), PAGE_SIZE)


# Stores to the older side.


def test_a_page_that_a_twin_refers_to_is_its_own_before_it_changes() -> None:
    mm = mapped()
    twin = fork(mm)
    assert store(mm, 7) == [copy(7, 8, 0, 1)]
    assert [store_at(mm, 7), store_at(twin, 7), store_at(twin, 8)] == [0, 1, 0]
    assert flags_at(mm, 7) == PteFlag.WRITE
    assert flags_at(mm, 8) == PteFlag.UFFD_WP
    assert store(mm, 7) == []


def test_one_copy_serves_all_twins() -> None:
    mm = mapped()
    first, second, third = fork(mm), fork(mm), fork(mm)
    assert store(mm, 7) == [copy(7, 8, 0, 1)]
    assert [store_at(each, 7) for each in (first, second, third)] == [1, 1, 1]
    assert store(first, 7) == [copy(7, 8, 1, 2)]
    assert store(second, 7) == [copy(7, 8, 2, 3)]
    assert store(third, 7) == []


def test_nothing_is_copied_for_nobody() -> None:
    mm = mapped()
    twin = fork(mm)
    assert store(mm, 50) == []
    twin.munmap(page(7))
    assert store(mm, 7) == []
    mm.lineage.leave(twin)
    assert store(mm, 8) == []


def test_a_page_that_a_twin_has_brought_is_not_copied_again() -> None:
    mm = mapped()
    twin = fork(mm)
    forking.copied(twin, copy(7, 8, 0, 1))
    assert store(mm, 7) == []
    assert store_at(twin, 7) == 1


def test_a_store_to_a_page_that_came_after_the_fork_is_not_noted_before_sync_tells_of_it() -> None:
    mm = mapped()
    fork(mm)
    store(mm, 50)
    assert store_at(mm, 50) is None
    mm.sync([page(50)], huge=False)
    assert store_at(mm, 50) == 0
    check(mm)


def test_sync_only_adds_pages_and_leaves_relatives_theirs() -> None:
    mm = mapped()
    twin = fork(mm)
    store(mm, 7)
    mm.sync([pages(0, 3), pages(30, 32)], huge=False)
    assert [store_at(mm, number) for number in (5, 7, 31, 32)] == [0, 0, 0, None]
    twin.sync([page(7)], huge=False)
    assert [store_at(twin, number) for number in (5, 7, 31)] == [0, 1, None]
    check(mm)


# Touches on the younger side.


def test_a_touch_of_the_twin_brings_the_page() -> None:
    mm = mapped()
    twin = fork(mm)
    effect = touch(twin, 7)
    assert effect == Bring((copy(7, 8, 0, 1),))
    assert touch(twin, 7) == effect
    forking.copied(twin, copy(7, 8, 0, 1))
    assert [store_at(mm, 7), store_at(twin, 7)] == [0, 1]
    assert flags_at(twin, 7) == PteFlag.WRITE
    check(mm)


def test_a_touch_of_what_the_origin_never_had_gives_zeros() -> None:
    twin = fork(mapped())
    assert touch(twin, 50) == ZeroFill(page(50))
    assert store_at(twin, 50) == 1


def test_what_may_not_be_touched_is_not_brought() -> None:
    mm = mapped()
    mm.mprotect(pages(5, 10), Prot.READ)
    mm.munmap(pages(10, 12))
    twin = fork(mm)
    assert touch(twin, 7) == Bring((copy(7, 8, 0, 1),))
    assert touch(twin, 7, Access.WRITE) == Deliver(Signal.SIGSEGV, page(7).start)
    assert touch(twin, 11) == Deliver(Signal.SIGBUS, page(11).start)


def test_a_page_is_brought_from_whoever_is_gone() -> None:
    mm = mapped()
    first, second = fork(mm), fork(mm)
    mm.lineage.leave(mm)
    assert touch(first, 7) == Bring((copy(7, 8, 0, 1),))
    forking.copied(first, copy(7, 8, 0, 1))
    assert store(first, 7) == []
    assert touch(second, 7) == Bring((copy(7, 8, 0, 2),))


def test_a_fork_of_a_fork_has_each_page_from_whoever_has_it() -> None:
    mm = mapped()
    twin = fork(mm)
    forking.copied(twin, copy(3, 5, 0, 1))
    grandchild = fork(twin)
    assert touch(grandchild, 3) == Bring((copy(3, 4, 1, 2),))
    assert touch(grandchild, 5) == Bring((copy(5, 6, 0, 2),))
    assert store(twin, 3) == [copy(3, 4, 1, 2)]
    assert store(mm, 5) == [copy(5, 6, 0, 1)]
    assert [store_at(grandchild, number) for number in (3, 4, 5, 6)] == [2, 1, 1, 0]


def test_a_touch_told_late_leaves_a_page_that_relatives_refer_to_protected() -> None:
    """It came while the thread stopped, and was forked since."""
    mm = mapped()
    twin = fork(mm)
    forking.copied(twin, copy(7, 8, 0, 1))
    grandchild = fork(twin)
    assert touch(twin, 7) == ZeroFill(page(7))
    check(mm)
    assert store(twin, 7) == [copy(7, 8, 1, 2)]
    assert store_at(grandchild, 7) == 2


def test_a_touch_of_a_private_file_told_late_does_not_lose_what_relatives_refer_to() -> None:
    mm = mapped(0, 0)
    mm.mmap(pages(5, 10), 5 * PAGE_SIZE, fixed=True, replace=True, source=source(1, shared=False))
    mm.filled(page(5))
    fork(mm)
    assert touch(mm, 5) == Fill(page(5), FileId(1), 0, there=True)
    assert store_at(mm, 5) == 0
    check(mm)
    assert store(mm, 5) == [copy(5, 6, 0, 1)]
    assert touch(mm, 5) == Fill(page(5), FileId(1), 0)
    assert store_at(mm, 5) is None


# Calls.


def test_what_relatives_refer_to_is_to_be_preserved_before_it_goes() -> None:
    mm = mapped()
    twin = fork(mm)
    store(mm, 7)
    assert forking.to_preserve(mm, pages(5, 30)) == [copy(5, 7, 0, 1), copy(8, 20, 0, 1)]
    for each in forking.to_preserve(mm, pages(5, 30)):
        forking.copied(mm, each)
    assert forking.to_preserve(mm, pages(5, 30)) == []
    assert mm.munmap(pages(5, 30))[0] == Arm(pages(5, 30), MISSING | WP)
    assert [store_at(twin, number) for number in (4, 5, 7, 19)] == [0, 1, 1, 1]
    check(mm)


def test_who_is_alone_has_nothing_to_preserve() -> None:
    mm = mapped()
    assert forking.to_preserve(mm, mm.ar) == []
    mm.lineage.leave(fork(mm))
    assert forking.to_preserve(mm, mm.ar) == []


def test_the_younger_side_gives_up_what_it_only_refers_to() -> None:
    mm = mapped()
    twin = fork(mm)
    assert forking.to_preserve(twin, twin.ar) == []
    twin.madvise_remove(pages(0, 5))
    twin.munmap(pages(5, 10))
    assert [store_at(twin, number) for number in (4, 7, 10)] == [None, None, 0]
    assert touch(twin, 4) == ZeroFill(page(4))
    assert store(mm, 4) == []
    assert store(mm, 18) == [copy(18, 19, 0, 1)]


def test_only_what_relatives_have_is_brought() -> None:
    mm = mapped()
    twin = fork(mm)
    forking.copied(twin, copy(7, 8, 0, 1))
    assert forking.to_bring(mm, mm.ar) == []
    assert forking.to_bring(twin, pages(5, 30)) == [copy(5, 7, 0, 1), copy(8, 20, 0, 1)]


def test_what_is_brought_across_mappings_has_each_ones_protection() -> None:
    """After the shared leaf table is duplicated, its entries look alike whatever their mapping is."""
    mm = mapped()
    mm.mprotect(pages(5, 10), Prot.READ)
    twin = fork(mm)
    store(mm, 12)
    (first, second) = forking.to_bring(twin, pages(3, 15))
    assert (first, second) == (copy(3, 12, 0, 1), copy(13, 15, 0, 1))
    forking.copied(twin, first)
    check(mm)
    assert [flags_at(twin, n) for n in (3, 4)] == [PteFlag.WRITE] * 2
    assert [flags_at(twin, n) for n in (5, 9)] == [PteFlag.UFFD_WP] * 2


def test_memory_that_turns_writable_stays_protected_where_relatives_refer_to_it() -> None:
    mm = mapped()
    mm.mprotect(pages(5, 10), Prot.READ)
    twin = fork(mm)
    assert mm.mprotect(pages(5, 10), PROT_RW) == []
    assert twin.mprotect(pages(5, 10), PROT_RW) == [Arm(pages(5, 10), MISSING)]
    check(mm)
    assert store(mm, 7) == [copy(7, 8, 0, 1)]


def test_a_twin_that_nobody_refers_to_may_store_to_its_own_at_once() -> None:
    mm = mapped()
    mm.mprotect(pages(5, 10), Prot.READ)
    twin = fork(mm)
    forking.copied(twin, copy(7, 8, 0, 1))
    assert flags_at(twin, 7) == PteFlag.UFFD_WP
    twin.mprotect(pages(5, 10), PROT_RW)
    assert [flags_at(twin, 7), flags_at(twin, 8)] == [PteFlag.WRITE, PteFlag.UFFD_WP]


@pytest.mark.parametrize("prot", [Prot.READ, Prot.NONE])
def test_stores_that_were_allowed_are_not_any_more_when_the_mapping_forbids_them(prot: Prot) -> None:
    """All is armed with WP already, so arming alone would protect nothing."""
    mm = mapped()
    fork(mm)
    store(mm, 7)
    assert Protect(pages(5, 10)) in mm.mprotect(pages(5, 10), prot)


def test_no_store_is_lost_while_the_contents_of_a_shielded_twin_are_hidden() -> None:
    twin = fork(mapped())
    forking.shield(twin)
    for each in forking.to_bring(twin, pages(5, 10)):
        forking.copied(twin, each)
    effects = twin.mprotect(pages(5, 10), Prot.NONE)
    assert effects[:2] == [Protect(pages(5, 10)), Stash(pages(5, 10))]


@pytest.mark.parametrize(
    ("prot", "shared", "protects"),
    [(PROT_RW, None, False), (Prot.READ, None, True), (PROT_RW, False, False), (PROT_RW, True, True)],
)
def test_a_new_mapping_does_not_inherit_stores_that_were_allowed(
    prot: Prot, shared: bool | None, protects: bool
) -> None:
    twin = fork(mapped(0, 0))
    forking.shield(twin)
    place = None if shared is None else source(1, shared=shared)
    effects = twin.mmap(pages(5, 10), 5 * PAGE_SIZE, prot, fixed=True, replace=True, source=place)[1]
    assert (Protect(pages(5, 10)) in effects) == protects
    assert Punch(pages(5, 10)) in effects


def test_without_forks_protections_follow_the_arming_alone() -> None:
    mm = mapped()
    effects = mm.mprotect(pages(5, 10), Prot.READ)
    assert effects == [Arm(pages(5, 10), WP)]
    assert list(mm.vmas)[1] == Vma(pages(5, 10), Prot.READ)


def test_pages_of_2_mib_are_shared_brought_and_preserved_whole() -> None:
    mm = HostMm(AddrRange.sized(BASE, 8 * PMD_SIZE), page=PMD_SIZE, granule=8 * PMD_SIZE)
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    mm.sync([AddrRange.sized(BASE, 3 * PMD_SIZE)], huge=True)
    twin = fork(mm)
    second = AddrRange.sized(BASE + PMD_SIZE, PMD_SIZE)
    within = Address(second.start + 5000)
    assert twin.fault(Fault(within, Access.READ)).effect == Bring((Copy(second, StoreNo(0), StoreNo(1)),))
    asked = mm.fault(Fault(within, Access.WRITE, protected=True)).effect
    assert asked == Preserve((Copy(second, StoreNo(0), StoreNo(1)),))
    forking.copied(mm, Copy(second, StoreNo(0), StoreNo(1)))
    assert mm.fault(Fault(within, Access.WRITE, protected=True)).effect == Allow(second)
    assert (mm.table.huge_pages, twin.table.huge_pages, mm.table.pages) == (3, 3, 0)
    check(mm)


class TestRelaxing:
    """A region that is alone again is as it was before it was forked."""

    def test_the_origin(self) -> None:
        mm = mapped(0, 1024)
        before = list(mm.armings())
        twin = fork(mm)
        mm.lineage.leave(twin)
        assert forking.relax(mm) == [Arm(mm.ar, Arming.NATIVE)]
        assert list(mm.armings()) == before == []
        assert {pte.flags & (PteFlag.WRITE | PteFlag.UFFD_WP) for _, pte in mm.table.runs(mm.ar)} == {PteFlag.WRITE}
        check_mm(mm)
        assert forking.shield(mm) == [Arm(mm.ar, WP)]

    def test_a_twin_that_has_all_it_needs(self) -> None:
        mm = mapped(0, 2)
        twin = fork(mm)
        for copy in forking.to_bring(twin, twin.ar):
            forking.copied(twin, copy)
        mm.lineage.leave(mm)
        assert forking.relax(twin) == [Arm(mm.ar, Arming.NATIVE)]
        assert twin.borrowed == set()
        check_mm(twin)
        check_lineage(twin.lineage)

    def test_what_was_armed_for_other_reasons_stays_so(self) -> None:
        mm = mapped()
        mm.munmap(pages(0, 100))
        mm.mprotect(pages(100, 200), Prot.READ)
        mm.mmap(pages(200, 300), 100 * PAGE_SIZE, fixed=True, replace=True, source=source(1, shared=True))
        mm.mmap(pages(300, 400), 100 * PAGE_SIZE, fixed=True, replace=True, source=source(2, shared=False))
        before = list(mm.armings())
        mm.lineage.leave(fork(mm))
        assert forking.relax(mm) == [Arm(pages(300, 400), MISSING), Arm(pages(400, 1024), Arming.NATIVE)]
        assert list(mm.armings()) == before
