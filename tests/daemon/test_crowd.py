"""The same for many, by several threads."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from mshared.crowd import CROWD, do_for_all

PATIENCE = 60.0
"""Seconds."""


@pytest.mark.parametrize("size", [0, 1, CROWD - 1, CROWD, CROWD + 1, 50 * CROWD + 7])
def test_each_has_its_turn_once(size: int) -> None:
    seen: list[int] = []
    do_for_all(range(size), seen.append)
    assert Counter(seen) == Counter(range(size))


def test_few_are_served_in_order_by_the_caller() -> None:
    seen: list[tuple[int, int]] = []
    do_for_all(range(CROWD - 1), lambda each: seen.append((each, threading.get_ident())))
    assert seen == [(each, threading.get_ident()) for each in range(CROWD - 1)]


def test_many_are_served_by_two_threads_at_once() -> None:
    both = threading.Barrier(2, timeout=PATIENCE)
    met: set[int] = set()

    def meet(_: int) -> None:
        if threading.get_ident() not in met:
            both.wait()
            met.add(threading.get_ident())

    do_for_all(range(CROWD), meet)
    assert len(met) == 2


@pytest.mark.parametrize("size", [1, CROWD, 10 * CROWD])
def test_what_goes_wrong_is_raised_when_all_have_stopped(size: int) -> None:
    running: Counter[int] = Counter()

    def fail_at_last(each: int) -> None:
        running[threading.get_ident()] += 1
        if each == size - 1:
            raise MemoryError(each)

    with pytest.raises(MemoryError, match=str(size - 1)):
        do_for_all(range(size), fail_at_last)
    done = running.total()
    do_for_all(range(CROWD), lambda _: None)
    assert running.total() == done
