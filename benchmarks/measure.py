"""What is measured, in which order. Every round of every kind runs in fresh processes; kinds take turns."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

from benchmarks.driver import Worker
from benchmarks.machine import MIB
from benchmarks.memory import PAGE, Kind

FIRST: Final = "first touch"
LOAD: Final = "second process, loads"
STORE: Final = "second process, stores"
TABLES: Final = "page tables"
LOOP_P50: Final = "attach in a loop, p50"
LOOP_P99: Final = "attach in a loop, p99"
DETACH: Final = "detach in a loop, p50"
FRESH: Final = "attach in a fresh process"
STORM: Final = "attach storm, until the last"
STORM_P50: Final = "attach storm, a process, p50"
ERRORS: Final = "attach storm, errors"

_ATTACH_SIZE: Final = 64 * MIB


@attrs.frozen
class Plan:
    """How much is done."""

    size: int
    rounds: int
    loops: int
    fresh: int
    storm: int


@attrs.define
class Samples:
    """Everything measured: by metric, then by kind, one number a round."""

    values: dict[str, dict[Kind, list[float]]] = attrs.Factory(dict)

    def add(self, metric: str, kind: Kind, value: float) -> None:
        """Note a number."""
        self.values.setdefault(metric, {}).setdefault(kind, []).append(value)


def kinds_of(backing: str) -> tuple[Kind, ...]:
    """What can be compared where the daemon's default backing is ``backing``: thp is for root's only."""
    return tuple(kind for kind in Kind if kind is not Kind.THP or backing == Kind.THP)


def run(mount: Path, kinds: tuple[Kind, ...], plan: Plan, progress: Callable[[str], None]) -> Samples:
    """Measure everything."""
    samples = Samples()
    for number in range(plan.rounds):
        for kind in _in_turn(kinds, number):
            progress(f"round {number + 1} of {plan.rounds}: touching, {kind.label}")
            _touch(mount, kind, plan, samples)
    attached = (kinds[0], Kind.SHM)
    for number in range(plan.rounds):
        for kind in _in_turn(attached, number):
            progress(f"round {number + 1} of {plan.rounds}: attaching, {kind.label}")
            _attach(mount, kind, plan, samples)
    return samples


def _in_turn(kinds: tuple[Kind, ...], number: int) -> Iterator[Kind]:
    """All kinds, another one first in each round."""
    first = number % len(kinds)
    yield from kinds[first:] + kinds[:first]


def _touch(mount: Path, kind: Kind, plan: Plan, samples: Samples) -> None:
    """One process touches every page for the first time; then another loads from, a third stores into each."""
    pages = plan.size // PAGE
    with Worker(mount) as warmer, Worker(mount) as first, Worker(mount) as reader, Worker(mount) as writer:
        warmer.call("warm_up", size=2 * plan.size)
        handle = first.call("create", kind=kind, name=_name(), size=plan.size)
        samples.add(FIRST, kind, first.call("write")["seconds"] / pages)
        reader.call("attach", kind=kind, handle=handle)
        samples.add(LOAD, kind, reader.call("read")["seconds"] / pages)
        writer.call("attach", kind=kind, handle=handle)
        stored = writer.call("write")
        samples.add(STORE, kind, stored["seconds"] / pages)
        samples.add(TABLES, kind, stored["tables"])
        first.call("remove")


def _attach(mount: Path, kind: Kind, plan: Plan, samples: Samples) -> None:
    """Attach again and again in one process, once in each of several, and in many at once."""
    with Worker(mount) as owner, Worker(mount) as looper, Worker(mount) as stormer:
        handle = owner.call("create", kind=kind, name=_name(), size=_ATTACH_SIZE)
        owner.call("write")
        times = looper.call("attach_often", kind=kind, handle=handle, count=plan.loops)
        percents = statistics.quantiles(times["attach"], n=100)
        samples.add(LOOP_P50, kind, percents[49])
        samples.add(LOOP_P99, kind, percents[98])
        samples.add(DETACH, kind, statistics.median(times["detach"]))
        for _ in range(plan.fresh):
            with Worker(mount) as fresh:
                samples.add(FRESH, kind, fresh.call("attach", kind=kind, handle=handle))
        storm = stormer.call("attach_at_once", kind=kind, handle=handle, processes=plan.storm)
        samples.add(ERRORS, kind, len(storm["errors"]))
        if not storm["errors"]:
            samples.add(STORM, kind, storm["seconds"])
            samples.add(STORM_P50, kind, statistics.median(storm["attach"]))
        owner.call("remove")


def _name() -> str:
    return f"bench-{secrets.token_hex(6)}"
