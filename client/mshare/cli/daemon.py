"""Commands that start and stop the daemon: up, down."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import attrs
import click

from mshare.cli import progress
from mshare.cli.place import within
from mshare.discovery import Info, find_mount, read_info
from msharefs.mountinfo import msharefs_mounts

NOT_INSTALLED: Final = (
    "mshared is not installed here: `pip install 'msharefs[daemon]'`, which needs libfuse3 (Debian: fuse3 and "
    "libfuse3-dev); `mshare doctor` says what else is missing"
)
_UCRED: Final = struct.Struct("=iII")
_MOST_OF_LOG: Final = 16 << 10
_GRACE: Final = 5.0
"""Seconds between SIGTERM and SIGKILL for a daemon that did not become ready."""


@click.command()
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False), help="Where mshared writes. [default: below]")
@click.option("--timeout", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds to wait.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- MSHARED OPTIONS]")
@click.pass_obj
def up(mount: Path | None, log: Path | None, timeout: float, options: tuple[str, ...]) -> None:
    """Start mshared in the background, and return when it is ready.

    What follows -- goes to mshared, as in `mshare up -- --max-bytes 8G`; see `mshared --help`. It mounts where
    --mount says. Its messages are appended to /var/log/mshared.log (root) or
    $XDG_STATE_HOME/mshare/mshared.log (by default ~/.local/state).
    """
    command = [str(executable()), *(["--mount", os.path.abspath(mount)] if mount else []), *options]  # noqa: PTH100
    with _opened_log(log.absolute() if log else default_log()) as log_file, _Readiness() as readiness:
        process = subprocess.Popen(  # noqa: S603 - the daemon that belongs to this command
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file.writer,
            stderr=log_file.writer,
            env={**os.environ, "NOTIFY_SOCKET": readiness.address},
            start_new_session=True,
        )
        try:
            with progress.waiting("starting mshared", huge_pages if "--hugetlb-pool" in " ".join(options) else str):
                status = readiness.wait(process, timeout)
        except BaseException:
            _end(process)
            raise
        if status is None:
            click.echo(log_file.said(), nl=False, err=True)
            raise click.ClickException(_why_not_ready(process, timeout, log_file.path))
    process.returncode = 0  # It outlives us: nobody is to warn that we did not wait for it.
    where = status.removeprefix("serving ") or mount
    click.echo(f"mshared runs as pid {process.pid}, mounted at {where}; its messages go to {log_file.path}")


@click.command()
@click.option("--timeout", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds to wait.")
@click.pass_obj
def down(mount: Path | None, timeout: float) -> None:
    """Stop the mshared of the mount, and return when it has ended."""
    place = find_mount(mount)
    with _daemon_of(place, timeout) as daemon:
        try:
            signal.pidfd_send_signal(daemon.pidfd, signal.SIGTERM)
        except PermissionError as error:
            raise OSError(
                errno.EPERM, f"mshared (pid {daemon.pid}) belongs to another user; stop it as that user or as root"
            ) from error
        except ProcessLookupError:
            pass  # It ended on its own in this moment.
        with progress.waiting(f"mshared (pid {daemon.pid}) is stopping"):
            ended = _wait_readable(timeout, daemon.pidfd)
        if not ended:
            raise OSError(
                errno.ETIMEDOUT,
                f"mshared (pid {daemon.pid}) has not ended after {timeout:g} s; look into its log, or end it at once "
                f"with `kill -9 {daemon.pid}`",
            )
    click.echo(f"mshared (pid {daemon.pid}) of {place} has stopped")


def huge_pages() -> str:
    """How many the machine has by now, while a daemon raises their number."""
    try:
        return f"({Path('/proc/sys/vm/nr_hugepages').read_text().strip()} huge pages)"
    except OSError:
        return ""


def default_log() -> Path:
    """Where a daemon in the background writes, if nobody says otherwise."""
    if os.geteuid() == 0:
        return Path("/var/log/mshared.log")
    state = os.environ.get("XDG_STATE_HOME")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return base / "mshare" / "mshared.log"


@attrs.frozen
class _Daemon:
    """A process, held by a descriptor so that its pid can come to mean nobody else."""

    pid: int
    pidfd: int


@attrs.frozen
class _Log:
    """A log that is appended to, and where it ended before."""

    path: Path
    writer: IO[bytes]
    start: int

    def said(self) -> str:
        """The end of what was written since, as text."""
        with self.path.open("rb") as reader:
            end = reader.seek(0, os.SEEK_END)
            reader.seek(max(self.start, end - _MOST_OF_LOG))
            return reader.read().decode(errors="backslashreplace")


class _Readiness:
    """Plays the service manager (sd_notify(3)): an abstract datagram socket that hears READY=1."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind("")  # The kernel chooses a name.
        self.address = "@" + os.fsdecode(self._sock.getsockname()[1:])

    def __enter__(self) -> _Readiness:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()

    def wait(self, process: subprocess.Popen[bytes], timeout: float) -> str | None:
        """What the daemon says of itself when it is ready; None when it ended, or did not get so far in time."""
        pidfd = os.pidfd_open(process.pid)
        try:
            deadline = time.monotonic() + timeout
            while (left := deadline - time.monotonic()) > 0:
                ready = _wait_readable(left, self._sock.fileno(), pidfd)
                if self._sock.fileno() in ready:
                    fields = self._receive()
                    if fields.get("READY") == "1":
                        return fields.get("STATUS", "")
                elif ready:
                    return None
            return None
        finally:
            os.close(pidfd)

    def _receive(self) -> dict[str, str]:
        """The next message; nothing of one that somebody else sent, as anybody can."""
        packet, ancillary, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(_UCRED.size))
        senders = [
            _UCRED.unpack(data)[1]
            for level, kind, data in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        ]
        if senders != [os.geteuid()]:
            return {}
        lines = packet.decode(errors="surrogateescape").splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}


