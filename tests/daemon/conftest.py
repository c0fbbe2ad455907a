"""What the tests of single daemon modules share: other processes, for what may block or die."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import mounts

PATIENCE = 60.0
"""Seconds after which a process of a test is taken to hang, and is killed."""


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
