"""The C client and the daemon: regions that Python has made, or C, touched and ended from C."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from c_client import CClient, compiled
from conftest import Client, Daemon

MIB = 1 << 20
NOBODY = 65534
Condition = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """Where other users may run it, too."""
    with tempfile.TemporaryDirectory(prefix="msharefs-test-") as directory:
        os.chmod(directory, 0o755)
        yield compiled(Path(directory))


@pytest.fixture
def start(program: Path, daemon: Daemon) -> Iterator[Callable[..., CClient]]:
    started: list[CClient] = []

    def start(of: Daemon | None = None, uid: int | None = None) -> CClient:
        started.append(CClient(program, (of or daemon).mount, None if uid is None else lambda: drop(uid)))
        return started[-1]

    yield start
    for each in started:
        each.close()


def drop(uid: int) -> None:
    """Become another user, after fork and before exec."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)


@pytest.fixture
def c(start: Callable[..., CClient]) -> CClient:
    return start()


@pytest.fixture
def maker(client: Callable[..., Client], name: str) -> Client:
    """Python, on a region of 4 MiB, the third of which is a hole."""
    maker = client()
    maker.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.munmap(2 * MIB, MIB); r.buf[5] = 42")
    return maker


def attached(maker: Client) -> int:
    return int(maker.ask("r.stat().attached"))


def test_both_see_what_the_other_stores_at_the_same_address(maker: Client, c: CClient, name: str) -> None:
    c.do(f"attach 0 {name}")
    assert c.ask("show 0") == f"{maker.ask('hex(r.address)')} {4 * MIB} {4 * MIB} 0"
    assert c.ask("touch 0 5") == "42"
    c.do(f"touch 0 {4 * MIB - 1} 43")
    assert maker.ask("r.buf[-1]") == 43
    assert attached(maker) == 2


def test_what_may_not_be_touched_is_a_signal_with_its_address(maker: Client, c: CClient, name: str) -> None:
    c.do(f"attach 0 {name}")
    assert c.ask(f"touch 0 {2 * MIB + 8}") == f"signal {signal.SIGBUS} {2 * MIB + 8}"
    maker.do("r.mprotect(0, PAGE, mmap.PROT_READ)")
    assert c.ask("touch 0 7 1") == f"signal {signal.SIGSEGV} 7"
    assert c.ask("touch 0 5") == "42"
    maker.do("r.mmap(PAGE, offset=2 * MIB)")
    assert c.ask(f"touch 0 {2 * MIB + 8}") == "0"


def test_a_window_for_reading_cannot_write(maker: Client, c: CClient, name: str) -> None:
    c.do(f"attach 0 {name} ro")
    assert c.ask("show 0").endswith(" 1")
    assert c.ask("touch 0 5") == "42"
    assert c.ask("touch 0 5 1") == f"signal {signal.SIGSEGV} 5"
    maker.do("r.buf[5] = 44")
    assert c.ask("touch 0 5") == "44"


def test_a_second_window_must_be_elsewhere(maker: Client, c: CClient, name: str) -> None:
    c.do(f"attach 0 {name}")
    descriptors = c.descriptors()
    assert c.errno_of(f"attach 1 {name}") == errno.EINVAL
    assert c.errno_of(f"attach 1 {name} rw 600000001000") == errno.EINVAL
    assert c.descriptors() == descriptors
    c.do(f"attach 1 {name} rw 600000000000")
    c.do("touch 1 9 3")
    assert c.ask("touch 0 9") == "3"
    c.do("detach 1")
    assert c.descriptors() == descriptors
    assert attached(maker) == 2


def test_detached_it_is_no_reference_any_more(maker: Client, c: CClient, name: str) -> None:
    counts = set()
    for _ in range(3):
        c.do(f"attach 0 {name}")
        assert attached(maker) == 2
        c.do("detach 0")
        assert attached(maker) == 1
        counts.add(c.descriptors())
    assert len(counts) == 1


