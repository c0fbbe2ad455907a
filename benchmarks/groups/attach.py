"""Attaching: in a loop, in a fresh process, and in many processes at once."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, Samples, in_turn, kinds_of, new_name, size_of
from benchmarks.machine import GIB, MIB
from benchmarks.memory import Kind
from benchmarks.results import Metric

LOOP_P50: Final = "attach in a loop, p50"
LOOP_P99: Final = "attach in a loop, p99"
DETACH: Final = "detach in a loop, p50"
FRESH: Final = "attach in a fresh process"
STORM: Final = "attach storm, until the last"
STORM_P50: Final = "attach storm, a process, p50"
ERRORS: Final = "attach storm, errors"

_SIZE: Final = 64 * MIB


@attrs.frozen
class Plan:
    """How much is done."""

    rounds: int
    loops: int
    fresh: int
    storm: int


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    yield Metric(LOOP_P50, f"attach, {plan.loops} times in a loop: p50", "us", 1e6)
    yield Metric(LOOP_P99, f"attach, {plan.loops} times in a loop: p99", "us", 1e6)
    yield Metric(DETACH, "detach in that loop: p50", "us", 1e6)
    yield Metric(FRESH, "attach, the first in a fresh process", "us", 1e6)
    yield Metric(STORM, f"{plan.storm} processes attach at once: until the last has", "ms", 1e3)
    yield Metric(STORM_P50, "a process among those: p50", "ms", 1e3)
    yield Metric(ERRORS, "errors among those", "errors", 1)


def run(bench: Bench, plan: Plan) -> None:
    """Each round of each kind in fresh processes; kinds take turns."""
    with bench.daemon(pool=GIB) as daemon:
        found = kinds_of(daemon)
        regions: list[Kind] = [kind for kind in (Kind.THP, Kind.HUGETLB) if kind in found] or [Kind.SMALL]
        for number in range(plan.rounds):
            for kind in in_turn((*regions, Kind.SHM), number):
                bench.say(f"attach: round {number + 1} of {plan.rounds}, {kind.label}")
                _attach(daemon.mount, kind, plan, bench.samples)


def _attach(mount: Path, kind: Kind, plan: Plan, samples: Samples) -> None:
    """Attach again and again in one process, once in each of several, and in many at once."""
    with Worker(mount) as owner, Worker(mount) as looper, Worker(mount) as stormer:
        handle = owner.call("create", kind=kind, name=new_name(), size=size_of(kind, _SIZE))
        owner.call("write")
        times = looper.call("attach_often", kind=kind, handle=handle, count=plan.loops)
        percents = statistics.quantiles(times["attach"], n=100)
        samples.add(LOOP_P50, kind.label, percents[49])
        samples.add(LOOP_P99, kind.label, percents[98])
        samples.add(DETACH, kind.label, statistics.median(times["detach"]))
        for _ in range(plan.fresh):
            with Worker(mount) as fresh:
                samples.add(FRESH, kind.label, fresh.call("attach", kind=kind, handle=handle))
        storm = stormer.call("attach_at_once", kind=kind, handle=handle, processes=plan.storm)
        samples.add(ERRORS, kind.label, len(storm["errors"]))
        if not storm["errors"]:
            samples.add(STORM, kind.label, storm["seconds"])
            samples.add(STORM_P50, kind.label, statistics.median(storm["attach"]))
        owner.call("remove")


GROUP: Final = Group(
    name="attach",
    compares="attaching to memory that others have made",
    method=(
        "mshare.mshare(name, None, 0, O_RDWR) against SharedMemory(name) without its resource tracker, on 64 MiB "
        "(hugetlb: 1 GiB) that are present. The storm: forked processes wait for one signal and attach at once."
    ),
    quick=lambda: Plan(2, 500, 5, 200),
    full=lambda: Plan(5, 2000, 20, 200),
    metrics=metrics,
    run=run,
    pictures={"attach": (LOOP_P50, LOOP_P99, FRESH, STORM)},
)
