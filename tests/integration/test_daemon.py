"""The daemon itself: starting, stopping, standing in its own way, and running as an ordinary user."""

from __future__ import annotations

import errno
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon, mounts_below

pytestmark = pytest.mark.pool

MIB = 1 << 20
NOBODY = pwd.getpwnam("nobody").pw_uid
SIGBUS = 7


def mshared(*options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is not expected to serve."""
    command = [sys.executable, "-m", "mshared", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_stop_leaves_nothing(start_daemon: Callable[..., Daemon], number: int) -> None:
    daemon = start_daemon()
    daemon.process.send_signal(number)
    assert daemon.process.wait(60) == 0
    assert mounts_below(daemon.directory) == []
    assert not daemon.state.exists()
    assert not daemon.mount.exists()


def test_many_signals_do_not_spoil_a_stop(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    while daemon.process.poll() is None:
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.returncode == 0
    assert mounts_below(daemon.directory) == []
    assert not daemon.state.exists()


def test_a_stop_with_somebody_attached_says_so(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client]
) -> None:
    daemon = start_daemon()
    c = client(daemon)
    c.do("r = mshare.mshare('x', None, 2 * MIB, CREATE); r.buf[0] = 5")
    assert daemon.stop() == 0
    assert "stopping with 1 attachments" in daemon.log()
    c.do("r.buf[1] = 6")
    assert c.ask("list(r.buf[:2])") == [5, 6]
    assert "mshared" in c.error_of("r.stat()").text
    c.do("r.detach()")
    assert c.ask("r.closed")


def test_a_second_daemon_on_the_same_mount_is_refused(daemon: Daemon) -> None:
    second = mshared("--mount", daemon.mount, "--state-dir", daemon.state)
    assert (second.returncode, "another mshared serves" in second.stderr) == (1, True)
    other_state = mshared("--mount", daemon.mount, "--state-dir", daemon.directory / "other")
    assert (other_state.returncode, "another mshared serves" in other_state.stderr) == (1, True)
    assert not (daemon.directory / "other").exists()
    assert (daemon.mount / "mshare_info").read_text().startswith(f"{2 * MIB}\n")


def test_a_stale_mount_is_replaced(start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
    dead = start_daemon()
    attached = client(dead)
    attached.do("r = mshare.mshare('x', None, 2 * MIB, CREATE); r.buf[0] = 5")
    dead.kill()
    with pytest.raises(OSError, match=f"{os.strerror(errno.ENOTCONN)}|{os.strerror(errno.ECONNABORTED)}"):
        dead.mount.stat()
    assert attached.ask("r.buf[0]") == 5
    error = attached.error_of("mshare.mshare('y', None, 0, RW)")
    assert (error.errno, "is dead" in error.text) == (errno.ENOTCONN, True)
    options = ["--mount", str(dead.mount), "--state-dir", str(dead.state)]
    with subprocess.Popen([sys.executable, "-m", "mshared", *options], stderr=subprocess.PIPE) as again:
        assert again.stderr is not None
        text = b""
        while b"ready" not in text:
            line = again.stderr.readline()
            assert line, text
            text += line
        attached.do("s = mshare.mshare('y', None, 2 * MIB, CREATE); s.buf[0] = r.buf[0]")
        attached.do("mshare.mshare_unlink('y')")
        assert attached.ask("(r.buf[0], r.stat().attached)") == [5, 1]
        attached.do("r.detach()")
        again.terminate()
        again.stderr.read()
    assert again.returncode == 0
    assert mounts_below(dead.directory) == []
    assert not dead.state.exists()


def test_an_unmount_from_outside_stops_the_daemon(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    subprocess.run(["umount", daemon.mount], check=True)
    daemon.mount.rmdir()  # Which takes it out of the namespaces, too, that tests beside this one may have made.
    assert daemon.process.wait(60) == 0
    assert mounts_below(daemon.directory) == []


def test_a_service_manager_is_told(directory: Path) -> None:
    """READY=1 comes when the mount serves, STOPPING=1 at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(60)
        manager.bind(str(directory / "notify"))
        env = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify")}
        options = ["--mount", str(directory / "m"), "--state-dir", str(directory / "s")]
        with subprocess.Popen([sys.executable, "-m", "mshared", *options], env=env) as process:
            lines = manager.recv(4096).decode().splitlines()
            assert lines[:2] == ["READY=1", f"MAINPID={process.pid}"]
            assert (directory / "m" / "mshare_info").exists()
            process.terminate()
            assert manager.recv(4096) == b"STOPPING=1"
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--align", "3M"], 2, "power of two"),
        (["--align", "4K"], 2, "2M"),
        (["--align", "x"], 2, "not a size"),
        (["--mode", "999"], 2, "octal"),
        (["--hugetlb-pool", "1000T"], 1, "ask for less"),
        (["--paging", "some"], 2, "auto"),
        (["--max-regions", "0"], 2, "x>=1"),
        (["surplus"], 2, "unexpected"),
    ],
)
def test_wrong_usage(directory: Path, options: list[str], status: int, words: str) -> None:
    done = mshared("--mount", directory / "m", "--state-dir", directory / "s", *options)
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert not (directory / "m").exists()


