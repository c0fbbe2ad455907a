"""The benchmarks: every group runs and finds what it names, in a size at which figures mean nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300
TINY = {
    "touch": "touch.Plan(2 * MIB, 1, 4 * MIB)",
    "attach": "attach.Plan(1, 5, 1, 4)",
    "growth": "growth.Plan(64 * MIB, (1, 3, 1000000), 0)",
    "files_shared": "files_shared.Plan(GIB // 16, 3)",
    "scaling": "scaling.Plan((1,), (1, 3), 2, GIB)",
    "changes": "changes.Plan((1, 3), (2 * MIB, 4 * MIB), 1)",
    "faults": "faults.Plan(16, (1, 2), 2 * MIB, 1)",
    "control": "control.Plan(3, 1)",
    "refpages": "refpages.Plan(3, 4_096_000, (4096, 2_048_000, 4_096_000), 1)",
    "snapshots": "snapshots.Plan((8 << 20,), 8 << 20, 1 << 20, 2, 2, 1)",
}
RUN = """
import sys
from pathlib import Path
import attrs
from benchmarks import groups, suite
from benchmarks.daemon import stop_cleanly_on_signals
from benchmarks.groups import ALL, attach, changes, control, faults, files_shared, growth, refpages, scaling, snapshots
from benchmarks.groups import touch
from benchmarks.machine import GIB, MIB

if __name__ == "__main__":
    stop_cleanly_on_signals()
    (group,) = [each for each in ALL if each.name == sys.argv[1]]
    plan = eval(sys.argv[2])
    (found,) = suite.measure([attrs.evolve(group, quick=lambda: plan)], Path(sys.argv[3]), quick=True)
"""

pytestmark = [pytest.mark.usefixtures("_needs_the_kernel"), pytest.mark.pool]


def start(group: str, plan: str, output: Path) -> subprocess.Popen[str]:
    """Run a group with a plan, in a process of its own."""
    command = [sys.executable, "-c", RUN, group, plan, str(output)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_every_machine(group: dict[str, Any]) -> list[dict[str, Any]]:
    """What is measured without huge pages, and where temporary files are in memory, too."""
    elsewhere = ("1024 MiB", "on disk")
    return [each for each in group["measured"] if not any(word in each["metric"]["name"] for word in elsewhere)]


@pytest.mark.parametrize("name", TINY)
def test_a_group_finds_something_of_everything_it_names(name: str, tmp_path: Path) -> None:
    process = start(name, TINY[name], tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    (group,) = results["groups"]
    assert group["error"] is None, err
    for measured in on_every_machine(group):
        series = {row["series"] for row in measured["rows"]}
        assert series, f"nothing of {measured['metric']['name']}"
        assert any("msharefs" in each or "anonymous" in each for each in series)
        assert measured["metric"]["heading"] in out
        assert measured["metric"]["heading"] in (tmp_path / "results.md").read_text()
    assert results["machine"]["kernel"] == os.uname().release


def test_the_floor_of_a_change_is_measured_beside_it(tmp_path: Path) -> None:
    """What the system calls alone take, by a server that ends with the benchmark, and in every place that ours is."""
    process = start("changes", "changes.Plan((1, 3), (2 * MIB,), 1)", tmp_path)
    _, err = process.communicate(timeout=PATIENCE)
    (group,) = json.loads((tmp_path / "results.json").read_text())["groups"]
    for measured in group["measured"]:
        if "MiB, each" in measured["metric"]["name"] and "1024" not in measured["metric"]["name"]:
            places = {row["series"]: [] for row in measured["rows"]}
            for row in measured["rows"]:
                places[row["series"]].append(row["at"])
            assert places["the system calls alone, thp"] == places["msharefs, thp"] == [1, 3], err


def test_what_is_not_measured_is_marked_as_computed(tmp_path: Path) -> None:
    """A million processes are not started: their page tables follow from those of the few that were."""
    _, err = start("growth", TINY["growth"], tmp_path).communicate(timeout=PATIENCE)
    (group,) = json.loads((tmp_path / "results.json").read_text())["groups"]
    tables = next(each for each in group["measured"] if each["metric"]["name"] == "page tables of all")
    by_place = {row["at"]: row for row in tables["rows"] if row["series"] == "multiprocessing.shared_memory"}
    assert not by_place[1]["computed"], err
    assert by_place[1000000]["computed"]
    assert by_place[1000000]["median"] == pytest.approx(1000000 * by_place[1]["median"])
    assert "computed" in (tmp_path / "results.md").read_text()


def test_a_run_that_is_ended_takes_everything_down(tmp_path: Path) -> None:
    """SIGTERM while many processes are attached: no daemon, no mount and no directory stays."""
    process = start("changes", "changes.Plan((20,), (2 * MIB,), 100000)", tmp_path)
    assert process.stderr is not None
    while "20 attached" not in process.stderr.readline():
        assert process.poll() is None
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    mounts = [place for pid in children for place in mount_of(pid)]
    assert len(mounts) == 1, "the daemon was not found"
    assert os.path.ismount(mounts[0])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert not mounts[0].parent.exists()
    assert [pid for pid in children if os.path.exists(f"/proc/{pid}")] == []


def mount_of(pid: int) -> list[Path]:
    """Where a daemon mounts, by its command line; nothing for other processes."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return [Path(words[words.index("--mount") + 1])] if "--mount" in words else []
