"""Files mapped with MAP_SHARED_PT: one mapping for all who map a file alike, without a name."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon

MIB, HUGE = 1 << 20, 2 << 20
SIGBUS, SIGSEGV = 7, 11
SIZE = 3 * HUGE
HERE = 0x5800_0000_0000


@pytest.fixture
def path(name: str) -> Iterator[Path]:
    """A file on tmpfs of 6 MiB whose byte n is n % 251."""
    path = Path("/dev/shm") / name
    path.write_bytes((bytes(range(251)) * (SIZE // 251 + 1))[:SIZE])
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def mapper(client: Callable[..., Client], path: Path) -> Callable[..., Client]:
    """Start a process that maps the file as ``m``, and has closed the descriptor again."""

    def start(
        prot: str = "PROT_READ | PROT_WRITE", flags: str = "os.O_RDWR", more: str = "", uid: int | None = None
    ) -> Client:
        c = client(None, uid)
        c.do(f"from mmap import *\nf = os.open({str(path)!r}, {flags})")
        c.do(f"m = mshare.mmap(f, {SIZE}, prot={prot}{more and ', '}{more}); os.close(f)")
        return c

    return start


def shared(c: Client) -> bool:
    found: bool = c.ask("m.shared")
    return found


def touch(c: Client, offset: int = 0, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    where = f"(ctypes.c_char * 1).from_address(m.address + {offset})"
    status: int = -c.ask(f"fork('x = {where}; ' + {'x[0] = 7' if store else 'x[0]'!r})")
    return status


def entry(daemon: Daemon, path: Path) -> Path:
    """Where the mount tells of the mapping of a file."""
    about = path.stat()
    key = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    return daemon.mount / ".regions" / ".files" / key


def test_all_have_one_mapping_at_one_address(mapper: Callable[..., Client], daemon: Daemon, path: Path) -> None:
    a, b = mapper(), mapper()
    assert a.ask("m.why") is b.ask("m.why") is None
    assert shared(a)
    assert shared(b)
    assert a.ask("m.address") == b.ask("m.address")
    a.do("m.buf[HUGE := 5 * MIB] = 77")
    assert b.ask("m.buf[5 * MIB]") == 77 == path.read_bytes()[5 * MIB]
    pids = {line.split()[0] for line in (entry(daemon, path) / "attachments").read_text().splitlines()}
    assert pids == {str(a.pid), str(b.pid)}


def test_the_first_decides_on_the_address(mapper: Callable[..., Client]) -> None:
    a, b = mapper(more=f"addr={HERE}"), mapper()
    assert a.ask("m.address") == b.ask("m.address") == HERE
    assert shared(mapper(more=f"addr={HERE}"))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (f"addr={HERE + HUGE}", "at 0x"),
        (f"offset={HUGE}", "from offset 0x0 on"),
        ("flags=MAP_SHARED", "MAP_SHARED_PT is not among the flags"),
        ("addr=0x5a0000001000", "the address 0x5a0000001000 is not a multiple of 2 MiB"),
        ("offset=4096", "the offset 0x1000 is not a multiple of 2 MiB"),
    ],
)
def test_who_asks_for_something_else_gets_an_ordinary_mapping(
    mapper: Callable[..., Client], more: str, why: str
) -> None:
    mapper(more="" if "addr" in more else f"addr={HERE}")
    c = mapper(more=more)
    assert not shared(c)
    assert why in c.ask("m.why")
    c.do("m.buf[0] = 99; m.msync(); m.munmap()")


def test_another_length_is_not_shared(mapper: Callable[..., Client], client: Callable[..., Client], path: Path) -> None:
    mapper()
    c = client()
    c.do(f"from mmap import *\nf = os.open({str(path)!r}, RW); m = mshare.mmap(f, {HUGE}); n = mshare.mmap(f, 4096)")
    assert c.ask("[m.shared, n.shared]") == [False, False]
    assert "6 MiB of the file, not 2 MiB" in c.ask("m.why")
    assert "length 0x1000 is not a multiple" in c.ask("n.why")
    assert c.ask("n.buf[:3] == bytes([0, 1, 2])")


def test_a_protection_must_include_the_firsts(mapper: Callable[..., Client]) -> None:
    mapper()
    reader = mapper("PROT_READ")
    assert not shared(reader)
    assert "rw-, which r-- does not include" in reader.ask("m.why")
    assert reader.ask("m.buf[1]") == 1


def test_readers_first_then_writers(mapper: Callable[..., Client]) -> None:
    """Each has what it asked for: a reader's window cannot write, whoever joins."""
    reader, writer = mapper("PROT_READ"), mapper()
    assert shared(reader)
    assert shared(writer)
    writer.do("m.buf[0] = 50")
    assert reader.ask("m.buf[0]") == 50
    assert touch(reader, store=True) == SIGSEGV
    assert reader.error_of("m.buf.__setitem__(0, 1)").kind == "TypeError"


