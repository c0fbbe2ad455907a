"""Page tables that share tables: nothing that is done to one changes what another shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msharefs.addr import PAGE_SIZE, PGDIR_SIZE, PMD_SIZE, PUD_SIZE, Address, AddrRange, FrameNo
from msharefs.page_table import PageTable
from msharefs.pte import Pte, PteFlag
from msharefs.tables import hanging

BASE = 64 * PGDIR_SIZE + 5 * PUD_SIZE + 7 * PMD_SIZE
PRESENT, WRITE, HUGE, WP = PteFlag.PRESENT, PteFlag.WRITE, PteFlag.HUGE, PteFlag.UFFD_WP
RW = PRESENT | WRITE
FAR = 1 << 30
"""Frames of another store, far from all of the first one's."""


def at(page: int) -> Address:
    """The address of a page, counted from BASE, which is a PMD border."""
    return Address(BASE + page * PAGE_SIZE)


def pages(first: int, end: int) -> AddrRange:
    return AddrRange(at(first), at(end))


ALL = pages(0, 2048)


def small(frame: int, flags: PteFlag = RW) -> Pte:
    return Pte(FrameNo(frame), flags)


def huge(frame: int, flags: PteFlag = RW) -> Pte:
    return Pte(FrameNo(frame), flags | HUGE)


def filled(end: int = 1024) -> PageTable:
    """Small writable pages from BASE on."""
    table = PageTable()
    table.set_range(pages(0, end), FrameNo(0), RW)
    return table


def shared(table: PageTable) -> list[bool]:
    """Whether the first page's table is shared, and so on."""
    return [table.shared_at(at(page)) for page in range(0, 2048, 512) if table.walk(at(page))]


