"""The command line of the daemon: from options to a configuration, and mistakes in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mshared import __main__ as command
from msharefs.effects import Signal
from msharefs.namespace import Limits
from msharefs.region import BackingKind

pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed: scripts/setup installs it")

from mshared import app, places

PLACES = ["--mount", "/m", "--state-dir", "/s"]


class Mshared:
    """The command, with a daemon that only notes how it was started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.started: list[app.Config] = []
        self.masks: list[int] = []
        self.error: Exception | None = None
        monkeypatch.chdir(tmp_path)  # The command leaves it; the test comes back.
        monkeypatch.setattr(os, "umask", lambda mask: self.masks.append(mask) or 0)
        monkeypatch.setattr(app, "run", self.run)

    def run(self, config: app.Config) -> None:
        self.started.append(config)
        if self.error is not None:
            raise self.error

    def __call__(self, *arguments: str) -> Any:
        return CliRunner().invoke(command.main, list(arguments), prog_name="mshared")

    def config(self, *arguments: str) -> app.Config:
        result = self(*PLACES, *arguments)
        assert result.exit_code == 0, result.output
        (config,) = self.started
        return config


@pytest.fixture
def mshared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mshared:
    return Mshared(monkeypatch, tmp_path)


def test_nothing_said_is_the_default_of_everything(mshared: Mshared) -> None:
    config = mshared.config()
    assert (config.mount, config.state_dir) == (Path("/m"), Path("/s"))
    assert config.backing is None
    assert config.mode == 0o1777
    assert config.policy.align == 2 << 20
    assert not config.policy.paging_all
    assert config.policy.hole_signal is Signal.SIGBUS
    assert config.policy.limits == Limits()
    assert config.writeback == 30


def test_everything_said_is_taken_over(mshared: Mshared) -> None:
    config = mshared.config(
        *("--backing", "4k", "--align", "512G", "--paging", "all", "--hole-signal", "SIGSEGV"),
        *("--writeback", "2.5", "--max-bytes", "64g", "--max-regions", "7", "--mode", "0750", "--log-level", "debug"),
    )
    assert config.backing is BackingKind.SMALL
    assert config.mode == 0o750
    assert config.policy.align == 512 << 30
    assert config.policy.paging_all
    assert config.policy.hole_signal is Signal.SIGSEGV
    assert config.policy.limits == Limits(max_regions=7, max_bytes=64 << 30)
    assert config.writeback == 2.5


@pytest.mark.parametrize(
    ("text", "size"),
    [("2M", 2 << 20), ("4194304", 4 << 20), ("1g", 1 << 30), ("1GiB", 1 << 30), ("512 G", 512 << 30), ("1T", 1 << 40)],
)
def test_sizes(mshared: Mshared, text: str, size: int) -> None:
    assert mshared.config("--align", text).policy.align == size


@pytest.mark.parametrize(("text", "mode"), [("0", 0), ("700", 0o700), ("01777", 0o1777), ("0o755", 0o755)])
def test_modes(mshared: Mshared, text: str, mode: int) -> None:
    assert mshared.config("--mode", text).mode == mode


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--align", "1M"], "at least 2M"),
        (["--align", "0"], "at least 2M"),
        (["--align", "6M"], "power of two"),
        (["--align", "2X"], "not a size"),
        (["--align", "-2M"], "not a size"),
        (["--align", "1.5M"], "not a size"),
        (["--align", ""], "not a size"),
        (["--max-bytes", "much"], "not a size"),
        (["--max-regions", "0"], "0 is not in the range"),
        (["--max-regions", "-1"], "-1 is not in the range"),
        (["--max-regions", "1.5"], "not a valid integer"),
        (["--writeback", "0"], "0.0 is not in the range"),
        (["--mode", "778"], "'778' is not an octal mode"),
        (["--mode", "2777"], "'2777' is not an octal mode"),
        (["--mode", "-1"], "'-1' is not an octal mode"),
        (["--mode", "rwx"], "'rwx' is not an octal mode"),
        (["--backing", "floppy"], "'floppy' is not one of"),
        (["--hugetlb-pool", "much"], "Invalid value for '--hugetlb-pool'"),
        (["--paging", "none"], "'none' is not one of"),
        (["--hole-signal", "SIGKILL"], "'SIGKILL' is not one of"),
        (["--log-level", "loud"], "'loud' is not one of"),
        (["--colour", "blue"], "No such option"),
        (["here"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_told_and_starts_nothing(mshared: Mshared, arguments: list[str], words: str) -> None:
    result = mshared(*PLACES, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert "Usage: mshared" in result.output
    assert mshared.started == []


def test_places_are_absolute_before_the_directory_is_left(mshared: Mshared, tmp_path: Path) -> None:
    assert mshared("--mount", "a/../m", "--state-dir", "s").exit_code == 0
    assert mshared.started[0].mount == tmp_path / "m"
    assert mshared.started[0].state_dir == tmp_path / "s"
    assert Path.cwd() == Path("/")


def test_files_of_the_daemon_can_be_found_by_others(mshared: Mshared) -> None:
    mshared.config()
    assert mshared.masks == [0o022]


def test_places_nobody_names_are_the_users(mshared: Mshared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert mshared().exit_code == 0
    assert mshared.started[0].mount == Path("/run/user/1000/mshare")
    assert mshared.started[0].state_dir == Path("/run/user/1000/mshared/run-user-1000-mshare")


def test_a_daemon_that_cannot_start_says_why_in_one_line(mshared: Mshared) -> None:
    mshared.error = places.StartError("no such luck; try again")
    result = mshared(*PLACES)
    assert result.exit_code == 1
    assert result.output == "Error: no such luck; try again\n"


def test_so_does_one_that_finds_no_place(mshared: Mshared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    result = mshared()
    assert result.exit_code == 1
    assert "give --mount and --state-dir" in result.output
    assert mshared.started == []


class TestWithoutFuse:
    """On a machine where only the client is installed."""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.modules['pyfuse3'] = None; sys.modules['trio'] = None\n"
        code += f"from mshared.__main__ import main; main({list(arguments)!r}, prog_name='mshared')"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    def test_help_is_there_all_the_same(self) -> None:
        done = self.run("--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Usage: mshared ")

    def test_starting_says_what_to_install(self) -> None:
        done = self.run(*PLACES)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert "pip install 'msharefs[daemon]'" in done.stderr
        assert "Traceback" not in done.stderr
