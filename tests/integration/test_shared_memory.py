"""``mshare.SharedMemory`` and what stands on it: CPython's own cases, and what it promises beyond them."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hugepages import Pool, pool

pytestmark = pytest.mark.pool

MIB, GIB = 1 << 20, 1 << 30
NOBODY = 65534
PROGRAM = Path(__file__).parent.parent / "cpython_shared_memory.py"
Condition = Callable[[Callable[[], bool]], None]


@pytest.fixture
def user(client: Callable[..., Client]) -> Client:
    return client()


def regions(daemon: Daemon) -> set[str]:
    return {entry for entry in os.listdir(daemon.mount) if entry != "mshare_info" and not entry.startswith(".")}


def memory_of(daemon: Daemon, name: str) -> int:
    """Bytes of memory that a block takes."""
    done = [line.split() for line in (daemon.mount / f".regions/{name}/stat").read_text().splitlines()]
    return next(int(words[1]) for words in done if words[0] == "resident")


def run(daemon: Daemon, code: str) -> str:
    """A program of its own, started by none of ours; what it prints. It must write nothing to stderr."""
    env = {**os.environ, "MSHAREFS": str(daemon.mount)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_cpythons_own_cases_pass(daemon: Daemon, method: str) -> None:
    """Those of the interpreter that runs the tests; which of them are left out, and why, the program tells."""
    if not importlib.util.find_spec("test") or not importlib.util.find_spec("test._test_multiprocessing"):
        pytest.skip("this Python comes without its tests (Debian: libpython3.*-testsuite)")
    command = [sys.executable, "-W", "error", str(PROGRAM), method]
    env = {**os.environ, "MSHAREFS": str(daemon.mount)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "test_shared_memory_across_processes" in done.stderr
    assert "skipped" not in done.stderr
    assert regions(daemon) == set()


class TestSize:
    """What a block is made of."""

    def test_it_is_what_was_asked_for_to_all_who_attach(self, daemon: Daemon, user: Client) -> None:
        user.do("s = mshare.SharedMemory('sized', create=True, size=2 * MIB + 5); s.buf[-1] = 7")
        ask = "import mshare; s = mshare.SharedMemory('sized'); print(s.size, len(s.buf), s.buf[-1])"
        assert run(daemon, ask) == f"{2 * MIB + 5} {2 * MIB + 5} 7"
        user.do("s.unlink()")

    def test_small_blocks_take_what_they_need(self, daemon: Daemon, user: Client) -> None:
        user.do("s = mshare.SharedMemory('small', create=True, size=5000); s.buf[:] = bytes(5000)")
        assert memory_of(daemon, "small") == 8192
        user.do("s.unlink()")

    def test_large_ones_have_huge_pages(self, user: Client) -> None:
        user.do("""
            s = mshare.SharedMemory('large', create=True, size=8 * MIB)
            s.buf[0] = s.buf[7 * MIB] = 1
            s.unlink()
            """)
        assert user.ask("'ShmemPmdMapped:     4096 kB' in Path('/proc/self/smaps').read_text()")

    def test_its_memory_is_there_when_it_is_made(self, daemon: Daemon, user: Client) -> None:
        user.do("s = mshare.SharedMemory('reserved', create=True, size=64 * MIB)")
        assert memory_of(daemon, "reserved") == 64 * MIB
        user.do("t = mshare.SharedMemory('lazy', create=True, size=64 * MIB, reserve=False)")
        assert memory_of(daemon, "lazy") == 0
        user.do("s.unlink(); t.unlink()")

    @pytest.mark.parametrize(("size", "why"), [(44, "this machine has"), (50, "addresses"), (70, "addresses")])
    def test_what_the_machine_cannot_give_is_enomem_and_leaves_nothing(
        self, daemon: Daemon, user: Client, size: int, why: str
    ) -> None:
        error = user.error_of(f"mshare.SharedMemory(create=True, size=1 << {size})")
        assert error.errno == errno.ENOMEM
        assert why in error.text
        assert regions(daemon) == set()

    def test_what_the_daemon_may_not_give_is_enospc_and_leaves_nothing(
        self, start_daemon: Callable[..., Daemon], client: Callable[..., Client]
    ) -> None:
        """Of lazy regions more can be promised than there is, and a touch then is a SIGBUS; of blocks never."""
        tight = start_daemon("--max-bytes", "64M", "--backing", "4k")
        user = client(tight)
        user.do("s = mshare.SharedMemory('first', create=True, size=40 * MIB)")
        assert user.error_of("mshare.SharedMemory('second', create=True, size=40 * MIB)").errno == errno.ENOSPC
        user.do("s.unlink(); s.close(); s = mshare.SharedMemory('second', create=True, size=40 * MIB)")
        user.do("s.buf[:] = b'x' * (40 * MIB); s.unlink()")
        assert regions(tight) == set()

    def test_a_full_filesystem_is_enospc_and_leaves_nothing(
        self, start_daemon: Callable[..., Daemon], client: Callable[..., Client]
    ) -> None:
        """The tmpfs has no room for what limits would allow."""
        tight = start_daemon("--backing", "4k")
        user = client(tight)
        subprocess.run(["mount", "-o", "remount,size=32M", str(tight.state / "4k")], check=True)
        error = user.error_of("mshare.SharedMemory(create=True, size=40 * MIB)")
        assert error.errno == errno.ENOSPC
        assert "no room" in error.text
        assert regions(tight) == set()
        user.do("s = mshare.SharedMemory(create=True, size=20 * MIB); s.buf[:] = b'x' * len(s.buf); s.unlink()")


class TestNames:
    """As the standard library's, as far as regions can have them."""

    def test_a_leading_slash_makes_no_difference(self, user: Client) -> None:
        user.do("s = mshare.SharedMemory('/slash', create=True, size=1); t = mshare.SharedMemory('slash')")
        assert user.ask("(s.name, t.name)") == ["/slash", "slash"]
        user.do("s.unlink()")

    @pytest.mark.parametrize(
        ("call", "kind", "number"),
        [
            ("mshare.SharedMemory('x' * 300, create=True, size=1)", "OSError", errno.ENAMETOOLONG),
            ("mshare.SharedMemory('a/b', create=True, size=1)", "OSError", errno.EINVAL),
            ("mshare.SharedMemory('.a', create=True, size=1)", "OSError", errno.EINVAL),
            ("mshare.SharedMemory('', create=True, size=1)", "OSError", errno.EINVAL),
            ("mshare.SharedMemory('a\\0', create=True, size=1)", "ValueError", None),
            ("mshare.SharedMemory('nothing there')", "FileNotFoundError", errno.ENOENT),
            ("mshare.SharedMemory()", "ValueError", None),
            ("mshare.SharedMemory('a', create=True, size=0)", "ValueError", None),
            ("mshare.SharedMemory('a', create=True, size=-1)", "ValueError", None),
            ("mshare.SharedMemory('a', create=True, size='1')", "TypeError", None),
        ],
    )
    def test_what_cannot_be_has_the_error_it_has_there(
        self, daemon: Daemon, user: Client, call: str, kind: str, number: int | None
    ) -> None:
        error = user.error_of(call)
        assert (error.kind, error.errno) == (kind, number)
        assert regions(daemon) == set()

    def test_anothers_block_may_not_be_opened(self, client: Callable[..., Client]) -> None:
        owner, other = client(uid=2001), client(uid=2002)
        owner.do("s = mshare.SharedMemory('owned', create=True, size=1)")
        for call in ("mshare.SharedMemory('owned')", "mshare.remove('owned')"):
            assert other.error_of(call).kind == "PermissionError"
        owner.do("s.unlink()")


