"""How long it takes to have a snapshot of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, in_turn, kinds_of, new_name, size_of
from benchmarks.machine import GIB, MIB, fitting_size
from benchmarks.memory import Kind
from benchmarks.results import Metric

_PEER: Final = "os.fork()"


@attrs.frozen
class Plan:
    """How much is done: bytes of memory, and how often it is forked in a round."""

    size: int
    count: int
    rounds: int


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    size = f"{plan.size // MIB} MiB"
    yield Metric("fork", f"a snapshot of {size}, all of it touched", "ms", 1e3, peer=_PEER)
    yield Metric("first store", "the first store to a page after it", "us", 1e6, peer=_PEER)
    yield Metric("odfork", f"a child with a snapshot of {size}", "ms", 1e3, peer=_PEER)


def run(bench: Bench, plan: Plan) -> None:
    """Each round in fresh processes; kinds take turns."""
    with bench.daemon(pool=size_of(Kind.HUGETLB, plan.size) + GIB) as daemon:
        regions = tuple(kind for kind in kinds_of(daemon) if kind.is_region)
        for number in range(plan.rounds):
            for kind in in_turn(regions, number):
                bench.say(f"snapshots: round {number + 1} of {plan.rounds}, {kind.label}")
                with Worker(daemon.mount) as worker:
                    _measure(bench, worker, kind, plan)
            with Worker(daemon.mount) as worker:
                for _ in range(plan.count):
                    found = worker.call("fork_process", size=plan.size)
                    bench.samples.add("fork", _PEER, found["fork"])
                    bench.samples.add("odfork", _PEER, found["fork"])
                    bench.samples.add("first store", _PEER, found["first store"])


def _measure(bench: Bench, worker: Worker, kind: Kind, plan: Plan) -> None:
    worker.call("create", kind=kind, name=new_name(), size=size_of(kind, plan.size))
    worker.call("write")
    worker.call("fork_region", name=new_name())  # The first one finds out what is there.
    for _ in range(plan.count):
        found = worker.call("fork_region", name=new_name())
        bench.samples.add("fork", kind.label, found["fork"])
        bench.samples.add("first store", kind.label, found["first store"])
        bench.samples.add("odfork", kind.label, worker.call("odfork"))
    worker.call("remove")


GROUP: Final = Group(
    name="snapshots",
    compares="Region.fork and odfork, against os.fork() with as much private memory",
    method=(
        "All memory is touched before. The peer has 4 KiB pages, as memory has that is not asked to be huge; its fork "
        "copies page tables. The first store to a page after a fork has to copy it: 4 KiB, or 2 MiB with hugetlb."
    ),
    quick=lambda: Plan(fitting_size(GIB), 5, 1),
    full=lambda: Plan(fitting_size(2 * GIB), 10, 3),
    metrics=metrics,
    run=run,
    pictures={"snapshots": ("fork", "odfork", "first store")},
)