@pytest.mark.parametrize("prot", ["PROT_READ | PROT_WRITE", "PROT_WRITE"])
def test_a_read_only_descriptor_yields_no_writable_memory(
    mapper: Callable[..., Client], client: Callable[..., Client], path: Path, prot: str
) -> None:
    c = mapper("PROT_READ", "os.O_RDONLY")
    c.do(f"f = os.open({str(path)!r}, os.O_RDONLY)")
    assert c.error_of(f"mshare.mmap(f, {SIZE}, prot={prot})").errno == errno.EACCES
    assert shared(c)
    assert c.error_of("m.mprotect(PROT_READ | PROT_WRITE)").errno == errno.EACCES
    assert c.error_of("sc.mprotect(m.address, m.size, 3)").errno == errno.EACCES
    assert touch(c, store=True) == SIGSEGV
    raw = client()
    raw.do(f"f = os.open({str(path)!r}, os.O_RDONLY)\nlink = connect(find_mount())")
    ask = "link.exchange(protocol.MapFile(None, 6 * MIB, 0, 3), (f,))"
    assert raw.error_of(ask).errno == errno.EACCES


def test_protections_change_for_all(mapper: Callable[..., Client]) -> None:
    a, b = mapper(), mapper()
    a.do("m.mprotect(PROT_READ)")
    late = mapper("PROT_READ")
    assert shared(late)
    for c in (a, b):
        assert touch(c, 100, store=True) == SIGSEGV
        assert touch(c, 100) == 0
    b.do("m.mprotect(PROT_READ | PROT_WRITE); m.buf[100] = 11")
    assert touch(a, 100, store=True) == 0
    assert late.ask("m.buf[100]") == 7
    assert touch(late, 100, store=True) == SIGSEGV
    late.do("m.mprotect(PROT_READ | PROT_WRITE); m.buf[100] = 12")
    assert a.ask("m.buf[100]") == 12


def test_who_cannot_write_cannot_keep_others_from_it(mapper: Callable[..., Client]) -> None:
    reader, writer = mapper("PROT_READ", "os.O_RDONLY"), mapper()
    assert shared(reader)
    assert shared(writer)
    assert reader.error_of("m.mprotect(PROT_READ)").errno == errno.EACCES
    writer.do("m.buf[3] = 8")
    assert reader.ask("m.buf[3]") == 8


def test_what_lies_in_memory_cannot_be_hidden(mapper: Callable[..., Client]) -> None:
    a = mapper()
    assert a.error_of("m.mprotect(0)").errno == errno.EOPNOTSUPP
    assert a.error_of("m.mprotect(PROT_READ | 4)").errno == errno.EACCES
    assert a.error_of("m.mprotect(64)").errno == errno.EINVAL
    a.do("m.buf[0] = 1")


