"""What regions cost by their size and by how many there are."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

import attrs

from benchmarks import machine
from benchmarks.driver import Worker, WorkerFailedError
from benchmarks.group import Bench, Group, kinds_of, new_name
from benchmarks.machine import GIB, MIB
from benchmarks.memory import Kind
from benchmarks.results import Metric

CALLS: Final = ("create", "attach", "unlink")
BY_SIZE: Final = "by size"
BY_NUMBER: Final = "by number"

_SMALL: Final = 2 * MIB


@attrs.frozen
class Plan:
    """How much is done: sizes in GiB, numbers of regions, how often each is measured, bytes of huge pages."""

    gibibytes: tuple[int, ...]
    regions: tuple[int, ...]
    sample: int
    pool: int


def metrics(_plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    for call in CALLS:
        yield Metric(f"{call}, {BY_SIZE}", f"{call}: nothing touched, median", "us", 1e6, "GiB", log="xy")
    for call in CALLS:
        yield Metric(f"{call}, {BY_NUMBER}", f"{call}: 2 MiB each, median", "us", 1e6, "other regions", log="xy")


def run(bench: Bench, plan: Plan) -> None:
    """Nothing is touched: memory takes no memory."""
    with bench.daemon(pool=plan.pool) as daemon:
        kinds = [kind for kind in kinds_of(daemon) if kind in (Kind.THP, Kind.HUGETLB, Kind.SHM)]
        for kind in kinds if Kind.THP in kinds else [Kind.SMALL, *kinds]:
            for gibibytes in plan.gibibytes:
                if kind is not Kind.HUGETLB or gibibytes * GIB <= plan.pool:
                    bench.say(f"scaling: {kind.label}, {gibibytes} GiB")
                    with Worker(daemon.mount) as worker:
                        _by_size(bench, worker, kind, gibibytes, plan.sample)
            if kind is not Kind.HUGETLB:
                bench.say(f"scaling: {kind.label}, {max(plan.regions)} of them")
                with Worker(daemon.mount) as worker:
                    _by_number(bench, worker, kind, plan)


def _by_size(bench: Bench, worker: Worker, kind: Kind, gibibytes: int, sample: int) -> None:
    size = gibibytes * GIB
    try:
        times = worker.call("life_of_names", kind=kind, name=new_name(), size=size, count=sample)
        handle = worker.call("create", kind=kind, name=new_name(), size=size)
    except WorkerFailedError as error:
        bench.note(f"scaling: {kind.label}, {gibibytes} GiB: {error}")
        return
    worker.call("detach")
    times |= worker.call("attach_often", kind=kind, handle=handle, count=sample)
    worker.call("remove")
    for call in CALLS:
        bench.samples.add(f"{call}, {BY_SIZE}", kind.label, statistics.median(times[call]), gibibytes)


def _by_number(bench: Bench, worker: Worker, kind: Kind, plan: Plan) -> None:
    found = worker.call("life_of_regions", kind=kind, size=_SMALL, counts=plan.regions, sample=plan.sample)
    for number, times in found.items():
        for call in CALLS:
            bench.samples.add(f"{call}, {BY_NUMBER}", kind.label, statistics.median(times[call]), int(number))


def _pool() -> int:
    """Half of the room there is, in whole gibibytes."""
    return machine.room() // 2 // GIB * GIB


GROUP: Final = Group(
    name="scaling",
    compares="create, attach and unlink by size and by number of regions",
    method="Nothing is touched. Unlinking includes the detaching. One process; the median of several calls.",
    quick=lambda: Plan((1, 4), (1, 10, 100), 10, GIB),
    full=lambda: Plan((1, 2, 4, 8, 16), (1, 10, 100, 1000), 50, min(4 * GIB, _pool())),
    metrics=metrics,
    run=run,
    pictures={"scaling": tuple(f"{call}, {by}" for by in (BY_SIZE, BY_NUMBER) for call in CALLS)},
)
