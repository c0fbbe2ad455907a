"""Page tables: what is walked is what was set, and a table that holds nothing is gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.addr import PAGE_SIZE, PGDIR_SIZE, PMD_SIZE, PUD_SIZE, TABLE_ENTRIES, Address, AddrRange, FrameNo
from msharefs.errors import InternalError, InvalidArgumentError
from msharefs.page_table import PageTable
from msharefs.perms import PROT_RW, Prot
from msharefs.pte import Pte, PteFlag, pte_flags

BASE = 64 * PGDIR_SIZE + 5 * PUD_SIZE + 7 * PMD_SIZE
PRESENT, WRITE, HUGE, WP = PteFlag.PRESENT, PteFlag.WRITE, PteFlag.HUGE, PteFlag.UFFD_WP
RW = PRESENT | WRITE


def at(page: int) -> Address:
    """The address of a page, counted from BASE, which is a PMD border."""
    return Address(BASE + page * PAGE_SIZE)


def pages(first: int, end: int) -> AddrRange:
    return AddrRange(at(first), at(end))


def small(frame: int, flags: PteFlag = RW) -> Pte:
    return Pte(FrameNo(frame), flags)


def huge(frame: int, flags: PteFlag = RW) -> Pte:
    return Pte(FrameNo(frame), flags | HUGE)


def runs(table: PageTable, ar: AddrRange) -> list[tuple[AddrRange, Pte]]:
    return list(table.runs(ar))


def check_counts(table: PageTable) -> None:
    """The counts kept are the counts counted."""
    assert table.recount() == (table.tables, table.pages, table.huge_pages)


def test_flags_stand_where_x86_64_has_them() -> None:
    assert (PRESENT, WRITE, PteFlag.DIRTY, HUGE, WP) == (0x1, 0x2, 0x40, 0x80, 0x400)


@pytest.mark.parametrize(
    ("prot", "flags"), [(PROT_RW, RW), (Prot.WRITE, RW), (Prot.READ, PRESENT | WP), (Prot.NONE, PRESENT | WP)]
)
def test_a_page_of_a_mapping_that_cannot_be_written_is_write_protected(prot: Prot, flags: PteFlag) -> None:
    assert pte_flags(prot) == flags


@given(st.integers(0, (1 << 40) - 1), st.sets(st.sampled_from([WRITE, PteFlag.DIRTY, HUGE, WP])))
def test_an_entry_is_packed_into_the_processors_word_and_back(frame: int, flags: set[PteFlag]) -> None:
    pte = Pte(FrameNo(frame), PRESENT | sum(flags, PteFlag(0)))
    assert pte.pack() == frame << 12 | int(pte.flags)
    assert Pte.unpack(pte.pack()) == pte


def test_a_page_is_writable_where_nothing_else_is_said() -> None:
    assert Pte(FrameNo(5)).flags == RW


def test_a_packed_entry_is_always_present_so_that_no_word_is_zero() -> None:
    assert Pte(FrameNo(0), PteFlag(0)).pack() == PRESENT


@pytest.mark.parametrize("levels", [-1, 0, 3, 6])
def test_only_four_and_five_levels_exist(levels: int) -> None:
    with pytest.raises(InvalidArgumentError, match="4 or 5 levels"):
        PageTable(levels)


@pytest.mark.parametrize(
    ("levels", "names"), [(4, ["pgd", "pud", "pmd", "pte"]), (5, ["pgd", "p4d", "pud", "pmd", "pte"])]
)
def test_one_page_takes_one_table_a_level_and_leaves_the_top_alone_when_it_goes(levels: int, names: list[str]) -> None:
    table = PageTable(levels)
    assert table.tables_by_name() == dict.fromkeys(names, 0) | {"pgd": 1}
    table.set(at(0), small(0))
    assert list(table.tables_by_name().items()) == [(name, 1) for name in names]
    assert (table.pages, table.huge_pages, table.resident, table.table_bytes) == (1, 0, PAGE_SIZE, levels * PAGE_SIZE)
    check_counts(table)
    table.clear_range(pages(0, 1))
    assert table.tables == [0] * (levels - 1) + [1]
    assert table.resident == 0
    check_counts(table)


@pytest.mark.parametrize("levels", [4, 5])
def test_a_huge_leaf_needs_no_leaf_table(levels: int) -> None:
    table = PageTable(levels)
    table.set(at(0), huge(512))
    assert table.tables == [0] + [1] * (levels - 1)
    assert (table.pages, table.huge_pages, table.resident) == (0, 1, PMD_SIZE)
    check_counts(table)


@pytest.mark.parametrize("levels", [4, 5])
def test_tables_are_counted_level_by_level_as_addresses_part(levels: int) -> None:
    """Each further page parts from the first one level higher, and takes one table more on every level below."""
    table = PageTable(levels)
    counts = []
    for apart in (0, PAGE_SIZE, PMD_SIZE, PUD_SIZE, PGDIR_SIZE):
        table.set(Address(BASE + apart), small(0))
        counts.append(table.tables[:4])
    assert counts == [[1, 1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1], [3, 2, 1, 1], [4, 3, 2, 1]]
    check_counts(table)


def test_five_levels_reach_beyond_256_tib() -> None:
    table = PageTable(5)
    low, high = Address(0), Address(1 << 48)
    table.set(low, small(1))
    table.set(high, small(2))
    assert (table.walk(low), table.walk(high)) == (small(1), small(2))
    assert table.tables == [2, 2, 2, 2, 1]


def test_walk_finds_the_page_around_an_address_and_nothing_beside_it() -> None:
    table = PageTable()
    table.set(at(5), small(77))
    assert table.walk(Address(at(5) + 123)) == small(77)
    assert table.walk(at(4)) is None
    assert table.walk(at(6)) is None
    assert table.walk(Address(at(5) + PMD_SIZE)) is None
    assert table.walk(Address(at(5) + PGDIR_SIZE)) is None


def test_walk_gives_a_huge_leaf_whole() -> None:
    table = PageTable()
    table.set(at(0), huge(1024))
    assert table.walk(at(0)) == table.walk(Address(at(511) + 4095)) == huge(1024)
    assert table.walk(at(512)) is None


def test_set_replaces_what_was_there() -> None:
    table = PageTable()
    table.set(at(5), small(1))
    table.set(at(5), small(2, PRESENT | WP))
    assert table.walk(at(5)) == small(2, PRESENT | WP)
    assert table.pages == 1


def test_frame_zero_is_a_page_like_any_other() -> None:
    table = PageTable()
    table.set(at(5), small(0))
    assert table.walk(at(5)) == small(0)
    assert table.pages == 1


@pytest.mark.parametrize(
    ("addr", "pte"),
    [
        pytest.param(at(0) + 1, small(0), id="address within a page"),
        pytest.param(at(1), huge(0), id="address within 2 MiB"),
        pytest.param(at(0), huge(511), id="frame within 2 MiB"),
    ],
)
def test_a_page_that_is_not_aligned_is_a_bug_and_changes_nothing(addr: int, pte: Pte) -> None:
    table = PageTable()
    with pytest.raises(InternalError, match="installed at"):
        table.set(Address(addr), pte)
    assert table.tables == [0, 0, 0, 1]
    check_counts(table)


def test_a_huge_leaf_takes_the_place_of_small_pages_and_frees_their_table() -> None:
    table = PageTable()
    table.set_range(pages(3, 600), FrameNo(3), RW)
    table.set(at(0), huge(0))
    assert table.tables == [1, 1, 1, 1]
    assert (table.pages, table.huge_pages) == (600 - 512, 1)
    assert table.walk(at(3)) == huge(0)
    check_counts(table)


def test_a_huge_leaf_takes_the_place_of_another() -> None:
    table = PageTable()
    table.set(at(0), huge(0))
    table.set(at(0), huge(512, PRESENT | WP))
    assert table.huge_pages == 1
    assert table.walk(at(0)) == huge(512, PRESENT | WP)
    check_counts(table)


def test_a_small_page_splits_the_huge_leaf_it_lands_in() -> None:
    table = PageTable()
    table.set(at(0), huge(512))
    table.set(at(7), small(9, PRESENT | WP))
    assert (table.pages, table.huge_pages, table.tables[0]) == (TABLE_ENTRIES, 0, 1)
    assert table.walk(at(6)) == small(512 + 6)
    assert table.walk(at(7)) == small(9, PRESENT | WP)
    check_counts(table)


def test_set_range_installs_consecutive_frames_across_tables() -> None:
    table = PageTable()
    table.set_range(pages(510, 1030), FrameNo(100), RW)
    assert [table.walk(at(page)) for page in (509, 1030)] == [None, None]
    assert [table.walk(at(page)) for page in (510, 511, 512, 1029)] == [small(100), small(101), small(102), small(619)]
    assert table.pages == 520
    assert table.tables == [3, 1, 1, 1]
    check_counts(table)


def test_set_range_makes_small_pages_even_of_whole_2_mib() -> None:
    table = PageTable()
    table.set_range(pages(0, 512), FrameNo(0), RW | HUGE)
    assert (table.pages, table.huge_pages) == (512, 0)
    assert table.walk(at(0)) == small(0)


def test_set_range_splits_a_huge_leaf_and_keeps_the_rest_of_it() -> None:
    table = PageTable()
    table.set(at(0), huge(512))
    table.set_range(pages(0, 2), FrameNo(5), RW)
    assert runs(table, pages(0, 512)) == [(pages(0, 2), small(5)), (pages(2, 512), small(514))]
    check_counts(table)


def test_set_huge_installs_leaves_across_directories_as_if_one_by_one() -> None:
    start = Address(64 * PGDIR_SIZE - 3 * PMD_SIZE)
    table, one_by_one = PageTable(), PageTable()
    table.set_huge(AddrRange.sized(start, 5 * PMD_SIZE), FrameNo(1024), PteFlag.PRESENT | PteFlag.UFFD_WP)
    for number in range(5):
        pte = Pte(FrameNo(1024 + 512 * number), PteFlag.PRESENT | PteFlag.UFFD_WP | PteFlag.HUGE)
        one_by_one.set(Address(start + number * PMD_SIZE), pte)
    whole = AddrRange.sized(start - PMD_SIZE, 8 * PMD_SIZE)
    assert list(table.runs(whole)) == list(one_by_one.runs(whole))
    assert table.recount() == (table.tables, table.pages, table.huge_pages) == one_by_one.recount()


def test_pages_that_come_and_go_are_counted_as_changes_and_entries_that_change_are_not() -> None:
    table, page = PageTable(), AddrRange.sized(64 * PGDIR_SIZE, PAGE_SIZE)
    steps = [
        lambda: table.set(page.start, Pte(FrameNo(0))),
        lambda: table.set(page.start, Pte(FrameNo(7))),
        lambda: table.set_range(page, FrameNo(1), PteFlag.PRESENT),
        lambda: table.set_range(AddrRange.sized(page.start, 4 * PAGE_SIZE), FrameNo(1), PteFlag.PRESENT),
        lambda: table.change_flags(page, add=PteFlag.DIRTY),
        lambda: table.clear_range(page),
        lambda: table.clear_range(page),
        lambda: table.set(page.start, Pte(FrameNo(0), PteFlag.PRESENT | PteFlag.HUGE)),
        lambda: table.set(page.start, Pte(FrameNo(512), PteFlag.PRESENT | PteFlag.HUGE)),
        lambda: table.set_huge(AddrRange.sized(page.start + PMD_SIZE, PMD_SIZE), FrameNo(512), PteFlag.PRESENT),
    ]
    changed = []
    for step in steps:
        before = table.changes
        step()
        changed.append(table.changes != before)
    assert changed == [True, False, False, True, False, True, False, True, False, True]


def test_clear_range_keeps_what_lies_beside_it() -> None:
    table = PageTable()
    table.set_range(pages(0, 1100), FrameNo(0), RW)
    table.clear_range(pages(1, 1099))
    assert runs(table, pages(0, 1100)) == [(pages(0, 1), small(0)), (pages(1099, 1100), small(1099))]
    assert table.tables == [2, 1, 1, 1]
    assert table.pages == 2
    check_counts(table)


def test_clear_range_takes_a_huge_leaf_whole_or_splits_it() -> None:
    table = PageTable()
    table.set(at(0), huge(0))
    table.set(at(512), huge(512))
    table.clear_range(pages(0, 513))
    assert runs(table, pages(0, 1024)) == [(pages(513, 1024), small(513))]
    assert (table.pages, table.huge_pages) == (511, 0)
    check_counts(table)


def test_clear_range_frees_every_table_that_it_empties_on_every_level() -> None:
    table = PageTable(5)
    for apart in (0, PMD_SIZE, PUD_SIZE, PGDIR_SIZE):
        table.set(Address(BASE + apart), small(1))
    table.set(Address(BASE + 2 * PGDIR_SIZE), huge(512))
    table.clear_range(AddrRange.sized(BASE, 4 * PGDIR_SIZE))
    assert table.tables == [0, 0, 0, 0, 1]
    assert table.resident == 0
    check_counts(table)


def test_clear_range_where_nothing_is_changes_nothing() -> None:
    table = PageTable()
    table.set(at(0), small(0))
    table.clear_range(pages(1, 5000))
    assert table.tables == [1, 1, 1, 1]
    assert table.pages == 1


def test_change_flags_changes_small_pages_only_where_they_are() -> None:
    table = PageTable()
    table.set_range(pages(0, 3), FrameNo(0), RW)
    table.set_range(pages(5, 8), FrameNo(5), RW)
    table.change_flags(pages(2, 7), add=WP, drop=WRITE)
    assert runs(table, pages(0, 9)) == [
        (pages(0, 2), small(0)),
        (pages(2, 3), small(2, PRESENT | WP)),
        (pages(5, 7), small(5, PRESENT | WP)),
        (pages(7, 8), small(7)),
    ]
    assert table.pages == 6
    check_counts(table)


def test_change_flags_of_a_whole_huge_leaf_leaves_it_whole() -> None:
    table = PageTable()
    table.set(at(0), huge(0))
    table.change_flags(pages(0, 512), add=WP, drop=WRITE)
    assert table.walk(at(0)) == huge(0, PRESENT | WP)
    assert table.huge_pages == 1


def test_change_flags_of_many_leaves_changes_the_tables_and_the_holes_between_them_alike() -> None:
    """Huge leaves beside small pages and nothing, with a part of a leaf at each end."""
    table = PageTable()
    for first in (0, 512, 1536, 2560):
        table.set(at(first), huge(first))
    table.set(at(1100), small(1100))
    table.change_flags(pages(500, 2600), add=WP, drop=WRITE)
    for page in range(3072):
        there = page < 1024 or page == 1100 or 1536 <= page < 2048 or page >= 2560
        pte = table.walk(at(page))
        assert (pte is not None) == there
        if pte is not None:
            assert pte.flags & (WRITE | WP) == (WP if 500 <= page < 2600 else WRITE)
    assert table.huge_pages == 2
    check_counts(table)


def test_change_flags_of_a_part_of_a_huge_leaf_splits_it() -> None:
    table = PageTable()
    table.set(at(0), huge(512))
    table.change_flags(pages(500, 600), add=WP, drop=WRITE)
    assert runs(table, pages(0, 600)) == [(pages(0, 500), small(512)), (pages(500, 512), small(1012, PRESENT | WP))]
    check_counts(table)


def test_runs_break_at_holes_at_frames_at_flags_and_at_tables() -> None:
    table = PageTable()
    table.set_range(pages(0, 2), FrameNo(0), RW)
    table.set(at(2), small(9))
    table.set(at(3), small(10, PRESENT | WP))
    table.set_range(pages(511, 513), FrameNo(511), RW)
    assert runs(table, pages(0, 600)) == [
        (pages(0, 2), small(0)),
        (pages(2, 3), small(9)),
        (pages(3, 4), small(10, PRESENT | WP)),
        (pages(511, 512), small(511)),
        (pages(512, 513), small(512)),
    ]


def test_runs_are_cut_to_the_range_and_begin_with_the_frame_there() -> None:
    table = PageTable()
    table.set(at(0), huge(512))
    table.set_range(pages(512, 520), FrameNo(8), RW)
    assert runs(table, pages(100, 515)) == [(pages(100, 512), huge(612)), (pages(512, 515), small(8))]
    assert runs(table, pages(514, 515)) == [(pages(514, 515), small(10))]


def test_runs_go_from_table_to_table_of_every_level() -> None:
    table = PageTable()
    border = AddrRange.sized(65 * PGDIR_SIZE - PAGE_SIZE, 2 * PAGE_SIZE)
    table.set_range(border, FrameNo(7), RW)
    assert [(run.start, pte.frame) for run, pte in table.runs(border)] == [(border.start, 7), (65 * PGDIR_SIZE, 8)]
    assert table.tables == [2, 2, 2, 1]


PAGE = st.integers(0, 1100)
STEP = st.tuples(st.sampled_from(["set", "huge", "range", "clear", "flags"]), PAGE, PAGE, st.booleans())


def naive_step(pte_of: dict[int, Pte], what: str, first: int, end: int, flags: PteFlag) -> None:
    """The same on one small page after another."""
    span = range(first, end)
    if what == "clear":
        for page in span:
            pte_of.pop(page, None)
    elif what == "flags":
        pte_of.update({page: small(pte_of[page].frame, flags) for page in span if page in pte_of})
    else:
        pte_of.update({page: small(page, flags) for page in span})


def apply_step(table: PageTable, what: str, first: int, end: int, flags: PteFlag) -> None:
    """One step on the page tables."""
    match what:
        case "set":
            table.set(at(first), small(first, flags))
        case "huge":
            table.set(at(first), huge(first, flags))
        case "range":
            table.set_range(pages(first, end), FrameNo(first), flags)
        case "clear":
            table.clear_range(pages(first, end))
        case "flags":
            table.change_flags(pages(first, end), add=flags, drop=(WRITE | WP) & ~flags)


@given(st.lists(STEP, max_size=12), st.sampled_from([4, 5]))
def test_any_sequence_agrees_with_a_dict_of_pages(steps: list[tuple[str, int, int, bool]], levels: int) -> None:
    table, naive = PageTable(levels), dict[int, Pte]()
    for what, one, other, writable in steps:
        first, end = min(one, other), max(one, other) + 1
        if what == "set":
            end = first + 1
        elif what == "huge":
            first = one // 512 * 512
            end = first + 512
        flags = RW if writable else PRESENT | WP
        apply_step(table, what, first, end, flags)
        naive_step(naive, what, first, end, flags)
        check_counts(table)
    installed = {
        (run.start - BASE) // PAGE_SIZE + i: small(pte.frame + i, pte.flags & ~HUGE)
        for run, pte in table.runs(pages(0, 2000))
        for i in range(run.size // PAGE_SIZE)
    }
    assert installed == naive
    assert table.resident == len(naive) * PAGE_SIZE
    for level in range(1, levels - 1):
        assert table.tables[level] == len({at(page) >> (12 + 9 * (level + 1)) for page in naive})


def test_holes_are_what_is_not_installed() -> None:
    table = PageTable()
    table.set_range(pages(2, 4), FrameNo(2), RW)
    table.set_range(pages(6, 7), FrameNo(6), RW)
    assert table.holes(pages(0, 8)) == [pages(0, 2), pages(4, 6), pages(7, 8)]
    assert table.holes(pages(2, 4)) == []
    assert (table.holes(pages(6, 7)), table.holes(pages(7, 8))) == ([], [pages(7, 8)])