class TestLife:
    """How a block ends."""

    def test_who_attaches_and_ends_takes_nothing_along(self, daemon: Daemon, user: Client) -> None:
        """With the standard library this program's tracker would unlink the block, and say so."""
        user.do("s = mshare.SharedMemory('early', create=True, size=1)")
        for track in (True, False):
            run(daemon, f"import mshare; s = mshare.SharedMemory('early', track={track}); s.buf[0] += 1")
        assert user.ask("(s.buf[0], mshare.SharedMemory('early').buf[0])") == [2, 2]
        user.do("s.unlink()")

    @pytest.mark.parametrize("end", ["pass", "s.close()", "del s", "os._exit(0)", "os.kill(os.getpid(), 9)"])
    def test_it_ends_with_its_creator(self, daemon: Daemon, user: Client, eventually: Condition, end: str) -> None:
        user.do("s = mshare.SharedMemory('brief', create=True, size=1)")
        assert regions(daemon) == {"brief"}
        user.send(do=end)
        user.kill()
        eventually(lambda: regions(daemon) == set())

    def test_or_with_the_last_who_has_it_open(
        self, daemon: Daemon, client: Callable[..., Client], eventually: Condition
    ) -> None:
        creator, first, second = client(), client(), client()
        creator.do("s = mshare.SharedMemory('shared', create=True, size=1); s.buf[0] = 5")
        first.do("s = mshare.SharedMemory('shared')")
        creator.kill()
        second.do("s = mshare.SharedMemory('shared')")
        first.kill()
        eventually(lambda: "attached 1" in (daemon.mount / ".regions/shared/stat").read_text())
        assert second.ask("s.buf[0]") == 5
        second.do("s.close()")
        assert regions(daemon) == set()

    def test_closed_by_all_it_waits_for_others_while_its_creator_lives(self, daemon: Daemon, user: Client) -> None:
        user.do("s = mshare.SharedMemory('waiting', create=True, size=1); s.buf[0] = 3; s.close()")
        assert run(daemon, "import mshare; print(mshare.SharedMemory('waiting').buf[0])") == "3"
        user.do("s.unlink()")
        assert user.error_of("s.unlink()").kind == "FileNotFoundError"

    def test_untracked_it_stays_until_it_is_unlinked(self, daemon: Daemon, user: Client) -> None:
        name = run(daemon, "import mshare; print(mshare.SharedMemory(create=True, size=1, track=False).name)")
        assert regions(daemon) == {name}
        user.do(f"mshare.SharedMemory({name!r}).unlink()")
        assert regions(daemon) == set()

    def test_the_daemon_that_follows_knows_whom_it_ends_with(
        self, start_daemon: Callable[..., Daemon], client: Callable[..., Client], eventually: Condition
    ) -> None:
        mortal = start_daemon()
        maker, other = client(mortal), client(mortal)
        maker.do("s = mshare.SharedMemory('one', create=True, size=5); t = mshare.SharedMemory('two', True, 5)")
        maker.do("u = mshare.SharedMemory('three', create=True, size=5, track=False); s.buf[0] = 1; s.close()")
        other.do("t = mshare.SharedMemory('two')")
        mortal.kill()
        mortal.restart()
        assert regions(mortal) == {"one", "two", "three"}
        assert other.ask("mshare.SharedMemory('one').buf[0]") == 1
        assert other.ask("mshare.SharedMemory('one').size") == 5
        maker.kill()
        eventually(lambda: regions(mortal) == {"two", "three"})
        other.do("t.close()")
        assert regions(mortal) == {"three"}
        other.do("mshare.remove('three')")

    def test_unlinked_it_stays_for_those_who_have_it(self, daemon: Daemon, user: Client) -> None:
        user.do("s = mshare.SharedMemory('un', create=True, size=1); t = mshare.SharedMemory('un'); s.unlink()")
        assert regions(daemon) == set()
        user.do("s.buf[0] = 9; u = mshare.SharedMemory('un', create=True, size=1)")
        assert user.ask("(t.buf[0], u.buf[0])") == [9, 0]
        user.do("u.unlink()")

    def test_a_workers_block_is_for_who_has_started_it(
        self, daemon: Daemon, user: Client, eventually: Condition
    ) -> None:
        """The worker is gone before anybody else attaches, and so is the reference of each other process."""
        user.do("""
            def work(pipe):
                s = mshare.SharedMemory(create=True, size=1)
                s.buf[0] = 8
                pipe.send(s.name)
            ours, theirs = multiprocessing.Pipe()
            worker = multiprocessing.get_context('fork').Process(target=work, args=(theirs,))
            worker.start()
            name = ours.recv()
            worker.join()
            """)
        assert user.ask("mshare.SharedMemory(name).buf[0]") == 8
        user.kill()
        eventually(lambda: regions(daemon) == set())

    def test_nothing_piles_up(self, daemon: Daemon, user: Client, eventually: Condition) -> None:
        """Neither descriptors nor mappings, here or in the daemon, however a block was let go."""
        user.do("""
            def once(n):
                s = mshare.SharedMemory(create=True, size=5000)
                t = mshare.SharedMemory(s.name)
                if n % 2: t.close()
                s.unlink()
            for n in range(3): once(n)
            count = lambda: (len(os.listdir('/proc/self/fd')), len(Path('/proc/self/maps').read_text().splitlines()))
            before = count()
            """)
        descriptors = daemon.descriptors()
        user.do("for n in range(20): once(n)")
        assert user.ask("list(count())") == user.ask("list(before)")
        eventually(lambda: daemon.descriptors() <= descriptors + 1)

    def test_collected_in_the_middle_of_a_request_it_ends_right_after(self, user: Client) -> None:
        """The collector may run anywhere, also where this thread holds the connection."""
        user.do("""
            class Ring: pass
            def drop():
                ring = Ring(); ring.self = ring
                ring.block = mshare.SharedMemory('ring', track=True)
            s = mshare.SharedMemory('ring', create=True, size=1)
            from mshare import connection
            plain = connection._receive
            def collecting(sock):
                connection._receive = plain
                gc.collect()
                return plain(sock)
            gc.disable(); drop()
            connection._receive = collecting
            s.unlink()
            gc.enable()
            """)
        assert user.ask("connection._receive is plain")
        assert user.ask("len(mshare.region._attached)") == 1


