"""What many processes on one large memory cost: page tables, time, faults."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Final

import attrs

from benchmarks import machine
from benchmarks.daemon import Serving
from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, kinds_of, new_name
from benchmarks.machine import GIB, MIB
from benchmarks.memory import PAGE, Kind
from benchmarks.results import Metric

TABLES: Final = "page tables of all"
TIME: Final = "time of all"
FAULTS: Final = "faults of each"

_PROCESS: Final = 3 * MIB
"""Bytes that a process takes at most, besides its page tables for the memory."""


@attrs.frozen
class Plan:
    """How much is done: bytes of the memory, numbers of processes, ascending, and seconds for each kind at most."""

    size: int
    processes: tuple[int, ...]
    seconds: float


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    all_of_it = f"{plan.size / GIB:g} GiB, all of it mapped by each process"
    yield Metric(TABLES, f"{all_of_it}: growth of the machine's page tables", "MiB", 1 / MIB, "processes", log="xy")
    yield Metric(TIME, f"{all_of_it}: time until all have attached and mapped", "s", 1, "processes", log="xy")
    yield Metric(FAULTS, "page faults of each process meanwhile, median", "faults", 1)


def run(bench: Bench, plan: Plan) -> None:
    """One kind after the other; memory and processes of each are gone before the next."""
    if plan.size % GIB == 0:  # Huge pages come in nothing smaller.
        with bench.daemon(pool=plan.size) as daemon:
            if daemon.hugetlb:
                _grow(bench, daemon, Kind.HUGETLB, plan)
    with bench.daemon() as daemon:  # The memory of the huge pages is free again.
        _grow(bench, daemon, Kind.THP if Kind.THP in kinds_of(daemon) else Kind.SMALL, plan)
        _grow(bench, daemon, Kind.SHM, plan)


def _grow(bench: Bench, daemon: Serving, kind: Kind, plan: Plan) -> None:
    """Let more and more processes in. Their page tables from before they attach do not count."""
    with Worker(daemon.mount) as template, Worker(daemon.mount) as owner:
        handle = owner.call("create", kind=kind, name=new_name(), size=plan.size)
        owner.call("write")
        grown, seconds, inside = 0.0, 0.0, 0
        faults: list[float] = []
        most, start = _fitting(kind, plan), time.monotonic()
        for processes in (*(number for number in plan.processes if number < most), most):
            bench.say(f"growth: {kind.label}, {processes} processes")
            template.call("gather", processes=processes - inside)
            before = machine.page_tables()
            enter = {"call": "enter", "kind": kind, "handle": handle}
            found = template.call("everyone", request=enter, first=inside, count=processes - inside)
            grown, seconds, inside = grown + machine.page_tables() - before, seconds + found["seconds"], processes
            faults += [one["faults"] for one in found["results"]]
            bench.samples.add(TABLES, kind.label, grown, processes)
            bench.samples.add(TIME, kind.label, seconds, processes)
            if _next_takes_too_long(processes, plan, time.monotonic() - start):
                break
        bench.samples.add(FAULTS, kind.label, statistics.median(faults))
        _compute_rest(bench, kind, inside, plan)
        template.call("disperse")
        owner.call("remove")


def _fitting(kind: Kind, plan: Plan) -> int:
    """How many processes there is memory for when the memory itself is present."""
    each = _PROCESS + (plan.size // PAGE * 8 if kind in (Kind.SHM, Kind.SMALL) else plan.size // 512 // PAGE * 8)
    return max(1, min(max(plan.processes), machine.room() // each))


def _next_takes_too_long(processes: int, plan: Plan, spent: float) -> bool:
    following = next((number for number in plan.processes if number > processes), processes)
    return spent * following / processes > plan.seconds


def _compute_rest(bench: Bench, kind: Kind, measured: int, plan: Plan) -> None:
    """What larger numbers would take, each process as much as those that were measured took on average."""
    rest = [number for number in plan.processes if number > measured]
    if rest:
        bench.note(f"growth: {kind.label} was measured up to {measured} processes; the rest is computed from that")
    for metric in (TABLES, TIME):
        last = bench.samples.median(metric, kind.label, measured)
        for number in rest:
            bench.samples.compute(metric, kind.label, last / measured * number, number)


GROUP: Final = Group(
    name="growth",
    compares="page tables, time and faults of many processes on one large memory",
    method=(
        "One process makes the memory and stores into every page. In steps, more and more are forked from one that has "
        "attached nothing. When all of a step are there, they attach, each by itself, and have the kernel map every "
        "page for stores (MADV_POPULATE_WRITE, which takes the faults that touching would, without the touching), all "
        "at once. The growth of PageTables in /proc/meminfo from then on counts, and the time. Dashed lines and "
        "numbers with a star are computed: each further process taken to cost what those measured cost on average."
    ),
    quick=lambda: Plan(machine.fitting_size(GIB), (1, 10, 50, 100), 5),
    full=lambda: Plan(max(GIB, machine.fitting_size(8 * GIB, share=2)), (1, 10, 50, 100, 200, 500, 1000, 1500), 90),
    metrics=metrics,
    run=run,
    pictures={"growth": (TABLES, TIME)},
)
