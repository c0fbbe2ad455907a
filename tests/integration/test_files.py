"""Files mapped into a region: shared ones get every store, private ones none, and every process sees the same."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
PAGE = 4096
SIGBUS, SIGSEGV = 7, 11


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> Iterator[Path]:
    """A file of 3 MiB and 100 bytes whose byte n is n % 251."""
    path = tmp_path / "data" if request.param == "disk" else Path("/dev/shm") / name
    path.write_bytes((bytes(range(251)) * (3 * MIB // 251 + 2))[: 3 * MIB + 100])
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(params=["thp", "4k"])
def pair(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> tuple[Client, Client]:
    """Two processes on one empty region of 8 MiB, at different addresses."""
    a, b = client(), client()
    a.do(
        f"from mmap import *\nr = mshare.mshare({name!r}, None, 8 * MIB, CREATE, empty=True, backing={request.param!r})"
    )
    b.do(f"from mmap import *\nr = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    return a, b


def opened(c: Client, path: Path, flags: str = "os.O_RDWR") -> None:
    c.do(f"f = os.open({str(path)!r}, {flags})")


def touch(c: Client, offset: int, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    status: int = -c.ask(f"fork('r.buf[{offset}] = 2')" if store else f"fork('r.buf[{offset}]')")
    return status


def test_every_process_sees_the_file(pair: tuple[Client, Client], path: Path) -> None:
    a, _ = pair
    opened(a, path)
    assert a.ask("r.mmap(3 * MIB, PROT_READ, MAP_SHARED, offset=2 * MIB, fd=f)") == 2 * MIB
    a.do("os.close(f)")
    expected = f"open({str(path)!r}, 'rb').read(3 * MIB)"
    for c in pair:
        assert c.ask(f"r.buf[2 * MIB:5 * MIB] == {expected}")
        assert touch(c, 2 * MIB, store=True) == SIGSEGV
        assert touch(c, MIB) == touch(c, 5 * MIB) == SIGBUS
    assert 0 < a.ask("r.stat().faults") < 200


@pytest.mark.parametrize(
    "reach",
    [
        "r.msync()",
        "r.msync(0, 4 * MIB)",
        "r.munmap(0, 4 * MIB)",
        "r.mprotect(0, 4 * MIB, 1)",
        "r.mprotect(0, 4 * MIB, 0)",
        "r.mmap(4 * MIB, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10, offset=0)",
    ],
)
def test_stores_to_a_shared_mapping_reach_the_file(pair: tuple[Client, Client], path: Path, reach: str) -> None:
    a, b = pair
    opened(a, path)
    a.do("r.mmap(4 * MIB, flags=MAP_SHARED, offset=0, fd=f); r.buf[10] = 200; r.buf[2 * MIB + 7] = 201")
    b.do("r.buf[11] = 202; r.buf[3 * MIB + 50] = 203")
    assert path.read_bytes()[10] == 10
    b.do(reach)
    data = path.read_bytes()
    assert (data[9], data[10], data[11], data[2 * MIB + 7], data[3 * MIB + 50]) == (9, 200, 202, 201, 203)
    assert len(data) == 3 * MIB + 100


def test_stores_after_a_write_back_reach_the_file_too(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, flags=MAP_SHARED, offset=0, fd=f)")
    for value in range(1, 6):
        for c in pair:
            c.do(f"r.buf[100] = {value * 10}; r.buf[MIB + {value}] = {value}; r.msync()")
            data = path.read_bytes()
            assert (data[100], data[MIB + value]) == (value * 10, value)
    assert b.ask("r.buf[100]") == 50


@pytest.mark.parametrize("end", ["r.detach()", "mshare.mshare_unlink(name)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_stores_reach_the_file_when_the_last_goes(
    pair: tuple[Client, Client], path: Path, name: str, end: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    a, b = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, flags=MAP_SHARED, offset=0, fd=f)")
    b.do("r.buf[5] = 99")
    a.do("r.detach()")
    assert path.read_bytes()[5] == 5
    b.send(do=end.replace("name", repr(name)))
    eventually(lambda: path.read_bytes()[5] == 99)


def test_stores_reach_the_file_when_the_daemon_stops(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], path: Path
) -> None:
    daemon = start_daemon()
    c = client(daemon)
    c.do(f"r = mshare.mshare('x', None, 4 * MIB, CREATE, empty=True); f = os.open({str(path)!r}, os.O_RDWR)")
    c.do("r.mmap(3 * MIB, flags=1, offset=0, fd=f); r.buf[5] = 77")
    assert daemon.stop() == 0
    assert path.read_bytes()[5] == 77


def test_stores_to_a_private_mapping_stay_in_the_region(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    before = path.read_bytes()
    opened(a, path, "os.O_RDONLY")
    a.do("r.mmap(3 * MIB, flags=MAP_PRIVATE, offset=0, fd=f); r.buf[10] = 200")
    b.do("r.buf[MIB] = 201")
    assert (b.ask("r.buf[10]"), a.ask("r.buf[MIB]"), a.ask("r.buf[11]")) == (200, 201, 11)
    a.do("r.mprotect(0, 3 * MIB, 0); r.mprotect(0, 3 * MIB, 3)")
    assert (b.ask("r.buf[10]"), a.ask("r.buf[MIB]"), a.ask("r.buf[2 * MIB]")) == (200, 201, 2 * MIB % 251)
    a.do("r.msync(); r.munmap(0, 3 * MIB)")
    assert path.read_bytes() == before


def test_past_the_end_of_the_file(pair: tuple[Client, Client], path: Path) -> None:
    """The rest of the last page is zeros; beyond is SIGBUS, until the file grows."""
    a, b = pair
    opened(a, path)
    a.do("r.mmap(4 * MIB, flags=MAP_SHARED, offset=0, fd=f)")
    assert b.ask("r.buf[3 * MIB + 99]") == (3 * MIB + 99) % 251
    assert b.ask("sum(r.buf[3 * MIB + 100:3 * MIB + PAGE])") == 0
    assert touch(a, 3 * MIB + PAGE) == touch(b, 4 * MIB - 1, store=True) == SIGBUS
    with path.open("ab") as file:
        file.truncate(4 * MIB)
    assert touch(b, 3 * MIB + PAGE) == 0
    a.do("r.buf[4 * MIB - 1] = 9; r.msync()")
    assert path.read_bytes()[-1] == 9


def test_a_file_that_shrinks_or_goes_meanwhile(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, flags=MAP_SHARED, offset=0, fd=f); r.buf[5] = 1; r.buf[2 * MIB] = 1")
    os.truncate(path, MIB)
    assert touch(b, int(1.5 * MIB)) == SIGBUS
    a.do("r.msync()")
    assert path.stat().st_size == MIB
    path.unlink()
    assert b.ask("(r.buf[5], r.buf[MIB - 1])") == [1, (MIB - 1) % 251]
    a.do("r.munmap(0, 3 * MIB); os.close(f)")


def test_file_offsets_and_pieces(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    opened(a, path)
    a.do("r.mmap(MIB, flags=MAP_SHARED, offset=MIB, fd=f, fd_offset=2 * MIB)")
    assert b.ask("r.buf[MIB + 3]") == (2 * MIB + 3) % 251
    a.do("r.munmap(MIB + PAGE, PAGE); r.mprotect(MIB + 4 * PAGE, PAGE, 1)")
    a.do("r.buf[MIB + 8 * PAGE] = 3; r.msync(MIB + 8 * PAGE, PAGE)")
    assert path.read_bytes()[2 * MIB + 8 * PAGE] == 3
    assert touch(b, MIB + PAGE) == SIGBUS
    assert b.ask("r.buf[MIB + 5 * PAGE]") == (2 * MIB + 5 * PAGE) % 251
    assert b.ask("[(v.offset, v.prot, v.paged) for v in r.maps()]") == [
        [MIB, 3, True],
        [MIB + 2 * PAGE, 3, True],
        [MIB + 4 * PAGE, 1, True],
        [MIB + 5 * PAGE, 3, True],
    ]


def test_readers_and_later_processes(
    pair: tuple[Client, Client], path: Path, client: Callable[..., Client], name: str
) -> None:
    a, _ = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, flags=MAP_SHARED, offset=0, fd=f)")
    reader, later = client(), client()
    reader.do(f"r = mshare.mshare({name!r}, None, 0, RO)")
    assert reader.ask("r.buf[3]") == 3
    a.do("r.buf[3] = 100; r.buf[MIB] = 100")
    assert reader.ask("(r.buf[3], r.buf[MIB], r.buf[2 * MIB])") == [100, 100, 2 * MIB % 251]
    later.do(f"r = mshare.mshare({name!r}, None, 0, RW); r.buf[3] = 101; r.msync()")
    assert (path.read_bytes()[3], reader.ask("r.buf[3]")) == (101, 101)
    assert a.ask("fork('r.buf[4] = 77; r.msync()')") == 0
    assert path.read_bytes()[4] == 77


def test_what_cannot_be_mapped(
    pair: tuple[Client, Client],
    path: Path,
    daemon: Daemon,
    tmp_path: Path,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    a, _ = pair
    a.do(f"ro = os.open({str(path)!r}, os.O_RDONLY); wo = os.open({str(path)!r}, os.O_WRONLY)")
    a.do(f"directory = os.open({str(tmp_path)!r}, os.O_RDONLY); pipe = os.pipe()[0]; o_path = os.open('/', os.O_PATH)")
    for call, number in (
        ("fd=ro", errno.EACCES),
        ("fd=wo, prot=1", errno.EACCES),
        ("fd=directory, prot=1", errno.ENODEV),
        ("fd=pipe, prot=1", errno.ENODEV),
        ("fd=o_path, prot=1", errno.EBADF),
        ("prot=1", errno.EBADF),
        ("fd=ro, prot=1, fd_offset=100", errno.EINVAL),
        ("fd=ro, prot=1, fd_offset=-4096", errno.EINVAL),
        ("fd=ro, prot=5", errno.EACCES),
    ):
        assert a.error_of(f"r.mmap(MIB, flags=MAP_SHARED, offset=0, {call})").errno == number, call
    assert a.ask("r.maps()") == []
    a.do("r.mmap(MIB, PROT_READ, MAP_SHARED, offset=0, fd=ro)")
    assert a.error_of("r.mprotect(0, MIB, 3)").errno == errno.EACCES
    assert a.error_of("r.madvise(0, MIB, MADV_REMOVE)").errno in (errno.EACCES, errno.EOPNOTSUPP)
    assert a.error_of("r.msync(0, 2 * MIB)").errno == errno.ENOMEM
    before = daemon.descriptors()
    for _ in range(10):
        a.do("r.mmap(MIB, PROT_READ, MAP_SHARED | 0x10, offset=0, fd=ro)")
    a.do("r.munmap(0, MIB)")
    eventually(lambda: daemon.descriptors() <= before)


def test_append_mode_does_not_move_our_writes(pair: tuple[Client, Client], path: Path) -> None:
    a, _ = pair
    opened(a, path, "os.O_RDWR | os.O_APPEND")
    a.do("r.mmap(MIB, flags=MAP_SHARED, offset=0, fd=f); r.buf[0] = 55; r.msync()")
    assert (path.read_bytes()[0], path.stat().st_size) == (55, 3 * MIB + 100)


def test_no_store_is_lost_while_others_sync(pair: tuple[Client, Client], path: Path) -> None:
    """One stores without pause, another syncs: at the end the file holds the last value of every cell."""
    a, b = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, flags=MAP_SHARED, offset=0, fd=f)")
    a.send(do="for i in range(3000):\n    r.buf[(i % 7) * 300000] = i % 256")
    b.do("for i in range(60): r.msync()")
    a.receive()
    expected = {(i % 7) * 300000: i % 256 for i in range(3000)}
    assert b.ask(f"[r.buf[at] for at in {list(expected)}]") == list(expected.values())
    b.do("r.msync()")
    data = path.read_bytes()
    assert [data[at] for at in expected] == list(expected.values())


@pytest.mark.parametrize("dirty", [False, True])
def test_who_punches_its_own_window_does_not_hang(pair: tuple[Client, Client], path: Path, dirty: bool) -> None:
    """madvise(2) past the region's own call takes the memory away; the file is what comes back."""
    a, b = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, flags=MAP_SHARED, offset=0, fd=f); r.buf[5]")
    if dirty:
        a.do("r.buf[5] = 99")
    a.do("sc.madvise(r.address, PAGE, 9)")
    assert a.ask("r.buf[5]") == b.ask("r.buf[5]") == 5
    a.do("r.buf[6] = 77; r.msync()")
    assert path.read_bytes()[5:7] == bytes([5, 77])


