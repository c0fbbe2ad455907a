"""Ranges united, cut and compared by how they are armed."""

from __future__ import annotations

import pytest

from msharefs.addr import PAGE_SIZE, AddrRange, united
from msharefs.armings import Armed, changes, cut, page_within
from msharefs.vma import Arming

NATIVE, MISSING, WP = Arming.NATIVE, Arming.MISSING, Arming.WP


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(first * PAGE_SIZE, (end - first) * PAGE_SIZE)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], []),
        ([(1, 2)], [(1, 2)]),
        ([(1, 2), (3, 4)], [(1, 2), (3, 4)]),
        ([(1, 2), (2, 4)], [(1, 4)]),
        ([(1, 5), (2, 3), (4, 6), (6, 7), (9, 10)], [(1, 7), (9, 10)]),
        ([(1, 2), (1, 2)], [(1, 2)]),
    ],
)
def test_ranges_that_overlap_or_touch_are_united(
    ranges: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert united(pages(*ar) for ar in ranges) == [pages(*ar) for ar in expected]


@pytest.mark.parametrize(
    ("borders", "expected"),
    [
        ([], [(2, 8)]),
        ([1, 2, 8, 9], [(2, 8)]),
        ([3, 7], [(2, 3), (3, 7), (7, 8)]),
        ([0, 5, 20], [(2, 5), (5, 8)]),
    ],
)
def test_a_range_is_cut_at_the_borders_inside_it(borders: list[int], expected: list[tuple[int, int]]) -> None:
    addresses = [pages(border, border + 1).start for border in borders]
    assert list(cut(pages(2, 8), addresses)) == [pages(*ar) for ar in expected]


def test_within_paged_ranges_missing_is_added() -> None:
    parts = [(pages(0, 4), NATIVE), (pages(4, 6), WP), (pages(6, 10), NATIVE)]
    assert list(page_within(parts, [pages(2, 5), pages(9, 10)])) == [
        (pages(0, 2), NATIVE),
        (pages(2, 4), MISSING),
        (pages(4, 5), MISSING | WP),
        (pages(5, 6), WP),
        (pages(6, 9), NATIVE),
        (pages(9, 10), MISSING),
    ]


def test_nothing_paged_changes_nothing() -> None:
    assert list(page_within([(pages(0, 4), WP)], [])) == [(pages(0, 4), WP)]


def test_changes_pair_what_was_with_what_is_cut_at_borders_too() -> None:
    before: Armed = [(pages(0, 4), NATIVE), (pages(4, 10), MISSING)]
    after: Armed = [(pages(0, 2), WP), (pages(2, 10), MISSING)]
    assert list(changes(before, after, [pages(6, 7).start])) == [
        (pages(0, 2), NATIVE, WP),
        (pages(2, 4), NATIVE, MISSING),
        (pages(4, 6), MISSING, MISSING),
        (pages(6, 10), MISSING, MISSING),
    ]
