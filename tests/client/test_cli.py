"""The command as a whole: help, usage, errors, and what it does without."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mshare.cli import cli as group
from mshare.cli import place
from msharefs.errors import NotFoundError

COMMANDS = ["create", "doctor", "down", "fork", "ls", "maps", "rm", "stat", "unlink", "up"]
READING = ["doctor", "ls", "maps", "stat"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(group, list(arguments), prog_name="mshare", env={"MSHAREFS": None})


def test_the_commands_are_all_there() -> None:
    assert set(group.commands) >= set(COMMANDS)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, flag: str) -> None:
    """In a sentence that the list of commands shows, and by its options; and both flags ask for it."""
    result = invoke(command, flag)
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: mshare {command} ")
    assert (group.commands[command].help or "").split("\n")[0].endswith(".")
    assert ("--json" in result.output) == (command in READING)
    assert all(option.help for option in group.commands[command].params if isinstance(option, click.Option))


def test_it_tells_its_version() -> None:
    assert invoke("--version").output == f"mshare, version {version('msharefs')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("ls", "--frobnicate"),
        ("stat",),
        ("create", "x"),
        ("create", "x", "--size", "2X"),
        ("create", "x", "--size", "-1"),
        ("create", "x", "--size", "2M", "--addr", "up"),
        ("create", "x", "--size", "2M", "--addr", "-4096"),
        ("create", "x", "--size", "2M", "--mode", "888"),
        ("create", "x", "--size", "2M", "--mode", "1777"),
        ("create", "x", "--size", "2M", "--backing", "paper"),
        ("fork", "x"),
        ("fork", "x", "y", "--mode", "1777"),
        ("up", "--backing", "thp"),
        ("down", "--timeout", "-1"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("Usage: mshare ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls",),
        ("stat", "x"),
        ("maps", "x"),
        ("create", "x", "--size", "2M"),
        ("unlink", "x"),
        ("rm", "x"),
    ],
    ids=" ".join,
)
def test_without_a_daemon_each_command_says_how_to_start_one(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = invoke("--mount", str(tmp_path), *arguments)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path} is no msharefs mount")
    assert "`mshare up`" in result.output


@pytest.mark.parametrize("info", ["", "words\n", "2097152\n", "2097152\nversion 1\n"], ids=repr)
def test_something_else_that_looks_like_a_mount(info: str, tmp_path: Path) -> None:
    (tmp_path / "mshare_info").write_text(info)
    result = invoke("--mount", str(tmp_path), "ls")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path} is no msharefs mount (mshare_info is none of ours)")


def test_the_mount_may_be_named_by_the_environment(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["ls"], env={"MSHAREFS": str(tmp_path)})
    assert str(tmp_path) in result.output


def test_an_error_is_one_line_without_its_number() -> None:
    assert place.one_line(OSError(errno.EBUSY, "others are attached")) == "others are attached"
    assert place.one_line(NotFoundError("no such thing")) == "no such thing"
    assert place.one_line(FileNotFoundError(errno.ENOENT, "No such file", "/a\n\udcff")) == r"No such file: /a\n\xff"
    assert place.one_line(OSError("AF_UNIX path too long")) == "AF_UNIX path too long"


def test_a_reader_that_has_gone_is_no_error_of_ours() -> None:
    """`mshare ls | head -1` ends quietly."""

    @click.group(cls=place.TranslatingGroup)
    def talking() -> None:
        pass

    @talking.command()
    def talk() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    result = CliRunner().invoke(talking, ["talk"])
    assert (result.exit_code, result.output) == (1, "")


def test_what_takes_too_long_is_left_alone() -> None:
    """And what is in time comes back, as result or as error."""
    released = threading.Event()
    try:
        assert place.within(0.01, released.wait) is None
        assert place.within(10, lambda: "answer") == "answer"
        with pytest.raises(FileNotFoundError):
            place.within(10, Path("/nowhere/at/all").stat)
    finally:
        released.set()


def test_the_client_part_is_enough() -> None:
    """Nothing of the daemon is imported, nor rich before a table is drawn: the command works where they are missing."""
    code = """
import json, sys
for name in ("mshared", "trio", "pyfuse3"):
    sys.modules[name] = None  # importing it fails, and it cannot be found
from click.testing import CliRunner
from mshare.cli import cli
assert "rich" not in sys.modules
for command in cli.commands:
    assert CliRunner().invoke(cli, [command, "--help"]).exit_code == 0
result = CliRunner().invoke(cli, ["doctor", "--json"])
(daemon,) = [finding for finding in json.loads(result.output) if finding["name"] == "daemon"]
assert result.exit_code == 1
print(daemon["level"], daemon["found"], daemon["cure"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("lack pyfuse3 and trio missing")
    assert "pip install 'msharefs[daemon]'" in done.stdout
