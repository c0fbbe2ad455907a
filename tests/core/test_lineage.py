"""A lineage: who is in it, who refers to whose pages, and who gets them when they change."""

from __future__ import annotations

import pytest

from msharefs import forking
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import Copy
from msharefs.errors import InternalError, NoSpaceError
from msharefs.frames import MAX_STORES, StoreNo, store_of
from msharefs.host_mm import HostMm
from msharefs.invariants import check_lineage, check_mm
from msharefs.lineage import Lineage

BASE = 32 << 40


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def mapped(present: AddrRange | None = None, *, huge: bool = False) -> HostMm:
    """2048 pages of read-write memory, some of them present."""
    mm = HostMm(pages(0, 2048))
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    if present is not None:
        mm.sync([present], huge=huge)
    return mm


def fork(mm: HostMm) -> HostMm:
    """A fork, after everybody's stores are seen."""
    for member in mm.lineage.members.values():
        forking.shield(member)
    return forking.fork(mm)


def copy(first: int, end: int, source: int, target: int) -> Copy:
    return Copy(pages(first, end), StoreNo(source), StoreNo(target))


def check(mm: HostMm) -> None:
    """What must hold of a whole family."""
    check_lineage(mm.lineage)
    for member in mm.lineage.members.values():
        check_mm(member)


def stores_at(page: int, *members: HostMm) -> list[int | None]:
    """Whose store each of them has a page in."""
    frames = [mm.table.frame_at(pages(page, page + 1).start) for mm in members]
    return [None if frame is None else store_of(frame) for frame in frames]


def test_the_first_member_has_store_0_and_is_alone() -> None:
    mm = mapped()
    assert (mm.store, mm.lineage.members, mm.lineage.alone) == (0, {0: mm}, True)


def test_numbers_of_stores_are_never_given_twice() -> None:
    mm = mapped()
    twin = fork(mm)
    mm.lineage.leave(twin)
    assert mm.lineage.alone
    assert fork(mm).store == 2


def test_a_lineage_comes_to_an_end_with_its_last_number(monkeypatch: pytest.MonkeyPatch) -> None:
    mm = mapped(pages(0, 10))
    monkeypatch.setattr(mm.lineage, "_next", MAX_STORES - 1)
    last = fork(mm)
    assert last.store == MAX_STORES - 1
    with pytest.raises(NoSpaceError, match="forks of one region"):
        fork(mm)
    assert list(mm.lineage.members) == [0, MAX_STORES - 1]
    check(mm)


def test_frames_of_the_last_store_are_installed_like_all() -> None:
    mm = mapped(pages(0, 10))
    mm.lineage._next = MAX_STORES - 1
    last = fork(mm)
    forking.copied(last, copy(0, 10, 0, last.store))
    assert stores_at(9, mm, last) == [0, MAX_STORES - 1]
    check(mm)


def test_who_leaves_has_no_references_and_its_store_is_needed_where_others_have_some() -> None:
    mm = mapped(pages(0, 10))
    twin = fork(mm)
    twin.munmap(pages(3, 5))
    mm.lineage.leave(mm)
    assert mm.table.resident == 0
    assert twin.lineage.needed(mm.store) == [pages(0, 3), pages(5, 10)]
    assert twin.lineage.needed(twin.store) == []
    check(twin)


def test_a_store_is_needed_until_the_last_page_was_brought_or_is_gone() -> None:
    mm = mapped(pages(0, 2))
    twin = fork(mm)
    mm.lineage.leave(mm)
    forking.copied(twin, copy(0, 1, 0, 1))
    assert twin.lineage.needed(mm.store) == [pages(1, 2)]
    twin.madvise_remove(pages(1, 2))
    assert twin.lineage.needed(mm.store) == []


def test_refers_tells_whether_a_frame_is_installed_with_anybody() -> None:
    mm = mapped(pages(0, 2))
    twin = fork(mm)
    mine, its_own = mm.frame_at(pages(1, 2).start), twin.frame_at(pages(1, 2).start)
    assert mm.lineage.refers(pages(1, 2).start, mine)
    assert not mm.lineage.refers(pages(1, 2).start, its_own)
    mm.lineage.leave(mm)
    assert twin.lineage.refers(pages(1, 2).start, mine)
    forking.copied(twin, copy(1, 2, 0, 1))
    assert not twin.lineage.refers(pages(1, 2).start, mine)
    assert twin.lineage.refers(pages(1, 2).start, its_own)


def test_nobody_claims_what_nobody_has() -> None:
    mm = mapped(pages(4, 10))
    twin = fork(mm)
    assert list(mm.lineage.claims(mm, pages(0, 4))) == []
    assert list(mm.lineage.claims(mm, pages(0, 20))) == [copy(4, 10, 0, 1)]
    assert list(mm.lineage.claims(twin, pages(0, 20))) == []


def test_a_page_goes_to_the_oldest_that_refers_to_it_and_each_once() -> None:
    mm = mapped(pages(0, 10))
    first, second, third = fork(mm), fork(mm), fork(mm)
    first.munmap(pages(2, 6))
    second.munmap(pages(4, 8))
    claims = list(mm.lineage.claims(mm, pages(0, 10)))
    assert claims == [copy(0, 2, 0, 1), copy(6, 10, 0, 1), copy(2, 4, 0, 2), copy(4, 6, 0, 3)]
    for each in claims:
        mm.lineage.moved(each)
        check(mm)
    assert stores_at(0, mm, first, second, third) == [0, 1, 1, 1]
    assert stores_at(3, mm, first, second, third) == [0, None, 2, 2]
    assert stores_at(5, mm, first, second, third) == [0, None, None, 3]
    assert stores_at(7, mm, first, second, third) == [0, 1, None, 1]
    assert list(mm.lineage.claims(mm, mm.ar)) == []


