"""Runs groups one after the other, and keeps what they find."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import machine, plots, report
from benchmarks.group import RUN, Bench, Group, gist, why_no_hugetlb
from benchmarks.results import GroupResults, Results

_JSON: Final = "results.json"
_TABLES: Final = "results.md"


def measure(groups: list[Group[Any]], output: Path, *, quick: bool) -> list[GroupResults]:
    """Run the groups. What there is so far is written after each of them."""
    described = machine.describe()
    _say("\n".join(f"{key}: {value}" for key, value in described.items()))
    no_hugetlb = why_no_hugetlb()
    described["hugetlb"] = "available" if no_hugetlb is None else f"not available: {no_hugetlb}"
    _say(f"hugetlb: {described['hugetlb']}\n")
    found: list[GroupResults] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_leftovers)
        for group in groups:
            found.append(_run(group, no_hugetlb, quick=quick))
            print(report.text(found[-1]), flush=True)
            results = Results(described, quick, found)
            results.save(output / _JSON)
        write(results, output)
    return found


def _run(group: Group[Any], no_hugetlb: str | None, *, quick: bool) -> GroupResults:
    """Run a group. What it has found counts even when it fails."""
    _say(f"{group.name}: {group.compares}\n{group.method}")
    plan = (group.quick if quick else group.full)()
    bench, error, start = Bench(_say, no_hugetlb), None, time.monotonic()
    try:
        group.run(bench, plan)
    except (RuntimeError, OSError) as failure:
        error = f"{type(failure).__name__}: {gist(failure)}"
        _say(f"{group.name}: failed: {failure}")
    seconds = time.monotonic() - start
    _say(f"{group.name}: {seconds:.0f} seconds")
    return GroupResults(
        name=group.name,
        compares=group.compares,
        method=group.method,
        plan=attrs.asdict(plan),
        pictures={name: list(metrics) for name, metrics in group.pictures.items()},
        measured=[bench.samples.measured(metric) for metric in group.metrics(plan)],
        notes=bench.notes,
        error=error,
        seconds=seconds,
    )


def write(results: Results, output: Path) -> None:
    """Make tables and plots of results."""
    output.mkdir(parents=True, exist_ok=True)
    (output / _TABLES).write_text(report.markdown(results))
    try:
        plots.draw(results, output)
    except ImportError:
        _say(plots.HOW_TO_HAVE_THEM)
    _say(f"everything found is in {output}")


def _remove_leftovers() -> None:
    """Take away blocks of shared memory whose process was killed before it could."""
    for path in Path("/dev/shm").glob(f"{RUN}-*"):
        path.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
