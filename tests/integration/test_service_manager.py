"""A daemon and its service manager: what it is told and when, the units, and systemd itself."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon, mounts_below

MIB = 1 << 20
NOBODY = 65534
SIGBUS, SIGSEGV = 7, 11
UNIT = Path(__file__).parents[2] / "systemd" / "mshared.service"
CAPABILITIES = {"CAP_DAC_READ_SEARCH": 2, "CAP_KILL": 5, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}
HANGING = """
import mshared.app
def overview(service):  # What the daemon calls, on its loop, when SIGHUP comes.
    with open({fifo!r}) as fifo: return fifo.read()
mshared.app._overview = overview
"""
HELD = """
import os, trio
import mshared.fs
plain = mshared.fs.MshareFs.getattr
async def getattr(self, inode, ctx=None):
    while not os.path.exists({flag!r}): await trio.sleep(0.01)
    return await plain(self, inode, ctx)
mshared.fs.MshareFs.getattr = getattr
"""
LIMITED = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
for number in range(64):
    if number not in {kept}: libc.prctl(24, number, 0, 0, 0)
mask = sum(1 << number for number in {kept})
assert libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", mask, mask, 0, 0, 0, 0)) == 0
"""


class Manager:
    """Plays the service manager (sd_notify(3))."""

    def __init__(self, path: Path | None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.settimeout(60)
        self._sock.bind(str(path) if path else "")
        self.address = str(path) if path else "@" + self._sock.getsockname()[1:].decode()

    def next(self) -> str:
        """The next message, of whatever kind."""
        return self._sock.recv(4096).decode()

    def after_watchdog(self) -> str:
        """The next message that is not the watchdog's."""
        while (message := self.next()) == "WATCHDOG=1":
            pass
        return message

    def silent(self) -> bool:
        """Whether nothing is there to be read."""
        return not select.select([self._sock], [], [], 0)[0]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["a socket in the filesystem", "an abstract socket"])
