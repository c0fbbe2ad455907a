"""How many pages a touch of a reference page brings."""

from __future__ import annotations

import pytest

from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.perms import Advice
from msharefs.streams import MOST, Streams

BASE = 32 << 40
FREE = AddrRange.sized(BASE, 256 * MOST)


def page(offset: int) -> AddrRange:
    return AddrRange.sized(BASE + offset, PAGE_SIZE)


def sizes_in_order(streams: Streams, start: int, end: int, advice: Advice = Advice.NORMAL) -> list[int]:
    """What comes at once when everything in between is touched in order."""
    found, at = [], start
    while at < end:
        piece = streams.piece(page(at), FREE, advice)
        assert piece.start == BASE + at
        found.append(piece.size)
        at += piece.size
    return found


def test_a_touch_on_its_own_brings_its_page_alone() -> None:
    streams = Streams()
    for number in (0, 7, 3, 5000):
        assert streams.piece(page(number * PAGE_SIZE), FREE, Advice.NORMAL) == page(number * PAGE_SIZE)


def test_in_order_ever_more_comes() -> None:
    sizes = sizes_in_order(Streams(), 0, 4 * MOST)
    assert sizes[0] == PAGE_SIZE
    assert sizes[-3:] == [MOST, MOST, MOST]
    assert len(sizes) <= 9
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("length", [PAGE_SIZE, 5 * PAGE_SIZE, MOST // 8, 500 * PAGE_SIZE, MOST, 4_096_000, 3 * MOST])
def test_not_much_comes_for_nothing(length: int) -> None:
    """At most three times what was touched of little, and as much again of much."""
    came = sum(sizes_in_order(Streams(), 0, length))
    assert came <= (4 * length if length < MOST // 4 else 2 * length)


def test_a_long_stream_comes_by_whole_pieces_wherever_it_starts() -> None:
    at = 5 * PAGE_SIZE
    streams, pieces = Streams(), []
    while at < 5 * MOST:
        pieces.append(streams.piece(page(at), FREE, Advice.NORMAL))
        at += pieces[-1].size
    assert [piece.size for piece in pieces[-3:]] == [MOST] * 3
    assert all(piece.start % MOST == 0 for piece in pieces[-3:])


def test_several_streams_grow_side_by_side() -> None:
    streams, at = Streams(), [0, 4 * MOST, 8 * MOST]
    for _ in range(4):
        at = [start + streams.piece(page(start), FREE, Advice.NORMAL).size for start in at]
    assert [end % (4 * MOST) for end in at] == [at[0]] * 3
    assert at[0] >= 64 * PAGE_SIZE


def test_old_streams_are_forgotten() -> None:
    streams = Streams()
    streams.piece(page(0), FREE, Advice.NORMAL)
    for number in range(1000):
        streams.piece(page((2 * number + 8) * PAGE_SIZE), FREE, Advice.NORMAL)
    assert streams.piece(page(PAGE_SIZE), FREE, Advice.NORMAL) == page(PAGE_SIZE)


def test_nothing_comes_that_is_not_free() -> None:
    free = AddrRange.sized(BASE, 2 * PAGE_SIZE)
    streams = Streams()
    streams.piece(page(0), free, Advice.NORMAL)
    assert streams.piece(page(PAGE_SIZE), free, Advice.NORMAL) == page(PAGE_SIZE)


def test_with_random_order_each_page_comes_alone() -> None:
    assert set(sizes_in_order(Streams(), 0, 16 * PAGE_SIZE, Advice.RANDOM)) == {PAGE_SIZE}


def test_with_sequential_order_all_comes_up_to_a_border() -> None:
    assert sizes_in_order(Streams(), MOST // 2, 2 * MOST, Advice.SEQUENTIAL) == [MOST // 2, MOST]


def test_a_huge_page_comes_alone() -> None:
    huge = AddrRange.sized(BASE, PMD_SIZE)
    streams = Streams()
    for _ in range(3):
        assert streams.piece(huge, FREE, Advice.NORMAL) == huge
        huge = huge.moved(PMD_SIZE)


@pytest.mark.parametrize("length", [40 * PAGE_SIZE, 500 * PAGE_SIZE, MOST, 1000 * PAGE_SIZE])
def test_what_two_streams_came_to_is_expected_of_the_third(length: int) -> None:
    streams = Streams()
    starts = (0, 4 * MOST, 8 * MOST)
    first, second, third = (sizes_in_order(streams, start, start + length) for start in starts)
    assert first == second
    assert len(third) <= 2 < len(second)
    assert sum(third) <= sum(second)


def test_what_is_expected_is_given_up_when_it_does_not_come() -> None:
    streams = Streams()
    for number in range(2):
        sizes_in_order(streams, number * 4 * MOST, number * 4 * MOST + MOST // 2)
    expected = [streams.piece(page((2 + number) * 4 * MOST), FREE, Advice.NORMAL).size for number in range(3)]
    assert expected[0] >= MOST // 4
    assert expected[1:] == [PAGE_SIZE, PAGE_SIZE]


def test_huge_pages_come_whole_and_whether_they_are_used_is_seen_from_time_to_time() -> None:
    streams = Streams()
    for number in range(2):
        sizes_in_order(streams, number * 4 * MOST, number * 4 * MOST + MOST)
    first = [streams.piece(page((2 + number) * 4 * MOST), FREE, Advice.NORMAL).size for number in range(10)]
    assert first == [MOST] * 7 + [3 * MOST // 4, PAGE_SIZE, PAGE_SIZE]


def test_a_huge_page_that_is_used_is_trusted_again() -> None:
    streams = Streams()
    pieces = [sizes_in_order(streams, number * 4 * MOST, number * 4 * MOST + MOST) for number in range(30)]
    assert [len(sizes) for sizes in pieces[2:9]] == [1] * 7
    assert [len(sizes) for sizes in pieces[2:]].count(1) >= 20
    assert all(sum(sizes) == MOST for sizes in pieces)


def test_nothing_is_expected_after_one_stream() -> None:
    streams = Streams()
    sizes_in_order(streams, 0, MOST)
    assert sizes_in_order(streams, 4 * MOST, 4 * MOST + PAGE_SIZE) == [PAGE_SIZE]
    assert sizes_in_order(streams, 8 * MOST, 8 * MOST + PAGE_SIZE) == [PAGE_SIZE]


def test_the_lesser_of_two_streams_is_what_is_expected() -> None:
    streams = Streams()
    sizes_in_order(streams, 0, MOST)
    short = sum(sizes_in_order(streams, 4 * MOST, 4 * MOST + 16 * PAGE_SIZE))
    assert streams.piece(page(8 * MOST), FREE, Advice.NORMAL).size < short
    assert streams.piece(page(12 * MOST), FREE, Advice.NORMAL).size == PAGE_SIZE


def test_a_page_that_came_ahead_changes_nothing_about_what_is_expected_behind_it() -> None:
    streams = Streams()
    for number in range(2):
        sizes_in_order(streams, number * 4 * MOST, number * 4 * MOST + MOST // 2)
    for number in range(2, 4):
        streams.came(page(number * 4 * MOST))
    expected = [streams.piece(page(number * 4 * MOST + PAGE_SIZE), FREE, Advice.NORMAL).size for number in range(2, 4)]
    assert expected[0] >= MOST // 4
    assert expected[1] == 3 * PAGE_SIZE


def steps(streams: Streams, offset: int) -> list[int]:
    """Where a touch brings pages elsewhere, and what comes with it there."""
    found = streams.steps(page(offset))
    for ar in found:
        streams.came(ar)
    streams.piece(page(offset), FREE, Advice.NORMAL)
    return [ar.start - BASE for ar in found]


def test_steps_of_one_size_bring_what_comes_next_twice_as_many_each_time() -> None:
    streams, step, at = Streams(), 4_096_000, 0
    counts = []
    for _ in range(12):
        found = steps(streams, at)
        assert found == [at + step * number for number in range(1, len(found) + 1)]
        counts.append(len(found))
        at += step * (len(found) + 1)
    assert counts == [0, 0, 1, 2, 4, 8, 16, 32, 64, 64, 64, 64]


def test_steps_down_do_so_too_as_far_as_there_are_addresses() -> None:
    streams = Streams()
    assert [steps(streams, 100 * PAGE_SIZE - 10 * number * PAGE_SIZE) for number in range(3)][-1] == [70 * PAGE_SIZE]
    near_the_start = AddrRange.sized(3 * PAGE_SIZE, PAGE_SIZE)
    low = Streams()
    for number in (2, 1, 0):
        found = low.steps(near_the_start.moved(number * 2 * PAGE_SIZE))
    assert [ar.start for ar in found] == [PAGE_SIZE]


def test_steps_of_changing_size_and_touches_in_order_bring_nothing_elsewhere() -> None:
    streams = Streams()
    assert [steps(streams, number * number * PAGE_SIZE) for number in range(5, 20)] == [[]] * 15
    at = 1000 * PAGE_SIZE
    for _ in range(5):
        assert streams.steps(page(at)) == []
        at += streams.piece(page(at), FREE, Advice.NORMAL).size


def test_who_goes_on_behind_a_page_that_came_goes_on_in_order() -> None:
    streams = Streams()
    for number in range(3):
        steps(streams, number * MOST)
    assert streams.piece(page(3 * MOST + PAGE_SIZE), FREE, Advice.NORMAL).size > PAGE_SIZE
