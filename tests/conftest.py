"""Real daemons and real client processes for the tests, as fixtures; nothing of them outlives a test.

A ``Client`` is a Python process of its own that carries out one statement after the other: faults, signals and deaths
in it concern the test only by what it observes of them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from mshared import keeper

TESTS = Path(__file__).parent

PATIENCE = 60.0
"""Seconds after which a process of a test that has not answered is taken to hang."""

Work = Callable[[], object]

_DROP = """
import ctypes, os
def drop(uid, groups=()):
    os.setgroups(groups); os.setgid(uid); os.setuid(uid)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process started by that user is
"""

_CLIENT = (
    _DROP
    + """
import sys, json, traceback, signal, mmap, threading, time, subprocess, errno, gc, faulthandler, struct, socket, array
import multiprocessing, random
import mshare, mshare.syscalls as sc
from pathlib import Path
from mshare.connection import connect
from mshare.discovery import find_mount
from msharefs import protocol
PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
RW, RO, CREATE = os.O_RDWR, os.O_RDONLY, os.O_CREAT | os.O_RDWR | os.O_EXCL
def fork(code):
    "Run code in a forked child; its exit status, negative for a signal."
    pid = os.fork()
    if pid == 0:
        try:
            exec(code, globals())
        except BaseException:
            traceback.print_exc(); os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def remove_if_there(name):
    "The name may go by itself meanwhile: its keeper has died, or the last request of one that was killed is heard."
    try:
        mshare.remove(name)
    except FileNotFoundError:
        pass
class SigInfo(ctypes.Structure):
    _fields_ = [(field, ctypes.c_int) for field in ("signo", "errno", "code", "pad")] + [("addr", ctypes.c_uint64)]
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(SigInfo), ctypes.c_void_p)
def _on_fault(signo, info, _):
    os.write(2, b"SIGNAL %d %x\\n" % (signo, info.contents.addr)); os._exit(100 + signo)
_on_fault_c = _HANDLER(_on_fault)
def report_faults():
    "From now on SIGBUS and SIGSEGV write signal and si_addr to stderr and end the process with 100 + the signal."
    class Action(ctypes.Structure):
        _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
                    ("rest", ctypes.c_void_p)]
    action = Action(); action.handler = ctypes.cast(_on_fault_c, ctypes.c_void_p).value; action.flags = 4
    for number in (signal.SIGBUS, signal.SIGSEGV):
        assert ctypes.CDLL(None).sigaction(number, ctypes.byref(action), None) == 0