def test_one_that_is_killed_is_no_reference_any_more(
    maker: Client, c: CClient, name: str, eventually: Condition
) -> None:
    c.do(f"attach 0 {name}")
    c.process.kill()
    eventually(lambda: attached(maker) == 1)


def test_the_last_unlink_ends_the_region(maker: Client, c: CClient, name: str, daemon: Daemon) -> None:
    assert c.errno_of(f"unlink {name}") == errno.EBUSY
    c.do(f"attach 0 {name}")
    c.do(f"attach 1 {name} rw 600000000000")
    c.do(f"unlink {name}")
    assert c.ask("show 0").startswith("(nil) ")
    assert c.ask("show 1").startswith("(nil) ")
    c.do("detach 0")
    c.do("detach 1")
    assert attached(maker) == 1
    maker.do(f"mshare.mshare_unlink({name!r})")
    assert name not in os.listdir(daemon.mount)
    assert c.errno_of(f"unlink {name}") == errno.ENOENT


class TestCreating:
    def test_what_c_makes_python_finds(
        self, client: Callable[..., Client], c: CClient, name: str, daemon: Daemon
    ) -> None:
        """Memory at the address that was asked for, with its mode less the umask."""
        c.do(f"open 0 {name} rwcx 520000000000 {4 * MIB} 640")
        c.do("touch 0 5 42")
        assert c.ask("show 0") == f"0x520000000000 {4 * MIB} {4 * MIB} 0"
        assert (daemon.mount / name).stat().st_mode & 0o777 == 0o640 & ~umask_of(c.process.pid)
        other = client()
        other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
        assert other.ask("(r.address, r.size, r.buf[5])") == [0x5200_0000_0000, 4 * MIB, 42]
        assert other.ask("[(v.offset, v.length, v.prot) for v in r.maps()]") == [[0, 4 * MIB, 3]]
        assert c.errno_of(f"open 1 {name} rwcx 530000000000 {4 * MIB} 600") == errno.EEXIST
        c.do(f"unlink {name}")
        assert attached(other) == 1
        other.do("mshare.mshare_unlink(r.name)")

    def test_which_of_two_is_first_makes_it(self, start: Callable[..., CClient], name: str) -> None:
        """Without O_EXCL the other one attaches, to the same length or none."""
        one, two = start(), start()
        for c in (one, two):
            c.do(f"open 0 {name} rwc 0 {2 * MIB} 600")
        assert one.ask("show 0") == two.ask("show 0")
        one.do("touch 0 0 7")
        assert two.ask("touch 0 0") == "7"
        assert two.errno_of(f"open 1 {name} rwc 530000000000 {4 * MIB} 600") == errno.EINVAL
        two.do(f"open 1 {name} rc 530000000000 0 600")
        assert two.ask("touch 1 0 1") == f"signal {signal.SIGSEGV} 0"
        one.do(f"unlink {name}")
        two.do(f"unlink {name}")

    def test_what_cannot_be_is_refused_and_leaves_nothing(self, c: CClient, name: str, daemon: Daemon) -> None:
        """A length of none, no whole granules, a range that is in use."""
        c.do(f"open 0 {name} rwc 0 {2 * MIB} 600")
        descriptors = c.descriptors()
        for wrong in ("0 0", f"0 {MIB}", f"520000001000 {2 * MIB}"):
            assert c.errno_of(f"open 1 {name}-2 rwc {wrong} 600") == errno.EINVAL
        here = c.ask("show 0").split()[0]
        assert c.errno_of(f"open 1 {name}-2 rwc {here} {2 * MIB} 600") == errno.EINVAL
        stack = next(line for line in Path(f"/proc/{c.process.pid}/maps").read_text().splitlines() if "[stack]" in line)
        place = int(stack.split("-")[0], 16) // (2 * MIB) * 2 * MIB
        assert c.errno_of(f"open 1 {name}-2 rwc {place:x} {4 * MIB} 600") == errno.EINVAL
        assert f"{name}-2" not in os.listdir(daemon.mount)
        assert c.descriptors() == descriptors
        c.do(f"unlink {name}")

    def test_a_name_is_removed_and_windows_stay(self, c: CClient, name: str, daemon: Daemon) -> None:
        c.do(f"open 0 {name} rwc 0 {2 * MIB} 600")
        c.do("touch 0 9 1")
        c.do(f"remove {name}")
        assert name not in os.listdir(daemon.mount)
        assert c.errno_of(f"remove {name}") == errno.ENOENT
        assert c.ask("touch 0 9") == "1"
        c.do("detach 0")

    def test_another_user_may_not_where_the_mount_does_not_let_him(
        self, start: Callable[..., CClient], start_daemon: Callable[..., Daemon], name: str
    ) -> None:
        closed = start_daemon("--mode", "0755")
        other = start(closed, uid=2001)
        assert other.errno_of(f"open 0 {name} rwc 0 {2 * MIB} 600") == errno.EACCES
        mine = start(closed)
        mine.do(f"open 0 {name} rwc 0 {2 * MIB} 666")
        assert other.errno_of(f"remove {name}") == errno.EACCES
        mine.do(f"unlink {name}")