def manager(request: pytest.FixtureRequest, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A service manager that waits 20 s for what it expects, and watches: each 0.1 s it is to hear something."""
    with contextlib.closing(Manager(directory / "notify" if "filesystem" in request.param else None)) as found:
        monkeypatch.setenv("NOTIFY_SOCKET", found.address)
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        yield found


def test_it_hears_when_the_daemon_serves_reloads_and_stops(
    manager: Manager, start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon()
    ready = manager.after_watchdog().splitlines()
    assert ready == ["READY=1", f"MAINPID={daemon.pid}", f"STATUS=serving {daemon.mount}"]
    for _ in range(3):
        assert manager.next() == "WATCHDOG=1"
    daemon.process.send_signal(signal.SIGHUP)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", manager.after_watchdog())
    assert manager.next() == f"READY=1\nSTATUS=serving {daemon.mount}"
    assert re.search(r"SIGHUP: 0 regions, 0 attachments, \d+ of \d+ descriptors open", daemon.log())
    daemon.process.send_signal(signal.SIGTERM)
    assert manager.after_watchdog() == "STOPPING=1"
    assert daemon.process.wait(60) == 0


@pytest.mark.usefixtures("_needs_the_kernel")
def test_it_hears_of_readiness_only_once_the_mount_serves(manager: Manager, directory: Path) -> None:
    """While the mount does not answer, the watchdog hears that the loop runs, and nobody that it is ready."""
    options = ["--mount", str(directory / "m"), "--state-dir", str(directory / "s")]
    code = HELD.format(flag=str(directory / "flag")) + f"from mshared.__main__ import main\nmain({options!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert [manager.next() for _ in range(5)] == ["WATCHDOG=1"] * 5
        (directory / "flag").touch()
        assert manager.after_watchdog().startswith("READY=1")
        assert (directory / "m" / "mshare_info").exists()
        process.terminate()
    assert process.returncode == 0


def test_a_loop_that_hangs_is_not_covered_for(
    manager: Manager, start_daemon: Callable[..., Daemon], directory: Path
) -> None:
    """The watchdog hears nothing any more, for many times as long as it waits; and again when the loop goes on."""
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    daemon = start_daemon(prelude=HANGING.format(fifo=str(fifo)))
    assert manager.after_watchdog().startswith("READY=1")
    daemon.process.send_signal(signal.SIGHUP)
    assert manager.after_watchdog().startswith("RELOADING=1")
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.process.wait(0.5)
    assert manager.silent()
    fifo.write_text("going on")
    assert manager.next().startswith("READY=1")
    assert manager.next() == "WATCHDOG=1"
    assert "going on" in daemon.log()


def test_a_hangup_reopens_a_log_that_was_moved(start_daemon: Callable[..., Daemon], eventually: Callable) -> None:
    daemon = start_daemon()
    log = daemon.directory / "log"
    log.rename(daemon.directory / "log.1")
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: log.exists() and "SIGHUP: 0 regions" in log.read_text())


@pytest.mark.usefixtures("_needs_the_kernel")
def test_a_terminal_that_goes_stops_what_runs_on_it(directory: Path) -> None:
    """With nothing left behind, as on SIGTERM."""
    pid, terminal = pty.fork()
    if pid == 0:
        options = ["--mount", str(directory / "m"), "--state-dir", str(directory / "s")]
        os.execv(sys.executable, [sys.executable, "-m", "mshared", *options])
    text = b""
    while b"ready" not in text:
        text += os.read(terminal, 1000)
    assert len(mounts_below(directory)) >= 1
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mounts_below(directory) == []
    assert not (directory / "s").exists()


def test_the_unit_s_capabilities_are_enough(start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
    """For everything that a daemon of root's does to processes of other users; the log tells what became of faults."""
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    daemon = start_daemon(prelude=LIMITED.format(kept={CAPABILITIES[word] for word in line.split()}))
    c, other = client(daemon, NOBODY), client(daemon, 1)
    c.do("r = mshare.mshare('a', None, 8 * MIB, CREATE, 0o644); r.munmap(0, 2 * MIB); r.buf[4 * MIB] = 3")
    c.do("r.mprotect(4 * MIB, 4096, 0); r.mprotect(6 * MIB, 4096, 1)")
    assert c.ask("[fork(f'r.buf[{n} * MIB]') for n in (0, 4, 6)]") == [-SIGBUS, -SIGSEGV, 0]
    assert c.ask("fork('r.buf[6 * MIB] = 1')") == -SIGSEGV
    assert c.ask("fork('assert r.stat().attached == 2')") == 0
    assert "EFAULT" not in daemon.log()
    c.do("libc = ctypes.CDLL(None, use_errno=True); fd = os.open('/etc/passwd', RO)")
    assert c.ask("(libc.read(fd, ctypes.c_void_p(r.address), 10), ctypes.get_errno())") == [-1, 14]
    c.do("file = os.memfd_create('mine'); os.truncate(file, 8192)")
    c.do("r.mmap(8192, offset=0, fd=file, flags=mmap.MAP_SHARED); r.buf[0] = 65; r.msync()")
    assert c.ask("os.pread(file, 1, 0).decode()") == "A"
    other.do("p = mshare.mshare('a', None, 0, RO)")
    assert other.ask("(p.buf[0], p.buf[5 * MIB])") == [65, 0]
    assert other.ask("fork('ctypes.memset(p.address + 5 * MIB, 1, 1)')") == -SIGSEGV
    c.do("r.fork('b')")
    assert c.ask("mshare.mshare('b', 0x6000_0000_0000, 0, RO).buf[0]") == 65


SYSTEMD = "/usr/lib/systemd/systemd"
_SCENE = """
mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system  # It asks whether systemd runs here.
export XDG_RUNTIME_DIR=$1/run XDG_CONFIG_HOME=$1/config
setsid -w timeout -k 5 60 {systemd} --user > $1/manager.log 2>&1 &
manager=$!
for _ in $(seq 200); do systemctl --user is-system-running > /dev/null 2>&1 && break; sleep 0.05; done
show() {{ systemctl --user show mshared -P $1; }}
systemctl --user is-system-running > /dev/null 2>&1 || exit 77
systemctl --user start mshared && [ "$(show StatusText)" = "serving $1/mount" ] && [ -e $1/mount/mshare_info ] || exit 2
first=$(show MainPID)
systemctl --user reload mshared && [ "$(show ActiveState)" = active ] || exit 3
kill -KILL $first
until [ "$(show NRestarts) $(show ActiveState)" = "1 active" ] || ! kill -0 $manager; do sleep 0.05; done
[ "$(show MainPID)" != $first ] && [ -e $1/mount/mshare_info ] || exit 4
systemctl --user stop mshared && [ "$(show Result)" = success ] || exit 5
systemctl --user exit; wait; exit 0
"""


@pytest.mark.usefixtures("_needs_the_kernel")
def test_systemd_starts_reloads_restarts_and_stops_it(directory: Path) -> None:
    """A manager of its own, in a mount namespace of its own, with the unit that is installed for a user."""
    if not os.path.exists(SYSTEMD) or shutil.which("systemctl") is None:
        pytest.skip("needs systemd; scripts/setup installs it where CI is set")
    (directory / "run").mkdir(mode=0o700)
    mshare = [sys.executable, "-c", "from mshare.cli import main\nmain()", "--mount", str(directory / "mount")]
    place = ["--directory", str(directory / "config/systemd/user"), "--user", "--", "--state-dir", str(directory / "s")]
    subprocess.run([*mshare, "install-units", *place], check=True, timeout=60)
    scene = ["unshare", "-m", "sh", "-c", _SCENE.format(systemd=SYSTEMD), "sh", directory]
    done = subprocess.run(scene, capture_output=True, text=True, timeout=90, check=False)
    log = (directory / "manager.log").read_text()
    if done.returncode == 77:
        pytest.skip(f"systemd --user does not run here: {log[-300:]}")
    assert done.returncode == 0, done.stderr + log
