"""What a service manager hears, and that nobody need be listening."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from mshared.notify import keep_watchdog, notify, notify_reloading, watchdog_interval


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """A socket like a service manager's, not bound yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        yield sock


def test_a_socket_in_the_file_system(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_descriptors: Callable[[], int]
) -> None:
    manager.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    before = open_descriptors()
    assert notify("READY=1\nSTATUS=serving /run/mshare")
    assert notify("STOPPING=1")
    assert open_descriptors() == before
    assert manager.recv(1000) == b"READY=1\nSTATUS=serving /run/mshare"
    assert manager.recv(1000) == b"STOPPING=1"


def test_an_abstract_socket(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"msharefs-test-{os.getpid()}"
    manager.bind(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    assert notify("READY=1")
    assert manager.recv(1000) == b"READY=1"


@pytest.mark.parametrize("address", [None, "", "/nowhere/at/all", "@nobody-listens-here", "/" + "x" * 200])
def test_nobody_to_tell_is_no_error(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_a_manager_that_went_is_no_error(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.bind(str(tmp_path / "notify"))
    manager.close()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert not notify("READY=1")


@pytest.fixture
def listening(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A service manager that listens, and never waits for anything itself."""
    name = f"msharefs-test-{os.getpid()}"
    manager.bind(f"\0{name}")
    manager.setblocking(False)
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    return manager


def heard(manager: socket.socket) -> list[bytes]:
    """All that has come."""
    found = []
    try:
        while True:
            found.append(manager.recv(1000))
    except BlockingIOError:
        return found


def test_a_manager_that_reads_nothing_holds_nobody(listening: socket.socket) -> None:
    """A message that must not be lost waits as long as is said, one of the watchdog's not at all."""
    while notify("x", patience=0):
        pass
    assert not notify("x", patience=0.001)
    assert heard(listening)
    assert notify("READY=1")


def test_a_reload_tells_when_it_began(listening: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notify_reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = heard(listening)[0].decode().splitlines()
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= after


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        (None, None, None),
        ("30000000", None, 15.0),
        pytest.param("30000000", str(os.getpid()), 15.0, id="30000000-this process-15.0"),
        ("30000000", "1", None),
        ("30000000", "", None),
        ("0", None, None),
        ("-1", None, None),
        ("soon", None, None),
    ],
)
def test_how_often_the_watchdog_is_to_hear(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float | None
) -> None:
    """Twice in the time allowed, if it is this process that is watched."""
    for key, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    assert watchdog_interval() == interval


def test_the_watchdog_hears_at_half_of_its_time(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)

    async def main() -> None:
        with trio.move_on_after(25):
            await keep_watchdog()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert heard(listening) == [b"WATCHDOG=1"] * 3  # at 0, 10 and 20 s


def test_nobody_who_watches_is_told_nothing(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    trio.run(keep_watchdog)
    assert heard(listening) == []
