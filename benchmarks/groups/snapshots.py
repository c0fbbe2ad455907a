"""How long it takes to have a snapshot of memory, and what it costs who goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs

from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, in_turn, kinds_of, new_name, size_of
from benchmarks.machine import GIB, MIB, fitting_size
from benchmarks.memory import Kind
from benchmarks.results import Metric

_PEER: Final = "os.fork()"
_FORKS: Final = ("fork", "very first store", "first store")


@attrs.frozen
class Plan:
    """How much is done.

    ``sizes`` are bytes of memory, ascending, of which one is ``base``: all but the growth is measured with that; of
    its first ``hot`` bytes a writer stores to random pages, for ``steps`` of 100 ms after a fork. ``count``: forks in a
    round.
    """

    sizes: tuple[int, ...]
    base: int
    hot: int
    steps: int
    count: int
    rounds: int


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    size = f"{plan.base // MIB} MiB"
    touched = "all of it touched, over its size"
    yield Metric("fork", f"a snapshot of memory, {touched}", "ms", 1e3, "GiB", _PEER, log="xy")
    yield Metric("first fork", f"the first one of memory that was never forked, {touched}", "ms", 1e3, "GiB", _PEER)
    yield Metric("first store", f"the first store to a page of {size} after it", "us", 1e6, peer=_PEER)
    yield Metric("very first store", "the same, right after the fork", "us", 1e6, peer=_PEER)
    yield Metric("odfork", f"a child with a snapshot of {size}", "ms", 1e3, peer=_PEER)
    hot = f"{plan.hot / MIB:g} MiB"
    heading = f"stores to random pages of {hot} in the 100 ms before a fork (at 0) and after it"
    yield Metric("stores", heading, "1000/s", 1e-3, "ms", _PEER, more_is_better=True, log="y")
    heading = f"loads of every page of {size}: before a fork (at 0), after it, and once more"
    yield Metric("loads", heading, "ns/page", 1e9, "pass", _PEER)
    yield Metric("store all", f"stores to every page of {size} after a fork, in order", "ns/page", 1e9, peer=_PEER)
    yield Metric("read all", "loads of every page of the snapshot, in order", "ns/page", 1e9, peer=_PEER)


def run(bench: Bench, plan: Plan) -> None:
    """Each round in fresh processes; kinds take turns."""
    most = max(size_of(Kind.HUGETLB, max(plan.sizes)), 2 * size_of(Kind.HUGETLB, plan.base))
    with bench.daemon(pool=most + GIB) as daemon:
        regions = tuple(kind for kind in kinds_of(daemon) if kind.is_region)
        for number in range(plan.rounds):
            for size in plan.sizes:
                for kind in in_turn(regions, number):
                    if size == plan.base or kind is not Kind.SMALL:
                        bench.say(f"snapshots: round {number + 1} of {plan.rounds}, {kind.label}, {size // MIB} MiB")
                        with Worker(daemon.mount) as worker:
                            _measure(bench, worker, kind, size, plan)
                bench.say(f"snapshots: round {number + 1} of {plan.rounds}, {_PEER}, {size // MIB} MiB")
                with Worker(daemon.mount) as worker:
                    _measure_peer(bench, worker, size, plan)


def _measure(bench: Bench, worker: Worker, kind: Kind, size: int, plan: Plan) -> None:
    worker.call("create", kind=kind, name=new_name(), size=size_of(kind, size))
    worker.call("write")
    at = size_of(kind, size) / GIB
    bench.samples.add("first fork", kind.label, worker.call("first_fork", name=new_name()), at)
    _add_forks(bench, kind.label, worker.call("fork_region", name=new_name(), count=plan.count), at, size == plan.base)
    if size == plan.base:
        for _ in range(plan.count):
            bench.samples.add("odfork", kind.label, worker.call("odfork"))
        written = _of_new(worker, kind, size, "write_on", hot=plan.hot, steps=plan.steps)
        _add_goes_on(bench, kind.label, written, _of_new(worker, kind, size, "read_on"))
        for metric, call in (("store all", "store_all"), ("read all", "read_all")):
            bench.samples.add(metric, kind.label, _of_new(worker, kind, size, call))
    worker.call("remove")


def _of_new(worker: Worker, kind: Kind, size: int, call: str, **arguments: int) -> Any:  # noqa: ANN401 - as call()
    """What a request finds of a region that was never forked."""
    worker.call("remove")
    worker.call("create", kind=kind, name=new_name(), size=size_of(kind, size))
    worker.call("write")
    return worker.call(call, name=new_name(), **arguments)


def _measure_peer(bench: Bench, worker: Worker, size: int, plan: Plan) -> None:
    found = worker.call("fork_process", size=size, count=plan.count)
    _add_forks(bench, _PEER, found, size / GIB, size == plan.base)
    for took in found["fork"]:
        bench.samples.add("first fork", _PEER, took, size / GIB)
    if size == plan.base:
        for took in found["fork"]:
            bench.samples.add("odfork", _PEER, took)
        found = worker.call("process_goes_on", size=size, hot=plan.hot, steps=plan.steps)
        _add_goes_on(bench, _PEER, found["written"], found["read"])
        for metric, took in worker.call("process_from_end_to_end", size=size).items():
            bench.samples.add(metric, _PEER, took)


def _add_forks(bench: Bench, series: str, found: dict[str, list[float]], at: float, stores: bool) -> None:  # noqa: FBT001
    for metric in _FORKS if stores else _FORKS[:1]:
        for took in found[metric]:
            bench.samples.add(metric, series, took, 0 if metric != "fork" else at)


def _add_goes_on(bench: Bench, series: str, written: list[float], read: list[float]) -> None:
    for number, rate in enumerate(written):
        bench.samples.add("stores", series, rate, 100 * number)
    for number, took in enumerate(read):
        bench.samples.add("loads", series, took, number)


def _sizes(most: int) -> tuple[int, ...]:
    """1 GiB and its doubles, as far as there is room; less than that, where there is not even room for one."""
    room = fitting_size(most, share=2)
    return tuple(size for size in (GIB, 2 * GIB, 4 * GIB, 8 * GIB) if size <= room) or (room,)


def _plan(most: int, count: int, rounds: int) -> Plan:
    sizes = _sizes(most)
    base = max(size for size in sizes if size <= max(2 * GIB, sizes[0]))
    return Plan(sizes, base, min(base, 16 * MIB), 10, count, rounds)


GROUP: Final = Group(
    name="snapshots",
    compares="Region.fork and odfork, against os.fork() with as much private memory",
    method=(
        "All memory is touched before. The peer has 4 KiB pages, as memory has that is not asked to be huge; its fork "
        "copies page tables. Forks follow on each other, each ended before the next; the first one of a region, which "
        "has to look at all of it, is told apart. Stores are measured after further forks. The first store to a page "
        "after a fork has to copy it: 4 KiB, or 2 MiB with hugetlb; the very first one comes right after the fork. A "
        "writer stores to random 4 KiB pages, as fast as it can, from before a fork until a second after it. Last, a "
        "byte of every page is stored to after a fork, and a byte of every page of a snapshot read. Nobody but the one "
        "process runs."
    ),
    quick=lambda: _plan(GIB, 5, 1),
    full=lambda: _plan(8 * GIB, 10, 3),
    metrics=metrics,
    run=run,
    pictures={"snapshots": ("fork", "first fork", "stores"), "snapshots-stores": ("first store", "odfork", "loads")},
)