class TestViews:
    """What looks at the memory keeps it where it is."""

    def test_slices_hold_off_close(self, user: Client) -> None:
        user.do("s = mshare.SharedMemory(create=True, size=100); part = s.buf[10:20]")
        assert user.error_of("s.close()").kind == "BufferError"
        user.do("part[0] = 1; del part; s.close(); s.close(); s.unlink()")
        assert user.ask("s.buf is None")

    def test_a_name_for_buf_itself_does_not(self, user: Client) -> None:
        user.do("s = mshare.SharedMemory(create=True, size=100); whole = s.buf; s.close(); s.unlink()")
        assert user.error_of("whole[0]").kind == "ValueError"

    def test_an_array_of_numpys_stays_good_when_all_else_is_closed(self, user: Client) -> None:
        """With the standard library, touching it then ends the process."""
        user.do("""
            import numpy
            s = mshare.SharedMemory('array', create=True, size=1 << 20)
            array = numpy.ndarray((1 << 17,), dtype=numpy.int64, buffer=s.buf)
            s.close()
            array[:] = 7
            """)
        assert user.ask("int(mshare.SharedMemory('array').buf[-8])") == 7
        assert user.ask("len(mshare.region._attached)") == 1
        user.do("del array; mshare.SharedMemory('array').unlink()")
        assert user.ask("len(mshare.region._attached)") == 0

    def test_what_is_left_of_a_forgotten_block_can_be_used(self, user: Client) -> None:
        user.do("buf = mshare.SharedMemory('forgotten', create=True, size=100).buf; part = buf[5:]; del buf")
        user.do("gc.collect(); part[0] = 6")
        assert user.ask("mshare.SharedMemory('forgotten').buf[5]") == 6
        user.do("del part; mshare.SharedMemory('forgotten').unlink()")
        assert user.ask("len(mshare.region._attached)") == 0

    def test_a_region_is_not_detached_under_an_array(self, user: Client, name: str) -> None:
        user.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
        user.do("import numpy; array = numpy.ndarray((8,), dtype=numpy.int64, buffer=r.buf)")
        assert user.error_of("r.detach()").kind == "BufferError"
        user.do(f"array[0] = 1; del array; r.detach(); mshare.remove({name!r})")

    def test_subclasses_may_ask_for_reading_only(self, user: Client) -> None:
        user.do("s = mshare.SharedMemory('read', create=True, size=10)")
        user.do("class Reader(mshare.SharedMemory): _flags = os.O_RDONLY")
        user.do("r = Reader('read')")
        assert user.ask("r.buf.readonly")
        assert user.error_of("r.buf.__setitem__(0, 1)").kind == "TypeError"
        user.do("s.unlink()")


