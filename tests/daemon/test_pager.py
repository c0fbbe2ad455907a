"""The loop: handlers and when they are called, on descriptors of the test's own."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio
import trio.testing

from mshared.pager import AFTER_CHANGE, Pager


@pytest.fixture
def pager() -> Iterator[Pager]:
    pager = Pager()
    yield pager
    pager.close()


@pytest.fixture
def event() -> Iterator[Callable[[], int]]:
    """Make descriptors that are readable until they are read."""
    fds: list[int] = []

    def make() -> int:
        fds.append(os.eventfd(1, os.EFD_NONBLOCK))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def test_what_is_readable_has_its_handler_called(pager: Pager, event: Callable[[], int]) -> None:
    called: list[int] = []
    ready, quiet = event(), event()
    os.eventfd_read(quiet)
    for fd in (ready, quiet):
        pager.add(fd, lambda fd=fd: called.append(fd))  # type: ignore[misc]
    pager.drain()
    assert called == [ready]


def test_what_is_not_read_is_there_again(pager: Pager, event: Callable[[], int]) -> None:
    called: list[str] = []
    fd = event()
    pager.add(fd, lambda: called.append("left"))
    pager.drain()
    pager.drain()
    os.eventfd_read(fd)
    pager.drain()
    assert called == ["left", "left"]


def test_what_was_removed_is_watched_no_longer(pager: Pager, event: Callable[[], int]) -> None:
    fd = event()
    pager.add(fd, lambda: pytest.fail("called"))
    pager.remove(fd)
    pager.drain()


def test_a_descriptor_may_be_added_again_with_another_handler(pager: Pager, event: Callable[[], int]) -> None:
    called: list[str] = []
    fd = event()
    pager.add(fd, lambda: called.append("first"))
    pager.remove(fd)
    pager.add(fd, lambda: called.append("second"))
    pager.drain()
    assert called == ["second"]


def test_what_a_handler_removes_is_not_called_in_the_same_round(pager: Pager, event: Callable[[], int]) -> None:
    """A process that dies takes its other descriptors with it; one round has told of all of them."""
    called: list[int] = []
    pair = [event(), event()]

    def handler(mine: int) -> Callable[[], None]:
        def handle() -> None:
            called.append(mine)
            for fd in pair:
                pager.remove(fd)

        return handle

    for fd in pair:
        pager.add(fd, handler(fd))
    pager.drain()
    assert len(called) == 1


def test_what_a_handler_adds_is_served_in_the_next_round(pager: Pager, event: Callable[[], int]) -> None:
    called: list[str] = []
    parent, child = event(), event()

    def on_fork() -> None:
        os.eventfd_read(parent)
        pager.add(child, lambda: called.append("child"))

    pager.add(parent, on_fork)
    pager.drain()
    assert called == []
    pager.drain()
    assert called == ["child"]


@pytest.mark.parametrize("nested", [False, True], ids=["", "in a round within the round"])
def test_a_number_that_is_given_again_does_not_have_the_event_of_the_one_before(
    pager: Pager, event: Callable[[], int], nested: bool
) -> None:
    """Who died first takes another's descriptor away, and somebody who lives gets the number: both were readable."""
    called: list[str] = []
    pair = [event(), event()]

    def on_death(mine: int) -> None:
        called.append("dead")
        other = pair[1 - pair.index(mine)]
        for fd in pair:
            pager.remove(fd)
        os.eventfd_read(other)
        pager.add(other, lambda: called.append("alive"))
        if nested:
            pager.drain()

    for fd in pair:
        pager.add(fd, partial(on_death, fd))
    pager.drain()
    assert called == ["dead"]
    os.eventfd_write(next(fd for fd in pair if fd in pager._handlers), 1)
    pager.drain()
    assert called == ["dead", "alive"]


def test_more_than_one_batch_is_served(pager: Pager, event: Callable[[], int]) -> None:
    """All of them, in as few rounds as batches."""
    fds = [event() for _ in range(600)]
    served: list[int] = []

    def handler(fd: int) -> Callable[[], None]:
        def handle() -> None:
            os.eventfd_read(fd)
            served.append(fd)

        return handle

    for fd in fds:
        pager.add(fd, handler(fd))
    for _ in range(3):
        pager.drain()
    assert sorted(served) == fds


def test_work_for_later_comes_after_the_events_and_once(pager: Pager, event: Callable[[], int]) -> None:
    called: list[str] = []
    fd = event()
    pager.later(lambda: called.append("later"))
    pager.add(fd, lambda: (called.append("event"), os.eventfd_read(fd)))  # type: ignore[arg-type, return-value]
    pager.drain()
    pager.drain()
    assert called == ["event", "later"]


def test_work_for_later_may_ask_for_another_time(pager: Pager) -> None:
    called: list[int] = []

    def work() -> None:
        called.append(len(called))
        if len(called) < 3:
            pager.later(work)

    pager.later(work)
    pager.drain()
    assert called == [0]
    pager.drain()
    pager.drain()
    pager.drain()
    assert called == [0, 1, 2]


