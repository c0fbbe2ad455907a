"""The keeper: it has what the daemon has, from the moment the daemon has it, and gives it to the next one only."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import journal, keeper

Start = Callable[..., tuple[int, socket.socket]]


def daemon(directory: Path, *, write_state: bool = True, count: int = 1) -> Callable[[socket.socket], None]:
    """A daemon that opens something of each kind after it has made its keeper, says so, and waits to be killed."""

    def run(sock: socket.socket) -> None:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
        kept = keeper.start(directory, lock)
        if write_state:
            book = journal.Journal(directory / journal.NAME)
            book.keeper = kept.name
            book.replace(b"{}")
        memory = [os.memfd_create(f"memory-{number}") for number in range(count)]
        for number, fd in enumerate(memory):
            os.write(fd, b"%d" % number)
        reader, writer = os.pipe()
        sock.send(f"{kept.name} {kept.pid} {memory[0]} {memory[-1]} {reader} {writer} {lock}".encode())
        signal.pause()

    return run


@pytest.fixture
def keepers() -> Iterator[list[int]]:
    """Keepers that are killed in the end, if they are there still."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if is_there(pid):
            os.kill(pid, signal.SIGKILL)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "mshared-keeper\n"
    except OSError:
        return False


@pytest.fixture
def killed(other_process: Start, keepers: list[int], directory: Path) -> Callable[..., list[str]]:
    """A daemon that has been killed: its keeper's name and pid, and some descriptors it had."""

    def run(**how: object) -> list[str]:
        pid, sock = other_process(daemon(directory, **how))  # type: ignore[arg-type]
        words = sock.recv(200).decode().split()
        keepers.append(int(words[1]))
        os.kill(pid, signal.SIGKILL)
        assert sock.recv(1) == b""  # The keeper has closed the daemon's connections.
        return words

    return run


def wait_for_end(pid: int) -> None:
    """Of a process that is no child of ours."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([watch], [], [], 60)[0]
    finally:
        os.close(watch)


def test_it_has_what_was_opened_after_it_was_made(killed: Callable[..., list[str]], directory: Path) -> None:
    name, pid, memory, _, reader, writer, _ = killed()
    found = keeper.ask(directory, name)
    assert found is not None
    ours = found.fds[int(memory)]
    assert os.pread(ours, 10, 0) == b"0"
    assert not {int(reader), int(writer)} & set(found.fds)
    found.release()
    wait_for_end(int(pid))
    for fd in found.fds.values():
        os.close(fd)


def test_many_descriptors_come_in_order(killed: Callable[..., list[str]], directory: Path) -> None:
    name, _, first, last, *_ = killed(count=450)
    found = keeper.ask(directory, name)
    assert found is not None
    assert [os.pread(found.fds[int(fd)], 10, 0) for fd in (first, last)] == [b"0", b"449"]
    found.release()
    for fd in found.fds.values():
        os.close(fd)


def test_it_can_be_asked_again_until_it_is_let_go(killed: Callable[..., list[str]], directory: Path) -> None:
    """The next daemon may be killed, too."""
    name, pid, memory, *_ = killed()
    for release in (False, True):
        found = keeper.ask(directory, name)
        assert found is not None
        assert int(memory) in found.fds
        if release:
            found.release()
        else:
            found._sock.close()
        for fd in found.fds.values():
            os.close(fd)
    wait_for_end(int(pid))
    assert keeper.ask(directory, name) is None


def test_the_lock_is_free_once_everything_else_is_closed(killed: Callable[..., list[str]], directory: Path) -> None:
    name, _, _, _, _, _, lock = killed()
    found = keeper.ask(directory, name)
    assert found is not None
    assert int(lock) not in found.fds
    found.release()
    for fd in found.fds.values():
        os.close(fd)


def test_one_that_no_state_names_ends(killed: Callable[..., list[str]]) -> None:
    words = killed(write_state=False)
    wait_for_end(int(words[1]))


def test_one_whose_socket_is_gone_ends(
    killed: Callable[..., list[str]], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_LOOK_INTERVAL", 10)
    name, pid, *_ = killed()
    (directory / name).unlink()
    wait_for_end(int(pid))


def test_a_stranger_gets_nothing(
    killed: Callable[..., list[str]], directory: Path, other_process: Start, as_root: None
) -> None:
    name, pid, *_ = killed()
    (directory / name).chmod(0o777)

    def stranger(sock: socket.socket) -> None:
        os.setuid(12345)
        sock.send(b"nothing" if keeper.ask(directory, name) is None else b"something")

    assert other_process(stranger)[1].recv(20) == b"nothing"
    assert is_there(int(pid))
    found = keeper.ask(directory, name)
    assert found is not None
    found.release()
    for fd in found.fds.values():
        os.close(fd)


def test_ending_it_leaves_nothing(other_process: Start, directory: Path, open_descriptors: Callable[[], int]) -> None:
    """Whatever it was doing: its descriptors are ours."""

    def run(sock: socket.socket) -> None:
        before = open_descriptors()
        lock = os.dup(0)
        for _ in range(50):
            keeper.start(directory, lock).end()
        sock.send(f"{open_descriptors() - before} {sorted(os.listdir(directory))}".encode())

    assert other_process(run)[1].recv(200) == b"1 []"