def test_a_part_cannot_be_unmapped(mapper: Callable[..., Client]) -> None:
    a, b = mapper(), mapper()
    for part in ("0, 2 * MIB", "2 * MIB", "0, 8 * MIB", "4096, 4096"):
        assert a.error_of(f"m.munmap({part})").errno == errno.EINVAL
    requests = (
        "Munmap(m._region.own_attachment(), 0, 2 * MIB)",
        "Munmap(m._region.own_attachment(), 0, 6 * MIB)",
        "Mprotect(m._region.own_attachment(), 0, 4096, 1)",
        "Madvise(m._region.own_attachment(), 0, 6 * MIB, 9)",
        "Mmap(m._region.own_attachment(), 0, 4096, 3, 0x31)",
        "Fork(m._region.own_attachment(), 'x', 0o600)",
        "Snapshot((m._region.own_attachment(),))",
    )
    for request in requests:
        assert a.error_of(f"connect(find_mount()).exchange(protocol.{request})").errno == errno.EINVAL
    a.do("m.buf[0] = 1; m.munmap(0, 6 * MIB); m.munmap()")
    assert a.error_of("m.buf").kind == "ValueError"
    assert b.ask("m.buf[0]") == 1


def test_views_keep_it_mapped(mapper: Callable[..., Client]) -> None:
    a = mapper()
    a.do("v = m.buf[10:20]")
    assert a.error_of("m.munmap()").kind == "BufferError"
    a.do("v[0] = 3; v.release(); m.munmap()")
    assert a.ask("m.closed")