class TestPlaces:
    """Where windows are."""

    def test_processes_have_it_at_the_same_address(self, daemon: Daemon, user: Client) -> None:
        where = "ctypes.addressof(ctypes.c_char.from_buffer(s.buf))"
        user.do("s = mshare.SharedMemory('placed', create=True, size=1)")
        here = user.ask(where)
        assert run(daemon, f"import ctypes, mshare; s = mshare.SharedMemory('placed'); print({where})") == str(here)
        user.do("s.unlink()")

    def test_a_second_window_of_a_process_is_elsewhere(self, user: Client) -> None:
        user.do("s = mshare.SharedMemory('two', create=True, size=3 * MIB); t = mshare.SharedMemory('two')")
        user.do("s.buf[-1] = 4")
        assert user.ask("t.buf[-1]") == 4
        user.do("s.close()")
        assert user.ask("t.buf[-1]") == 4
        user.do("t.unlink()")

    def test_a_region_can_be_opened_as_a_block(self, user: Client, name: str) -> None:
        user.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); s = mshare.SharedMemory({name!r})")
        assert user.ask("(s.size, r.used)") == [2 * MIB, 2 * MIB]
        user.do("s.unlink()")

    def test_a_fork_of_a_block_is_opened_as_one(self, user: Client, name: str) -> None:
        user.do("s = mshare.SharedMemory('forked', create=True, size=5000); s.buf[0] = 1")
        user.do(f"r = mshare.mshare('forked', 0x6000_0000_0000, 0, RW); r.fork({name!r}); s.buf[0] = 2; s.unlink()")
        user.do(f"t = mshare.SharedMemory({name!r})")
        assert user.ask("(t.size, t.buf[0], s.buf[0])") == [5000, 1, 2]
        user.do("t.unlink()")

    def test_a_mount_that_was_named_goes_along_when_pickled(
        self, start_daemon: Callable[..., Daemon], user: Client
    ) -> None:
        other = start_daemon()
        user.do(f"s = mshare.SharedMemory('moved', create=True, size=1, mount={str(other.mount)!r}); s.buf[0] = 2")
        user.do("import pickle; t = pickle.loads(pickle.dumps(s))")
        assert user.ask("(t.buf[0], t.size)") == [2, 1]
        assert regions(other) == {"moved"}
        user.do("t.unlink()")


