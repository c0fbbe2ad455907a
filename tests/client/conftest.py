"""The command ``mshare``, run as people run it: as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from mshare import syscalls as sc
from mshare.cli import cli as group
from msharefs import protocol

PATIENCE = 60.0
READING = ("ls", "stat", "maps", "heat", "top", "faults", "explain", "completion", "man", "doctor")
_AS_USER = """
import ctypes, os, sys
from mshare.cli import main
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process started by that user is
main()
"""


@attrs.frozen
class Ran:
    """A command that has ended: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        """Of a command that succeeded, in silence on stderr."""
        assert (self.status, self.err) == (0, "")
        return self.out.splitlines()

    @property
    def error(self) -> str:
        """The one line of a command that failed."""
        assert self.status == 1, self.out
        *before, last = self.err.splitlines()
        assert before == []
        assert last.startswith("Error: ")
        return last.removeprefix("Error: ")


Mshare = Callable[..., Ran]


def command_for(uid: int | None = None) -> list[str]:
    """What to start for the command ``mshare``, as another user if need be."""
    code = "from mshare.cli import main\nmain()" if uid is None else _AS_USER.format(uid=uid)
    return [sys.executable, "-c", code]


@pytest.fixture
def mshare() -> Mshare:
    """Run ``mshare`` with arguments, as another user if need be."""

    def run(
        *arguments: str, mount: Path | None = None, uid: int | None = None, env: Mapping[str, str] | None = None
    ) -> Ran:
        variables = {key: value for key, value in os.environ.items() if key != "MSHAREFS"} | dict(env or {})
        if mount is not None:
            variables["MSHAREFS"] = str(mount)
        done = subprocess.run(
            [*command_for(uid), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=variables,
            timeout=PATIENCE,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def cli(mshare: Mshare, daemon: Any) -> Mshare:
    """The same for the daemon of the test. What only reads runs in this process, where that makes no difference."""

    def run(*arguments: str, uid: int | None = None, env: Mapping[str, str] | None = None) -> Ran:
        if arguments[0] not in READING or uid is not None or env is not None:
            return mshare(*arguments, mount=daemon.mount, uid=uid, env=env)
        result = CliRunner().invoke(group, arguments, env={"MSHAREFS": str(daemon.mount)})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


# For the tests of single client modules, which need no mshared: other processes, and a daemon that is none.


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Descriptors to send about."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def copies(pipe: tuple[int, int]) -> Callable[[], int]:
    """How many descriptors of this process are ends of that pipe, beyond the two."""

    def count() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                found += os.path.samestat(os.stat(f"/proc/self/fd/{fd}"), os.fstat(pipe[0]))
        return found - 2

    return count


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Which mappings without access, made where the kernel liked, still stand: anchors and scratch places."""
    made: list[tuple[int, int]] = []
    plain = sc.mmap

    def mmap(addr: int | None, length: int, prot: int, *rest: int) -> int:
        start = plain(addr, length, prot, *rest)
        if addr is None and prot == sc.PROT_NONE:
            made.append((start, start + length))
        return start

    monkeypatch.setattr(sc, "mmap", mmap)
    return lambda: [m.start for ends in made for m in sc.own_mappings(*ends) if not (m.prot or m.inode)]


Reply = protocol.Message | bytes | tuple[protocol.Message | bytes, list[int]] | list[protocol.Message] | None
Handler = Callable[[Any, list[int]], Reply]


class FakeDaemon:
    """A socket that answers as the test says, and a directory that stands in for the mount.

    ``on[Kind]`` answers requests of that kind, given the message and its descriptors (closed afterwards): with a reply
    or a whole packet, descriptors beside it or not, or several; None hangs up. ``heard`` is what came, hello included.
    """

    def __init__(self, directory: Path) -> None:
        self.mount = directory / "mount"
        self.mount.mkdir()
        self.socket = directory / "socket"
        self.heard: list[protocol.Message] = []
        self.on: dict[type, Handler] = {protocol.Hello: lambda _hello, _fds: self.welcome}
        self.welcome: Reply = protocol.Welcome("fake", str(self.mount), fork_events=True)
        (self.mount / "mshare_info").write_text(f"2097152\nversion 0\nsocket {self.socket}\n")
        self.start()

    def start(self) -> None:
        """Listen. To be called again after ``stop``, it is another daemon."""
        self._socks = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        self._socks[0].bind(str(self.socket))
        self._socks[0].listen()
        self._threads: list[threading.Thread] = []
        self._run(self._accept, self._socks[0])

    def stop(self) -> None:
        """Hang up on everybody."""
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        for sock in self._socks:
            sock.close()
        self.socket.unlink()

    def kinds(self) -> list[type]:
        """Of what was heard."""
        return [type(message) for message in self.heard]

    def _run(self, work: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = threading.Thread(target=work, args=(sock,))
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                self._socks.append(sock)
                self._run(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            try:
                while self._answer(sock):
                    pass
            finally:
                sock.shutdown(socket.SHUT_RDWR)

    def _answer(self, sock: socket.socket) -> bool:
        packet, fds, _, _ = socket.recv_fds(sock, protocol.MAX_PACKET, 16)
        if not packet:
            return False
        message, announced = protocol.decode(packet)
        assert announced == len(fds)
        self.heard.append(message)
        reply = self.on[type(message)](message, fds)
        for fd in fds:
            os.close(fd)
        if reply is None:
            return False
        if isinstance(reply, list):
            for each in reply:
                sock.send(protocol.encode(each))
            return True
        reply, fds = reply if isinstance(reply, tuple) else (reply, [])
        socket.send_fds(sock, [reply if isinstance(reply, bytes) else protocol.encode(reply, len(fds))], fds)
        return True


@pytest.fixture
def fake_daemon(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon that is none, for calls that name no mount too."""
    daemon = FakeDaemon(directory)
    monkeypatch.setenv("MSHAREFS", str(daemon.mount))
    yield daemon
    daemon.stop()
