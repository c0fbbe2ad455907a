"""One mprotect of a whole region, for everybody who is attached, against a message to each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from benchmarks import machine
from benchmarks.daemon import Serving
from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, kinds_of, new_name
from benchmarks.machine import GIB, MIB
from benchmarks.memory import Kind
from benchmarks.results import Metric

_CHANGES: Final = {"r": "make all of it read-only", "w": "make it writable again"}
_PROCESS: Final = 4 * MIB
"""Bytes that a process takes at most, besides page tables."""


@attrs.frozen
class Plan:
    """How much is done: numbers of attached processes, ascending, sizes of regions, how often each is measured."""

    processes: tuple[int, ...]
    sizes: tuple[int, ...]
    rounds: int


@attrs.frozen
class Variant:
    """Memory of a kind and a size, and how its protection is changed: by us, or by messages."""

    kind: Kind
    size: int
    by_message: bool

    @property
    def label(self) -> str:
        """For people."""
        return _message(self.kind) if self.by_message else self.kind.label


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    over = "attached processes"
    for size in (*plan.sizes, GIB):
        peer = _message(Kind.THP)
        for letter, what in _CHANGES.items():
            heading = f"{size // MIB} MiB: {what}: time of the call"
            yield Metric(_each(letter, size), f"{heading} for each process", "us", 1e6, over, peer, log="xy")
            if letter == "r":
                yield Metric(_total(letter, size), heading, "ms", 1e3, over, peer, log="xy")


def _message(kind: Kind) -> str:
    return f"a message to each, {'the same region' if kind.is_region else kind}"


def _each(letter: str, size: int) -> str:
    return f"{_CHANGES[letter]}, {size // MIB} MiB, each"


def _total(letter: str, size: int) -> str:
    return f"{_CHANGES[letter]}, {size // MIB} MiB, all"


def run(bench: Bench, plan: Plan) -> None:
    """Each variant with its own processes, all alive throughout."""
    with bench.daemon(pool=GIB) as daemon:
        found = kinds_of(daemon)
        region = Kind.THP if Kind.THP in found else Kind.SMALL
        for size in plan.sizes:
            bare = [(Kind.BARE, False)] if region is Kind.THP else []
            for kind, by_message in ((region, False), *bare, (region, True), (Kind.SHM, True)):
                _measure(bench, daemon, Variant(kind, size, by_message), plan)
        if Kind.HUGETLB in found:
            for by_message in (False, True):
                _measure(bench, daemon, Variant(Kind.HUGETLB, GIB, by_message), plan)


def _measure(bench: Bench, daemon: Serving, variant: Variant, plan: Plan) -> None:
    """The caller is one of the processes attached; the others are its children, forked before it made the memory."""
    with Worker(daemon.mount) as caller:
        others = _fitting(bench, variant, max(plan.processes)) - 1
        caller.call("gather", processes=others)
        handle = caller.call("create", kind=variant.kind, name=new_name(), size=variant.size)
        caller.call("write")
        for processes in (number for number in plan.processes if number <= others + 1):
            bench.say(f"changes: {variant.label}, {variant.size // MIB} MiB, {processes} attached")
            for _ in range(plan.rounds):
                _enter_anew(caller, variant, handle, processes)
                _change(bench, caller, variant, processes, variant.label)
                if not variant.by_message:
                    _change(bench, caller, variant, processes, f"{variant.label}, again")
        caller.call("disperse")
        caller.call("remove")


def _enter_anew(caller: Worker, variant: Variant, handle: str, processes: int) -> None:
    """Give every process a new window, with nothing mapped in it yet."""
    for request in ({"call": "detach"}, {"call": "attach", "kind": variant.kind, "handle": handle}):
        caller.call("everyone", request=request, count=processes - 1)
        caller.call(**request)


def _change(bench: Bench, caller: Worker, variant: Variant, processes: int, label: str) -> None:
    """Once to read-only and back, all pages of all processes being mapped for stores before."""
    caller.call("populate")
    caller.call("everyone", request={"call": "populate"}, count=processes - 1)
    if variant.by_message:
        times = {letter: caller.call("order", letter=letter, count=processes - 1) for letter in "rw"}
    else:
        times = caller.call("protect")
    for letter, seconds in times.items():
        bench.samples.add(_each(letter, variant.size), label, seconds / processes, processes)
        bench.samples.add(_total(letter, variant.size), label, seconds, processes)


def _fitting(bench: Bench, variant: Variant, wanted: int) -> int:
    """How many processes this machine's memory has room for; each has page tables for 4 KiB pages at worst."""
    each = _PROCESS + (0 if variant.kind is Kind.HUGETLB else variant.size // 512)
    fitting = max(1, min(wanted, (machine.room() - variant.size) // each))
    if fitting < wanted:
        bench.note(f"changes: memory for {fitting} processes only, instead of {wanted}")
    return fitting


GROUP: Final = Group(
    name="changes",
    compares="mprotect of a whole region for all processes, against a message to each of them",
    method=(
        "Before each call every process has all pages of the region mapped for stores. Ours: one Region.mprotect; when "
        "it returns, it holds in all processes. The peer: the caller sends a message over a socket to each process, "
        "calls mprotect(2) itself, and waits for all replies; each process calls mprotect(2) on its own window and "
        "replies. Windows are new in each round. 'Again' is a second change of the same windows: the first has split "
        "huge pages in their page tables. 'The system calls alone' are those of a server in Python that has a "
        "userfaultfd of each process and does nothing else: no names, no model, no journal. All processes are "
        "forked from one that has attached nothing; each attaches by itself."
    ),
    quick=lambda: Plan((1, 10, 100), (2 * MIB, 64 * MIB), 2),
    full=lambda: Plan((1, 10, 100, 1000), (2 * MIB, 64 * MIB), 3),
    metrics=metrics,
    run=run,
    pictures={"changes": tuple(_each(letter, size) for letter in _CHANGES for size in (2 * MIB, 64 * MIB, GIB))},
)
