"""Ranges united, cut and compared by how they are armed."""

from __future__ import annotations

import pytest

from msharefs.addr import PAGE_SIZE, AddrRange, united
from msharefs.armings import Armed, ArmingRule, changes, cut
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import Arming, Vma
from msharefs.vma_set import VmaSet

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


def mapped(*vmas: tuple[int, int, Prot]) -> VmaSet:
    found = VmaSet()
    for first, end, prot in vmas:
        found.insert(Vma(pages(first, end), prot))
    return found


def test_what_shares_a_granule_with_a_hole_is_paged() -> None:
    rule = ArmingRule(pages(0, 16), 4 * PAGE_SIZE, paging_all=False)
    vmas = mapped((0, 6, PROT_RW), (6, 9, Prot.READ), (11, 16, PROT_RW))
    assert rule.over(vmas, pages(0, 16)) == [
        (pages(0, 6), NATIVE),
        (pages(6, 8), WP),
        (pages(8, 9), MISSING | WP),
        (pages(9, 12), MISSING),
        (pages(12, 16), NATIVE),
    ]
    assert rule.over(vmas, pages(7, 13)) == [
        (pages(7, 8), WP),
        (pages(8, 9), MISSING | WP),
        (pages(9, 12), MISSING),
        (pages(12, 13), NATIVE),
    ]


def test_without_holes_nothing_is_paged() -> None:
    rule = ArmingRule(pages(0, 16), 4 * PAGE_SIZE, paging_all=False)
    vmas = mapped((0, 6, PROT_RW), (6, 16, Prot.READ))
    assert rule.over(vmas, pages(0, 16)) == [(pages(0, 6), NATIVE), (pages(6, 16), WP)]


def test_changes_pair_what_was_with_what_is_cut_at_borders_too() -> None:
    before: Armed = [(pages(0, 4), NATIVE), (pages(4, 10), MISSING)]
    after: Armed = [(pages(0, 2), WP), (pages(2, 10), MISSING)]
    borders = [pages(0, 1).start, pages(6, 7).start, pages(10, 11).start]
    found = changes(before, after, borders)
    assert [(start // PAGE_SIZE, end // PAGE_SIZE, old, new) for start, end, old, new in found] == [
        (0, 2, NATIVE, WP),
        (2, 4, NATIVE, MISSING),
        (4, 6, MISSING, MISSING),
        (6, 10, MISSING, MISSING),
    ]
