"""Clients that mean harm, or have gone mad: an error or their own end, and nothing that a bystander would notice."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hostile import EVIL, GOOD, Bystander, bystander, harmful

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
    """A process that means harm."""
    with harmful(daemon, client(daemon, EVIL), name) as found:
        yield found


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
        c.ask(attempt)  # Succeeds; it may be cut off before anybody looks.
        eventually(lambda: c.ask("os.fstat(fd).st_size") == 4 * MIB)
        # The kernel sets the size of a file first, and lets its pages go one by one after that.
        eventually(lambda: c.ask("os.fstat(fd).st_blocks * 512") == 2 * MIB)
        assert c.ask("bytes(r.buf[:4]).decode()") == "mine"


class TestBehaviour:
    """What a process does to itself, or with others of its kind."""

    @pytest.fixture
    def friend(self, c: Client, client: Callable[..., Client], daemon: Daemon, name: str) -> Iterator[Client]:
        """Another process on the region of the one that means harm."""
        assert c.is_alive()
        found = client(daemon, EVIL)
        found.do(f"f = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
        yield found
        found.kill_all()

    @pytest.mark.parametrize(
        "harm",
        [
            "sc.munmap(r.address, r.size)",
            "sc.munmap(r.address + PAGE, PAGE)",
            "sc.mprotect(r.address, r.size, 0)",
            "sc.mmap(r.address, r.size, 3, 0x32)",
            "os.closerange(3, 1000)",
            "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
            "os.kill(os.getpid(), signal.SIGSTOP)",
            "sc.punch(link_fd, 0, 4 * MIB)",
        ],
    )
    def test_harm_to_one_s_own_window(self, c: Client, friend: Client, by: Bystander, harm: str) -> None:
        """Others map, protect and unmap as if nothing had been."""
        if "link_fd" in harm:
            c.do("""
                ticket = os.open(find_mount() / name, RW)
                reply, fds = connect(find_mount()).exchange(protocol.Attach(None, 0), (ticket,)); link_fd = fds[0]
                """)
        c.send(do=harm)
        for _ in range(3):
            friend.do("f.mprotect(0, PAGE, 1); f.mprotect(0, PAGE, 3); f.munmap(PAGE, PAGE); f.mmap(PAGE, offset=PAGE)")
            friend.do("f.buf[PAGE] = 9; assert f.buf[PAGE] == 9 and f.stat().attached >= 1")
        by.check()

    def test_somebody_else_s_userfaultfd(self, c: Client, friend: Client, by: Bystander) -> None:
        """It is armed where that process has nothing, or something of its own: nobody else's business."""
        friend.do("uffds = [sc.userfaultfd(None) for _ in range(2)]")
        c.do(f"""
            own = [os.pidfd_open({friend.pid})]
            uffds = [ctypes.CDLL(None, use_errno=True).syscall(438, own[0], n, 0) for n in range(3, 20)]
            sock = hello(); ticket = os.open(find_mount() / name, RW)
            told = []
            for uffd in [u for u in uffds if u >= 0] + [ticket, sock.fileno(), 0, own[0]]:
                offer = say(sock, protocol.Attach(None, 0), [ticket])
                told.append(type(say(sock, protocol.Mapped(offer.offer, offer.addr, r.address), [uffd])).__name__)
            """)
        assert set(c.ask("told")) <= {"Failed", "Attached"}
        friend.do("f.mprotect(0, PAGE, 1); f.mprotect(0, PAGE, 3); f.buf[0] = 1")
        by.check()

    def test_many_forks_that_touch_what_they_may_not(self, c: Client, by: Bystander) -> None:
        """Within the limits of its user: each child dies, and nobody else waits for long."""
        c.do("r.munmap(PAGE, PAGE)")
        c.send(
            do="""
for _ in range(150):
    if os.fork() == 0:
        os.close(0); os.fork(); os.fork(); r.buf[PAGE]
left = 150
while left: os.wait(); left -= 1
"""
        )
        for _ in range(5):
            by.check()
        c.receive()

    def test_chmod_against_open(self, c: Client, client: Callable[..., Client], name: str) -> None:
        """Who opens while the mode changes may or may not; who opens afterwards may not."""
        other = client(uid=GOOD)
        c.do("os.chmod(find_mount() / name, 0o666)")
        c.send(do="for n in range(400): os.chmod(find_mount() / name, 0o666 if n % 2 == 0 else 0)")
        other.do(f"""
            told = []
            for _ in range(100):
                try: mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW).detach(); told.append(0)
                except OSError as error: told.append(error.errno)
            """)
        c.receive()
        assert set(other.ask("told")) <= {0, errno.EACCES}
        assert other.error_of(f"mshare.mshare({name!r}, 0x6000_0000_0000, 0, RO)").errno == errno.EACCES
        other.kill_all()
