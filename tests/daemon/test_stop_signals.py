"""The first signal stops the daemon, further ones change nothing; in processes of their own, which get them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import trio

from mshared.stop_signals import StopSignals

Apart = Callable[[Callable[[], object]], None]
BOTH = [signal.SIGTERM, signal.SIGINT]


def kill(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def ignored() -> set[signal.Signals]:
    """What the kernel throws away for this process."""
    with open("/proc/self/status") as status:
        mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
    return {number for number in BOTH if mask >> (number - 1) & 1}


@pytest.mark.parametrize("number", BOTH)
def test_one_that_comes_while_it_is_waited_for(apart: Apart, number: signal.Signals) -> None:
    def work() -> None:
        stop = StopSignals()

        async def main() -> signal.Signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, kill, number)
                return await stop.wait()

        assert trio.run(main) is number

    apart(work)


@pytest.mark.parametrize("number", BOTH)
def test_one_that_came_before_is_not_lost(apart: Apart, number: signal.Signals) -> None:
    def work() -> None:
        stop = StopSignals()
        kill(number)
        assert trio.run(stop.wait) is number

    apart(work)


def test_the_first_one_counts_and_further_ones_are_not_even_delivered(apart: Apart) -> None:
    def work() -> None:
        stop = StopSignals()
        assert ignored() == set()
        kill(signal.SIGINT)
        assert ignored() == set(BOTH)
        for number in BOTH * 3:
            kill(number)
        assert trio.run(stop.wait) is signal.SIGINT

    apart(work)


def test_afterwards_they_stay_ignored_while_the_process_ends(apart: Apart) -> None:
    def work() -> None:
        stop = StopSignals()
        kill(signal.SIGTERM)
        stop.ignore()
        assert [signal.getsignal(number) for number in BOTH] == [signal.SIG_IGN] * 2
        for number in BOTH:
            kill(number)
        assert ignored() == set(BOTH)

    apart(work)


def test_one_that_comes_when_the_loop_is_over_disturbs_nobody(apart: Apart) -> None:
    """The daemon was unmounted from outside, say, and gives back what it has taken."""

    def work() -> None:
        stop = StopSignals()

        async def main() -> None:
            with trio.move_on_after(0):
                await stop.wait()

        trio.run(main)
        kill(signal.SIGTERM)
        assert ignored() == set(BOTH)
        stop.ignore()

    apart(work)


def test_a_hangup_is_ignored_until_somebody_takes_it(apart: Apart) -> None:
    """It never ends the daemon unawares, with all it has taken from the machine left behind."""

    def work() -> None:
        StopSignals()
        kill(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    apart(work)


def test_a_hangup_stops_what_runs_on_a_terminal(apart: Apart) -> None:
    def work() -> None:
        stop = StopSignals(hangup=True)
        kill(signal.SIGHUP)
        assert ignored() == set(BOTH)
        assert trio.run(stop.wait) is signal.SIGHUP
        kill(signal.SIGHUP)

    apart(work)
