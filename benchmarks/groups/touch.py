"""First touch of memory, and the touches of processes that come later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from benchmarks import machine
from benchmarks.driver import Worker
from benchmarks.group import Bench, Group, Samples, in_turn, kinds_of, new_name, size_of
from benchmarks.machine import GIB, MIB
from benchmarks.memory import PAGE, Kind
from benchmarks.results import Metric

FIRST: Final = "first touch"
FIRST_SHUFFLED: Final = "first touch, random"
LOAD: Final = "second process, loads"
LOAD_SHUFFLED: Final = "second process, random loads"
STORE: Final = "second process, stores"
TABLES: Final = "page tables"
FAULTS: Final = "faults"


@attrs.frozen
class Plan:
    """How much is done. ``size`` in bytes; at least ``warm`` are touched and freed before each."""

    size: int
    rounds: int
    warm: int = GIB


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    size = f"{plan.size // MIB} MiB"
    yield Metric(FIRST, f"first touch: a store into each 4 KiB page of {size}", "ns a page", 1e9)
    yield Metric(FIRST_SHUFFLED, "the same in random order, in fresh memory", "ns a page", 1e9)
    yield Metric(LOAD, "a second process loads from each page, all present", "ns a page", 1e9)
    yield Metric(LOAD_SHUFFLED, "another process does so in random order", "ns a page", 1e9)
    yield Metric(STORE, "a third process stores into each page, all present", "ns a page", 1e9)
    yield Metric(FAULTS, "page faults of that process meanwhile", "faults", 1)
    yield Metric(TABLES, "page tables of that process for it (growth of VmPTE)", "KiB", 1 / 1024)


def run(bench: Bench, plan: Plan) -> None:
    """Each round of each kind in fresh processes; kinds take turns."""
    with bench.daemon(pool=size_of(Kind.HUGETLB, plan.size)) as daemon:
        for number in range(plan.rounds):
            for kind in in_turn(kinds_of(daemon), number):
                bench.say(f"touch: round {number + 1} of {plan.rounds}, {kind.label}")
                _in_order(daemon.mount, kind, plan, bench.samples)
                _shuffled(daemon.mount, kind, plan, bench.samples, number)


def _in_order(mount: Path, kind: Kind, plan: Plan, samples: Samples) -> None:
    """One process touches every page for the first time; then another loads from, a third stores into each."""
    size = size_of(kind, plan.size)
    pages = size // PAGE
    with Worker(mount) as warmer, Worker(mount) as first, Worker(mount) as reader, Worker(mount) as writer:
        _warm_up(warmer, kind, size, plan.warm)
        handle = first.call("create", kind=kind, name=new_name(), size=size)
        samples.add(FIRST, kind.label, first.call("write")["seconds"] / pages)
        reader.call("attach", kind=kind, handle=handle)
        samples.add(LOAD, kind.label, reader.call("read")["seconds"] / pages)
        writer.call("attach", kind=kind, handle=handle)
        stored = writer.call("write")
        samples.add(STORE, kind.label, stored["seconds"] / pages)
        samples.add(FAULTS, kind.label, stored["faults"])
        samples.add(TABLES, kind.label, stored["tables"])
        for worker in (reader, writer, first):  # Before the next round needs the memory.
            worker.call("remove")


def _shuffled(mount: Path, kind: Kind, plan: Plan, samples: Samples, seed: int) -> None:
    """The same in random order, for two processes."""
    size = size_of(kind, plan.size)
    pages = size // PAGE
    with Worker(mount) as warmer, Worker(mount) as first, Worker(mount) as reader:
        _warm_up(warmer, kind, size, plan.warm)
        handle = first.call("create", kind=kind, name=new_name(), size=size)
        samples.add(FIRST_SHUFFLED, kind.label, first.call("write_shuffled", seed=seed)["seconds"] / pages)
        reader.call("attach", kind=kind, handle=handle)
        samples.add(LOAD_SHUFFLED, kind.label, reader.call("read_shuffled", seed=seed)["seconds"] / pages)
        for worker in (reader, first):
            worker.call("remove")


def _warm_up(warmer: Worker, kind: Kind, size: int, least: int) -> None:
    """Touch and free as much memory as this takes, of the same sort: huge pages are set aside for their own use."""
    if kind is Kind.HUGETLB:
        warmer.call("create", kind=kind, name=new_name(), size=size)
        warmer.call("write")
        warmer.call("remove")
    else:
        warmer.call("warm_up", size=min(max(2 * size, least), machine.room() // 2))


GROUP: Final = Group(
    name="touch",
    compares="touching memory for the first time, and memory that others have touched",
    method=(
        "In order: assignments to slices (stores) or copies of slices (loads) with a stride of 4096 bytes, 32 MiB at "
        "once. In random order: an iterator written in C over offsets made before, about 35 ns of a store and 10 ns of "
        "a load. Nothing is subtracted. Every round in fresh processes, kinds in turn; before each, at least twice the "
        "memory it takes is touched and freed until that gets no faster (hugetlb: once, of its own). hugetlb comes in "
        "whole gibibytes."
    ),
    quick=lambda: Plan(machine.fitting_size(128 * MIB), 2),
    full=lambda: Plan(machine.fitting_size(GIB), 5),
    metrics=metrics,
    run=run,
    pictures={"touch": (FIRST, FIRST_SHUFFLED, LOAD, LOAD_SHUFFLED, STORE, TABLES)},
)
