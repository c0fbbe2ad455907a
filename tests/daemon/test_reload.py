"""SIGHUP: the log goes on under its name, and says how things stand; in processes of their own, which get it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from mshared.reload import LogFile, reload_on_hangup

Apart = Callable[[Callable[[], object]], None]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "mshared.log"


def write_to(log: Path) -> LogFile:
    """Have stdout, stderr and log messages of this process go to a file."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    logging.basicConfig(level="INFO", format="%(levelname)s: %(message)s", stream=sys.__stderr__, force=True)
    return LogFile()


def hang_up(log_file: LogFile, seen: Callable[[], bool]) -> None:
    """Send this process SIGHUP, and serve until it shows."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(reload_on_hangup, log_file, lambda: "3 regions", "serving")
            os.kill(os.getpid(), signal.SIGHUP)
            while not seen():  # noqa: ASYNC110 - a file tells
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_log_that_was_moved_away_is_begun_anew(apart: Apart, log: Path) -> None:
    def work() -> None:
        log_file = write_to(log)
        os.write(2, b"old\n")
        log.rename(log.with_suffix(".1"))
        hang_up(log_file, lambda: log.exists() and bool(log.read_bytes()))
        os.write(1, b"out\n")

    apart(work)
    assert log.with_suffix(".1").read_text() == "old\n"
    first, second = log.read_text().splitlines()
    assert first.startswith("INFO: SIGHUP: 3 regions, ")
    assert first.endswith(" descriptors open")
    assert second == "out"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_cannot_be_opened_stays_as_it_is(apart: Apart, log: Path, tmp_path: Path) -> None:
    """Somebody has put a link in its place, which is not followed."""

    def work() -> None:
        log_file = write_to(log)
        log.rename(log.with_suffix(".1"))
        log.symlink_to(tmp_path / "elsewhere")
        hang_up(log_file, lambda: b"3 regions" in log.with_suffix(".1").read_bytes())

    apart(work)
    assert "cannot reopen" in log.with_suffix(".1").read_text()
    assert not (tmp_path / "elsewhere").exists()


def test_a_pipe_is_left_alone(apart: Apart) -> None:
    def work() -> None:
        reader, writer = os.pipe()
        before = os.dup(2)
        os.dup2(writer, 2)
        LogFile().reopen()
        os.write(2, b"still here")
        os.dup2(before, 2)
        assert os.read(reader, 100) == b"still here"

    apart(work)


def test_a_reload_leaves_no_descriptor(apart: Apart, log: Path, open_descriptors: Callable[[], int]) -> None:
    def work() -> None:
        log_file = write_to(log)
        before = open_descriptors()
        for _ in range(5):
            log_file.reopen()
        assert open_descriptors() == before

    apart(work)


def test_a_service_manager_hears_of_it(
    apart: Apart, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RELOADING=1 when it begins, READY=1 when it is done."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        apart(lambda: hang_up(write_to(log), lambda: b"3 regions" in log.read_bytes()))
        assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
