"""What memory full of a pattern costs, when it comes from a reference page and is filled as it is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, new_name
from benchmarks.machine import fitting_size
from benchmarks.memory import PAGE, Kind
from benchmarks.results import Metric

_PEER: Final = "anonymous, memset"
_SIZE: Final = 4_096_000
_KIB: Final = 1024


@attrs.frozen
class Plan:
    """How much is done: so many maps of ``size`` bytes, of each of which the first ``touched`` bytes are stored to."""

    count: int
    size: int
    touched: tuple[int, ...]
    rounds: int


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    what = f"{plan.size:,} bytes of 0xAA"
    over = "KiB stored to"
    yield Metric("time", f"mapping {what} and storing to their start, a byte a page", "us", 1e6, over, _PEER, log="xy")
    yield Metric("touch", "the same, without the call that maps", "us", 1e6, over, log="xy")
    yield Metric("memory", f"memory that is taken then by {what}", "MiB", 2**-20, over, _PEER)


def run(bench: Bench, plan: Plan) -> None:
    """Each round in fresh processes; ways take turns."""
    with bench.daemon() as daemon:
        kinds = [Kind.THP, Kind.SMALL] if daemon.backing == Kind.THP else [Kind.SMALL]
        ways: list[tuple[str, str, Kind | None]] = [(_PEER, "fill_private", None)]
        ways += [(kind.label, "map_all", kind) for kind in kinds]
        ways += [(f"{kinds[0].label}, a call each", "map_each", kinds[0])]
        ways += [(f"{Kind.BARE.label}, a call each", "map_bare", kind) for kind in kinds if kind is Kind.THP]
        for number in range(plan.rounds):
            for touched in plan.touched:
                for series, call, kind in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    if call == "map_bare" and touched > PAGE:
                        continue  # Its server brings no more than the page that is touched.
                    bench.say(f"refpages: round {number + 1} of {plan.rounds}, {touched // _KIB} KiB, {series}")
                    more: dict[str, object] = {} if kind is None else {"kind": kind, "name": new_name()}
                    with Worker(daemon.mount) as worker:
                        found = worker.call(call, count=plan.count, size=plan.size, touched=touched, **more)
                    at = touched / _KIB
                    bench.samples.add("time", series, found["map"] + found["touch"], at)
                    bench.samples.add("memory", series, found["memory"], at)
                    if kind is not None:
                        bench.samples.add("touch", series, found["touch"], at)


def _plan(count: int, rounds: int) -> Plan:
    room = fitting_size(count * _SIZE, share=2)
    return Plan(min(count, room // _SIZE), _SIZE, (4 * _KIB, _SIZE // 2, _SIZE), rounds)


GROUP: Final = Group(
    name="refpages",
    compares="memory mapped with a reference page, against private memory filled by memset",
    method=(
        "Many maps of 4,096,000 bytes are made one after the other and kept; after each, the first 4 KiB, half or all "
        "of it is stored to, a byte a page. The peer is anonymous memory of 4 KiB pages, whose faults memset takes. "
        "The maps are parts of one mapping, made by one call, whose share counts; or each is made by a call of its "
        "own. The system calls alone are the least that a call and a fault each can take here: a server in Python that "
        "answers a packet, and fills the page that is touched. All is done three times in a process, and the quickest "
        "counts, the peer's as well: the first may touch memory that the host of a virtual machine has yet to find. "
        "Memory is what the region, or the process, has more in the end, when most is in use."
    ),
    quick=lambda: _plan(200, 1),
    full=lambda: _plan(1000, 3),
    metrics=metrics,
    run=run,
    pictures={"refpages": ("time", "memory")},
)
