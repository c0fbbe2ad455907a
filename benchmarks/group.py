"""What a group of measurements is: a name, what it compares, what it does, and how that is shown."""

from __future__ import annotations

import contextlib
import secrets
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, TypeVar

import attrs

from benchmarks.daemon import Serving, private_daemon
from benchmarks.driver import Worker
from benchmarks.machine import GIB, MIB
from benchmarks.memory import Kind
from benchmarks.results import Measured, Metric, Row

P = TypeVar("P")
Key = tuple[str, str, float]
"""Metric, series, and where on the metric's axis: 0 if it has none."""


@attrs.define
class Samples:
    """Everything that a group has measured."""

    values: dict[Key, list[float]] = attrs.Factory(dict)
    computed: set[Key] = attrs.Factory(set)

    def add(self, metric: str, series: str, value: float, at: float = 0) -> None:
        """Note a number that was measured."""
        self.values.setdefault((metric, series, at), []).append(value)

    def compute(self, metric: str, series: str, value: float, at: float) -> None:
        """Note a number that was not measured, but follows from what was."""
        self.values[metric, series, at] = [value]
        self.computed.add((metric, series, at))

    def median(self, metric: str, series: str, at: float = 0) -> float:
        """The median of what was noted."""
        return statistics.median(self.values[metric, series, at])

    def measured(self, metric: Metric) -> Measured:
        """What there is of a metric, in its unit."""
        keys = [key for key in self.values if key[0] == metric.name]
        return Measured(metric, [self._row(metric, key) for key in keys])

    def _row(self, metric: Metric, key: Key) -> Row:
        values = [value * metric.scale for value in self.values[key]]
        theirs = self.values.get((metric.name, metric.peer, key[2]))
        ratio = None if theirs is None else _times(statistics.median(values), statistics.median(theirs) * metric.scale)
        if ratio and metric.more_is_better:
            ratio = 1 / ratio
        median, computed = statistics.median(values), key in self.computed
        return Row(key[1], key[2], median, min(values), max(values), values, computed, ratio)


@attrs.define
class Bench:
    """What a group needs in order to run: daemons, somewhere to put samples, and somebody to tell how far it is."""

    say: Callable[[str], None]
    no_hugetlb: str | None = None
    samples: Samples = attrs.Factory(Samples)
    notes: list[str] = attrs.Factory(list)

    def note(self, text: str) -> None:
        """Tell something that a reader of the figures must know."""
        if text not in self.notes:
            self.notes.append(text)
            self.say(f"note: {text}")

    @contextlib.contextmanager
    def daemon(self, *options: str, pool: int = 0) -> Iterator[Serving]:
        """A daemon for some measurements. ``pool``: bytes of huge pages it shall have, if there can be any."""
        with contextlib.ExitStack() as stack:
            serving = None
            if pool and self.no_hugetlb is None:
                pages = ("--hugetlb-pool", f"{pool // MIB}M")
                try:
                    serving = attrs.evolve(stack.enter_context(private_daemon("bench", *options, *pages)), hugetlb=True)
                except RuntimeError as error:
                    self.note(f"hugetlb is left out: {gist(error)}")
            elif pool:
                self.note(f"hugetlb is left out: {self.no_hugetlb}")
            if serving is None:
                serving = stack.enter_context(private_daemon("bench", *options))
            for warning in serving.warnings:
                self.note(warning)
            yield serving


@attrs.frozen
class Group(Generic[P]):
    """Measurements that belong together. ``quick`` and ``full`` say how much to do; ``run`` does it.

    ``method`` is what a reader must know of how it is measured. ``pictures``: names of plots, and the metrics in each.
    """

    name: str
    compares: str
    method: str
    quick: Callable[[], P]
    full: Callable[[], P]
    metrics: Callable[[P], Iterable[Metric]]
    run: Callable[[Bench, P], None]
    pictures: dict[str, tuple[str, ...]]


def _times(ours: float, theirs: float) -> float | None:
    return theirs / ours if ours > 0 and theirs > 0 else None


RUN: Final = f"bench-{secrets.token_hex(4)}"
"""What the names of all memory that this run makes start with."""


def new_name() -> str:
    """A name that nothing has yet."""
    return f"{RUN}-{secrets.token_hex(6)}"


def kinds_of(serving: Serving) -> tuple[Kind, ...]:
    """The kinds of memory that can be compared: thp is there for root's daemon only, hugetlb where it has a pool."""
    missing = {Kind.THP: serving.backing != Kind.THP, Kind.HUGETLB: not serving.hugetlb, Kind.BARE: True}
    return tuple(kind for kind in Kind if not missing.get(kind, False))


def in_turn(kinds: tuple[Kind, ...], number: int) -> Iterator[Kind]:
    """All kinds, another one first in each round."""
    first = number % len(kinds)
    yield from kinds[first:] + kinds[:first]


def size_of(kind: Kind, wanted: int) -> int:
    """The size nearest to what is wanted that the kind can have: hugetlb comes in whole gibibytes."""
    return max(wanted, GIB) // GIB * GIB if kind is Kind.HUGETLB else wanted


def why_no_hugetlb() -> str | None:
    """Ask a daemon for a region of huge pages; why that fails, or None."""
    try:
        with private_daemon("bench", "--hugetlb-pool", "1G") as serving, Worker(serving.mount) as worker:
            worker.call("create", kind=Kind.HUGETLB, name=new_name(), size=GIB)
            worker.call("remove")
    except RuntimeError as error:
        return gist(error)
    return None


def gist(error: Exception) -> str:
    """The last line of what it says, which in a traceback is what matters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
