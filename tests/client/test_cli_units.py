"""mshare install-units: what it writes, where, and that it touches nothing of anybody else's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare.cli import units

Install = Callable[..., Any]
ROOT = Path(__file__).parents[2]
MSHARED = Path(sys.executable).parent / "mshared"
NO_NAMESPACE = (
    *("Private", "Protect", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths"),
    *("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "MountFlags", "MountAPIVFS", "MountImages"),
    *("RootDirectory", "RootImage", "DynamicUser", "NoNewPrivileges", "RestrictNamespaces"),
)
"""Options, or how they start, by which a unit would hide the mount, or keep fusermount3 from mounting."""


@pytest.fixture
def install(mshare: Install, tmp_path: Path) -> Install:
    return lambda *arguments, **more: mshare(
        "install-units", "--directory", str(tmp_path / "units"), *arguments, **more
    )


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return tmp_path / "units" / "mshared.service"


def settings(text: str) -> list[tuple[str, str]]:
    """The keys and values of a unit."""
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


@pytest.mark.parametrize("kind", [[], ["--user"]])
def test_a_unit_runs_the_mshared_that_belongs_to_the_command(install: Install, unit: Path, kind: list[str]) -> None:
    (said,) = install(*kind).lines
    assert str(unit) in said
    assert "daemon-reload" in said
    text = unit.read_text()
    assert ("ExecStart", str(MSHARED)) in settings(text)
    assert ("WantedBy", "default.target" if kind else "multi-user.target") in settings(text)
    assert unit.stat().st_mode & 0o777 == 0o644
    assert os.listdir(unit.parent) == ["mshared.service"]


@pytest.mark.parametrize("kind", [[], ["--user"]])
def test_systemd_finds_nothing_to_say(install: Install, unit: Path, tmp_path: Path, kind: list[str]) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze; scripts/setup installs it where CI is set")
    assert install(*kind, "--", "--max-bytes", "8G", "--state-dir", '/somewhere with "quotes" and $5 100%').status == 0
    manager = ["--user"] if kind else ["--system"]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", *manager, "--man=no", "--recursive-errors=no", "verify", unit],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("place", ["systemd/mshared.service", "systemd/user/mshared.service"])
def test_no_option_hides_the_mount(place: str) -> None:
    keys = [key for key, _ in settings((ROOT / place).read_text())]
    assert {"Type", "WatchdogSec", "Restart", "LimitNOFILE", "KillMode"} <= set(keys)
    assert [key for key in keys if key.startswith(NO_NAMESPACE)] == []


def test_a_user_s_unit_asks_for_nothing_that_a_user_cannot_give() -> None:
    keys = {key for key, _ in settings((ROOT / "systemd/user/mshared.service").read_text())}
    assert (
        keys & {"OOMScoreAdjust", "CapabilityBoundingSet", "RestrictAddressFamilies", "SystemCallArchitectures"}
        == set()
    )


def test_mount_and_options_go_to_mshared(mshare: Install, tmp_path: Path, unit: Path) -> None:
    directory = str(unit.parent)
    mshare("--mount", str(tmp_path / "m"), "install-units", "--directory", directory, "--", "--max-bytes", "8G")
    assert ("ExecStart", f"{MSHARED} --mount {tmp_path / 'm'} --max-bytes 8G") in settings(unit.read_text())


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/usr/bin/mshared", "/usr/bin/mshared"),
        ("100%", "100%%"),
        ("a b", '"a b"'),
        ('a"b', '"a\\"b"'),
        ("a\\b", '"a\\\\b"'),
        ("$HOME", '"$$HOME"'),
        ("", '""'),
        ("a;b", '"a;b"'),
    ],
)
def test_words_are_written_so_that_systemd_reads_them_back(word: str, written: str) -> None:
    assert units.quoted(word) == written


@pytest.mark.parametrize("word", ["a\nExecStartPre=/bin/evil", "a\tb", "bell\a", "ü"])
def test_words_that_could_be_misread_are_refused(install: Install, unit: Path, word: str) -> None:
    assert "characters" in install("--", word).error
    assert not unit.exists()


def test_a_dry_run_prints_and_writes_nothing(install: Install, unit: Path) -> None:
    first, *rest = install("--dry-run").lines
    assert first == f"# {unit}"
    assert f"ExecStart={MSHARED}" in rest
    assert not unit.parent.exists()
    install()
    assert unit.read_text().splitlines() == rest
    assert install("--uninstall", "--dry-run").lines == [f"{unit} would be taken away"]
    assert unit.exists()


def test_again_brings_it_up_to_date_and_uninstall_takes_it_away(install: Install, unit: Path) -> None:
    assert install().status == 0
    assert install("--", "--max-regions", "7").status == 0
    assert f"ExecStart={MSHARED} --max-regions 7\n" in unit.read_text()
    assert install("--uninstall").status == 0
    assert os.listdir(unit.parent) == []
    assert "nothing to take away" in install("--uninstall").error


@pytest.mark.parametrize("arguments", [[], ["--uninstall"]])
def test_what_somebody_else_wrote_is_left_alone(install: Install, unit: Path, arguments: list[str]) -> None:
    unit.parent.mkdir()
    unit.write_text("[Service]\nExecStart=/opt/mine\n")
    assert "was not written by this command" in install(*arguments).error
    assert unit.read_text() == "[Service]\nExecStart=/opt/mine\n"


def test_where_it_may_not_write_it_says_so(mshare: Install, directory: Path) -> None:
    """As another user, who has no business there."""
    error = mshare("install-units", "--directory", str(directory), uid=65534).error
    assert "Permission denied" in error
    assert os.listdir(directory) == []


def test_default_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert units.default_directory(user=False) == Path("/etc/systemd/system")
    assert units.default_directory(user=True) == Path("/home/somebody/.config/systemd/user")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    assert units.default_directory(user=True) == Path("/elsewhere/systemd/user")