def executable() -> Path:
    """The mshared that belongs to this Python, or else the one on the PATH."""
    beside = Path(sys.executable).parent / "mshared"
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which("mshared")
    if found is None:
        raise FileNotFoundError(errno.ENOENT, NOT_INSTALLED)
    return Path(found)


@contextlib.contextmanager
def _opened_log(path: Path) -> Iterator[_Log]:
    """The log, to append to."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        writer = path.open("ab", buffering=0)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; choose another with --log") from error
    with writer:
        yield _Log(path, writer, writer.tell())


def _why_not_ready(process: subprocess.Popen[bytes], timeout: float, log: Path) -> str:
    """One line on a daemon that did not become ready; it is ended, if it has not ended on its own."""
    status = process.poll()
    if status is None:
        _end(process)
        return f"mshared was not ready after {timeout:g} s and was stopped; see {log}, or give it more --timeout"
    return f"mshared did not start (exit status {status}); what it said stands above and in {log}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a daemon that we started."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _daemon_of(mount: Path, timeout: float) -> Iterator[_Daemon]:
    """The process that listens on the socket of ``mount``, by the kernel's word (unix(7), SO_PEERCRED).

    Raises OSError when there is none, or when the mount names a socket of somebody else's: that of a service which
    its owner would like us to stop.
    """
    path = _running(mount, timeout).socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
        except OSError as error:
            raise OSError(error.errno, f"no daemon answers at {path}: {error.strerror or error}") from error
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        _check_owner(mount, uid)
        if not pid:
            raise OSError(errno.ESRCH, f"the daemon of {mount} runs in another pid namespace; stop it there")
        pidfd = os.pidfd_open(pid)
        try:
            if _hung_up(sock):
                raise ProcessLookupError(errno.ESRCH, f"the daemon of {mount} has just ended")
            yield _Daemon(pid, pidfd)
        finally:
            os.close(pidfd)


def _running(mount: Path, timeout: float) -> Info:
    """What the mount tells. Raises OSError when there is nothing to stop."""
    try:
        info = within(timeout, lambda: read_info(mount))
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise OSError(error.errno, f"no mshared serves {mount}: nothing to stop") from error
        raise OSError(
            error.errno,
            f"the mshared of {mount} is dead already: `mshare up` replaces it, `fusermount3 -uz {mount}` takes away "
            "what it left",
        ) from error
    if info is None:
        text = f"the mshared of {mount} does not answer; find its pid with `pgrep -a mshared` and end it by kill -9"
        raise OSError(errno.ETIMEDOUT, text)
    return info


def _check_owner(mount: Path, uid: int) -> None:
    """Refuse a daemon that is not of the user who mounted: the mount's owner could name any service's socket."""
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    owners = [found.uid for found in msharefs_mounts(text) if found.point == os.path.realpath(mount)]
    if owners[-1:] != [uid]:
        raise OSError(errno.EPERM, f"the socket that {mount} names is not its owner's; find the daemon by hand")


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def _wait_readable(timeout: float, *fds: int) -> list[int]:
    """Those that can be read, or have ended, within ``timeout`` seconds."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout * 1000)]
