"""A daemon that is killed, and the one that follows: nobody notices more than a pause."""

from __future__ import annotations

import errno
import os
import pwd
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon, mounts_below
from hugepages import GIB, need_memory
from twins import files_of_regions

pytestmark = pytest.mark.pool

MIB, PAGE = 1 << 20, 4096
SIGBUS, SIGSEGV = 7, 11
Eventually = Callable[[Callable[[], bool]], None]
CONSTANTS = "from mmap import *; PROT_NONE, MAP_FIXED = 0, 0x10"
NOBODY = pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon that is killed in this test."""
    return start_daemon()


DIES_OF_A_FORK = """
from mshared.lifetimes import Lifetimes
if "CALM" not in os.environ:
    Lifetimes.inherit = lambda self, parent, fd: os.kill(os.getpid(), 9)
"""


def killed(daemon: Daemon) -> None:
    daemon.kill()
    daemon.restart()


@pytest.fixture
def two(daemon: Daemon, client: Callable[..., Client], name: str) -> tuple[Client, Client]:
    """Two processes on region ``r`` of 4 MiB; the second has it elsewhere."""
    one, other = client(), client()
    for c, how in ((one, "None, 4 * MIB, CREATE"), (other, "0x6000_0000_0000, 0, RW")):
        c.do(f"{CONSTANTS}\nname = {name!r}; r = mshare.mshare(name, {how})")
    return one, other


class TestAtRest:
    """Killed while nothing is under way."""

    def test_contents_layout_and_references_are_there(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, other = two
        one.do("r.buf[0] = 1; r.buf[MIB] = 2; r.munmap(2 * MIB, MIB); r.mprotect(MIB, PAGE, PROT_READ)")
        before = one.ask("[(v.offset, v.length, v.prot) for v in r.maps()]")
        killed(daemon)
        for c in two:
            assert c.ask("[(v.offset, v.length, v.prot) for v in r.maps()]") == before
            assert c.ask("(r.buf[0], r.buf[MIB], r.stat().attached)") == [1, 2, 2]
            assert c.ask("fork('r.buf[2 * MIB]')") == -SIGBUS
            assert c.ask("fork('r.buf[MIB] = 1')") == -SIGSEGV
        other.do("r.mprotect(MIB, PAGE, PROT_READ | PROT_WRITE); r.buf[MIB] = 3")
        assert one.ask("r.buf[MIB]") == 3

    def test_native_memory_goes_on_while_there_is_no_daemon(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, other = two
        daemon.kill()
        one.do("r.buf[3 * MIB] = 9")
        assert other.ask("r.buf[3 * MIB]") == 9
        daemon.restart()
        assert one.ask("r.stat().attached") == 2

    def test_the_mount_names_modes_and_owners_are_back(
        self, daemon: Daemon, two: tuple[Client, Client], name: str
    ) -> None:
        assert two[0].ask("name") == name
        path = daemon.mount / name
        path.chmod(0o640)
        os.chown(path, NOBODY, -1)
        before = path.stat()
        killed(daemon)
        after = path.stat()
        assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, NOBODY)
        assert set(os.listdir(daemon.mount)) == {name, "mshare_info", ".regions", ".metrics"}

    def test_what_nobody_may_touch_comes_back_with_its_contents(
        self, daemon: Daemon, two: tuple[Client, Client]
    ) -> None:
        one, other = two
        one.do("r.buf[MIB : MIB + 5] = b'stash'; r.mprotect(MIB, PAGE, PROT_NONE)")
        killed(daemon)
        assert other.ask("fork('r.buf[MIB]')") == -SIGSEGV
        one.do("r.mprotect(MIB, PAGE, PROT_READ | PROT_WRITE)")
        assert other.ask("bytes(r.buf[MIB : MIB + 5]).decode()") == "stash"

    def test_readers_go_on_reading_and_cannot_write(
        self, daemon: Daemon, two: tuple[Client, Client], client: Callable[..., Client], name: str
    ) -> None:
        reader = client()
        reader.do(f"r = mshare.mshare({name!r}, 0x6100_0000_0000, 0, RO)")
        two[0].do("r.buf[5] = 5; r.munmap(2 * MIB, MIB)")
        killed(daemon)
        assert reader.ask("(r.buf[5], r.readonly, r.stat().attached)") == [5, True, 3]
        assert reader.ask("fork('ctypes.memset(r.address, 1, 1)')") == -SIGSEGV
        assert reader.ask("fork('r.buf[2 * MIB]')") == -SIGBUS
        assert reader.error_of("r.munmap(0, PAGE)").errno == errno.EACCES

    def test_forked_children_are_attached_still(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        """Their userfaultfd exists nowhere but in the daemon: it must not be lost."""
        one, _ = two
        one.do("r.munmap(2 * MIB, MIB); ours, theirs = socket.socketpair()")
        one.do(
            """
            child = os.fork()
            if not child:
                theirs.recv(1)
                os._exit(10 + r.stat().attached if fork('r.buf[2 * MIB]') == -7 else 1)
            """
        )
        killed(daemon)
        one.do("ours.send(b'.')")
        assert one.ask("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == 13
        assert one.ask("r.stat().attached") == 2

    @pytest.mark.parametrize("forks", ["at once", "later"])
    def test_children_that_were_not_written_down_can_fork(
        self, start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str, forks: str
    ) -> None:
        """The daemon has read of the child, and dies at once: the next one finds it, and its children, by itself.

        The child may be in fork(2) by then, too.
        """
        daemon = start_daemon(prelude=DIES_OF_A_FORK)
        one, go = client(daemon), "ours.send(b'.')"
        one.do(f"{CONSTANTS}\nr = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.munmap(2 * MIB, MIB)")
        one.do(f"ours, theirs = socket.socketpair(); {go if forks == 'at once' else ''}")
        one.send(
            do="""
