"""From samples to tables and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import measure
from benchmarks.machine import MIB
from benchmarks.measure import Plan, Samples
from benchmarks.memory import Kind

METHOD: Final = (
    "Touching: one slice assignment (stores) or copy (loads) with a stride of 4096 bytes, a loop in C inside CPython; "
    "nothing is subtracted. Every round in fresh processes, kinds in turn; before each, twice the memory it takes is "
    "touched and freed until that gets no faster. Attaching: mshare.mshare(name, None, 0, O_RDWR) against "
    "SharedMemory(name) without its resource tracker, on 64 MiB that are present. The storm: forked processes wait "
    "for one signal and attach at once."
)


@attrs.frozen
class Metric:
    """How a metric is shown: under which heading, in which unit, which is 1/``scale`` of what was sampled."""

    name: str
    heading: str
    unit: str
    scale: float


def metrics(plan: Plan) -> Iterator[Metric]:
    """All metrics, in order."""
    size = f"{plan.size // MIB} MiB"
    yield Metric(measure.FIRST, f"first touch: a store into each 4 KiB page of {size}", "ns a page", 1e9)
    yield Metric(measure.LOAD, "a second process loads from each page, all present", "ns a page", 1e9)
    yield Metric(measure.STORE, "a third process stores into each page, all present", "ns a page", 1e9)
    yield Metric(measure.TABLES, "page tables of that process for it (growth of VmPTE)", "KiB", 1 / 1024)
    yield Metric(measure.LOOP_P50, f"attach, {plan.loops} times in a loop: p50", "us", 1e6)
    yield Metric(measure.LOOP_P99, f"attach, {plan.loops} times in a loop: p99", "us", 1e6)
    yield Metric(measure.DETACH, "detach in that loop: p50", "us", 1e6)
    yield Metric(measure.FRESH, "attach, the first in a fresh process", "us", 1e6)
    yield Metric(measure.STORM, f"{plan.storm} processes attach at once: until the last has", "ms", 1e3)
    yield Metric(measure.STORM_P50, "a process among those: p50", "ms", 1e3)
    yield Metric(measure.ERRORS, "errors among those", "errors", 1)


def table(samples: Samples, plan: Plan) -> str:
    """For the terminal."""
    lines = []
    for metric in metrics(plan):
        if metric.name in samples.values:
            lines += [*_block(metric, samples.values[metric.name]), ""]
    return "\n".join(lines)


def summary(samples: Samples, plan: Plan) -> dict[str, dict[str, Any]]:
    """The medians and ratios, by metric and kind."""
    return {
        metric.name: {
            "unit": metric.unit,
            "median": {kind: statistics.median(found) * metric.scale for kind, found in by_kind.items()},
            "shm / this": {kind: ratio(by_kind, kind) for kind in by_kind},
        }
        for metric in metrics(plan)
        if (by_kind := samples.values.get(metric.name))
    }


def write_json(path: Path, machine: dict[str, str], plan: Plan, samples: Samples) -> None:
    """Everything: machine, method, settings, medians, and each number sampled (seconds and bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "method": METHOD,
        "plan": attrs.asdict(plan),
        "summary": summary(samples, plan),
        "samples": samples.values,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def ratio(by_kind: dict[Kind, list[float]], kind: Kind) -> float | None:
    """How many times shm's median this kind's is smaller; None where there is nothing to divide."""
    ours = statistics.median(by_kind[kind])
    theirs = by_kind.get(Kind.SHM)
    return statistics.median(theirs) / ours if theirs and ours > 0 else None


def _block(metric: Metric, by_kind: dict[Kind, list[float]]) -> Iterator[str]:
    yield f"{metric.heading}, {metric.unit}"
    yield f"  {'':<30}{'median':>10}{'least':>10}{'most':>10}{'shm / this':>13}"
    for kind in Kind:
        if kind in by_kind:
            found = [value * metric.scale for value in by_kind[kind]]
            times = ratio(by_kind, kind)
            numbers = "".join(f"{_number(n):>10}" for n in (statistics.median(found), min(found), max(found)))
            yield f"  {kind.label:<30}{numbers}{'' if times is None else f'{_number(times)}x':>13}"


def _number(value: float) -> str:
    """Three digits, as far as they say something."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