def test_a_block_of_the_pool_of_huge_pages(client: Callable[..., Client], hugetlb: Daemon, before: Pool) -> None:
    """With the backing hugetlb the daemon has as many pages promised as are used, not all of 1 GiB."""
    user = client(hugetlb)
    user.do("s = mshare.SharedMemory(create=True, size=5 * MIB, backing='hugetlb'); s.buf[-1] = 1")
    assert pool() == before.with_region(mapped=3, touched=1)
    assert user.ask("s.size") == 5 * MIB
    assert user.error_of("mshare.SharedMemory(create=True, size=100 * GIB, backing='hugetlb')").errno == errno.ENOMEM
    user.do("s.unlink(); s.close()")


def test_a_daemon_of_an_ordinary_user_has_blocks_too(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], eventually: Condition
) -> None:
    """With small pages, and children that arm their windows themselves."""
    users = start_daemon(uid=NOBODY)
    user, watcher = client(users, uid=NOBODY), client(users, uid=NOBODY)
    names = "[name for name in os.listdir(find_mount()) if name[0] not in '.m']"
    user.do("s = mshare.SharedMemory('own', create=True, size=3 * MIB); t = mshare.SharedMemory('own')")
    assert user.ask("fork('s.buf[-1] = 5; s.close(); t.buf[0] = 6; l = mshare.ShareableList([1]); l[0] = 2')") == 0
    assert user.ask("(t.buf[-1], s.buf[0])") == [5, 6]
    assert user.error_of("mshare.SharedMemory(create=True, size=1 << 44)").errno == errno.ENOMEM
    user.do("t.unlink(); u = mshare.SharedMemory('other', create=True, size=1)")
    eventually(lambda: bool(watcher.ask(names) == ["other"]))
    user.kill()
    eventually(lambda: bool(watcher.ask(names) == []))


def test_a_sponsor_must_be_a_process(daemon: Daemon, user: Client) -> None:
    user.do("link = connect(find_mount()); odd = protocol.Create('odd', None, 2 * MIB, 0, True, False, kept=True)")
    user.do("null = os.open('/dev/null', os.O_RDWR)")
    for fds in ("()", "(null,)", "(null, null)"):
        assert user.error_of(f"link.exchange(odd, {fds})").errno == errno.EBADF
    assert regions(daemon) == set()