def test_work_for_a_later_time_waits_until_then(pager: Pager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is due comes first."""
    called: list[str] = []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for delay in (0.3, 0.1, 0.1, 0.0):
        pager.later(lambda delay=delay: called.append(str(delay)), delay=delay)  # type: ignore[misc]
    pager.drain()
    assert called == ["0.0"]
    now += 0.2
    pager.drain()
    assert called == ["0.0", "0.1", "0.1"]
    now += 0.2
    pager.drain()
    assert called == ["0.0", "0.1", "0.1", "0.3"]


def test_a_mistake_in_a_handler_is_logged_and_concerns_nobody_else(
    pager: Pager, event: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []
    for _ in range(3):
        fd = event()
        pager.add(fd, lambda fd=fd: called.append(fd))  # type: ignore[misc]

    def mistake() -> None:
        raise ZeroDivisionError("a mistake")

    pager.add(event(), mistake)
    pager.later(mistake)
    pager.later(lambda: called.append(-1))
    pager.drain()
    assert len(called) == 4
    assert called[-1] == -1
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["a mistake"] * 2
    assert caplog.text.count("pager: a handler failed") == 2


def test_what_must_end_a_program_ends_the_loop_too(pager: Pager, event: Callable[[], int]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    pager.add(event(), interrupt)
    with pytest.raises(KeyboardInterrupt):
        pager.drain()


class TestLingering:
    """Looking for the next fault, awake."""

    @pytest.fixture
    def yields(self, monkeypatch: pytest.MonkeyPatch) -> list[None]:
        """Each moment for which it had nothing to do and stayed."""
        yields: list[None] = []
        monkeypatch.setattr(os, "sched_yield", lambda: yields.append(None))
        return yields

    def test_it_stays_for_a_moment_while_nobody_wants_anything(self, pager: Pager, yields: list[None]) -> None:
        pager.linger()
        assert yields

    def test_for_who_was_answered_it_stays_until_it_can_have_woken_up(
        self, pager: Pager, yields: list[None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = itertools.count(step=1e-5)
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        pager.linger()
        usual = len(yields)
        pager.linger(AFTER_CHANGE)
        assert abs(len(yields) - usual - AFTER_CHANGE / 1e-5) <= 2
        assert usual < len(yields) / 4

    def test_who_asks_for_something_does_not_wait_for_that(
        self, pager: Pager, event: Callable[[], int], yields: list[None]
    ) -> None:
        """But for faults that are there, which come first."""
        called: list[str] = []
        fault = event()
        pager.add(fault, lambda: (called.append("fault"), os.eventfd_read(fault)))  # type: ignore[arg-type, return-value]
        pager.add_caller(event())
        pager.linger()
        assert called == ["fault"]
        assert not yields

    def test_a_caller_that_has_gone_changes_nothing(
        self, pager: Pager, event: Callable[[], int], yields: list[None]
    ) -> None:
        caller = event()
        pager.add_caller(caller)
        pager.remove_caller(caller)
        pager.linger()
        assert yields


def test_closing_leaves_the_descriptors_open(event: Callable[[], int]) -> None:
    pager = Pager()
    fd = event()
    pager.add(fd, lambda: None)
    pager.close()
    assert os.eventfd_read(fd) == 1


class TestRun:
    """The loop in a nursery."""

    def run_until(self, pager: Pager, done: trio.Event, *beside: Callable[[], object]) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pager.run)
                for each in beside:
                    await trio.testing.wait_all_tasks_blocked()
                    each()
                with trio.fail_after(10):
                    await done.wait()
                nursery.cancel_scope.cancel()

        trio.run(main)

    def test_it_waits_and_serves(self, pager: Pager, event: Callable[[], int]) -> None:
        served, done = [], trio.Event()
        fd = event()
        os.eventfd_read(fd)

        def handle() -> None:
            served.append(os.eventfd_read(fd))
            if len(served) == 3:
                done.set()

        pager.add(fd, handle)
        self.run_until(pager, done, *[lambda: os.eventfd_write(fd, 1)] * 3)
        assert served == [1, 1, 1]

    def test_work_for_later_does_not_wait_for_the_next_event(self, pager: Pager) -> None:
        """Another task asks for it while the pager waits for whatever comes."""
        done = trio.Event()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pager.run)
                await trio.testing.wait_all_tasks_blocked()
                pager.later(done.set)
                with trio.fail_after(10):
                    await done.wait()
                nursery.cancel_scope.cancel()

        trio.run(main)

    def test_work_for_a_later_time_is_done_though_nothing_comes(self, pager: Pager) -> None:
        """It may be asked for while the pager waits for whatever comes, or before."""
        done = trio.Event()
        order: list[str] = []
        pager.later(lambda: (order.append("later"), done.set()), delay=0.1)  # type: ignore[arg-type, return-value]
        self.run_until(pager, done, lambda: pager.later(partial(order.append, "sooner"), delay=0.05))
        assert order == ["sooner", "later"]

    def test_work_for_later_is_tried_again_though_nothing_is_readable(self, pager: Pager) -> None:
        tries, done = [], trio.Event()

        def work() -> None:
            tries.append(1)
            if len(tries) < 5:
                pager.later(work)
            else:
                done.set()

        pager.later(work)
        self.run_until(pager, done)
        assert len(tries) == 5

    def test_it_goes_on_after_a_mistake(
        self, pager: Pager, event: Callable[[], int], caplog: pytest.LogCaptureFixture
    ) -> None:
        done = trio.Event()
        fd = event()
        os.eventfd_read(fd)
        handled: list[int] = []

        def handle() -> None:
            handled.append(os.eventfd_read(fd))
            if len(handled) == 1:
                raise ZeroDivisionError("a mistake")
            done.set()

        pager.add(fd, handle)
        self.run_until(pager, done, *[lambda: os.eventfd_write(fd, 1)] * 2)
        assert len(handled) == 2
        assert "a handler failed" in caplog.text
