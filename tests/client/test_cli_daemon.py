"""mshare up and down: real daemons, and programs that pretend to be one."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from mshare.cli import cli as group
from mshare.cli import daemon as module

NOBODY = 65534
PATIENCE = 60.0
Mshare = Callable[..., Any]


def mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in reversed(lines) if line.split()[4].startswith(str(directory))]


@attrs.frozen
class Place:
    """Where a test's own daemon is to run."""

    directory: Path
    mshare: Mshare

    @property
    def mount(self) -> Path:
        return self.directory / "mount"

    @property
    def log(self) -> Path:
        return self.directory / "logs" / "mshared.log"

    def up(self, *options: str) -> Any:
        state = self.directory / "state"
        return self.mshare(
            "--mount", str(self.mount), "up", "--log", str(self.log), "--", "--state-dir", str(state), *options
        )

    def down(self, *options: str) -> Any:
        return self.mshare("--mount", str(self.mount), "down", *options)


@pytest.fixture
def place(_needs_the_kernel: None, directory: Path, mshare: Mshare) -> Iterator[Place]:
    """A place of its own; whatever a failed test left running there is ended."""
    found = Place(directory, mshare)
    yield found
    said = found.log.read_text() if found.log.exists() else ""
    for pid in daemons_at(found.mount):
        os.kill(pid, signal.SIGKILL)
        said += f"\npid {pid} was left running"
    left = mounts_below(directory)
    for point in left:
        subprocess.run(["umount", "-l", point], check=True)
    assert not left, said
    assert "left running" not in said
    assert "Traceback" not in said


def daemons_at(mount: Path) -> list[int]:
    """Processes that were started with ``--mount`` there."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if os.fsencode(mount) in words:
                found.append(int(entry.name))
    return found


def test_up_starts_a_daemon_that_down_stops(place: Place, mshare: Mshare) -> None:
    """Up returns when it is ready, down when it has ended; both say who it is, and nothing is left."""
    (said,) = place.up().lines
    match = re.fullmatch(rf"mshared runs as pid (\d+), mounted at {place.mount}; its messages go to {place.log}", said)
    assert match
    pid = int(match[1])
    assert daemons_at(place.mount) == [pid]
    assert os.getsid(pid) == pid
    assert mshare("ls", mount=place.mount).status == 0
    assert f"ready: mount {place.mount}" in place.log.read_text()
    assert place.down().lines == [f"mshared (pid {pid}) of {place.mount} has stopped"]
    assert daemons_at(place.mount) == []
    assert mounts_below(place.directory) == []
    assert not place.mount.exists()


def test_a_second_daemon_is_refused_and_the_first_stays(place: Place) -> None:
    """What mshared said is shown, then where it stands."""
    assert place.up().status == 0
    (pid,) = daemons_at(place.mount)
    second = place.up()
    assert second.status == 1
    first_line, last_line = second.err.splitlines()
    assert first_line == f"Error: another mshared serves {place.mount}; `mshare down` stops it"
    assert last_line.startswith("Error: mshared did not start (exit status 1)")
    assert str(place.log) in last_line
    assert daemons_at(place.mount) == [pid]
    assert place.down().status == 0


def test_options_reach_the_daemon(place: Place, mshare: Mshare) -> None:
    assert place.up("--backing", "4k", "--align", "4M").status == 0
    info = (place.mount / "mshare_info").read_text().splitlines()
    assert info[0] == str(4 << 20)
    assert "backing 4k" in info
    assert place.down().status == 0


def test_a_wrong_option_is_shown_as_mshared_says_it(place: Place) -> None:
    result = place.up("--frobnicate")
    assert result.status == 1
    assert "Usage: mshared" in result.err
    assert "exit status 2" in result.err.splitlines()[-1]


def test_a_dead_daemon_is_replaced(place: Place) -> None:
    """Down has nothing to stop and says what to do about what is left; up does it."""
    place.up()
    (pid,) = daemons_at(place.mount)
    with opened_pidfd(pid) as pidfd:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], PATIENCE)[0]
    error = place.down().error
    assert error.startswith(f"the mshared of {place.mount} is dead already: `mshare up` replaces it")
    assert place.up().status == 0
    assert place.down().status == 0


def test_a_mount_may_be_named_through_a_link(place: Place, mshare: Mshare) -> None:
    """As /var/run/mshare is /run/mshare."""
    place.up()
    link = place.directory / "link"
    link.symlink_to(place.directory)
    assert mshare("down", mount=link / "mount").status == 0


def test_nothing_to_stop(place: Place) -> None:
    assert place.down().error == f"no mshared serves {place.mount}: nothing to stop"


def test_a_daemon_that_does_not_end_is_named(place: Place) -> None:
    """A stopped process cannot answer; down gives up in time, and says how to end it."""
    place.up()
    (pid,) = daemons_at(place.mount)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "does not answer" in place.down("--timeout", "0.2").error
    finally:
        os.kill(pid, signal.SIGCONT)
    assert place.down().status == 0


def test_a_user_cannot_stop_the_daemon_of_root(daemon: Any, mshare: Mshare) -> None:
    error = mshare("down", mount=daemon.mount, uid=NOBODY).error
    assert error == f"mshared (pid {daemon.pid}) belongs to another user; stop it as that user or as root"
    assert daemon.process.poll() is None


def test_users_stop_their_own(start_daemon: Callable[..., Any], mshare: Mshare) -> None:
    own = start_daemon(uid=NOBODY)
    assert mshare("down", mount=own.mount, uid=NOBODY).status == 0
    assert own.process.wait(PATIENCE) == 0


def test_the_process_behind_a_foreign_socket_is_left_alone(directory: Path, mshare: Mshare) -> None:
    """Whoever serves a mount writes its mshare_info, and could name the socket of any service there."""
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()  # As this very process, which a SIGTERM would end.
        (directory / "mshare_info").write_text(f"{2 << 20}\nsocket {path}\n")
        assert "is not its owner's" in mshare("down", mount=directory).error


@pytest.fixture
def pretend(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Run ``mshare up`` with a shell script for mshared; the result, with stdout and stderr in one."""

    def run(script: str, *options: str) -> Any:
        path = directory / "mshared"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(directory / "python"))
        return CliRunner().invoke(group, ["up", "--log", str(directory / "log"), *options], env={"MSHAREFS": None})

    return run


