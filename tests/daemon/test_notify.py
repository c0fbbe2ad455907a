"""What a service manager hears, and that nobody need be listening."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared.notify import notify


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """A socket like a service manager's, not bound yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
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