def test_claims_of_many_pieces_are_apart_and_complete() -> None:
    """Every other page of the first twin is gone: the second has those alone."""
    mm = mapped(pages(0, 1024))
    first, second = fork(mm), fork(mm)
    for page in range(0, 1024, 2):
        first.munmap(pages(page, page + 1))
    claims = list(mm.lineage.claims(mm, mm.ar))
    assert {each.target for each in claims[:512]} == {first.store}
    assert {each.target for each in claims[512:]} == {second.store}
    assert [each.ar for each in claims[512:]] == [pages(page, page + 1) for page in range(0, 1024, 2)]
    assert sum(each.ar.size for each in claims) == 1024 * PAGE_SIZE


def test_the_leaf_table_that_twins_share_stays_shared_when_their_page_moves() -> None:
    mm = mapped(pages(0, 10))
    first, second = fork(mm), fork(mm)
    assert [each.table.shared_tables() for each in (mm, first, second)] == [1, 1, 1]
    mm.lineage.moved(copy(5, 6, 0, 1))
    assert [each.table.shared_tables() for each in (mm, first, second)] == [0, 1, 1]
    assert stores_at(5, mm, first, second) == [0, 1, 1]
    assert stores_at(6, mm, first, second) == [0, 0, 0]
    check(mm)


def test_a_page_that_has_moved_moves_on_when_its_heir_stores_to_it() -> None:
    mm = mapped(pages(0, 10))
    first, second = fork(mm), fork(mm)
    mm.lineage.moved(copy(5, 6, 0, 1))
    assert list(mm.lineage.claims(first, pages(0, 10))) == [copy(5, 6, 1, 2)]
    mm.lineage.moved(copy(5, 6, 1, 2))
    assert stores_at(5, mm, first, second) == [0, 1, 2]
    check(mm)


def test_a_whole_2_mib_leaf_moves_whole_and_a_part_splits_it() -> None:
    mm = mapped(pages(0, 1024), huge=True)
    twin = fork(mm)
    mm.lineage.moved(copy(0, 512, 0, 1))
    assert (twin.table.huge_pages, twin.table.pages) == (2, 0)
    mm.lineage.moved(copy(600, 601, 0, 1))
    assert (twin.table.huge_pages, twin.table.pages) == (1, 512)
    assert mm.table.huge_pages == 2
    assert [stores_at(page, mm, twin) for page in (0, 511, 512, 600, 601)] == [[0, 1], [0, 1], [0, 0], [0, 1], [0, 0]]
    check(mm)


def test_moves_go_across_borders_of_tables() -> None:
    mm = mapped(pages(500, 1030))
    first, second = fork(mm), fork(mm)
    for each in list(mm.lineage.claims(mm, mm.ar)):
        mm.lineage.moved(each)
    assert [stores_at(page, mm, first, second) for page in (500, 511, 512, 1023, 1024, 1029)] == [[0, 1, 1]] * 6
    assert {first.table.frame_at(pages(n, n + 1).start) for n in range(500, 1030)} == {
        first.frame_at(pages(n, n + 1).start) for n in range(500, 1030)
    }
    check(mm)


def test_the_owner_may_have_lost_its_tables_before_its_pages_move() -> None:
    """The kernel missed what the tables had: no tables are made for it."""
    mm = mapped(pages(0, 1))
    twin = fork(mm)
    mm.table.clear_range(mm.ar)
    mm.lineage.moved(copy(0, 1, 0, 1))
    assert stores_at(0, mm, twin) == [None, 1]
    check(mm)


def test_a_copy_for_somebody_who_refers_to_nothing_is_a_bug_and_changes_nothing() -> None:
    mm = mapped(pages(0, 10))
    first, second = fork(mm), fork(mm)
    first.munmap(pages(0, 5))
    with pytest.raises(InternalError, match="who does not refer to it"):
        mm.lineage.moved(copy(0, 5, 0, 1))
    assert stores_at(0, mm, first, second) == [0, None, 0]
    check(mm)


def test_a_page_of_2_mib_moves_like_a_small_one() -> None:
    mm = HostMm(AddrRange.sized(BASE, 4 * PMD_SIZE), page=PMD_SIZE, granule=PMD_SIZE)
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    mm.sync([mm.ar], huge=True)
    first, second = fork(mm), fork(mm)
    page = AddrRange.sized(BASE + PMD_SIZE, PMD_SIZE)
    assert list(mm.lineage.claims(mm, page)) == [Copy(page, StoreNo(0), StoreNo(1))]
    mm.lineage.moved(Copy(page, StoreNo(0), StoreNo(1)))
    assert stores_at(512, mm, first, second) == [0, 1, 1]
    assert stores_at(1024, mm, first, second) == [0, 0, 0]
    check(mm)


def test_a_lineage_of_its_own_is_nobodys_relative() -> None:
    assert mapped().lineage is not mapped().lineage
    assert HostMm(pages(0, 1), lineage=Lineage()).store == 0
