"""How much of a file a fault brings in."""

from __future__ import annotations

import pytest

from msharefs.addr import PAGE_SIZE, AddrRange
from msharefs.perms import Advice
from msharefs.readahead import MOST, PIECE, Readahead
from msharefs.vma import FileId, FileSource, Vma

BASE = 32 << 40
AREA = AddrRange.sized(BASE, 16 * MOST)


def mapping(advice: Advice = Advice.NORMAL, ar: AddrRange = AREA) -> Vma:
    return Vma(ar, source=FileSource(FileId(1), 0, shared=True, writable=True), advice=advice)


def page(offset: int) -> AddrRange:
    return AddrRange.sized(BASE + offset, PAGE_SIZE)


def at(offset: int, size: int) -> AddrRange:
    return AddrRange.sized(BASE + offset, size)


def test_a_touch_brings_what_lies_around_the_page() -> None:
    assert Readahead().next(page(3 * PIECE + 5 * PAGE_SIZE), mapping()) == (at(3 * PIECE, PIECE), None)


def test_what_lies_around_ends_with_the_mapping() -> None:
    small = mapping(ar=at(PAGE_SIZE, 3 * PAGE_SIZE))
    assert Readahead().next(page(2 * PAGE_SIZE), small) == (small.ar, None)


def test_random_access_brings_the_page_alone_and_says_nothing_of_the_order() -> None:
    readahead = Readahead()
    for number in range(4):
        alone = page(number * PAGE_SIZE)
        assert readahead.next(alone, mapping(Advice.RANDOM)) == (alone, None)
    assert readahead == Readahead()


def test_sequential_access_brings_as_much_as_possible_at_once_and_ahead() -> None:
    assert Readahead().next(page(PAGE_SIZE), mapping(Advice.SEQUENTIAL)) == (
        at(PAGE_SIZE, MOST),
        at(PAGE_SIZE + MOST, MOST),
    )


def test_in_order_ever_more_is_brought_up_to_the_most() -> None:
    readahead, sizes, offset = Readahead(), [], 0
    for _ in range(7):
        piece, ahead = readahead.next(page(offset), mapping())
        sizes.append(piece.size)
        offset = (ahead or piece).end - BASE
    assert sizes == [PIECE, 2 * PIECE, 4 * PIECE, 8 * PIECE, MOST, MOST, MOST]


def test_nothing_is_brought_ahead_of_the_end_of_the_mapping() -> None:
    last = AREA.size - MOST
    assert Readahead().next(page(last), mapping(Advice.SEQUENTIAL)) == (at(last, MOST), None)


@pytest.mark.parametrize("late", [PAGE_SIZE, PIECE - PAGE_SIZE])
def test_a_touch_of_what_was_brought_just_now_does_not_end_the_order(late: int) -> None:
    readahead = Readahead()
    readahead.next(page(0), mapping())
    readahead.next(page(late), mapping())
    assert readahead.next(page(PIECE), mapping())[0] == at(PIECE, 2 * PIECE)


def test_a_jump_ends_the_order() -> None:
    readahead = Readahead()
    readahead.next(page(0), mapping())
    readahead.next(page(8 * MOST), mapping())
    assert readahead.next(page(PIECE), mapping()) == (at(PIECE, PIECE), None)
