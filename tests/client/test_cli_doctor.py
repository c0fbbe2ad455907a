"""mshare doctor: what is made of the facts, and where the facts come from."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from mshare.cli import cli as group
from mshare.cli import doctor, fix, machine
from mshare.cli.findings import Finding, Level
from mshare.cli.machine import DaemonState, Machine, Userfaultfd
from mshare.discovery import HOW_TO_START
from msharefs.uffd_abi import Feature

ALL_FEATURES = Feature(0x1FFFF)
Mshare = Callable[..., Any]

ROOT = Machine(
    root=True,
    capabilities=(1 << 41) - 1,
    kernel="6.18.44",
    architecture="x86_64",
    fuse="",
    fusermount="",
    userfaultfd=Userfaultfd("", ALL_FEATURES, 0),
    thp=True,
    hugetlb_pages=(512, 500),
    landlock=7,
    libfuse=True,
    missing_modules=(),
    runtime_directory=None,
    daemon=DaemonState(Path("/run/mshare"), regions=3),
    open_files=(1024, 1 << 20),
    max_map_count=65530,
)
USER = attrs.evolve(
    ROOT,
    root=False,
    capabilities=0,
    userfaultfd=Userfaultfd("Permission denied", ALL_FEATURES, 0),
    runtime_directory="/run/user/1000",
)


def found(facts: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(facts)}


def test_a_machine_that_has_everything() -> None:
    assert {finding.level for finding in doctor.examine(ROOT)} == {Level.OK}


def test_an_ordinary_user_lacks_nothing() -> None:
    """Only the device, which a daemon run by root would hand out."""
    assert [name for name, finding in found(USER).items() if finding.level is not Level.OK] == ["userfaultfd"]
    note = found(USER)["userfaultfd"]
    assert note.level is Level.NOTE
    assert "vm.unprivileged_userfaultfd is 0" in note.found
    assert "run by root" in (note.cure or "")


@pytest.mark.parametrize(
    ("change", "name", "for_root", "for_user", "cure"),
    [
        ({"kernel": "6.0.19-1-amd64"}, "kernel", "lack", "lack", "6.1"),
        ({"kernel": "5.15.0"}, "kernel", "lack", "lack", "6.1"),
        ({"kernel": "6.1"}, "kernel", "ok", "ok", ""),
        ({"kernel": "10.0-rc1"}, "kernel", "ok", "ok", ""),
        ({"kernel": "unknown"}, "kernel", "lack", "lack", "6.1"),
        ({"architecture": "aarch64"}, "kernel", "lack", "lack", "x86-64"),
        ({"capabilities": 1 << 19}, "capabilities", "lack", None, "--cap-add SYS_ADMIN"),
        ({"capabilities": 1 << 21}, "capabilities", "note", None, "--cap-add SYS_PTRACE"),
        ({"fuse": "No such file or directory"}, "fuse", "lack", "lack", "modprobe fuse"),
        ({"fusermount": "not installed"}, "fusermount3", "note", "lack", "apt-get install fuse3"),
        ({"userfaultfd": Userfaultfd("x", None, 0)}, "userfaultfd", "lack", "lack", "CONFIG_USERFAULTFD"),
        ({"userfaultfd": Userfaultfd("x", ALL_FEATURES, None)}, "userfaultfd", "note", "note", ""),
        (
            {"userfaultfd": Userfaultfd("", ALL_FEATURES & ~Feature.WP_HUGETLBFS_SHMEM, 0)},
            "features",
            *("lack", "lack", "6.1"),
        ),
        ({"userfaultfd": Userfaultfd("", ALL_FEATURES & ~Feature.EVENT_FORK, 0)}, "features", "note", "note", ""),
        ({"userfaultfd": Userfaultfd("", ALL_FEATURES & ~Feature.POISON, 0)}, "features", "note", "note", "6.6"),
        ({"thp": False}, "huge pages", "note", "note", "CONFIG_TRANSPARENT_HUGEPAGE"),
        ({"hugetlb_pages": (0, 0)}, "hugetlb", "note", "note", "sysctl vm.nr_hugepages=N"),
        ({"hugetlb_pages": None}, "hugetlb", "note", "note", "CONFIG_HUGETLBFS"),
        ({"landlock": 2}, "landlock", "note", "ok", "6.2"),
        ({"landlock": 0}, "landlock", "note", "ok", "6.2"),
        ({"missing_modules": ("pyfuse3", "trio")}, "daemon", "lack", "lack", "pip install 'msharefs[daemon]'"),
        ({"libfuse": False}, "daemon", "lack", "lack", "apt-get install"),
        ({"runtime_directory": None}, "runtime directory", None, "lack", "--state-dir"),
        ({"daemon": DaemonState(None, f"no msharefs is mounted; {HOW_TO_START}")}, "mount", "note", "note", "up"),
        ({"daemon": DaemonState(Path("/run/mshare"), hangs=True)}, "mount", "note", "note", "kill -9"),
        ({"open_files": (256, 1024)}, "open files", "note", "note", "ulimit -Hn"),
        ({"open_files": (1024, -1)}, "open files", "ok", "ok", ""),
        ({"max_map_count": 1000}, "map count", "note", "note", "sysctl vm.max_map_count"),
        ({"max_map_count": None}, "map count", None, None, ""),
    ],
    ids=str,
)
def test_each_lack_is_found_and_has_a_cure(
    change: dict[str, Any], name: str, for_root: str | None, for_user: str | None, cure: str
) -> None:
    """``None``: nothing to say about it to that user."""
    for facts, level in ((ROOT, for_root), (USER, for_user)):
        finding = found(attrs.evolve(facts, **change)).get(name)
        assert (finding and finding.level) == level
        if finding and finding.level is not Level.OK:
            assert finding.cure
            if facts is ROOT or for_root is None:
                assert cure in finding.cure


def test_a_machine_without_userfaultfd_has_no_features_to_judge() -> None:
    assert "features" not in found(attrs.evolve(ROOT, userfaultfd=Userfaultfd("none", None, None)))


def test_what_is_wrong_with_the_mount_and_its_cure_stand_apart() -> None:
    trouble = DaemonState(Path("/m"), f"the daemon of /m is dead; {HOW_TO_START}")
    finding = found(attrs.evolve(ROOT, daemon=trouble))["mount"]
    assert finding == Finding("mount", Level.NOTE, "the daemon of /m is dead", HOW_TO_START)


def test_a_lack_is_status_1_and_a_note_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_machine", lambda _: attrs.evolve(ROOT, hugetlb_pages=(0, 0)))
    result = CliRunner().invoke(group, ["doctor"])
    assert result.exit_code == 0
    assert "note  hugetlb       no pages reserved\n" in result.output
    assert "                    cure: for the hugetlb backing: `sysctl vm.nr_hugepages=N`" in result.output
    monkeypatch.setattr(doctor, "read_machine", lambda _: attrs.evolve(ROOT, fuse="Permission denied"))
    assert CliRunner().invoke(group, ["doctor"]).exit_code == 1
    result = CliRunner().invoke(group, ["doctor", "--json"])
    assert result.exit_code == 1
    (lack,) = [each for each in json.loads(result.output) if each["level"] == "lack"]
    assert lack["name"] == "fuse"
    assert lack["found"] == "/dev/fuse: Permission denied"


def test_the_facts_of_this_machine(cli: Mshare, daemon: Any) -> None:
    """Where the daemon of these tests runs, nothing essential is missing."""
    findings = {finding["name"]: finding for finding in cli("doctor", "--json").json}
    assert findings["mount"]["found"].startswith(f"{daemon.mount}, regions: ")
    assert findings["features"]["level"] != "lack"
    assert findings["daemon"]["level"] == "ok"


def test_a_daemon_that_hangs_does_not_hang_the_doctor(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PATIENCE", 0.2)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        assert machine.read_daemon(daemon.mount) == DaemonState(daemon.mount, hangs=True)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    monkeypatch.setattr(machine, "_PATIENCE", 20)
    assert machine.read_daemon(daemon.mount) == DaemonState(daemon.mount)


def test_no_daemon_is_a_fact_too(tmp_path: Path) -> None:
    state = machine.read_daemon(tmp_path)
    assert "is no msharefs mount" in state.trouble
    assert not state.hangs


def test_a_device_that_can_be_opened_and_those_that_cannot(tmp_path: Path) -> None:
    assert machine.read_device(Path("/dev/null")) == ""
    assert machine.read_device(tmp_path / "none") == "No such file or directory"
    assert machine.read_device(tmp_path) == "Is a directory"


def test_fusermount3_must_be_set_uid(tmp_path: Path) -> None:
    assert machine.read_fusermount(str(tmp_path)) == "not installed"
    program = tmp_path / "fusermount3"
    program.touch(mode=0o755)
    assert machine.read_fusermount(str(tmp_path)) == f"{program} is not set-uid root"
    if os.geteuid() == 0:
        program.chmod(0o4755)
        assert machine.read_fusermount(str(tmp_path)) == ""


def test_without_the_device_the_system_call_is_asked(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the device is root's")
    whole = machine.read_userfaultfd()
    without = machine.read_userfaultfd(tmp_path / "userfaultfd")
    assert without.device == "No such file or directory"
    assert without.features == whole.features
    assert whole.device == ""
    assert whole.features is not None
    assert whole.features & Feature.MISSING_SHMEM


def test_huge_pages_are_read_from_their_pool(tmp_path: Path) -> None:
    assert machine.read_hugetlb(tmp_path) is None
    (tmp_path / "nr_hugepages").write_text("512\n")
    (tmp_path / "free_hugepages").write_text("500\n")
    assert machine.read_hugetlb(tmp_path) == (512, 500)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("always [madvise] never\n")
    assert machine.read_number(tmp_path / "words") is None
    assert machine.read_number(tmp_path / "nothing") is None


def test_capabilities_are_read_as_bits(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000000000280000\n")
    assert machine.read_capabilities(status) == 1 << 19 | 1 << 21
    status.write_text("Name:\tx\n")
    assert machine.read_capabilities(status) == 0


def test_libraries_are_looked_for_where_the_loader_looks() -> None:
    assert machine.read_libfuse(("libc.so.6",))
    assert not machine.read_libfuse(("libnothing-of-the-kind.so.9",))


class TestFix:
    """What root would run for each lack, and what it runs when asked."""

    @pytest.fixture(autouse=True)
    def _with_apt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fix.shutil, "which", lambda name: f"/usr/bin/{name}")

    @pytest.mark.parametrize(
        ("lack", "first"),
        [
            ({"fuse": "No such file or directory"}, "modprobe fuse"),
            ({"fusermount": "not installed"}, "apt-get install"),
            ({"missing_modules": ("pyfuse3",)}, "apt-get install"),
            ({"libfuse": False}, "apt-get install"),
            ({"max_map_count": 1000}, "sysctl -w vm.max_map_count=65530"),
            ({"userfaultfd": Userfaultfd("No such file or directory", ALL_FEATURES, 0)}, "mknod"),
            ({"daemon": DaemonState(Path("/m"), trouble="the daemon of /m is dead")}, sys.executable),
        ],
    )
    def test_a_lack_has_commands_that_cure_it(self, lack: dict[str, Any], first: str) -> None:
        facts = attrs.evolve(ROOT, **lack)
        (bad,) = [finding for finding in doctor.examine(facts) if finding.level is not Level.OK]
        assert " ".join(fix.commands_for(bad, facts)[0]).startswith(first)

    @pytest.mark.parametrize(
        "lack",
        [{"kernel": "5.10"}, {"hugetlb_pages": (0, 0)}, {"daemon": DaemonState(Path("/m"), hangs=True)}],
    )
    def test_what_takes_a_decision_or_another_machine_is_left_to_people(self, lack: dict[str, Any]) -> None:
        facts = attrs.evolve(ROOT, **lack)
        (bad,) = [finding for finding in doctor.examine(facts) if finding.level is not Level.OK]
        assert fix.commands_for(bad, facts) == []

    @pytest.fixture
    def lacking(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
        """A machine without fuse; the commands that were run, after which it has it."""
        ran: list[tuple[str, ...]] = []
        monkeypatch.setattr(fix.os, "geteuid", lambda: 0)
        monkeypatch.setattr(fix, "run", lambda commands: ran.extend(commands) or True)
        lack = attrs.evolve(ROOT, fuse="No such file or directory")
        monkeypatch.setattr(doctor, "read_machine", lambda _mount: ROOT if ran else lack)
        return ran

    def test_root_is_asked(self, lacking: list[tuple[str, ...]]) -> None:
        refused = CliRunner().invoke(group, ["doctor", "--fix"], input="n\n")
        assert (refused.exit_code, lacking) == (1, [])
        agreed = CliRunner().invoke(group, ["doctor", "--fix"], input="y\n")
        assert (agreed.exit_code, lacking) == (0, [("modprobe", "fuse")])

    def test_root_may_say_yes_to_all(self, lacking: list[tuple[str, ...]]) -> None:
        assert CliRunner().invoke(group, ["doctor", "--fix", "--yes"]).exit_code == 0
        assert lacking == [("modprobe", "fuse")]

    def test_others_are_told_what_to_run(self, lacking: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fix.os, "geteuid", lambda: 1000)
        told = CliRunner().invoke(group, ["doctor", "--fix"])
        assert "modprobe fuse\n  run that as root" in told.stdout
        assert lacking == []

    @pytest.mark.parametrize("options", [["--yes"], ["--fix", "--json"]])
    def test_what_makes_no_sense_is_wrong_usage(self, options: list[str]) -> None:
        assert CliRunner().invoke(group, ["doctor", *options]).exit_code == 2

    def test_commands_run_until_one_fails(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert fix.run([("echo", "one"), ("echo", "two")])
        assert not fix.run([("false",), ("echo", "three")])
        assert not fix.run([("no-such-command-at-all",), ("echo", "four")])
        out, err = capfd.readouterr()
        assert out.split() == ["one", "two"]
        assert "false ended with 1" in err
        assert "no-such-command-at-all: No such file" in err