child = os.fork()
if not child:
    theirs.recv(1)
    os._exit(10 + r.stat().attached if [fork('r.buf[2 * MIB]') for _ in range(2)] == [-7, -7] else 1)
"""
        )
        daemon.restart(CALM="1")
        one.receive()
        one.do(go)
        assert one.ask("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == 12

    def test_numbers_are_not_given_twice(self, daemon: Daemon, two: tuple[Client, Client], name: str) -> None:
        number = (daemon.mount / name).stat().st_ino
        two[0].do("s = mshare.mshare(name + '2', None, 2 * MIB, CREATE)")
        second = (daemon.mount / (name + "2")).stat().st_ino
        two[0].do("mshare.mshare_unlink(name + '2')")
        killed(daemon)
        two[0].do("s = mshare.mshare(name + '2', None, 2 * MIB, CREATE)")
        assert (daemon.mount / (name + "2")).stat().st_ino not in (number, second)
        assert two[0].ask("s.address != r.address")

    def test_again_and_again(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, other = two
        for number in range(1, 4):
            one.do(f"r.buf[0] = {number}; r.munmap({number} * PAGE, PAGE)")
            killed(daemon)
            assert other.ask("r.buf[0]") == number
            assert other.ask(f"fork('r.buf[{number} * PAGE]')") == -SIGBUS
        assert one.ask("len(r.maps())") == 2

    def test_the_dead_are_gone(self, daemon: Daemon, two: tuple[Client, Client], name: str) -> None:
        one, other = two
        daemon.kill()
        other.kill_all()
        daemon.restart()
        assert one.ask("r.stat().attached") == 1
        one.do("mshare.mshare_unlink(name)")
        assert name not in os.listdir(daemon.mount)

    def test_who_detached_meanwhile_is_gone(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        daemon.kill()
        two[1].send(do="r.detach()")
        two[1].receive()
        daemon.restart()
        assert two[0].ask("r.stat().attached") == 1


class TestWaiting:
    """Threads that wait for a fault while there is no daemon."""

    def test_a_touch_waits_and_gets_what_it_should(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, other = two
        one.do("import tempfile; f = tempfile.TemporaryFile(); f.write(b'from the file' + bytes(5000)); f.flush()")
        one.do("r.munmap(MIB, MIB); r.mmap(2 * PAGE, flags=MAP_PRIVATE | MAP_FIXED, offset=MIB, fd=f.fileno())")
        one.do("r.buf[0] = 1; r.mprotect(0, PAGE, PROT_READ)")
        daemon.kill()
        other.send(ask="bytes(r.buf[MIB : MIB + 13]).decode()")
        one.send(ask="fork('r.buf[MIB + 2 * PAGE]')")
        daemon.restart()
        assert other.receive() == "from the file"
        assert one.receive() == -SIGBUS

    def test_so_does_one_whose_fault_the_daemon_had_read(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        """The kernel tells of each fault once: the next daemon must have it told again."""
        one, other = two
        one.do("r.munmap(MIB, MIB)")
        daemon.process.send_signal(signal.SIGSTOP)
        other.send(ask="fork('r.buf[MIB]')")
        daemon.kill()
        daemon.restart()
        assert other.receive() == -SIGBUS


class TestFiles:
    """Files that are mapped into a region."""

    @pytest.fixture
    def mapped(self, two: tuple[Client, Client], tmp_path: Path) -> Path:
        path = tmp_path / "file"
        path.write_bytes(b"a" * 4 * PAGE)
        one, _ = two
        one.do(f"f = open({str(path)!r}, 'r+b'); r.munmap(0, MIB)")
        one.do("r.mmap(4 * PAGE, flags=MAP_SHARED | MAP_FIXED, offset=0, fd=f.fileno())")
        return path

    def test_stores_reach_the_file(self, daemon: Daemon, two: tuple[Client, Client], mapped: Path) -> None:
        one, other = two
        other.do("r.buf[0] = 98; r.buf[PAGE] = 98; r.buf[3 * PAGE] = r.buf[2 * PAGE]")
        killed(daemon)
        one.do("r.buf[PAGE + 1] = 99; r.msync()")
        data = mapped.read_bytes()
        assert (data[:2], data[PAGE : PAGE + 3], data[2 * PAGE :]) == (b"ba", b"bca", b"a" * 2 * PAGE)

    def test_only_what_was_stored_to_is_written(self, daemon: Daemon, two: tuple[Client, Client], mapped: Path) -> None:
        """What others have written to the file meanwhile stays."""
        one, other = two
        other.do("r.buf[0] = 98; r.buf[PAGE]; r.buf[2 * PAGE] = 98; r.msync(2 * PAGE, PAGE)")
        killed(daemon)
        with mapped.open("r+b") as file:
            file.seek(PAGE)
            file.write(b"z" * 2 * PAGE)
        one.do("r.msync()")
        data = mapped.read_bytes()
        assert (data[:1], data[PAGE : PAGE + 1], data[2 * PAGE : 2 * PAGE + 1]) == (b"b", b"z", b"z")

    def test_the_last_one_gone_leaves_the_file_complete(
        self, daemon: Daemon, two: tuple[Client, Client], mapped: Path, eventually: Callable[..., None]
    ) -> None:
        one, other = two
        other.do("r.buf[0] = 98")
        daemon.kill()
        one.kill()
        other.kill()
        daemon.restart()
        eventually(lambda: mapped.read_bytes()[:1] == b"b")

    def test_private_ones_keep_their_stores_to_themselves(
        self, daemon: Daemon, two: tuple[Client, Client], tmp_path: Path
    ) -> None:
        one, other = two
        (tmp_path / "p").write_bytes(b"p" * 2 * PAGE)
        one.do(f"p = open({str(tmp_path / 'p')!r}, 'rb'); r.munmap(MIB, MIB)")
        one.do("r.mmap(2 * PAGE, flags=MAP_PRIVATE | MAP_FIXED, offset=MIB, fd=p.fileno()); r.buf[MIB] = 1")
        killed(daemon)
        assert other.ask("(r.buf[MIB], r.buf[MIB + PAGE])") == [1, ord("p")]
        assert (tmp_path / "p").read_bytes() == b"p" * 2 * PAGE


SLOWLY = """
import time, mshared.writeback
def slowly(*args, copy=mshared.writeback._copy):
    time.sleep(0.3)
    copy(*args)