def umask_of(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Umask:"))
    return int(line.split()[1], 8)


def test_an_orphan_is_unlinked(maker: Client, c: CClient, name: str, daemon: Daemon) -> None:
    maker.do("r.detach()")
    c.do(f"unlink {name}")
    assert name not in os.listdir(daemon.mount)


@pytest.mark.parametrize("name", ["ä日𝄞", 'a"b\\c', "\x01\x7f", "\udcff\udce4x", "é\udced\udca0\udc80", "x" * 255])
def test_any_name_can_be_said(client: Callable[..., Client], c: CClient, name: str, daemon: Daemon) -> None:
    """Letters of UTF-8 and bytes that are none, as they stand in the mount."""
    client().do(f"mshare.mshare({name!r}, None, 2 * MIB, CREATE).detach()")
    c.do(f"attach 0 {name}")
    c.do(f"unlink {name}")
    assert name not in os.listdir(daemon.mount)


def test_errors_have_their_numbers(c: CClient, name: str) -> None:
    assert c.errno_of(f"attach 0 {name}") == errno.ENOENT
    assert c.errno_of("attach 0 mshare_info") == errno.EINVAL
    assert c.errno_of("attach 0 .metrics") == errno.EINVAL
    assert c.errno_of("attach 0 a/b") == errno.EINVAL
    assert c.errno_of(f"attach 0 {'x' * 256}") == errno.ENAMETOOLONG
    assert c.errno_of("unlink .regions") == errno.EINVAL


def test_another_user_may_do_what_the_mode_allows(maker: Client, start: Callable[..., CClient], name: str) -> None:
    other = start(uid=2001)
    assert other.errno_of(f"attach 0 {name} ro") == errno.EACCES
    assert other.errno_of(f"unlink {name}") == errno.EACCES
    maker.do(f"os.chmod(find_mount() / {name!r}, 0o644)")
    assert other.errno_of(f"attach 0 {name} rw") == errno.EACCES
    other.do(f"attach 0 {name} ro")
    assert other.ask("touch 0 5") == "42"
    other.do(f"unlink {name}")
    assert attached(maker) == 1


def test_children_have_their_parents_windows(maker: Client, c: CClient, name: str) -> None:
    c.do(f"attach 0 {name}")
    for command, said in (
        ("touch 0 5", "42"),
        (f"touch 0 {2 * MIB}", f"signal {signal.SIGBUS} {2 * MIB}"),
        ("detach 0", "ok"),
        (f"unlink {name}", "ok"),
        (f"attach 1 {name} rw 600000000000", "ok"),
    ):
        assert c.ask(f"child {command}") == said
        assert c.process.stdout is not None
        assert c.process.stdout.readline() == b"status 0\n"
    assert c.ask("touch 0 5") == "42"
    c.do("detach 0")
    assert attached(maker) == 1


def test_with_a_daemon_that_sees_no_forks_children_have_none(
    client: Callable[..., Client], start_daemon: Callable[..., Daemon], start: Callable[..., CClient], name: str
) -> None:
    """They would have to be armed before they touch anything."""
    users = start_daemon(uid=NOBODY)
    maker = client(users, uid=NOBODY)
    maker.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.buf[5] = 42; r.munmap(PAGE, PAGE)")
    c = start(users, uid=NOBODY)
    c.do(f"attach 0 {name}")
    assert c.ask("touch 0 5") == "42"
    assert c.ask("touch 0 4096") == f"signal {signal.SIGBUS} 4096"
    assert c.ask("child touch 0 5").startswith(f"signal {signal.SIGSEGV} ")
    maker.do("mshare.remove(r.name)")


def test_the_mount_is_found_without_being_named(
    maker: Client, program: Path, name: str, daemon: Daemon, tmp_path: Path
) -> None:
    """By its type and its owner, at a place whose name has a space; all others are hidden for this process.

    Those of other tests go while they are being hidden: a directory that is removed takes its mount out of every
    namespace.
    """
    place = tmp_path / "with space"
    place.mkdir()
    hide = """
        mount --bind "$1" "$2"
        findmnt -rn -t fuse.msharefs -o TARGET | while read -r each; do
            each=$(printf %b "$each")
            [ "$each" = "$2" ] || umount -l "$each" || ! mountpoint -q "$each"
        done
        exec "$3"
        """
    command = ["unshare", "-m", "bash", "-ec", hide, "bash", str(daemon.mount), str(place), str(program)]
    with contextlib.closing(CClient(command, None)) as c:
        c.do(f"attach 0 {name}")
        assert c.ask("touch 0 5") == "42"
        assert f"in {place}:" in c.ask("attach 0 nothing")


def test_of_a_block_as_much_is_told_as_is_used(client: Callable[..., Client], c: CClient) -> None:
    client().do("s = mshare.SharedMemory('block', create=True, size=5000, track=False)")
    c.do("attach 0 block")
    assert c.ask("show 0").split()[1:] == [str(2 * MIB), "5000", "0"]
    c.do("unlink block")


def test_without_a_daemon_it_says_so(program: Path, tmp_path: Path) -> None:
    with contextlib.closing(CClient(program, tmp_path)) as c:
        answer = c.ask("attach 0 any")
    assert answer.startswith(f"errno {errno.ENOENT} ")
    assert "mshare up" in answer


def test_it_goes_on_with_the_daemon_that_follows(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], start: Callable[..., CClient], name: str
) -> None:
    """Windows, holes and numbers are as before; who attaches while there is none waits."""
    mortal = start_daemon()
    maker = client(mortal)
    maker.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.munmap(2 * MIB, MIB); r.buf[5] = 42")
    c = start(mortal)
    c.do(f"attach 0 {name}")
    mortal.kill()
    assert c.ask("touch 0 5") == "42"
    mortal.restart()
    assert c.ask(f"touch 0 {2 * MIB}") == f"signal {signal.SIGBUS} {2 * MIB}"
    c.do(f"attach 1 {name} rw 600000000000")
    c.do("detach 1")
    mortal.kill()
    restarting = threading.Thread(target=mortal.restart)
    restarting.start()
    c.do(f"attach 1 {name} ro 600000000000")
    restarting.join()
    assert c.ask("touch 1 5") == "42"
    assert attached(maker) == 2
    mortal.kill()
    mortal.restart()
    c.do(f"unlink {name}")
    assert attached(maker) == 1
    maker.do(f"mshare.mshare_unlink({name!r})")
