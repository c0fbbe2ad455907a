"""What many processes that read one large file cost: page tables, time, faults."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from benchmarks import machine
from benchmarks.daemon import Serving
from benchmarks.driver import Worker
from benchmarks.group import Bench, Group
from benchmarks.machine import GIB, MIB
from benchmarks.results import Metric

TABLES: Final = "page tables of all readers"
TIME: Final = "time of all readers"
FAULTS: Final = "faults of each reader"

_DISK: Final = "mmap, on disk"
_SPARE: Final = 64 * MIB
"""Huge pages more than the file has."""


@attrs.frozen
class Plan:
    """How much is done: bytes of the file, and how many processes read it."""

    size: int
    processes: int


@attrs.frozen
class Way:
    """A way to map a file: ``directory`` is where it lies, None if it has huge pages; ``plain`` is mmap(2)."""

    label: str
    directory: str | None
    plain: bool
    backing: str | None = None


def ways() -> tuple[Way, ...]:
    """All that are compared, those that take huge pages last."""
    disk, memory = tempfile.gettempdir(), "/dev/shm"
    return (
        Way(_DISK, disk, plain=True),
        Way("mmap, tmpfs", memory, plain=True),
        Way("msharefs, tmpfs", memory, plain=False),
        Way("mmap, hugetlbfs", None, plain=True),
        Way("msharefs, hugetlbfs", None, plain=False),
        Way("msharefs, disk through hugetlb", disk, plain=False, backing="hugetlb"),
    )


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    all_of_it = f"{plan.processes} processes read all of a file of {plan.size / GIB:g} GiB"
    yield Metric(TABLES, f"{all_of_it}: growth of the machine's page tables", "MiB", 1 / MIB, peer=_DISK)
    yield Metric(TIME, f"{all_of_it}: time until all have it mapped", "s", 1, peer=_DISK)
    yield Metric(FAULTS, "page faults of each process meanwhile, median", "faults", 1, peer=_DISK)


def run(bench: Bench, plan: Plan) -> None:
    """One way after the other; file and processes of each are gone before the next."""
    if not plan.size or machine.room() < 2 * plan.size + _SPARE:
        bench.note(f"files_shared needs {(2 * plan.size + _SPARE) // MIB} MiB of free memory")
        return
    for way in ways():
        huge = way.directory is None or way.backing == "hugetlb"
        with bench.daemon(pool=plan.size + _SPARE if huge else 0) as daemon:
            if not huge or daemon.hugetlb:
                _read(bench, daemon, way, plan)


def _read(bench: Bench, daemon: Serving, way: Way, plan: Plan) -> None:
    bench.say(f"files_shared: {way.label}, {plan.processes} processes")
    if way.directory is not None:
        bench.note(f"files lie on {machine.filesystem_of(Path(way.directory))} in {way.directory}")
    with Worker(daemon.mount) as owner, Worker(daemon.mount) as template:
        path = owner.call("make_file", size=plan.size, directory=way.directory)
        template.call("gather", processes=plan.processes)
        request = {"call": "enter_file", "path": path, "size": plan.size, "backing": way.backing, "plain": way.plain}
        before = machine.page_tables()
        found = template.call("everyone", request=request)
        bench.samples.add(TABLES, way.label, machine.page_tables() - before)
        bench.samples.add(TIME, way.label, found["seconds"])
        bench.samples.add(FAULTS, way.label, statistics.median(one["faults"] for one in found["results"]))
        template.call("disperse")


GROUP: Final = Group(
    name="files_shared",
    compares="mshare.mmap of a file by many readers, against mmap(2) of it",
    method=(
        "The file is sparse, so that no disk is waited for, and is opened for reading only. Processes forked from one "
        "that has mapped nothing map it, all at once, and have the kernel map every page (MADV_POPULATE_READ). The "
        "growth of PageTables in /proc/meminfo counts, and the time, the daemon's reading of the file included. A "
        "filesystem may keep the file in memory in large pieces, which take fewer page tables: what it does is "
        "measured. With plain mmap(2) of hugetlbfs the kernel shares tables by itself where processes map the file at "
        "addresses that agree modulo 1 GiB: children of one process do, others only if they see to it. Less is not to "
        "be had: one set of tables for 4 GiB takes 16 KiB, and each process has a page above it, unless something else "
        "of its lies near. A file on tmpfs, and one on disk through the backing thp, has pages of 4 KiB, for which the "
        "kernel shares no tables."
    ),
    quick=lambda: Plan(machine.fitting_size(GIB), 20),
    full=lambda: Plan(machine.fitting_size(4 * GIB), 50),
    metrics=metrics,
    run=run,
    pictures={"files-shared": (TABLES, TIME)},
)