def frames(table: PageTable) -> dict[int, int]:
    """The frame of every page installed, by its number from BASE."""
    return {
        (run.start - BASE) // PAGE_SIZE + i: pte.frame + i
        for run, pte in table.runs(ALL)
        for i in range(run.size // PAGE_SIZE)
    }


def check(*tables: PageTable) -> None:
    """The counts kept are the counts counted, references too."""
    for table in tables:
        assert table.recount() == (table.tables, table.pages, table.huge_pages)
    for each, refs in hanging(table.top for table in tables).items():
        assert each.refs == refs


@pytest.mark.parametrize("levels", [4, 5])
def test_a_fork_has_the_same_entries_and_counts_in_shared_tables(levels: int) -> None:
    table = PageTable(levels)
    table.set_range(pages(510, 1030), FrameNo(100), RW)
    table.set(at(1536), huge(512))
    twin = table.fork()
    assert frames(twin) == frames(table)
    assert (twin.tables, twin.pages, twin.huge_pages) == (table.tables, 520, 1)
    assert (twin.levels, twin.table_bytes) == (levels, table.table_bytes)
    assert (table.shared_tables(), twin.shared_tables()) == (3, 3)
    assert table.top is twin.top
    check(table, twin)


def test_a_2_mib_leaf_is_an_entry_of_both_and_protected_in_both() -> None:
    table = PageTable()
    table.set(at(0), huge(512))
    twin = table.fork()
    assert table.walk(at(0)) == twin.walk(at(0)) == huge(512, PRESENT | WP)
    twin.set(at(7), small(FAR))
    assert (table.huge_pages, twin.huge_pages, table.walk(at(7))) == (1, 0, huge(512, PRESENT | WP))
    assert twin.walk(at(8)) == small(520, PRESENT | WP)
    check(table, twin)


CHANGES: dict[str, Callable[[PageTable], None]] = {
    "set": lambda table: table.set(at(5), small(FAR)),
    "set anew": lambda table: table.set(at(1500), small(FAR)),
    "huge": lambda table: table.set(at(512), huge(FAR)),
    "one page": lambda table: table.set_range(pages(5, 6), FrameNo(FAR), RW),
    "range": lambda table: table.set_range(pages(500, 520), FrameNo(FAR), RW),
    "range over a whole table": lambda table: table.set_range(pages(0, 512), FrameNo(FAR), RW),
    "clear one": lambda table: table.clear_range(pages(5, 6)),
    "clear a part": lambda table: table.clear_range(pages(500, 520)),
    "clear a whole table": lambda table: table.clear_range(pages(512, 1024)),
    "clear all": lambda table: table.clear_range(ALL),
    "flags": lambda table: table.change_flags(pages(500, 520), add=PteFlag.DIRTY),
    "flags of a whole table": lambda table: table.change_flags(pages(0, 512), add=PteFlag.DIRTY),
    "own": lambda table: table.own(at(5)),
    "release": lambda table: table.release(),
}


@pytest.mark.parametrize("by_twin", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_one_changes_the_others_do_not_see(
    change: Callable[[PageTable], None], *, warm: bool, by_twin: bool
) -> None:
    """``warm``: the leaf table was looked up last, before the fork."""
    table = filled()
    before = frames(table)
    if warm:
        table.set(at(5), small(5))
    twin = table.fork()
    other = twin.fork()
    changing, kept = (twin, table) if by_twin else (table, twin)
    change(changing)
    assert frames(kept) == frames(other) == before
    assert not [pte for each in (kept, other) for _, pte in each.runs(ALL) if pte.flags & PteFlag.DIRTY]
    check(table, twin, other)


def test_a_leaf_table_that_is_broken_is_the_breakers_and_all_pages_of_both_are_protected() -> None:
    table = filled()
    twin = table.fork()
    assert table.walk(at(6)) == twin.walk(at(6)) == small(6, PRESENT | WP)
    twin.set(at(5), small(FAR))
    assert twin.walk(at(5)) == small(FAR)
    assert table.walk(at(5)) == small(5, PRESENT | WP)
    assert table.walk(at(6)) == twin.walk(at(6)) == small(6, PRESENT | WP)
    assert shared(table) == shared(twin) == [False, True]
    check(table, twin)


def test_only_what_may_have_been_written_is_protected_by_a_fork() -> None:
    """The rest is protected already, by who says so."""
    table = filled()
    table.change_flags(ALL, add=WP, drop=WRITE)
    table.set_range(pages(5, 6), FrameNo(5), RW)
    table.set_range(pages(600, 700), FrameNo(600), RW)
    twin = table.fork([pages(5, 6), pages(550, 1024)])
    assert not [pte for _, pte in twin.runs(ALL) if pte.flags & WRITE]
    table.set_range(pages(7, 8), FrameNo(7), RW)
    assert table.fork([]).walk(at(7)) == small(7)


def test_a_leaf_table_of_one_owner_is_kept_when_it_is_to_be_its_own() -> None:
    table = filled()
    (leaf, _) = table.leaves()
    table.own(at(5))
    assert next(table.leaves()) is leaf
    twin = table.fork()
    twin.own(at(5))
    assert next(table.leaves()) is leaf
    table.own(at(5))
    assert next(table.leaves()) is leaf
    assert (table.shared_tables(), twin.shared_tables()) == (1, 1)
    check(table, twin)


def test_owning_where_there_is_no_leaf_table_makes_none() -> None:
    table = PageTable()
    table.set(at(512), huge(512))
    for page in (0, 512, 512 * 512 * 512):
        table.own(at(page))
    assert table.tables == [0, 1, 1, 1]
    check(table)


def test_shared_at_tells_of_the_tables_on_the_way() -> None:
    table = filled()
    table.set(at(1024), huge(1024))
    twin = table.fork()
    table.own(at(0))
    assert [table.shared_at(at(page)) for page in (0, 511, 512, 1023, 1024, 5000)] == [False] * 2 + [True] * 2 + [
        False
    ] * 2
    assert not twin.shared_at(at(0))


def test_the_last_one_that_has_a_leaf_table_finds_its_pages_protected() -> None:
    """Whoever went may have been the one whose pages they are."""
    table = filled(512)
    twin, other = table.fork(), table.fork()
    table.release()
    twin.clear_range(ALL)
    assert other.walk(at(5)) == small(5, PRESENT | WP)
    assert shared(other) == [False]
    check(other, table, twin)


def test_what_is_taken_out_whole_counts_with_all_below() -> None:
    """A whole table of level 2, which others share, and of level 1, which they do not any more."""
    table = PageTable()
    for number in range(3):
        table.set_range(AddrRange.sized(at(0) + number * PUD_SIZE, 3 * PMD_SIZE), FrameNo(0), RW)
        table.set(Address(at(0) + number * PUD_SIZE + 3 * PMD_SIZE), huge(512))
    twin = table.fork()
    table.own(at(0))
    start = at(0) // PUD_SIZE * PUD_SIZE
    table.clear_range(AddrRange.sized(start, 2 * PUD_SIZE))
    assert (table.tables, table.pages, table.huge_pages) == ([3, 1, 1, 1], 3 * 512, 1)
    check(table, twin)
    twin.clear_range(AddrRange.sized(start, 1 << 40))
    assert (twin.tables, twin.resident) == ([0, 0, 0, 1], 0)
    check(table, twin)


def test_release_drops_what_is_shared_and_leaves_it_to_others() -> None:
    table = filled()
    table.set(at(1536), huge(512))
    twin = table.fork()
    table.release()
    assert (table.tables, table.resident, frames(table)) == ([0, 0, 0, 1], 0, {})
    assert len(frames(twin)) == 1536
    check(table, twin)
    table.set(at(5), small(FAR))
    assert twin.walk(at(5)) == small(5, PRESENT | WP)
    check(table, twin)


def test_frame_at_gives_the_frame_of_the_very_page() -> None:
    table = filled(512)
    table.set(at(512), huge(1024))
    assert [table.frame_at(Address(at(page) + 17)) for page in (0, 511, 512, 700, 1024)] == [0, 511, 1024, 1212, None]


def test_reassigned_pages_have_other_frames_in_all_tables_that_share_the_leaf() -> None:
    table = filled()
    twin, other = table.fork(), table.fork()
    table.own(at(5))
    twin.reassign(pages(5, 8), FrameNo(FAR))
    assert [each.frame_at(at(5)) for each in (table, twin, other)] == [5, FAR, FAR]
    assert [each.frame_at(at(7)) for each in (table, twin, other)] == [7, FAR + 2, FAR + 2]
    assert [each.frame_at(at(8)) for each in (table, twin, other)] == [8, 8, 8]
    assert (twin.shared_tables(), other.shared_tables()) == (2, 2)
    assert twin.walk(at(5)) == small(FAR, PRESENT | WP)
    check(table, twin, other)


def test_reassigning_keeps_flags_and_2_mib_leaves_whole_and_splits_those_that_stick_out() -> None:
    table = PageTable()
    table.set(at(0), huge(0))
    table.set(at(512), huge(512))
    twin = table.fork()
    table.own(at(0))
    twin.reassign(pages(0, 512), FrameNo(FAR))
    twin.reassign(pages(600, 602), FrameNo(FAR + 600))
    assert twin.walk(at(0)) == huge(FAR, PRESENT | WP)
    assert [twin.walk(at(page)) for page in (599, 600, 601, 602)] == [
        small(frame, PRESENT | WP) for frame in (599, FAR + 600, FAR + 601, 602)
    ]
    assert (table.walk(at(0)), table.walk(at(512))) == (huge(0, PRESENT | WP), huge(512, PRESENT | WP))
    check(table, twin)


def test_present_are_pages_of_every_kind_with_neighbours_as_one() -> None:
    table = PageTable()
    table.set_range(pages(10, 20), FrameNo(10), RW)
    table.set_range(pages(20, 30), FrameNo(FAR), PRESENT | WP)
    table.set_range(pages(511, 1024), FrameNo(511), RW)
    table.set(at(1024), huge(1024))
    assert table.present(ALL) == [pages(10, 30), pages(511, 1536)]
    assert table.present(pages(15, 600)) == [pages(15, 30), pages(511, 600)]
    assert table.present(pages(30, 511)) == []


def test_present_does_not_look_beyond_a_directory_that_is_full() -> None:
    table = PageTable()
    start = 64 * PGDIR_SIZE + 5 * PUD_SIZE
    for number in range(512):
        table.set(Address(start + number * PMD_SIZE), huge(number * 512))
    table.set(Address(start + PUD_SIZE), small(1))
    inside = AddrRange.sized(start + 3 * PAGE_SIZE, 10 * PMD_SIZE)
    assert table.present(inside) == [inside]
    whole = AddrRange.sized(start - PAGE_SIZE, 2 * PUD_SIZE)
    assert table.present(whole) == [AddrRange.sized(start, PUD_SIZE + PAGE_SIZE)]


PAGE = st.integers(0, 1100)
WHO = st.integers(0, 3)
WHAT = st.sampled_from(["set", "huge", "range", "clear", "flags", "fork", "release"])


def apply_step(table: PageTable, naive: dict[int, int], what: str, first: int, end: int) -> None:
    """One step, on the page tables and on a dict of frames."""
    match what:
        case "set":
            table.set(at(first), small(FAR + first))
            naive[first] = FAR + first
        case "huge":
            start = first // 512 * 512
            table.set(at(start), huge(FAR + start))
            naive.update({page: FAR + page for page in range(start, start + 512)})
        case "range":
            table.set_range(pages(first, end), FrameNo(first), RW)
            naive.update({page: page for page in range(first, end)})
        case "clear":
            table.clear_range(pages(first, end))
            for page in naive.keys() & set(range(first, end)):
                del naive[page]
        case "flags":
            table.change_flags(pages(first, end), add=WP, drop=WRITE)
        case "release":
            table.release()
            naive.clear()


@given(st.lists(st.tuples(WHO, WHAT, PAGE, PAGE), max_size=14))
@settings(max_examples=min(300, settings().max_examples))
def test_any_sequence_over_several_forks_agrees_with_dicts_of_frames(steps: list[tuple[int, str, int, int]]) -> None:
    tables, naive = [filled()], [{page: page for page in range(1024)}]
    for who, what, one, other in steps:
        each = who % len(tables)
        if what == "fork" and len(tables) < 4:
            tables.append(tables[each].fork())
            naive.append(dict(naive[each]))
        else:
            apply_step(tables[each], naive[each], what, min(one, other), max(one, other) + 1)
        check(*tables)
    assert [frames(table) for table in tables] == naive
