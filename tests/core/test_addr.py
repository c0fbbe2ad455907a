"""Ranges are half-open, never empty, and cut where they should be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.addr import (
    PAGE_SIZE,
    PGDIR_SIZE,
    PMD_SIZE,
    PUD_SIZE,
    TABLE_ENTRIES,
    USER_MAX,
    USER_MIN,
    WINDOW_END,
    WINDOW_START,
    Address,
    AddrRange,
    round_down,
    round_up,
)
from msharefs.errors import InvalidArgumentError

SMALL = st.integers(0, 40)
POWERS = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def small_ranges(draw: st.DrawFn) -> AddrRange:
    """Ranges so small that their addresses can be counted."""
    return AddrRange.sized(draw(SMALL), draw(st.integers(1, 40)))


def addresses(ar: AddrRange | None) -> set[int]:
    """Every address of a range, one by one."""
    return set() if ar is None else set(range(ar.start, ar.end))


def ar(start: int, end: int) -> AddrRange:
    return AddrRange(Address(start), Address(end))


def test_sizes_are_those_of_x86_64() -> None:
    assert (PAGE_SIZE, PMD_SIZE, PUD_SIZE, PGDIR_SIZE) == (4 << 10, 2 << 20, 1 << 30, 512 << 30)
    assert PMD_SIZE == TABLE_ENTRIES * PAGE_SIZE
    assert PUD_SIZE == TABLE_ENTRIES * PMD_SIZE
    assert PGDIR_SIZE == TABLE_ENTRIES * PUD_SIZE


def test_the_daemons_window_is_made_of_user_addresses_and_of_whole_top_level_entries() -> None:
    assert (USER_MIN, USER_MAX) == (0x10000, 0x7FFF_FFFF_F000)
    assert USER_MIN < WINDOW_START < WINDOW_END <= USER_MAX
    assert ar(WINDOW_START, WINDOW_END).is_aligned(PGDIR_SIZE)


@given(st.integers(0, 1 << 48), st.sampled_from([1, 2, PAGE_SIZE, PMD_SIZE, PGDIR_SIZE]))
def test_rounding_gives_the_nearest_multiples(value: int, to: int) -> None:
    down, up = round_down(value, to), round_up(value, to)
    assert down % to == up % to == 0
    assert down <= value <= up
    assert value - down < to
    assert up - value < to


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (6, 5), (-1, 5), (-2, -1)])
def test_an_empty_backward_or_negative_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(InvalidArgumentError, match="not a range"):
        ar(start, end)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_must_be_positive(size: int) -> None:
    with pytest.raises(InvalidArgumentError):
        AddrRange.sized(PAGE_SIZE, size)


def test_sized_and_size_agree() -> None:
    assert AddrRange.sized(0x1000, 0x2000) == ar(0x1000, 0x3000)
    assert ar(0x1000, 0x3000).size == 0x2000


@pytest.mark.parametrize(
    ("addr", "size", "start"),
    [(0, PAGE_SIZE, 0), (4095, PAGE_SIZE, 0), (4096, PAGE_SIZE, 4096), (PMD_SIZE + 1, PMD_SIZE, PMD_SIZE)],
)
def test_page_at_is_the_page_around_an_address(addr: int, size: int, start: int) -> None:
    assert AddrRange.page_at(addr, size) == AddrRange.sized(start, size)


def test_the_end_lies_outside() -> None:
    assert 2 in ar(2, 4)
    assert 3 in ar(2, 4)
    assert 1 not in ar(2, 4)
    assert 4 not in ar(2, 4)
    assert "3" not in ar(2, 4)


@given(small_ranges(), small_ranges())
def test_covers_overlaps_and_intersect_agree_with_sets(one: AddrRange, other: AddrRange) -> None:
    assert one.covers(other) == (addresses(other) <= addresses(one))
    assert one.overlaps(other) == bool(addresses(one) & addresses(other))
    assert addresses(one.intersect(other)) == addresses(one) & addresses(other)


def test_ranges_that_only_touch_do_not_overlap() -> None:
    assert not ar(0, 2).overlaps(ar(2, 4))
    assert ar(0, 2).intersect(ar(2, 4)) is None


@given(small_ranges(), POWERS)
def test_pieces_are_the_range_cut_at_every_multiple(whole: AddrRange, size: int) -> None:
    pieces = list(whole.pieces(size))
    assert [addr for piece in pieces for addr in range(piece.start, piece.end)] == sorted(addresses(whole))
    assert all(round_down(piece.start, size) == round_down(piece.end - 1, size) for piece in pieces)
    assert all(below.end % size == 0 for below in pieces[:-1])


@given(small_ranges(), POWERS)
def test_aligned_means_both_ends(whole: AddrRange, to: int) -> None:
    assert whole.is_aligned(to) == (whole.start % to == 0 and whole.end % to == 0)


@given(small_ranges(), POWERS)
def test_inner_is_made_of_all_whole_multiples_inside(whole: AddrRange, size: int) -> None:
    inside = [each for start in range(0, 96, size) if whole.covers(each := AddrRange.sized(start, size))]
    assert addresses(whole.inner(size)) == {address for each in inside for address in addresses(each)}


def test_moved_keeps_the_size_and_refuses_to_go_below_zero() -> None:
    assert ar(4, 6).moved(10) == ar(14, 16)
    assert ar(4, 6).moved(-4) == ar(0, 2)
    with pytest.raises(InvalidArgumentError):
        ar(4, 6).moved(-5)


def test_ranges_sort_by_start_then_end() -> None:
    assert sorted([ar(2, 4), ar(1, 9), ar(1, 3)]) == [ar(1, 3), ar(1, 9), ar(2, 4)]


def test_text_is_that_of_proc_maps() -> None:
    assert str(ar(0x1000, 0x200000000000)) == "000000001000-200000000000"
