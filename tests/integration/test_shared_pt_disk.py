"""Files of a disk mapped with MAP_SHARED_PT: paged through a backing, and written back to the file."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hugepages import HUGE, MIB, SIGBUS, SIGSEGV

pytestmark = pytest.mark.pool

Start = Callable[..., Client]
Eventually = Callable[[Callable[[], bool]], None]

SIZE = 4 * HUGE
LENGTH = 3 * HUGE + 100
"""Of the file: it ends within the last page."""
LEISURELY = 1000
"""Seconds: nothing is written back by itself."""


@pytest.fixture(scope="module")
def server(start_daemon: Callable[..., Daemon], hugetlb: Daemon) -> Daemon:
    """It has huge pages from the pool of another."""
    return start_daemon("--writeback", str(LEISURELY))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 6 MiB and 100 bytes whose byte n is n % 251."""
    path = tmp_path / "data"
    path.write_bytes((bytes(range(251)) * (LENGTH // 251 + 1))[:LENGTH])
    return path


@pytest.fixture(params=["thp", "hugetlb"])
def backing(request: pytest.FixtureRequest, server: Daemon, eventually: Eventually) -> Iterator[str]:
    """In the end the daemon has nothing of it left."""
    yield str(request.param)
    eventually(lambda: not any(name.isdecimal() for name in os.listdir(server.state / request.param)))


@pytest.fixture
def mapper(server: Daemon, backing: str, client: Start, path: Path) -> Start:
    """Start a process that maps the file as ``m``, and has closed the descriptor again."""

    def start(prot: str = "3", flags: str = "os.O_RDWR", uid: int | None = None, of: Daemon | None = None) -> Client:
        c = client(of or server, uid)
        c.do(f"f = os.open({str(path)!r}, {flags})")
        c.do(f"m = mshare.mmap(f, {SIZE}, prot={prot}, backing={backing!r}); os.close(f); assert m.shared, m.why")
        return c

    return start


def touch(c: Client, offset: int = 0, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    where = f"(ctypes.c_char * 1).from_address(m.address + {offset})"
    status: int = -c.ask(f"fork('x = {where}; ' + {'x[0] = 7' if store else 'x[0]'!r})")
    return status


def holds(path: Path, offset: int, data: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(len(data)) == data


def test_all_have_its_contents_at_one_address(mapper: Start, path: Path) -> None:
    a, b = mapper(), mapper()
    assert a.ask("m.address") == b.ask("m.address")
    for c in (a, b):
        assert c.ask(f"m.buf[:{LENGTH}] == open({str(path)!r}, 'rb').read()")
        assert c.ask(f"m.buf[{LENGTH} : {LENGTH} + 50] == bytes(50)")
    a.do("m.buf[4 * MIB] = 99")
    assert b.ask("m.buf[4 * MIB]") == 99


@pytest.mark.parametrize("how", ["m.msync()", "m.munmap()"])
def test_stores_reach_the_file(mapper: Start, path: Path, how: str) -> None:
    a, b = mapper(), mapper()
    a.do(f"m.buf[5] = 200; m.buf[{LENGTH - 1}] = 201; m.buf[{LENGTH + 3}] = 202")
    b.do("m.buf[2 * MIB : 2 * MIB + 4] = b'page'")
    if how == "m.munmap()":
        b.do("m.munmap()")
    a.do(how)
    assert holds(path, 4, bytes([4, 200, 6]))
    assert holds(path, LENGTH - 1, bytes([201]))
    assert holds(path, 2 * MIB, b"page")
    assert path.stat().st_size == LENGTH
    if how == "m.msync()":
        a.do("m.buf[5] = 210; m.buf[6] = 211; m.msync(); m.msync()")
        assert holds(path, 4, bytes([4, 210, 211, 7]))


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "os.execv('/bin/true', ['t'])"])
def test_the_last_one_that_dies_leaves_the_file_with_every_store(
    mapper: Start, path: Path, server: Daemon, how: str, eventually: Eventually
) -> None:
    a, b = mapper(), mapper()
    a.do("m.buf[1] = 101")
    b.do("m.buf[4 * MIB + 1] = 102")
    a.kill()
    b.send(do=how)
    eventually(lambda: holds(path, 1, bytes([101])) and holds(path, 4 * MIB + 1, bytes([102])))
    eventually(lambda: os.listdir(server.mount / ".regions" / ".files") == [])


def test_a_daemon_that_stops_leaves_the_file_with_every_store(
    mapper: Start, path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    other = start_daemon("--writeback", str(LEISURELY))
    a, b = mapper(of=other), mapper(of=other)
    a.do("m.buf[1] = 101")
    b.do("m.buf[4 * MIB + 1] = 102")
    assert other.stop() == 0
    assert holds(path, 1, bytes([101]))
    assert holds(path, 4 * MIB + 1, bytes([102]))
    a.close()
    b.close()


def test_from_time_to_time_it_is_written_unasked(
    mapper: Start, path: Path, start_daemon: Callable[..., Daemon], eventually: Eventually
) -> None:
    eager = start_daemon("--writeback", "0.05")
    a = mapper(of=eager)
    a.do("m.buf[1] = 101")
    eventually(lambda: holds(path, 1, bytes([101])))
    a.do("m.buf[1] = 102; m.buf[4 * MIB] = 103")
    eventually(lambda: holds(path, 1, bytes([102])) and holds(path, 4 * MIB, bytes([103])))
    a.close()


def test_who_maps_it_next_sees_what_was_stored(mapper: Start, server: Daemon, path: Path) -> None:
    """A mapping that has just ended is written back before the file is read again."""
    for value in range(20, 25):
        a = mapper()
        assert a.ask("m.buf[7]") == (value - 1 if value > 20 else 7)
        a.do(f"m.buf[7] = {value}")
        a.kill()


def test_what_changes_before_it_is_read_is_seen(mapper: Start, path: Path) -> None:
    """And what others have stored to a page of the file later is not written over by stores to another page."""
    a = mapper()
    assert a.ask("m.buf[0]") == 0
    with path.open("rb+") as file:
        os.pwrite(file.fileno(), b"seen", 4 * MIB)
        os.pwrite(file.fileno(), b"mine", 8192)
    a.do("got = bytes(m.buf[4 * MIB : 4 * MIB + 4]).decode(); m.buf[100] = 1; m.msync()")
    assert a.ask("got") == "seen"
    assert holds(path, 8192, b"mine")
    assert holds(path, 100, bytes([1]))


def test_past_the_last_page_is_a_sigbus(mapper: Start, backing: str) -> None:
    a = mapper()
    page = HUGE if backing == "hugetlb" else 4096
    end = -(-LENGTH // page) * page
    assert touch(a, end - 1, store=True) == 0
    if end < SIZE:
        assert touch(a, end) == SIGBUS
        assert touch(a, end, store=True) == SIGBUS


def test_a_short_file_ends_early_for_readers_too(mapper: Start, path: Path, backing: str) -> None:
    os.truncate(path, HUGE + 10)
    for c in (mapper("1", "os.O_RDONLY"), mapper()):
        assert c.ask("m.buf[2 * MIB + 9]") == (HUGE + 9) % 251
        assert touch(c, 2 * HUGE) == SIGBUS


def test_a_file_that_shrinks_or_goes(mapper: Start, path: Path, tmp_path: Path) -> None:
    """What is in memory stays; nothing is written past the end, and nothing to a new file of that name."""
    a, b = mapper(), mapper()
    a.do("m.buf[0] = 1; m.buf[4 * MIB] = 2")
    os.truncate(path, 4096)
    a.do("m.msync()")
    assert path.stat().st_size == 4096
    assert holds(path, 0, bytes([1]))
    assert b.ask("m.buf[4 * MIB]") == 2
    link = tmp_path / "link"
    link.hardlink_to(path)
    path.unlink()
    path.write_bytes(b"new")
    b.do("m.buf[1] = 3")
    a.do("m.munmap()")
    b.do("m.munmap()")
    assert holds(link, 0, bytes([1, 3]))
    assert path.read_bytes() == b"new"


def test_protections_change_for_all(mapper: Start, path: Path) -> None:
    a, b = mapper(), mapper()
    a.do("m.buf[100] = 9; m.mprotect(1)")
    for c in (a, b):
        assert touch(c, 100, store=True) == SIGSEGV
        assert c.ask("m.buf[100]") == 9
        assert touch(c, 2 * MIB, store=True) == SIGSEGV
    b.do("m.mprotect(3); m.buf[100] = 11")
    assert a.ask("m.buf[100]") == 11
    a.do("m.msync()")
    assert holds(path, 99, bytes([99, 11, 101]))


def test_hiding_it(mapper: Start, backing: str) -> None:
    a, b = mapper(), mapper()
    a.do("m.buf[100] = 9")
    if backing == "hugetlb":
        assert a.error_of("m.mprotect(0)").errno == errno.EOPNOTSUPP
        return
    a.do("m.mprotect(0)")
    assert touch(b, 100) == SIGSEGV
    b.do("m.mprotect(3)")
    assert [c.ask("m.buf[100]") for c in (a, b)] == [9, 9]


def test_a_reader_cannot_write_by_any_way(mapper: Start, path: Path) -> None:
    """Its descriptor of the memory is of a mount that nobody can write through."""
    path.chmod(0o644)
    path.parent.chmod(0o755)
    reader = mapper("1", "os.O_RDONLY")
    assert touch(reader, 5, store=True) == SIGSEGV
    assert reader.error_of("m.mprotect(3)").errno == errno.EACCES
    writer = mapper()
    writer.do("m.buf[5] = 77")
    assert reader.ask("m.buf[5]") == 77
    assert reader.error_of(f"mshare.mmap(os.open({str(path)!r}, os.O_RDONLY), {SIZE})").errno == errno.EACCES
    raw = f"""
        link = connect(find_mount())
        f = os.open({str(path)!r}, os.O_RDONLY)
        offer, fds = link.exchange(protocol.MapFile(None, {SIZE}, 0, 1), (f,))
        assert offer.readonly and not offer.own
        def denied(work):
            try:
                work()
            except OSError as error:
                return error.errno
        found = [
            denied(lambda: os.pwrite(fds[0], b'x', 0)),
            denied(lambda: sc.mmap(None, 2 * MIB, 3, 1, fds[0])),
            denied(lambda: os.open('/proc/self/fd/%d' % fds[0], os.O_RDWR)),
            denied(lambda: os.ftruncate(fds[0], 0)),
        ]
    """
    reader.do(raw)
    assert all(reader.ask("found")), reader.ask("found")
    assert writer.ask("m.buf[5]") == 77


def test_readers_first_then_a_writer(mapper: Start, path: Path) -> None:
    readers = [mapper("1", "os.O_RDONLY") for _ in range(2)]
    assert [c.ask("m.buf[8]") for c in readers] == [8, 8]
    writer = mapper()
    writer.do("m.buf[8] = 80; m.buf[4 * MIB + 5] = 81; m.msync()")
    assert [c.ask("m.buf[8], m.buf[4 * MIB + 5]") for c in readers] == [[80, 81]] * 2
    assert holds(path, 8, bytes([80]))
    assert holds(path, 4 * MIB + 5, bytes([81]))
    writer.do("m.buf[9] = 90; m.munmap()")
    for c in readers:
        c.do("m.munmap()")
    assert holds(path, 8, bytes([80, 90]))


def test_a_writer_first_then_readers(mapper: Start, path: Path, client: Start, server: Daemon, backing: str) -> None:
    """A reader asks for less than the writer has set, and maps the file itself; what was written back it sees."""
    writer = mapper()
    writer.do("m.buf[8] = 80; m.msync()")
    reader = client(server)
    reader.do(f"f = os.open({str(path)!r}, os.O_RDONLY)")
    reader.do(f"m = mshare.mmap(f, {SIZE}, prot=1, backing={backing!r})")
    assert "does not include" in reader.ask("m.why")
    assert reader.ask("m.buf[8]") == 80
    writer.do("m.mprotect(1)")
    reader.do(f"n = mshare.mmap(f, {SIZE}, prot=1, backing={backing!r})")
    assert reader.ask("n.why") is None
    assert reader.ask("n.buf[8]") == 80


def test_children_count(mapper: Start, path: Path) -> None:
    a = mapper()
    a.do("pid = os.fork()\nif not pid: signal.pause()")
    a.do("m.buf[3] = 30; m.munmap()")
    assert a.ask("fork('pass')") == 0
    a.do("os.kill(pid, 9); os.waitpid(pid, 0)")


def test_a_stopped_sharer_holds_nobody_up(mapper: Start, path: Path) -> None:
    a, b = mapper(), mapper()
    a.do("m.buf[3] = 30")
    a.signal(signal.SIGSTOP)
    b.do("m.buf[4] = 40; m.mprotect(1); m.msync(); m.mprotect(3)")
    assert holds(path, 3, bytes([30, 40]))
    a.signal(signal.SIGCONT)
    a.do("m.buf[3] = 31; m.msync()")
    assert holds(path, 3, bytes([31, 40]))


class TestTables:
    """With huge pages the kernel shares the tables, also between those who may only read."""

    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        """A file of 1 GiB, of which little is not zeros."""
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(1 << 30)
            file.seek((1 << 29) + 5)
            file.write(b"middle")
        return path

    @pytest.mark.usefixtures("before")
    @pytest.mark.parametrize(("prot", "flags"), [(1, os.O_RDONLY), (3, os.O_RDWR)], ids=["readers", "writers"])
    def test_one_set_of_them_is_for_all(
        self, hugetlb: Daemon, client: Start, large: Path, prot: int, flags: int
    ) -> None:
        found = []
        for _ in range(3):
            c = client(hugetlb)
            c.do(f"""
                import resource
                f = os.open({str(large)!r}, {flags})
                m = mshare.mmap(f, GIB, prot={prot}, backing='hugetlb')
                assert m.shared, m.why
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                got = sum(m.buf[:: 2 * MIB]), bytes(m.buf[GIB // 2 + 5 :][:6]).decode()
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            """)
            assert c.ask("got") == [0, "middle"]
            found.append(c.ask("faults"))
        assert max(found[1:]) <= 8
        (entry,) = (hugetlb.mount / ".regions" / ".files").iterdir()
        assert "tables_shared true" in (entry / "stat").read_text()

    def test_without_pages_it_says_so(self, server: Daemon, client: Start, tmp_path: Path) -> None:
        path = tmp_path / "sparse"
        path.touch()
        os.truncate(path, 1 << 40)
        c = client(server)
        c.do(f"f = os.open({str(path)!r}, RW)")
        error = c.error_of("mshare.mmap(f, 1 << 40, backing='hugetlb')")
        assert error.errno == errno.ENOMEM
        assert "nr_hugepages" in error.text

    def test_an_empty_file_is_none_for_huge_pages(self, server: Daemon, client: Start, tmp_path: Path) -> None:
        path = tmp_path / "empty"
        path.touch()
        c = client(server)
        c.do(f"f = os.open({str(path)!r}, RW)")
        assert c.error_of("mshare.mmap(f, 2 * MIB, backing='hugetlb')").errno == errno.ENOMEM