def test_a_daemon_that_never_gets_ready_is_ended(pretend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit holds, and nothing of it goes on."""
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    result = pretend("exec sleep 60", "--timeout", "0.05")
    assert result.exit_code == 1
    assert "was not ready after 0.05 s and was stopped" in result.output
    assert "--timeout" in result.output
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_only_what_is_new_in_the_log_is_shown(pretend: Callable[..., Any], directory: Path) -> None:
    (directory / "log").write_text("of yesterday\n")
    result = pretend("echo no memory >&2; exit 3")
    assert result.output.splitlines()[0] == "no memory"
    assert "exit status 3" in result.output
    assert (directory / "log").read_text() == "of yesterday\nno memory\n"


def test_a_daemon_that_is_not_installed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(directory / "python"))
    result = CliRunner().invoke(group, ["up"], env={"PATH": str(directory)})
    assert result.exit_code == 1
    assert "pip install 'msharefs[daemon]'" in result.output


def test_a_log_that_cannot_be_written(directory: Path) -> None:
    (directory / "file").touch()
    result = CliRunner().invoke(group, ["up", "--log", str(directory / "file" / "log")])
    assert result.exit_code == 1
    assert "choose another with --log" in result.output


@pytest.mark.usefixtures("_needs_the_kernel")
def test_readiness_is_believed_of_the_own_user_only() -> None:
    """Anybody can send to an abstract socket; the kernel says who did."""
    with module._Readiness() as readiness:
        send(readiness.address, "READY=1\nSTATUS=serving /elsewhere", uid=NOBODY)
        assert readiness._receive() == {}
        send(readiness.address, "READY=1\nSTATUS=serving /run/mshare", uid=os.geteuid())
        assert readiness._receive() == {"READY": "1", "STATUS": "serving /run/mshare"}


def send(address: str, text: str, *, uid: int) -> None:
    code = f"""
import os, socket
os.setgroups([]) if {uid} else None
os.setuid({uid})
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto({text.encode()!r}, b"\\0" + {address[1:].encode()!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("uid", "env", "expected"),
    [
        (0, {"XDG_STATE_HOME": "/state"}, "/var/log/mshared.log"),
        (1000, {"XDG_STATE_HOME": "/state", "HOME": "/home/me"}, "/state/mshare/mshared.log"),
        (1000, {"XDG_STATE_HOME": "", "HOME": "/home/me"}, "/home/me/.local/state/mshare/mshared.log"),
    ],
)
def test_where_the_log_goes(uid: int, env: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert module.default_log() == Path(expected)


@contextlib.contextmanager
def opened_pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)
