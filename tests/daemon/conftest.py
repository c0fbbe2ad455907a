"""What the tests of single daemon modules share: other processes, for what may block or die."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import mounts

PATIENCE = 10.0
"""Seconds after which a process of a test is taken to hang, and is killed."""

Work = Callable[[], object]


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
def other_process() -> Iterator[Callable[..., tuple[int, socket.socket]]]:
    """Start a process that runs a function with one end of a socketpair; its pid and the other end.

    It is killed, and waited for, at the end of the test.
    """
    pids, socks = [], []

    def start(work: Callable[[socket.socket], object]) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                work(theirs)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        ours.settimeout(PATIENCE)
        pids.append(pid)
        socks.append(ours)
        return pid, ours

    yield start
    for sock in socks:
        sock.close()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def gone() -> int:
    """The pid of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def open_descriptors() -> Callable[[], int]:
    """How many descriptors this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting is for root only")


@pytest.fixture
def tmpfs(as_root: None, directory: Path) -> Iterator[Callable[[str], Path]]:
    """Mount fresh tmpfs with certain options, each in a directory of its own; unmounted at the end."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = directory / f"tmpfs-{len(mounted)}"
        place.mkdir()
        mounts.mount_tmpfs(place, options)
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        mounts.unmount(place)


def _status_of(pid: int) -> int:
    """Wait for a process, or kill it; its exit status, negative for a signal."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], PATIENCE)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
