"""Faults that the daemon serves: how long one takes, how many a second, and reading a file in order."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import machine
from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, new_name
from benchmarks.machine import GIB, MIB
from benchmarks.memory import PAGE, Kind
from benchmarks.results import Metric

P50: Final = "touch, p50"
P99: Final = "touch, p99"
SERVED: Final = "faults a touch"
RATE: Final = "faults a second"
PAGES: Final = "pages a second"
SPEED_MEMORY: Final = "a file on tmpfs in order"
SPEED_DISK: Final = "a file on disk in order"

ANONYMOUS: Final = "anonymous memory, --paging=all"
_OURS: Final = "msharefs, a mapped file"
_MAPPED: Final = "mmap of the file"
_READ: Final = "read() into fresh memory"


@attrs.frozen
class Plan:
    """How much is done: pages touched by a client, numbers of clients, bytes of the file that is read in order."""

    pages: int
    clients: tuple[int, ...]
    file: int
    rounds: int

    @property
    def size(self) -> int:
        """Bytes that all clients touch together."""
        return max(2 * MIB, self.pages * PAGE) * max(self.clients)


@attrs.frozen
class Source:
    """What is touched: memory for which the daemon sees each fault, or a file on some filesystem.

    ``path`` leads to the file and is None for memory.
    """

    label: str
    path: str | None

    def make(self, worker: Worker, size: int) -> str:
        """Have a worker create a region of it, nothing of which has been touched; its handle."""
        name = new_name()
        if self.path is None:
            return str(worker.call("create", kind=Kind.SMALL, name=name, size=size))
        return str(worker.call("map_file", name=name, path=self.path, shuffled=True))


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    over, each = "clients at once", f"{plan.pages} pages touched in random order by one client"
    rate = partial(Metric, unit="1000/s", scale=1e-3, over=over, peer="", more_is_better=True)
    yield Metric(P50, f"{each}: time of a touch, p50", "us", 1e6, peer="")
    yield Metric(P99, f"{each}: time of a touch, p99", "us", 1e6, peer="")
    yield Metric(SERVED, f"{each}: faults that the daemon served, for each page touched", "faults", 1, peer="")
    yield rate(RATE, f"each client touches {plan.pages} pages of its own: faults served")
    yield rate(PAGES, "pages touched meanwhile")
    heading = f"a file of {plan.file // MIB} MiB in the page cache, one load from each page, in order"
    speed = partial(Metric, unit="GB/s", scale=1e-9, peer=_MAPPED, more_is_better=True)
    yield speed(SPEED_MEMORY, f"{heading}, on tmpfs")
    yield speed(SPEED_DISK, f"{heading}, on disk")


def run(bench: Bench, plan: Plan) -> None:
    """Files on tmpfs and on disk are in the page cache throughout."""
    with bench.daemon("--paging=all") as daemon:
        _measure(bench, daemon.mount, Source(ANONYMOUS, None), plan)
    with bench.daemon() as daemon, contextlib.ExitStack() as stack:
        for directory in _directories(bench):
            label = machine.filesystem_of(directory)
            path = stack.enter_context(_file(directory, max(plan.size, plan.file)))
            _measure(bench, daemon.mount, Source(f"file on {label}", path), plan)
    for directory in _directories(bench):
        metric = SPEED_MEMORY if directory == _MEMORY else SPEED_DISK
        with bench.daemon() as daemon, _file(directory, plan.file) as path:
            _read_in_order(bench, daemon.mount, metric, path, plan)


def _measure(bench: Bench, mount: Path, source: Source, plan: Plan) -> None:
    for number in range(plan.rounds):
        bench.say(f"faults: round {number + 1} of {plan.rounds}, {source.label}")
        _latency(bench, mount, source, plan, number)
        for clients in plan.clients:
            _rate(bench, mount, source, plan, clients)


def _latency(bench: Bench, mount: Path, source: Source, plan: Plan, seed: int) -> None:
    with Worker(mount) as worker:
        source.make(worker, plan.size)
        times = worker.call("touch_each", pages=plan.pages, seed=seed, store=source.path is None)
        percents = statistics.quantiles(times, n=100)
        bench.samples.add(P50, source.label, percents[49])
        bench.samples.add(P99, source.label, percents[98])
        bench.samples.add(SERVED, source.label, worker.call("served") / plan.pages)
        worker.call("remove")


def _rate(bench: Bench, mount: Path, source: Source, plan: Plan, clients: int) -> None:
    """Clients are forked before there is a region, attach, and touch at the same time."""
    with Worker(mount) as owner:
        owner.call("gather", processes=clients)
        handle = source.make(owner, plan.size)
        owner.call("everyone", request={"call": "attach", "kind": Kind.SMALL, "handle": handle})
        for number in range(clients):
            share: dict[str, Any] = {"call": "prepare", "first": number * plan.pages, "pages": plan.pages}
            owner.call("everyone", request={**share, "seed": number}, first=number, count=1)
        touch = {"call": "touch_prepared", "store": source.path is None}
        found = owner.call("everyone", request=touch)["results"]
        seconds = max(one["end"] for one in found) - min(one["start"] for one in found)
        bench.samples.add(RATE, source.label, owner.call("served") / seconds, clients)
        bench.samples.add(PAGES, source.label, clients * plan.pages / seconds, clients)
        owner.call("disperse")
        owner.call("remove")


def _read_in_order(bench: Bench, mount: Path, metric: str, path: str, plan: Plan) -> None:
    """In a region, and by the two ways that processes without regions have. Everything in fresh processes."""
    for number in range(plan.rounds):
        bench.say(f"faults: round {number + 1} of {plan.rounds}, {metric}")
        with Worker(mount) as worker:
            worker.call("warm_up", size=2 * plan.file)
            worker.call("map_file", name=new_name(), path=path, shuffled=False)
            bench.samples.add(metric, _OURS, plan.file / worker.call("read")["seconds"])
            worker.call("remove")
        for label, request in ((_MAPPED, "read_mapped"), (_READ, "read_copied")):
            with Worker(mount) as worker:
                bench.samples.add(metric, label, plan.file / worker.call(request, path=path))


def _directories(bench: Bench) -> list[Path]:
    """Where files are made: in memory, and on a disk if there is one."""
    disk = Path(tempfile.gettempdir()).resolve()
    if machine.filesystem_of(disk) == _TMPFS:
        bench.note(f"faults: {disk} is no disk; set TMPDIR to a directory on one for figures of disk files")
        return [_MEMORY]
    return [_MEMORY, disk]


@contextlib.contextmanager
def _file(directory: Path, size: int) -> Iterator[str]:
    """A file without a name, every byte of which is 1 and in the page cache; a path by which others can open it."""
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(size // (2 * MIB)):
            file.write(b"\1" * (2 * MIB))
        file.flush()
        os.fsync(file.fileno())  # Else the disk would still be at work on it while we measure.
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


_MEMORY: Final = Path("/dev/shm")
_TMPFS: Final = "tmpfs"

GROUP: Final = Group(
    name="faults",
    compares="touches that the daemon serves: memory of a daemon that sees every fault, and files",
    method=(
        "Random touches: stores into anonymous memory, loads from a mapped file after madvise(RANDOM); one client is "
        "timed touch by touch, several by an iterator written in C each, from the first start to the last end. Faults "
        "are those that the region's stat counts. In order: a file that the page cache holds, mapped into a region, "
        "against mmap.mmap and read() in a process of its own. Every measurement on a new region."
    ),
    quick=lambda: Plan(4096, (1, 8), machine.fitting_size(256 * MIB), 2),
    full=lambda: Plan(16384, (1, 2, 4, 8), machine.fitting_size(GIB), 3),
    metrics=metrics,
    run=run,
    pictures={"faults": (P50, P99, RATE, PAGES, SPEED_MEMORY, SPEED_DISK)},
)