faulthandler.enable(sys.stderr)
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for line in sys.stdin:
    request = json.loads(line)
    try:
        if "do" in request:
            exec(request["do"], globals()); answer = {"value": None}
        else:
            answer = {"value": eval(request["ask"], globals())}
        json.dumps(answer)
    except Exception as error:
        answer = {"error": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        if not isinstance(error, (OSError, BufferError, ValueError, TypeError)):
            traceback.print_exc()
    out.write(json.dumps(answer) + "\\n")
"""
)

_DAEMON = _DROP + "import sys, os\nfrom mshared.__main__ import main\nimport mshared.app\n"


def pytest_configure() -> None:
    """Have Ctrl-C mean what it does although whoever started the tests, in the background, had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Where several processes share the tests, a file is one's, and so are all files whose tests use the pool."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope_of(nodeid.partition("::")[0])


@functools.cache
def _scope_of(file: str) -> str:
    return "pool" if "pytest.mark.pool" in (TESTS.parent / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


class ClientError(Exception):
    """What a statement in a client raised."""

    def __init__(self, kind: str, number: int | None, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.errno, self.text = kind, number, text


class Client:
    """A client process. ``do`` runs statements in it, ``ask`` evaluates an expression to something JSON can carry."""

    def __init__(self, mount: Path, uid: int | None = None) -> None:
        env = {**os.environ, "MSHAREFS": str(mount)}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,
        )
        if uid is not None:
            self.do(f"drop({uid})")

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, statements: str) -> None:
        self.send(do=textwrap.dedent(statements))
        self.receive()

    def ask(self, expression: str) -> Any:
        self.send(ask=expression)
        return self.receive()

    def error_of(self, expression: str) -> ClientError:
        """What evaluating it raises, which it must."""
        with pytest.raises(ClientError) as caught:
            self.ask(expression)
        return caught.value

    def send(self, **request: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            stacks = self.stacks()
            self.kill_all()
            pytest.fail(f"client hangs: {self.stderr()}{stacks}")
        line = self._process.stdout.readline()
        if not line:
            pytest.fail(f"client died with {self._process.wait()}: {self.stderr()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["errno"], answer["text"])
        return answer["value"]

    def is_silent(self) -> bool:
        """Whether it has not answered yet."""
        return not select.select([self._process.stdout], [], [], 0)[0]

    def answers(self, within: float) -> bool:
        """Whether an answer has come, or comes soon."""
        return bool(select.select([self._process.stdout], [], [], within)[0])

    def dies_of(self, statements: str) -> tuple[int, str]:
        """Run statements that end the process; its exit status and what it wrote to stderr."""
        self.send(do=textwrap.dedent(statements))
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_all()
            pytest.fail(f"client does not die: {self.stderr()}")
        return status, self.stderr()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stderr(self) -> str:
        self._process.wait(PATIENCE)
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    def stacks(self) -> str:
        """Where in the kernel each of its threads is."""
        return "\n".join((task / "stack").read_text() for task in Path(f"/proc/{self.pid}/task").iterdir())

    def kill(self) -> None:
        """SIGKILL, and wait for it; forked children live on."""
        self._process.kill()
        self._process.wait(PATIENCE)

    def kill_all(self) -> None:
        """SIGKILL for it and for whatever it forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)

    def close(self) -> None:
        self.kill_all()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Daemon:
    """A running mshared on a mount of its own. ``prelude`` are statements that it carries out first."""

    def __init__(self, directory: Path, *options: str, uid: int | None = None, prelude: str = "") -> None:
        self.directory = directory
        self.mount = directory / "mount"
        self.state = directory / "state"
        arguments = ["--mount", str(self.mount), "--state-dir", str(self.state), *options]
        self._code = _DAEMON + (f"drop({uid})\n" if uid is not None else "") + f"{prelude}\nmain({arguments!r})\n"
        self._log = (directory / "log").open("wb+")
        self.process = self._start({})
        try:
            self._wait_until_ready()
        except BaseException:
            self._log.close()
            raise

    def _start(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", self._code]
        return subprocess.Popen(command, stderr=self._log, stdout=self._log, env=os.environ | env)

    def restart(self, **env: str) -> None:
        """Start the daemon that follows one that has ended, and wait until it is ready."""
        self.process.wait()
        before = self.log().count("mshared: ready")
        self.process = self._start(env)
        self._wait_until_ready(before)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def socket(self) -> Path:
        return self.state / "socket"

    @property
    def log_file(self) -> Any:
        return self._log

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def descriptors(self) -> int:
        """How many descriptors it has open, once those of connections that just ended are closed.

        Those of files that it has ready for the next fork do not count.
        """
        return sum(self.open_files().values())

    def open_files(self) -> collections.Counter[str]:
        """The same, by what they are for; the number of a socket or pipe is left out."""
        found: collections.Counter[str] = collections.Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                target = link.readlink()
                if not target.name.startswith("memory-") or link.stat().st_size:
                    found[re.sub(r"\[\d+\]", "", str(target))] += 1
        return found

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"daemon does not stop: {self.log()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Stop it, and take away what a daemon that was killed leaves."""
        if self.process.poll() is None:
            self.stop()
        self._log.close()
        for place in self.state.glob("keeper-*"):
            kept = keeper.ask(self.state, place.name)
            if kept is not None:
                kept.release()
                for fd in kept.fds.values():
                    os.close(fd)
        for place in mounts_below(self.directory):
            subprocess.run(["umount", "-l", place], check=False)
        shutil.rmtree(self.directory)

    def _wait_until_ready(self, before: int = 0) -> None:
        waited = 0.0
        while self.log().count("mshared: ready") <= before:
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                waited += 0.02
            else:
                raise RuntimeError(self.log())
            if waited > PATIENCE:
                self.kill()
                pytest.fail(f"daemon is not ready: {self.log()}")


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, the last mounted first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in reversed(lines) if line.split()[4].startswith(str(directory))]


@pytest.fixture(scope="session")
def _needs_the_kernel() -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/userfaultfd"):
        pytest.skip("needs root, /dev/fuse and /dev/userfaultfd")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that other users may enter, for mounts and sockets."""
    path = Path(tempfile.mkdtemp(prefix="msharefs-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def start_daemon(_needs_the_kernel: None) -> Iterator[Callable[..., Daemon]]:
    """Start daemons with options; each must be able to stop cleanly at the end, having logged no mistake."""
    started: list[Daemon] = []

    def start(*options: str, uid: int | None = None, prelude: str = "") -> Daemon:
        path = Path(tempfile.mkdtemp(prefix="msharefs-test-"))
        path.chmod(0o755)
        if uid is not None:
            os.chown(path, uid, uid)
        started.append(Daemon(path, *options, uid=uid, prelude=prelude))
        return started[-1]

    yield start
    problems = []
    for daemon in started:
        alive = daemon.process.poll() is None
        status = daemon.stop()
        text = daemon.log()
        if alive and (status or mounts_below(daemon.directory) or daemon.state.exists()):
            left = mounts_below(daemon.directory)
            problems.append(f"status {status}, left {left}, state {daemon.state.exists()}: {text}")
        if "Traceback" in text or "ERROR" in text:
            problems.append(text)
        daemon.close()
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon with default options, for all tests of a file."""
    return start_daemon()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Callable[..., Client]]:
    """Start clients of ``daemon``, or of another one given; they end with the test."""
    started: list[Client] = []

    def start(of: Daemon | None = None, uid: int | None = None) -> Client:
        started.append(Client((of or daemon).mount, uid))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait for what the daemon does in its own time, up to a limit."""

    def wait(condition: Callable[[], bool]) -> None:
        poll = select.poll()
        for _ in range(int(PATIENCE / 0.01)):
            if condition():
                return
            poll.poll(10)
        pytest.fail("it never happened")

    return wait


@pytest.fixture
def status_of() -> Callable[[Work], int]:
    """Run a function in a forked process: what blocks or dies of a signal does so there. Its exit status.

    0: it returned. Negative: it died of a signal. When it raises, the test fails with the same words.
    """

    def run(work: Work) -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os.write(writer, traceback.format_exc().encode()[-60000:])
            finally:
                os._exit(1)
        os.close(writer)
        try:
            status = _status_of(pid)
            os.set_blocking(reader, False)
            with contextlib.suppress(BlockingIOError):  # A process it forked may still hold the other end.
                words = os.read(reader, 65536).decode()
                assert not words, words
        finally:
            os.close(reader)
        return status

    return run


@pytest.fixture
def apart(status_of: Callable[[Work], int]) -> Callable[[Work], None]:
    """Run a function in a forked process, which must end well and in time."""

    def run(work: Work) -> None:
        assert status_of(work) == 0

    return run


@pytest.fixture
def open_descriptors() -> Callable[[], int]:
    """How many descriptors this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


def _status_of(pid: int) -> int:
    """Wait for a process, or kill it; its exit status, negative for a signal."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], PATIENCE)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_names = iter(range(1 << 30))


@pytest.fixture
def name() -> str:
    """A region name that no other test has."""
    return f"region-{os.getpid()}-{next(_names)}"