def test_help_and_version() -> None:
    done = mshared("--help")
    assert done.returncode == 0
    for option in ("--mount", "--backing", "--align", "--paging", "--hole-signal", "--max-bytes", "--max-regions"):
        assert option in done.stdout
    assert mshared("--version").stdout.strip()


def test_limits(start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
    c = client(start_daemon("--max-regions", "2", "--max-bytes", "8M"))
    c.do("mshare.mshare('a', None, 4 * MIB, CREATE)")
    error = c.error_of("mshare.mshare('b', None, 6 * MIB, CREATE)")
    assert (error.errno, "--max-bytes" in error.text) == (errno.ENOSPC, True)
    c.do("mshare.mshare('b', None, 2 * MIB, CREATE)")
    error = c.error_of("mshare.mshare('c', None, 2 * MIB, CREATE)")
    assert (error.errno, "--max-regions" in error.text) == (errno.ENOSPC, True)
    c.do("mshare.mshare_unlink('a'); mshare.mshare('c', None, 2 * MIB, CREATE)")


def test_many_regions_and_attachments_leave_no_descriptor(
    start_daemon: Callable[..., Daemon],
    client: Callable[..., Client],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    daemon = start_daemon()
    c = client(daemon)
    c.do("mshare.mshare('warm', None, 2 * MIB, CREATE); mshare.mshare_unlink('warm')")
    before = daemon.descriptors()
    c.do("rs = [mshare.mshare(f'n{i}', None, 2 * MIB, CREATE) for i in range(100)]")
    assert len(os.listdir(daemon.mount)) == 103
    c.do("for i in range(100): mshare.mshare_unlink(f'n{i}')")
    eventually(lambda: daemon.descriptors() <= before)  # A file that was just closed may be among those before.
    assert len(os.listdir(daemon.mount)) == 3


@pytest.fixture(scope="module")
def users(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon of an ordinary user."""
    return start_daemon(uid=NOBODY)


class TestAnOrdinaryUser:
    """A daemon without privileges: fusermount3, memfds, and a userfaultfd for user mode."""

    @pytest.fixture
    def c(self, users: Daemon, client: Callable[..., Client], name: str) -> Client:
        c = client(users, uid=NOBODY)
        c.do(f"name = {name!r}")
        return c

    def test_it_says_what_is_different(self, users: Daemon, c: Client) -> None:
        assert "/dev/userfaultfd" in users.log()
        c.do("r = mshare.mshare(name, None, 2 * MIB, CREATE)")
        assert c.ask("(r.stat().backing, r.stat().uid)") == ["4k", NOBODY]
        assert any("system calls" in note for note in c.ask("r.stat().notes"))

    def test_a_region_is_shared(self, users: Daemon, c: Client, client: Callable[..., Client], name: str) -> None:
        c.do("r = mshare.mshare(name, None, 2 * MIB, CREATE); r.buf[:2] = b'hi'")
        other = client(users, uid=NOBODY)
        other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
        assert other.ask("(bytes(r.buf[:2]).decode(), r.stat().attached)") == ["hi", 2]
        other.kill()

    def test_holes_answer_in_every_process(
        self, users: Daemon, c: Client, client: Callable[..., Client], name: str
    ) -> None:
        c.do("sc.mmap(0x5000_0000_0000, 4096, 3, 0x22 | sc.MAP_FIXED_NOREPLACE)")
        c.do("r = mshare.mshare(name, 0x5000_0000_0000, 2 * MIB, CREATE)")
        assert c.ask("fork('r.buf[4096]')") == -SIGBUS
        assert c.ask("fork('os._exit(40 - fork(\"r.buf[8192]\"))')") == 40 + SIGBUS
        other = client(users, uid=NOBODY)
        other.do(f"r = mshare.mshare({name!r}, None, 0, RO)")
        assert other.dies_of("r.buf[4096]")[0] == -SIGBUS
        assert c.dies_of("r.buf[4096] = 1")[0] == -SIGBUS

    def test_forked_children_are_attached(self, c: Client) -> None:
        c.do("r = mshare.mshare(name, None, 2 * MIB, CREATE)")
        assert c.ask("fork('assert r.stat().attached == 2; r.buf[0] = 3')") == 0
        assert c.ask("(r.stat().attached, r.buf[0])") == [1, 3]

    def test_thp_needs_root(self, c: Client) -> None:
        error = c.error_of("mshare.mshare(name, None, 2 * MIB, CREATE, backing='thp')")
        assert (error.errno, "root" in error.text) == (errno.EOPNOTSUPP, True)

    def test_a_clean_stop_leaves_nothing(self, start_daemon: Callable[..., Daemon]) -> None:
        daemon = start_daemon(uid=NOBODY)
        assert daemon.stop() == 0
        assert mounts_below(daemon.directory) == []
        assert not daemon.state.exists()