def test_an_unmapping_waits_for_a_write_back(pair: tuple[Client, Client], tmp_path: Path) -> None:
    """One process syncs many pages while another unmaps them: the file holds every store."""
    a, b = pair
    large = tmp_path / "large"
    large.write_bytes(b"x" * (8 * MIB))
    opened(a, large)
    for _ in range(5):
        a.do("r.mmap(8 * MIB, flags=MAP_SHARED, offset=0, fd=f); r.buf[:: 2 * PAGE] = b'y' * (4 * MIB // PAGE)")
        a.send(do="r.msync()")
        b.do("r.munmap(0, 8 * MIB)")
        a.receive()
        data = large.read_bytes()
        assert data[:: 2 * PAGE] == b"y" * (4 * MIB // PAGE)
        large.write_bytes(b"x" * (8 * MIB))


def test_read_at_random_a_touch_brings_its_page_alone(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, PROT_READ, MAP_SHARED, offset=0, fd=f); r.madvise(0, 2 * MIB, MADV_RANDOM)")
    for c, pages in ((a, (7, 100, 11, 300)), (b, (8, 11))):
        for page in pages:
            assert c.ask(f"r.buf[{page} * PAGE + 5]") == (page * PAGE + 5) % 251
    low, high = a.ask("[(v.length, v.resident, v.faults) for v in r.maps()]")
    assert low == [2 * MIB, 5 * PAGE, 5]
    assert high == [MIB, 0, 0]


def test_read_in_sequence_the_first_touch_brings_all_it_can(pair: tuple[Client, Client], path: Path) -> None:
    a, _ = pair
    opened(a, path)
    a.do("r.mmap(3 * MIB, PROT_READ, MAP_SHARED, offset=0, fd=f); r.madvise(0, 3 * MIB, MADV_SEQUENTIAL)")
    assert a.ask("r.buf[MIB]") == MIB % 251
    assert a.ask("r.maps()[0].resident") >= 2 * MIB - PAGE
    a.do("r.madvise(0, 3 * MIB, MADV_NORMAL)")
    assert a.ask("r.buf[:] [:10] == bytes(range(10))")


def test_smaps_tells_of_each_mapping_how_its_faults_were_served(
    pair: tuple[Client, Client], path: Path, daemon: Daemon, name: str
) -> None:
    a, _ = pair
    opened(a, path)
    a.do("r.mmap(MIB, offset=0); r.mmap(2 * MIB, flags=MAP_SHARED, offset=2 * MIB, fd=f)")
    a.do("r.buf[0] = 1; r.madvise(2 * MIB, 2 * MIB, MADV_RANDOM); r.buf[2 * MIB] = 1; r.buf[3 * MIB]")
    texts = (daemon.mount / ".regions" / name / "smaps").read_text().split("Mode:")
    fields = [dict(line.split(":") for line in text.splitlines() if line.endswith("kB")) for text in texts[:2]]
    faults = [int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("Faults:")]
    native = "native" if a.ask("r.stat().backing") == "4k" else "paged"
    assert [text.split()[0] for text in texts[1:]] == [native, "paged"]
    assert fields[1]["Dirty"].split() == ["4", "kB"]
    assert faults == a.ask("[v.faults for v in r.maps()]")
    assert faults[1] == 3  # Two pages missed, and one store that had to be seen.


def test_a_file_that_a_client_holds_locked_while_it_waits_does_not_stop_the_daemon(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str, path: Path
) -> None:
    """write(2) holds the file locked while the memory it takes is faulted in, which is the daemon's to do."""
    paging = start_daemon("--paging", "all", "--backing", "4k")
    a, b = client(paging), client(paging)
    a.do(f"r = mshare.mshare({name!r}, None, 32 * MIB, CREATE)")
    opened(a, path)
    opened(b, path)
    b.do(f"from mmap import *\nr = mshare.mshare({name + '-2'!r}, None, 4 * MIB, CREATE, empty=True)")
    for _ in range(5):
        b.do("r.mmap(2 * MIB, flags=MAP_SHARED | 0x10, offset=0, fd=f)")
        b.do("r.buf[: 2 * MIB : PAGE] = b'b' * (2 * MIB // PAGE)")
        a.do("r.madvise(0, 32 * MIB, 9)")
        a.send(do="os.lseek(f, 0, 0); os.write(f, r.buf[:])")  # Thousands of faults, one after the other.
        b.do("r.munmap(0, 4 * MIB); r.mmap(4096, flags=MAP_SHARED, fd=f); r.buf[0] = 98; r.detach()")
        a.receive()
        b.do(f"r = mshare.mshare({name + '-2'!r}, None, 0, RW)")
    assert b.ask("os.pread(f, 1, 0)[0] in (0, 98)")


SLOWLY = """
import time, mshared.writeback
from pathlib import Path
def slowly(*args, copy=mshared.writeback._copy):
    Path({!r}).touch(); time.sleep(0.5)
    copy(*args)
mshared.writeback._copy = slowly
"""


@pytest.mark.parametrize("end", ["r.detach()", "m.munmap()"])
def test_who_goes_last_while_it_is_written_unasked_goes_on_when_all_is(
    start_daemon: Callable[..., Daemon],
    client: Callable[..., Client],
    tmp_path: Path,
    end: str,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    path, under_way = tmp_path / "data", tmp_path / "under way"
    path.write_bytes(b"a" * 2 * MIB)
    daemon = start_daemon("--writeback", "0.05", prelude=SLOWLY.format(str(under_way)))
    c = client(daemon)
    c.do(f"f = os.open({str(path)!r}, RW)")
    if end == "r.detach()":
        c.do("r = mshare.mshare('r', None, 2 * MIB, CREATE); r.mmap(2 * MIB, flags=0x11, offset=0, fd=f)")
        c.do("r.buf[0] = 98")
    else:
        c.do("m = mshare.mmap(f, 2 * MIB); assert m.shared, m.why\nm.buf[0] = 98")
    eventually(under_way.exists)
    c.do(end)
    assert path.read_bytes()[:2] == b"ba"


def test_a_child_that_is_dead_is_not_the_last(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], tmp_path: Path
) -> None:
    """Even if the daemon learns of both at the same time."""
    path = tmp_path / "data"
    path.write_bytes(b"a" * 2 * MIB)
    daemon = start_daemon(prelude=SLOWLY.format(str(tmp_path / "under way")))
    c = client(daemon)
    c.do(f"f = os.open({str(path)!r}, RW)")
    for value in (b"b", b"c", b"d"):
        c.do(f"m = mshare.mmap(f, 2 * MIB); m.buf[0] = {value[0]}; child = os.fork()\nif not child: signal.pause()")
        daemon.process.send_signal(signal.SIGSTOP)
        c.send(do="os.kill(child, 9); os.waitpid(child, 0); m.munmap()")
        daemon.process.send_signal(signal.SIGCONT)
        c.receive()
        assert path.read_bytes()[:2] == value + b"a"
