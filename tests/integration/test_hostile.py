"""Clients that mean harm, or have gone mad: an error or their own end, and nothing that a bystander would notice."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hostile import EVIL, GOOD, Bystander, bystander, speaking

MIB = 1 << 20
TESTS = Path(__file__).parents[1]
SIGBUS, SIGSEGV = 7, 11


@pytest.fixture
def by(
    daemon: Daemon, client: Callable[..., Client], name: str, eventually: Callable[..., None]
) -> Iterator[Bystander]:
    """Somebody else, who is well before and after; and no descriptor is left."""
    with bystander(daemon, client(daemon, GOOD), f"{name}-bystander", eventually) as found:
        yield found


@pytest.fixture
def c(daemon: Daemon, by: Bystander, client: Callable[..., Client], name: str) -> Iterator[Client]:
    """A process that means harm, with a region of its own; its name goes with it."""
    found = speaking(client(daemon, EVIL))
    found.do(f"name = {name!r}; r = mshare.mshare(name, None, 4 * MIB, CREATE); r.buf[:4] = b'mine'")
    yield found
    found.kill_all()
    if (daemon.mount / name).exists():
        with contextlib.closing(Client(daemon.mount)) as root:
            root.do(f"mshare.remove({name!r})")


class TestMemory:
    """Who may write a region holds a descriptor of its memory: what can be done with it, and what not."""

    @pytest.fixture
    def fd(self, c: Client) -> None:
        """The descriptor that comes with an offer, and one for reading, as ``fd`` and ``ro`` in the client."""
        c.do("""
            link = connect(find_mount())
            def offered(flags):
                ticket = os.open(find_mount() / name, flags)
                reply, fds = link.exchange(protocol.Attach(None, 0), (ticket,))
                for other in (ticket, *fds[1:]): os.close(other)
                return fds[0]
            fd, ro = offered(RW), offered(RO)
            """)

    @pytest.mark.usefixtures("fd")
    @pytest.mark.parametrize("which", ["fd", "ro"])
    def test_the_file_itself_is_not_the_client_s(self, c: Client, which: str) -> None:
        """Not its length, not its attributes, and it cannot be opened again for writing, nor sealed."""
        attempts = [
            *(f"os.ftruncate({which}, {size})" for size in ("0", "1 << 30")),
            *(f"os.open(f'/proc/self/fd/{{{which}}}', os.O_RDWR{more})" for more in ("", "| os.O_TRUNC")),
            *(f"os.truncate(f'/proc/self/fd/{{{which}}}', {size})" for size in ("0", "1 << 30")),
            f"os.fchmod({which}, 0o777)",
            f"os.fchown({which}, os.getuid(), -1)",
            f"__import__('fcntl').fcntl({which}, 1033, 8)",
            f"os.setxattr({which}, 'user.x', b'1')",
            f"os.utime({which})",
            f"os.unlink(os.readlink(f'/proc/self/fd/{{{which}}}'))",
        ]
        allowed = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS, errno.ENOENT}
        assert {c.error_of(attempt).errno for attempt in attempts} <= allowed
        assert c.ask("(bytes(r.buf[:4]).decode(), os.fstat(fd).st_size)") == ["mine", 4 * MIB]

    @pytest.mark.usefixtures("fd")
    def test_reading_is_all_that_a_reader_can(self, c: Client) -> None:
        for attempt in (
            "os.pwrite(ro, b'x', 0)",
            "os.posix_fallocate(ro, 0, PAGE)",
            "sc.mmap(None, 4 * MIB, 3, sc.MAP_SHARED, ro)",
            "sc.mprotect(sc.mmap(None, 4 * MIB, 1, sc.MAP_SHARED, ro), PAGE, 3)",
            "os.open(f'/proc/self/fd/{ro}', os.O_RDWR)",
        ):
            assert c.error_of(attempt).errno in (errno.EACCES, errno.EPERM, errno.EBADF, errno.EROFS), attempt
        assert c.ask("bytes(r.buf[:4]).decode()") == "mine"

    @pytest.mark.parametrize(
        "attempt", ["os.pwrite(fd, b'x' * MIB, 64 * MIB)", "os.posix_fallocate(fd, 4 * MIB, 64 * MIB)"]
    )
    @pytest.mark.usefixtures("fd")
    def test_what_is_written_behind_the_end_goes_again(
        self, c: Client, attempt: str, eventually: Callable[..., None]
    ) -> None:
        """It would take memory that no limit counts."""
        c.ask(attempt)
        assert c.ask("os.fstat(fd).st_size") > 4 * MIB
        eventually(lambda: c.ask("os.fstat(fd).st_size") == 4 * MIB)
        assert c.ask("os.fstat(fd).st_blocks * 512") == 2 * MIB
        assert c.ask("bytes(r.buf[:4]).decode()") == "mine"