mshared.writeback._copy = slowly
"""


@pytest.mark.parametrize("when", ["before it is asked", "while it writes", "again and again"])
def test_who_unmaps_a_file_last_goes_on_when_the_file_is_complete(
    start_daemon: Callable[..., Daemon],
    client: Callable[..., Client],
    tmp_path: Path,
    when: str,
    eventually: Eventually,
) -> None:
    """Whatever the daemon is killed at, and although the next one has nobody attached to that region any more."""
    daemon = start_daemon(prelude=SLOWLY)
    c, path, state = client(daemon), tmp_path / "file", daemon.state / "state"
    path.write_bytes(b"a" * PAGE)
    c.do(f"f = open({str(path)!r}, 'r+b'); r = mshare.mshare('r', 0x5000_0000_0000, 4 * MIB, CREATE)")
    c.do("r.mmap(PAGE, flags=mmap.MAP_SHARED | 0x10, offset=0, fd=f.fileno()); r.buf[0] = 98")
    c.do("mshare.connection.PATIENCE = 60")  # Several are started meanwhile.
    if when == "while it writes":
        c.send(do="r.detach()")
        eventually(lambda: b"AttachmentGone" in state.read_bytes())
        daemon.kill()
    else:
        daemon.kill()
        c.send(do="r.detach()")
        eventually(lambda: "\n500000000000-" not in Path(f"/proc/{c.pid}/maps").read_text())
    for _ in range(2 if when == "again and again" else 0):
        daemon.restart()
        daemon.kill()
    daemon.restart()
    c.receive()
    assert path.read_bytes()[:2] == b"ba"


class TestReferencePages:
    """Which of their pages were only read the next daemon finds out when it is asked to give them back."""

    SHOW = "mshare.MAP_REFPAGE | MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED"
    STORE = """
        def store():
            "Into each page, in an order and at an offset of one's own, and not all at once."
            pages = list(range(1024)); random.Random(number).shuffle(pages)
            for page in pages:
                sum(range(3000)); r.buf[page * PAGE + number] = number
        """

    @pytest.fixture(params=["thp", "4k"])
    def pair(self, client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> tuple[Client, Client]:
        """Two processes on a region of 4 MiB that shows 0xAA."""
        one, other = client(), client()
        for c, how in ((one, f"None, 4 * MIB, CREATE, backing={request.param!r}"), (other, "0x6000_0000_0000, 0, RW")):
            c.do(f"{CONSTANTS}\nr = mshare.mshare({name!r}, {how})")
        one.do(f"r.mmap(4 * MIB, flags={self.SHOW}, offset=0, refpage=mshare.refpage_create(b'\\xaa'))")
        return one, other

    def test_pages_that_hold_the_pattern_are_given_back_and_no_others(
        self, daemon: Daemon, pair: tuple[Client, Client]
    ) -> None:
        one, other = pair
        one.do("for page in range(0, 1000, 2): r.buf[page * PAGE]")
        other.do("for page in range(0, 1000, 4): r.buf[page * PAGE + 5] = 1 + page % 100")
        one.do("r.mprotect(1000 * PAGE, 24 * PAGE, PROT_READ); r.buf[1001 * PAGE]")
        killed(daemon)
        other.do("for page in range(0, 100, 4): r.buf[page * PAGE + 6] = 9")
        before = one.ask("r.stat().resident") // PAGE
        one.do("r.madvise(0, 4 * MIB, 20)")
        assert (before, one.ask("(r.stat().resident // PAGE, r.stat().clean)")) == (501, [250, 0])
        for c in pair:
            assert c.ask("all(r.buf[page * PAGE + 5] == (1 + page % 100, 0xAA)[page % 4 > 0] for page in range(1000))")
            assert c.ask("all(r.buf[page * PAGE + 6] == (0xAA if page % 4 else 9) for page in range(100))")
            assert c.ask("bytes(r.buf[1000 * PAGE :]) == b'\\xaa' * 24 * PAGE")
        other.do("for page in range(0, 1000, 3): r.buf[page * PAGE + 7] = 3")
        assert one.ask("all(r.buf[page * PAGE + 7] == (0xAA if page % 3 else 3) for page in range(1000))")

    def test_no_store_is_lost_to_it(
        self, daemon: Daemon, pair: tuple[Client, Client], client: Callable[..., Client], name: str
    ) -> None:
        """By processes, and their children, that store while pages are looked at and given back."""
        third = client()
        third.do(f"r = mshare.mshare({name!r}, 0x6100_0000_0000, 0, RW)")
        third.do("for page in range(1024): r.buf[page * PAGE] = 0xAA")  # Nobody has them protected.
        for number, c in enumerate(pair):
            c.do(f"number = {number}\n{textwrap.dedent(self.STORE)}")
        killed(daemon)
        third.ask("r.stat().size")
        pair[0].send(ask="fork('store()')")
        pair[1].send(do="store()")
        while not pair[1].answers(0):
            third.do("r.madvise(0, 4 * MIB, 21)")
        pair[1].receive()
        assert pair[0].receive() == 0
        for c in (*pair, third):
            c.do("r.madvise(0, 4 * MIB, 21)")
            assert c.ask("all(bytes(r.buf[page * PAGE : page * PAGE + 3]) == b'\\0\\1\\xaa' for page in range(1024))")

    def test_what_a_fork_refers_to_stays(self, daemon: Daemon, pair: tuple[Client, Client], name: str) -> None:
        one, other = pair
        one.do(f"for page in range(8): r.buf[page * PAGE] = 0xAA\nr.buf[0] = 1; r.fork({name + 't'!r})")
        killed(daemon)
        one.do("r.madvise(0, 4 * MIB, 20)")
        other.do(f"t = mshare.mshare({name + 't'!r}, 0x6100_0000_0000, 0, RW)")
        for c, which in ((other, "t"), (one, "r")):
            assert c.ask(f"bytes({which}.buf[: 8 * PAGE]) == b'\\1' + b'\\xaa' * (8 * PAGE - 1)")
        other.do("t.detach()")


class TestForks:
    """Regions that are forks of each other."""

    @pytest.mark.parametrize("backing", ["thp", "4k"])
    def test_twins_of_twins_keep_what_they_had(
        self, daemon: Daemon, client: Callable[..., Client], backing: str
    ) -> None:
        c = client()
        c.do(f"a = mshare.mshare('a', None, 4 * MIB, CREATE, backing={backing!r})")
        c.do("for page in range(8): a.buf[page * PAGE] = 10 + page")
        c.do("a.fork('b'); b = mshare.mshare('b', 0x6000_0000_0000, 0, RW)")
        c.do("a.buf[0] = 1; b.buf[PAGE] = 2; a.fork('c'); b.fork('d')")
        c.do("a.buf[2 * PAGE] = 3; a.buf[0] = 4; b.buf[3 * PAGE] = 5")
        killed(daemon)
        c.do("c = mshare.mshare('c', 0x6100_0000_0000, 0, RW); d = mshare.mshare('d', 0x6200_0000_0000, 0, RW)")
        c.do("a.buf[4 * PAGE] = 6; b.buf[5 * PAGE] = 7; c.buf[6 * PAGE] = 8")
        expected = {
            "a": [4, 11, 3, 13, 6, 15, 16, 17],
            "b": [10, 2, 12, 5, 14, 7, 16, 17],
            "c": [1, 11, 12, 13, 14, 15, 8, 17],
            "d": [10, 2, 12, 13, 14, 15, 16, 17],
        }
        for name, pages in expected.items():
            assert c.ask(f"[{name}.buf[page * PAGE] for page in range(8)]") == pages
        killed(daemon)
        for name, pages in expected.items():
            assert c.ask(f"[{name}.buf[page * PAGE] for page in range(8)]") == pages
        c.do("for n in 'abcd': mshare.mshare_unlink(n)")
        assert files_of_regions(daemon.state) == []

    def test_pages_of_a_region_that_has_ended_are_there(self, daemon: Daemon, client: Callable[..., Client]) -> None:
        c = client()
        c.do("a = mshare.mshare('a', None, 4 * MIB, CREATE); a.buf[0] = 1; a.buf[MIB] = 2")
        c.do("a.fork('b'); mshare.mshare_unlink('a')")
        killed(daemon)
        c.do("b = mshare.mshare('b', None, 0, RW)")
        assert c.ask("(b.buf[0], b.buf[MIB], b.buf[2 * MIB])") == [1, 2, 0]

    def test_a_snapshot_that_waits_for_its_child_is_taken(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, _ = two
        one.do(
            "r.buf[0] = 1; token = connect(find_mount()).call(protocol.Snapshot((r.own_attachment(),)), "
            "protocol.Snapshots).tokens[0]; r.buf[0] = 2"
        )
        killed(daemon)
        one.do("r.keep_from_children(keep=True)")
        assert one.ask("fork('r.become(token); os._exit(r.buf[0])')") == 1
        one.do("r.keep_from_children(keep=False)")
        assert one.ask("r.buf[0]") == 2

    def test_a_child_with_snapshots_keeps_them(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, _ = two
        one.do("r.buf[0] = 1; r.buf[MIB] = 1; ours, theirs = socket.socketpair()")
        one.do(
            """
            child = mshare.odfork()
            if not child:
                theirs.recv(1)
                os._exit(10 * r.buf[0] + r.buf[MIB])
            """
        )
        one.do("r.buf[0] = 2")
        killed(daemon)
        one.do("r.buf[MIB] = 2; ours.send(b'.')")
        assert one.ask("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == 11


class TestCleanStop:
    """SIGTERM with somebody attached, and with nobody."""

    def test_with_somebody_attached_everything_is_kept(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        one, other = two
        one.do("r.buf[0] = 5; r.munmap(MIB, MIB)")
        assert daemon.stop() == 0
        assert "stopping with 2 attachments: all regions are kept" in daemon.log()
        assert [place for place in mounts_below(daemon.directory) if place == str(daemon.mount)] == []
        daemon.restart()
        assert other.ask("(r.buf[0], r.stat().attached)") == [5, 2]
        assert other.ask("fork('r.buf[MIB]')") == -SIGBUS

    def test_with_nobody_attached_nothing_is(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        killed(daemon)
        for c in two:
            c.do("r.detach()")
        assert daemon.stop() == 0
        assert mounts_below(daemon.directory) == []
        assert not daemon.state.exists()
        assert not daemon.mount.exists()


def replace(path: Path, data: bytes) -> None:
    """At once: its keeper looks at it."""
    new = path.with_suffix(".test")
    new.write_bytes(data)
    new.rename(path)


class TestState:
    """The file that tells the next daemon."""

    def test_a_corrupt_one_is_refused_and_nothing_is_lost(self, daemon: Daemon, two: tuple[Client, Client]) -> None:
        daemon.kill()
        state = daemon.state / "state"
        good = state.read_bytes()
        replace(state, good[:100] + b"x" + good[101:])
        with pytest.raises(RuntimeError, match=f"{state} is corrupt .* remove the directory {daemon.state}"):
            daemon.restart()
        replace(state, good)
        daemon.restart()
        assert two[0].ask("r.stat().attached") == 2

    def test_it_stays_small(self, daemon: Daemon, client: Callable[..., Client]) -> None:
        """A thousand attachments that came and went leave it as long as it may get before it is written anew."""
        c = client()
        c.do("r = mshare.mshare('it', None, 2 * MIB, CREATE)")
        c.do("for _ in range(1000): mshare.mshare('it', 0x6000_0000_0000, 0, RW).detach()")
        assert (daemon.state / "state").stat().st_size < 8 * MIB


def test_without_a_keeper_processes_give_their_own_back(
    daemon: Daemon, two: tuple[Client, Client], eventually: Callable[..., None]
) -> None:
    """Killed together with its keeper: what only they had is lost, and that is said."""
    two[0].do("r.buf[0] = 1; r.munmap(MIB, MIB)")
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    (keeper,) = (int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "mshared-keeper\n")
    daemon.process.send_signal(signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    daemon.kill()
    daemon.restart()
    assert "no keeper is left" in daemon.log()
    for c in two:
        assert c.ask("(r.buf[0], r.stat().attached)") == [1, 2]
        assert c.ask("fork('r.buf[MIB]')") == -SIGBUS


def test_a_keeper_that_ends_is_replaced(
    daemon: Daemon, two: tuple[Client, Client], eventually: Callable[..., None]
) -> None:
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    eventually(lambda: "starting another" in daemon.log())
    eventually(lambda: len(list(daemon.state.glob("keeper-*"))) == 1)
    two[0].do("r.munmap(MIB, MIB)")
    killed(daemon)
    assert two[1].ask("fork('r.buf[MIB]')") == -SIGBUS


@pytest.mark.parametrize("user", [NOBODY])
def test_an_ordinary_users_daemon_does_the_same(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], user: int
) -> None:
    """Its memory has no names: the keeper has all of it."""
    daemon = start_daemon(uid=user)
    c = client(daemon, uid=user)
    c.do(f"{CONSTANTS}\nr = mshare.mshare('r', None, 4 * MIB, CREATE); r.buf[0] = 5; r.buf[MIB] = 6")
    c.do("r.mprotect(MIB, PAGE, PROT_NONE); r.munmap(2 * MIB, MIB)")
    killed(daemon)
    assert c.ask("(r.buf[0], r.stat().attached)") == [5, 1]
    assert c.ask("fork('r.buf[2 * MIB]')") == -SIGBUS
    c.do("r.mprotect(MIB, PAGE, PROT_READ)")
    other = client(daemon, uid=user)
    other.do("r = mshare.mshare('r', None, 0, RW)")
    assert other.ask("(r.buf[0], r.buf[MIB])") == [5, 6]


class TestHugePages:
    """Regions of hugetlb memory, and the pool that a daemon has raised for them."""

    @pytest.fixture
    def daemon(self, start_daemon: Callable[..., Daemon]) -> Daemon:
        need_memory(GIB)
        return start_daemon("--hugetlb-pool", "1G")

    def test_contents_forks_and_hidden_pages_are_there(self, daemon: Daemon, client: Callable[..., Client]) -> None:
        c = client()
        c.do(f"{CONSTANTS}; H = 2 * MIB; r = mshare.mshare('r', None, GIB, CREATE, backing='hugetlb', empty=True)")
        c.do("r.mmap(8 * H, offset=0); r.buf[0] = 1; r.buf[H] = 2; r.buf[2 * H] = 3")
        c.do("r.mprotect(H, H, PROT_NONE); r.fork('s'); r.buf[0] = 4")
        killed(daemon)
        c.do("s = mshare.mshare('s', 0x6000_0000_0000, 0, RW); r.mprotect(H, H, PROT_READ | PROT_WRITE)")
        assert c.ask("(r.buf[0], r.buf[H], r.buf[2 * H], s.buf[0], s.buf[2 * H])") == [4, 2, 3, 1, 3]
        assert c.ask("fork('r.buf[9 * H]')") == -SIGBUS
        killed(daemon)
        c.do("s.mprotect(H, H, PROT_READ)")
        assert c.ask("(r.buf[0], s.buf[0], s.buf[H])") == [4, 1, 2]
        c.do("mshare.mshare_unlink('s'); mshare.mshare_unlink('r')")

    def test_a_mapped_file_gets_what_was_stored_and_nothing_else(
        self, daemon: Daemon, client: Callable[..., Client], tmp_path: Path
    ) -> None:
        """Also of stores from before that are found by comparing: what others have written to the file since stays."""
        path = tmp_path / "data"
        path.write_bytes(b"a" * 6 * MIB)
        c = client()
        c.do(f"f = os.open({str(path)!r}, RW); m = mshare.mmap(f, 6 * MIB, backing='hugetlb'); assert m.shared, m.why")
        c.do("m.buf[5] = 98; m.msync(); m.buf[6] = 98; m.buf[4 * MIB] = 98; m.buf[2 * MIB]")
        daemon.kill()
        with path.open("r+b") as file:
            for at in (PAGE, 2 * MIB, 4 * MIB + PAGE):
                os.pwrite(file.fileno(), b"theirs", at)
        c.do("m.buf[7] = 98")
        daemon.restart()
        c.do("m.buf[8] = 98; m.msync()")
        data = path.read_bytes()
        assert data[4:10] == b"abbbba"
        assert [data[at : at + 6] for at in (PAGE, 2 * MIB, 4 * MIB, 4 * MIB + PAGE)] == [
            b"theirs",
            b"theirs",
            b"baaaaa",
            b"theirs",
        ]
        c.do("m.buf[PAGE] = 99; m.munmap()")
        assert path.read_bytes()[PAGE : PAGE + 6] == b"caaaaa"

    def test_a_file_that_is_only_read_is_not_written(
        self, daemon: Daemon, client: Callable[..., Client], tmp_path: Path
    ) -> None:
        path = tmp_path / "data"
        path.write_bytes(b"a" * 2 * MIB)
        c = client()
        c.do(f"f = os.open({str(path)!r}, RO); m = mshare.mmap(f, 2 * MIB, prot=1, backing='hugetlb'); m.buf[0]")
        daemon.kill()
        path.write_bytes(b"b" * 2 * MIB)
        daemon.restart()
        c.do("m.msync()")
        writer = client()
        writer.do(f"f = os.open({str(path)!r}, RW); m = mshare.mmap(f, 2 * MIB, backing='hugetlb'); assert m.shared")
        writer.do("m.buf[9] = 99; m.msync()")
        assert path.read_bytes()[PAGE - 1 : PAGE + 1] == b"ab"
        assert c.ask("(m.buf[9], m.buf[PAGE])") == [99, ord("a")]
        for each in (c, writer):
            each.do("m.munmap()")
        assert path.read_bytes()[PAGE:] == b"b" * (2 * MIB - PAGE)

    def test_pages_that_hold_their_reference_page_go_back(self, daemon: Daemon, client: Callable[..., Client]) -> None:
        c = client()
        c.do(f"{CONSTANTS}; H = 2 * MIB; r = mshare.mshare('r', None, GIB, CREATE, backing='hugetlb', empty=True)")
        c.do(f"r.mmap(8 * H, flags={TestReferencePages.SHOW}, offset=0, refpage=mshare.refpage_create(b'\\xaa'))")
        c.do("for page in range(6): r.buf[page * H]")
        c.do("r.buf[H + 5] = r.buf[6 * H] = 1")
        killed(daemon)
        assert c.ask("r.stat().resident // H") == 7
        c.do("r.madvise(0, 8 * H, 20)")
        assert c.ask("r.stat().resident // H") == 2
        c.do("r.buf[2 * H] = r.buf[H + 6] = 2")
        seen = c.ask("(bytes(r.buf[H + 4 : H + 7]).hex(), r.buf[6 * H], bytes(r.buf[2 * H :][:2]).hex())")
        assert seen == ["aa0102", 1, "02aa"]
        c.do("mshare.mshare_unlink('r')")

    def test_what_the_pool_was_raised_by_is_given_back_by_the_last(
        self, daemon: Daemon, client: Callable[..., Client]
    ) -> None:
        note = daemon.state / "hugetlb-pool"
        c = client()
        c.do("r = mshare.mshare('r', None, GIB, CREATE, backing='hugetlb', empty=True); r.mmap(2 * MIB, offset=0)")
        assert note.read_text() == "512"
        killed(daemon)
        assert note.read_text() == "512"
        c.do("r.detach()")
        assert daemon.stop() == 0
        assert not note.exists()
