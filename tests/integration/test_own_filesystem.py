"""A user mounts a filesystem whose server it is itself, maps a file of it into a region, and stops answering.

Or lets the server die: what was stored is lost then, and the log says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hostile import EVIL, GOOD, Bystander, bystander, harmful

TESTS = Path(__file__).parents[1]
SEND_IT_OFTEN = """
sock = hello()
for _ in range(100): send(sock, protocol.GetList(), [os.open(f"/proc/self/fd/{file}", RW) for _ in range(16)])
"""


@pytest.fixture(scope="module")
def daemon(_needs_the_kernel: None) -> Iterator[Daemon]:
    """One that may log lost stores as errors, but no mistake of its own."""
    path = Path(tempfile.mkdtemp(prefix="msharefs-test-"))
    path.chmod(0o755)
    found = Daemon(path)
    try:
        yield found
        assert found.stop() == 0
        assert "Traceback" not in found.log(), found.log()
    finally:
        found.close()


@pytest.fixture
def by(
    daemon: Daemon, client: Callable[..., Client], name: str, eventually: Callable[..., None]
) -> Iterator[Bystander]:
    """Somebody else, who is well before and after; and no descriptor is left."""
    with bystander(daemon, client(daemon, GOOD), f"{name}-bystander", eventually) as found:
        yield found


@pytest.fixture
def c(daemon: Daemon, by: Bystander, client: Callable[..., Client], name: str) -> Iterator[Client]:
    """A process that means harm."""
    with harmful(daemon, client(daemon, EVIL), name) as found:
        yield found


@pytest.fixture
def hang(directory: Path, c: Client) -> Iterator[Callable[..., Callable[[], None]]]:
    """Mount one that can stop answering requests of a kind; it does so when what is returned is called."""
    with contextlib.ExitStack() as stack:

        def mount(kind: str, *options: str) -> Callable[[], None]:
            place = directory / "own"
            place.mkdir()
            os.chown(place, EVIL, EVIL)
            command = [sys.executable, TESTS / "hanging_fs.py", place, str(EVIL), kind, *options]
            server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(subprocess.run, ["umount", "-l", place], check=False)
            stack.callback(server.kill)
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            c.do(f"file = os.open({str(place / 'file')!r}, RW)")

            def stop() -> None:
                assert server.stdout is not None
                if kind == "dies":
                    server.kill()
                    server.wait()
                    return
                server.send_signal(signal.SIGUSR1)
                assert server.stdout.readline() == b"hangs\n"

            return stop

        yield mount


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("flush", "r.munmap(0, PAGE)"),
        ("flush", "mshare.mshare_unlink(name)"),
        ("flush", "os._exit(0)"),
        ("flush", SEND_IT_OFTEN),
        ("statfs", "r.mmap(PAGE, offset=PAGE, fd=file, flags=0x11)"),
        ("open", "r.mmap(PAGE, offset=PAGE, fd=file, flags=0x11)"),
        ("write", "r.msync()"),
        ("read", "r.buf[PAGE]"),
    ],
)
def test_it_holds_up_nobody_else(
    c: Client, by: Bystander, hang: Callable[..., Callable[[], None]], kind: str, act: str
) -> None:
    stop = hang(kind)
    c.do("r.mmap(2 * PAGE, offset=0, fd=file, flags=0x11); r.buf[0] = 5")
    stop()
    c.send(do=act)
    for _ in range(3):
        by.check()


@pytest.mark.parametrize("act", ["r.msync()", "r.munmap(0, PAGE)", "r.detach()", "os._exit(0)"])
def test_its_death_is_an_error_for_whoever_mapped_it(
    c: Client, hang: Callable[..., Callable[[], None]], act: str
) -> None:
    """Closing such a file fails, and so does looking at it. (What was stored is lost, and the log says so.)"""
    die = hang("dies")
    c.do("r.mmap(PAGE, offset=0, fd=file, flags=0x11); r.buf[0]")
    die()
    c.send(do=act)
    if "exit" not in act:
        c.receive()
        c.do("again = mshare.mshare(name, 0x6000_0000_0000, 0, RW)")
        assert c.error_of("again.mmap(PAGE, offset=PAGE, fd=file, flags=0x11)").errno == errno.EACCES


def test_one_that_the_daemon_may_not_look_at(c: Client, hang: Callable[..., Callable[[], None]]) -> None:
    """As users' filesystems are, where nothing else is said."""
    hang("nothing", "private")
    error = c.error_of("r.mmap(PAGE, offset=0, fd=file, flags=0x11)")
    assert (error.errno, "allow_other" in error.text) == (errno.EACCES, True)
