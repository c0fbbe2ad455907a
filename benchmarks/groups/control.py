"""How long single calls take."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

import attrs

from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, in_turn, kinds_of, new_name
from benchmarks.machine import MIB
from benchmarks.memory import Kind
from benchmarks.results import Metric

_SIZE: Final = 64 * MIB
_CALLS: Final = (
    *("create", "unlink", "attach", "detach"),
    *("mmap, 2 MiB", "munmap, 2 MiB", "mprotect, a page", "mprotect, back"),
    *("msync, nothing to do", "msync, a page of a file", "stat", "maps"),
)


@attrs.frozen
class Plan:
    """How much is done: how often each call is made in a round."""

    count: int
    rounds: int


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    for call in _CALLS:
        yield Metric(call, f"{call}: median of {plan.count}", "us", 1e6)
        yield Metric(f"{call}, p99", f"{call}: p99", "us", 1e6)


def run(bench: Bench, plan: Plan) -> None:
    """Each round in fresh processes; kinds take turns."""
    with bench.daemon() as daemon:
        region = Kind.THP if Kind.THP in kinds_of(daemon) else Kind.SMALL
        for number in range(plan.rounds):
            for kind in in_turn((region, Kind.SHM), number):
                bench.say(f"control: round {number + 1} of {plan.rounds}, {kind.label}")
                with Worker(daemon.mount) as worker, Worker(daemon.mount) as other:
                    _measure(bench, worker, other, kind, plan)


def _measure(bench: Bench, worker: Worker, other: Worker, kind: Kind, plan: Plan) -> None:
    times = worker.call("life_of_names", kind=kind, name=new_name(), size=_SIZE, count=plan.count)
    handle = worker.call("create", kind=kind, name=new_name(), size=_SIZE)
    worker.call("write")
    times |= other.call("attach_often", kind=kind, handle=handle, count=plan.count)
    times |= worker.call("region_calls" if kind.is_region else "kernel_calls", count=plan.count)
    for call, found in times.items():
        percents = statistics.quantiles(found, n=100)
        bench.samples.add(call, kind.label, percents[49])
        bench.samples.add(f"{call}, p99", kind.label, percents[98])
    worker.call("remove")


GROUP: Final = Group(
    name="control",
    compares="single calls on a region, against the kernel's for one process",
    method=(
        "64 MiB, all of it present, one process attached; nobody else asks the daemon anything. The peer is "
        "multiprocessing.shared_memory, and the system call of the same name, which acts on one process only."
    ),
    quick=lambda: Plan(200, 2),
    full=lambda: Plan(1000, 3),
    metrics=metrics,
    run=run,
    pictures={"control": _CALLS},
)