@pytest.mark.parametrize(
    "how", ["m.munmap()", "os._exit(0)", "os.kill(os.getpid(), 9)", "os.execv('/bin/true', ['t'])"]
)
def test_the_last_one_frees_it(
    mapper: Callable[..., Client],
    daemon: Daemon,
    path: Path,
    how: str,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    a, b = mapper(), mapper()
    """Not only is it hard to find: it is listed no longer. Those of tests before this one may be, for a moment."""
    place = entry(daemon, path)
    a.do("m.munmap()")
    assert place.exists()
    assert place.name in os.listdir(place.parent)
    b.send(do=how)
    eventually(lambda: not place.exists())
    assert place.name not in os.listdir(place.parent)


def test_children_have_it_too(mapper: Callable[..., Client], daemon: Daemon, path: Path) -> None:
    a = mapper()
    assert a.ask("fork('m.buf[1] = 2; m.mprotect(PROT_READ); assert m.shared; m.munmap()')") == 0
    assert a.ask("m.buf[1]") == 2
    assert touch(a, 1, store=True) == SIGSEGV
    assert shared(mapper("PROT_READ"))


def test_a_snapshot_leaves_it_shared(mapper: Callable[..., Client], name: str) -> None:
    """odfork() of all regions is not about files."""
    a = mapper()
    a.do(f"""
        r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)
        pid = mshare.odfork()
        if not pid:
            m.buf[9] = 90; r.buf[9] = 91; os._exit(0)
        os.waitpid(pid, 0); got = m.buf[9], r.buf[9]; mshare.mshare_unlink({name!r})
    """)
    assert a.ask("got") == [90, 0]


def test_other_users_share_it_as_far_as_they_may_open_it(mapper: Callable[..., Client], path: Path) -> None:
    path.chmod(0o644)
    reader = mapper("PROT_READ", "os.O_RDONLY", uid=65534)
    writer = mapper()
    assert shared(reader)
    assert shared(writer)
    writer.do("m.buf[0] = 44")
    assert reader.ask("m.buf[0]") == 44
    assert reader.error_of("m.mprotect(3)").errno == errno.EACCES


def test_it_shows_in_the_mount(mapper: Callable[..., Client], daemon: Daemon, path: Path) -> None:
    mapper(more=f"addr={HERE}")
    place = entry(daemon, path)
    assert place.name in os.listdir(place.parent)
    assert ".files" in os.listdir(daemon.mount / ".regions")
    stat = dict(line.split(" ", 1) for line in (place / "stat").read_text().splitlines())
    assert (stat["backing"], stat["attached"], stat["size"]) == ("file", "1", str(SIZE))
    assert (place / "maps").read_text() == f"{HERE:012x}-{HERE + SIZE:012x} rw-s {0:012x} [file {place.name}]\n"
    assert place.name not in os.listdir(daemon.mount)


def test_a_part_of_a_file(client: Callable[..., Client], path: Path) -> None:
    a, b = client(), client()
    for c in (a, b):
        c.do(f"f = os.open({str(path)!r}, RW); m = mshare.mmap(f, {HUGE}, offset={HUGE})")
    a.do("m.buf[5] = 9; m.mprotect(1)")
    assert shared(a)
    assert shared(b)
    assert b.ask("m.buf[5]") == path.read_bytes()[HUGE + 5] == 9
    assert b.ask("os.preadv(f, [bytearray(m.buf[:4096])], 2 * MIB)") == 4096
    assert b.error_of("os.preadv(f, [m.buf[:4096]], 0)").errno == errno.EFAULT
    assert b.ask("m.buf[5]") == 9


def test_a_file_may_go_shrink_or_end_early(
    mapper: Callable[..., Client], client: Callable[..., Client], path: Path
) -> None:
    a, b = mapper(), mapper()
    path.unlink()
    a.do("m.buf[2] = 5")
    assert b.ask("m.buf[2]") == 5
    c = client()
    c.do(f"f = os.open({str(path)!r}, RW | os.O_CREAT); os.ftruncate(f, 3 * MIB); m = mshare.mmap(f, {SIZE})")
    assert shared(c)
    assert touch(c, 3 * MIB - 1, store=True) == 0
    assert touch(c, 3 * MIB) == SIGBUS
    c.do("os.ftruncate(f, 4096)")
    assert touch(c, 4096) == SIGBUS


def test_a_memfd_that_is_passed_on(client: Callable[..., Client]) -> None:
    a, b = client(), client()
    a.do("f = os.memfd_create('it'); os.ftruncate(f, 4 * MIB); m = mshare.mmap(f, 4 * MIB)")
    b.do(f"f = os.open('/proc/{a.pid}/fd/' + str({a.ask('f')}), RW); m = mshare.mmap(f, 4 * MIB)")
    assert shared(a)
    assert shared(b)
    a.do("m.buf[MIB] = 6")
    assert b.ask("m.buf[MIB]") == 6


def test_a_sealed_memfd_is_for_reading_only(client: Callable[..., Client], daemon: Daemon) -> None:
    a = client()
    a.do("import fcntl\nf = os.memfd_create('it', 2); os.ftruncate(f, 4 * MIB); fcntl.fcntl(f, 1033, 8)")
    before = set(os.listdir(daemon.mount / ".regions" / ".files"))  # Of processes that have just ended, perhaps.
    assert a.error_of("mshare.mmap(f, 4 * MIB)").errno in (errno.EPERM, errno.EACCES)
    assert set(os.listdir(daemon.mount / ".regions" / ".files")) <= before
    a.do("m = mshare.mmap(f, 4 * MIB, prot=1)")
    assert shared(a)
    assert a.ask("m.buf[0]") == 0


def test_where_something_stands_in_the_way(
    mapper: Callable[..., Client], client: Callable[..., Client], path: Path
) -> None:
    mapper(more=f"addr={HERE}")
    c = client()
    c.do(f"f = os.open({str(path)!r}, RW); at = sc.mmap({HERE}, 4096, 3, 0x100022)")
    c.do(f"m = mshare.mmap(f, {SIZE})")
    assert not shared(c)
    assert "in use in this process" in c.ask("m.why")
    assert c.error_of(f"mshare.mmap(f, {SIZE}, addr={HERE}, flags=0x300001)").errno == errno.EEXIST


IMPOSSIBLE = {
    "mshare.mmap(f, 2 * MIB, flags=0x200000)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, flags=0x200002)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, flags=0x200011)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, prot=5)": errno.EACCES,
    "mshare.mmap(f, 2 * MIB, prot=64)": errno.EINVAL,
    "mshare.mmap(f, 0)": errno.EINVAL,
    "mshare.mmap(f, -1)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, offset=-2 * MIB)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, addr=1 << 62)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, addr=-2 * MIB)": errno.EINVAL,
    "mshare.mmap(f, 2 * MIB, backing='gold')": errno.EINVAL,
    "mshare.mmap(-1, 2 * MIB)": errno.EBADF,
    "mshare.mmap(os.open('/', os.O_PATH), 2 * MIB)": errno.EBADF,
    "mshare.mmap(os.open('/', os.O_RDONLY), 2 * MIB, prot=1)": errno.ENODEV,
    "mshare.mmap(os.open(str(find_mount() / 'mshare_info'), os.O_RDONLY), 2 * MIB, prot=1)": errno.ENODEV,
    "mshare.mmap(os.open(path, os.O_WRONLY), 2 * MIB)": errno.EACCES,
    "mshare.mmap(os.pipe()[0], 2 * MIB, prot=1)": errno.ENODEV,
}
"""Calls, and the errors that they end in."""


def test_what_cannot_be(client: Callable[..., Client], daemon: Daemon, path: Path) -> None:
    before = set(os.listdir(daemon.mount / ".regions" / ".files"))  # Of processes that have just ended, perhaps.
    c = client()
    c.do(f"path = {str(path)!r}; f = os.open(path, RW)")
    assert {call: c.error_of(call).errno for call in IMPOSSIBLE} == IMPOSSIBLE
    assert set(os.listdir(daemon.mount / ".regions" / ".files")) <= before


def test_without_a_file_or_a_daemon(client: Callable[..., Client], path: Path, tmp_path: Path) -> None:
    c = client()
    c.do("m = mshare.mmap(-1, 2 * MIB, flags=0x200021); m.buf[0] = 1")
    assert "MAP_ANONYMOUS" in c.ask("m.why")
    c.do(f"f = os.open({str(path)!r}, RW); m = mshare.mmap(f, 4 * MIB, mount={str(tmp_path)!r}); m.buf[0] = 1")
    assert not shared(c)
    assert c.ask("m.why").startswith("no daemon: ")
    assert "MAP_SHARED_VALIDATE" not in c.ask("mshare.mmap(f, 4 * MIB, flags=0x200003).why or ''")


def test_a_range_of_a_mapping_is_not_donated(mapper: Callable[..., Client], name: str) -> None:
    a = mapper()
    assert a.error_of(f"mshare.mshare({name!r}, m.address, 2 * MIB, CREATE)").errno == errno.EINVAL


def test_many_come_and_go_at_once(
    mapper: Callable[..., Client], daemon: Daemon, path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Whoever finds the last one gone starts over: nobody is refused."""
    clients = [mapper() for _ in range(3)]
    code = f"""
        def work():
            for _ in range(30):
                f = os.open({str(path)!r}, RW)
                with mshare.mmap(f, {SIZE}) as m:
                    os.close(f)
                    assert m.shared, m.why
                    m.buf[os.getpid() % 1000] = 1
        m.munmap()
        work()
    """
    for c in clients:
        c.send(do="\n".join(line[8:] for line in code.splitlines()))
    for c in clients:
        c.receive()
    eventually(lambda: not entry(daemon, path).exists())


def test_a_death_while_it_changes_hands(mapper: Callable[..., Client], daemon: Daemon, path: Path) -> None:
    a, b = mapper(), mapper()
    a.signal(signal.SIGSTOP)
    b.do("m.mprotect(PROT_READ)")
    a.kill()
    b.do("m.mprotect(PROT_READ | PROT_WRITE); m.buf[0] = 2")
    assert [line.split()[0] for line in (entry(daemon, path) / "attachments").read_text().splitlines()] == [str(b.pid)]


def test_what_was_refused_is_told(mapper: Callable[..., Client], daemon: Daemon, path: Path) -> None:
    a = mapper()
    a.do("m.mprotect(PROT_READ)")
    assert touch(a, 100, store=True) == SIGSEGV
    a.do("from mshare import inspect")
    assert entry(daemon, path).name in a.ask("[refusal.region for refusal in inspect.refusals()]")
