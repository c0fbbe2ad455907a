"""From samples to tables and pictures, without measuring anything."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.group import Samples
from benchmarks.groups import ALL
from benchmarks.results import GroupResults, Measured, Metric, Results

ROOT = Path(__file__).resolve().parents[1]
LESS = Metric("time", "time of it", "us", 1e6, peer="theirs")
MORE = Metric("rate", "how many", "1/s", 1, peer="theirs", more_is_better=True)
GROWN = Metric("tables", "page tables", "MiB", 1, over="processes", peer="theirs", log="xy")
MACHINE = {"cpu": "z", "cpus": "2", "memory": "1 GiB", "virtual machine": "no", "kernel": "6", "python": "3"}


def results_of(*measured: Measured) -> Results:
    pictures = {"picture": [each.metric.name for each in measured]}
    return Results(MACHINE, True, [GroupResults("g", "a and b", "as one does", {}, pictures, [*measured], [], None, 1)])


def text_of(*measured: Measured) -> str:
    return report.text(results_of(*measured).groups[0])


def test_medians_are_shown_in_the_unit_with_their_spread() -> None:
    samples = Samples()
    for value in (1e-6, 2e-6, 5e-6):
        samples.add("time", "ours", value)
    (row,) = samples.measured(LESS).rows
    assert [row.median, row.least, row.most] == pytest.approx([2, 1, 5])
    assert row.ratio is None
    assert "2 ±100%" in text_of(samples.measured(LESS))


@pytest.mark.parametrize(("metric", "ours", "theirs", "shown"), [(LESS, 1, 4, "4x"), (LESS, 4, 1, "1/4")])
def test_less_is_better_unless_said(metric: Metric, ours: float, theirs: float, shown: str) -> None:
    samples = Samples()
    samples.add(metric.name, "ours", ours)
    samples.add(metric.name, "theirs", theirs)
    assert f", {shown}" in text_of(samples.measured(metric))


def test_more_is_better_where_that_is_said() -> None:
    samples = Samples()
    samples.add("rate", "ours", 8)
    samples.add("rate", "theirs", 2)
    assert [row.ratio for row in samples.measured(MORE).rows] == [4, 1]


def test_a_table_over_something_has_a_column_for_each_place_and_stars_for_what_is_computed() -> None:
    samples = Samples()
    for place, ours, theirs in ((1, 1, 3), (10, 2, 30)):
        samples.add("tables", "ours", ours, place)
        samples.add("tables", "theirs", theirs, place)
    samples.compute("tables", "theirs", 300, 100)
    lines = text_of(samples.measured(GROWN)).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert cells["processes"] == ["1", "10", "100"]
    assert cells["ours"] == ["1", "2"]
    assert cells["theirs"] == ["3", "30", "300*"]
    assert cells["..."][-2:] == ["3x", "15x"]
    assert "* computed, not measured" in lines


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = Samples()
    samples.add("tables", "ours", 1, 10)
    samples.compute("tables", "ours", 7, 70)
    results = results_of(samples.measured(GROWN))
    results.save(tmp_path / "found.json")
    assert Results.load(tmp_path / "found.json") == results
    assert "| ours | 1 | 7* |" in report.markdown(results)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="pictures need matplotlib: pip install matplotlib")
def test_pictures_are_drawn_of_results_alone(tmp_path: Path) -> None:
    """In a process of its own: what matplotlib warns of is not ours."""
    samples = Samples()
    for place in (1, 10):
        samples.add("tables", "ours", place, place)
    samples.compute("tables", "ours", 100, 100)
    samples.add("time", "ours", 3)
    results_of(samples.measured(GROWN), samples.measured(LESS)).save(tmp_path / "found.json")
    command = [sys.executable, "-m", "benchmarks", "--render", tmp_path / "found.json", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    assert "A quick run" in (tmp_path / "results.md").read_text()


def test_without_matplotlib_it_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    results_of().save(tmp_path / "found.json")
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = sys.argv[2:]\n"
    code += "from benchmarks.__main__ import main; main()\n"
    command = [sys.executable, "-c", code, tmp_path, "--render", tmp_path / "found.json", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "pip install matplotlib" in done.stderr


def test_each_group_has_a_name_of_its_own_and_pictures_of_its_own_metrics() -> None:
    names = [group.name for group in ALL]
    assert len(set(names)) == len(names)
    for group in ALL:
        metrics = [metric.name for metric in group.metrics(group.quick())]
        assert len(set(metrics)) == len(metrics)
        for pictured in group.pictures.values():
            assert set(pictured) <= set(metrics)
