"""Files mapped into huge pages: shared ones get every store, private ones none, and every process sees the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hugepages import HUGE, MIB, SIGBUS, SIGSEGV, Pool, layout, pool, touch

pytestmark = pytest.mark.pool

Start = Callable[..., Client]

SIZE = 3 * HUGE + MIB + 100
"""Bytes of the file: huge pages, and a part of one."""
CONTENTS = (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> Iterator[Path]:
    """A file whose byte n is n % 251."""
    path = tmp_path / "data" if request.param == "disk" else Path("/dev/shm") / name
    path.write_bytes(CONTENTS)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def pair(hugetlb: Daemon, before: Pool, client: Start, name: str, attached: Start, path: Path) -> tuple[Client, Client]:
    """Two processes on one empty region of 1 GiB, at different addresses; the first has the file open as ``f``."""
    a = client(hugetlb)
    a.do(f"from mmap import *\nname, H, f = {name!r}, 2 * MIB, os.open({str(path)!r}, os.O_RDWR)")
    a.do("r = mshare.mshare(name, None, GIB, CREATE, empty=True, backing='hugetlb')")
    return a, attached()


def test_every_process_sees_the_file(pair: tuple[Client, Client], path: Path, before: Pool, attached: Start) -> None:
    a, b = pair
    assert a.ask("r.mmap(4 * H, PROT_READ, MAP_SHARED, offset=2 * H, fd=f)") == 2 * HUGE
    assert pool() == before.with_region(mapped=4, touched=0)
    for c in (*pair, attached("RO", None)):
        assert c.ask(f"r.buf[2 * H : 2 * H + {SIZE}] == open({str(path)!r}, 'rb').read()")
        assert c.ask(f"sum(r.buf[2 * H + {SIZE} : 6 * H])") == 0
        assert touch(c, 2 * HUGE - 1) == touch(c, 6 * HUGE) == SIGBUS
    assert touch(a, 2 * HUGE, store=True) == touch(b, 2 * HUGE, store=True) == SIGSEGV
    assert pool() == before.with_region(mapped=4, touched=4)
    assert 4 <= a.ask("r.stat().faults") < 50
    a.do("r.munmap(2 * H, 4 * H)")
    assert pool() == before.with_region(mapped=0, touched=0, kept=1)


def test_past_the_end_of_the_file(pair: tuple[Client, Client], path: Path) -> None:
    """The rest of the last huge page is zeros; beyond is SIGBUS, until the file grows."""
    a, b = pair
    a.do("r.mmap(6 * H, flags=MAP_SHARED, offset=0, fd=f); r.buf[4 * H - 1] = 9")
    assert touch(a, 4 * HUGE) == touch(b, 6 * HUGE - 1, store=True) == SIGBUS
    a.do("r.msync()")
    assert path.stat().st_size == SIZE
    os.truncate(path, 5 * HUGE)
    assert b.ask("(r.buf[4 * H], r.buf[4 * H - 1])") == [0, 9]
    b.do("r.buf[5 * H - 1] = 8; r.msync()")
    assert path.read_bytes()[5 * HUGE - 1] == 8


@pytest.mark.parametrize(
    "reach",
    [
        "r.msync()",
        "r.msync(0, 4 * H)",
        "r.munmap(0, 4 * H)",
        "r.mprotect(0, 4 * H, 1)",
        "r.mprotect(0, 4 * H, 0)",
        "r.mmap(4 * H, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10, offset=0)",
    ],
)
def test_stores_to_a_shared_mapping_reach_the_file(pair: tuple[Client, Client], path: Path, reach: str) -> None:
    a, b = pair
    a.do("r.mmap(4 * H, flags=MAP_SHARED, offset=0, fd=f); r.buf[10] = 200; r.buf[2 * H + 7] = 201")
    b.do(f"r.buf[11] = 202; r.buf[{SIZE - 1}] = 203; r.buf[{SIZE}] = 204")
    assert path.read_bytes() == CONTENTS
    b.do(reach)
    expected = bytearray(CONTENTS)
    expected[10], expected[11], expected[2 * HUGE + 7], expected[-1] = 200, 202, 201, 203
    assert path.read_bytes() == expected


def test_stores_after_a_write_back_reach_the_file_too(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    a.do("r.mmap(4 * H, flags=MAP_SHARED, offset=0, fd=f)")
    for value in range(1, 5):
        for c in pair:
            c.do(f"r.buf[100] = {value * 10}; r.buf[H + {value}] = {value}; r.msync()")
            data = path.read_bytes()
            assert (data[100], data[HUGE + value]) == (value * 10, value)
    assert b.ask("(r.buf[100], [v.dirty for v in r.maps()])") == [40, [0]]
    b.do("r.buf[0] = 1")
    assert a.ask("[v.dirty // H for v in r.maps()]") == [1]


@pytest.mark.parametrize("end", ["r.detach()", "mshare.mshare_unlink(name)", "os.kill(os.getpid(), 9)"])
def test_stores_reach_the_file_when_the_last_goes(
    pair: tuple[Client, Client], path: Path, end: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    a, b = pair
    a.do("r.mmap(4 * H, flags=MAP_SHARED, offset=0, fd=f)")
    b.do("r.buf[5] = 99")
    a.do("r.detach()")
    assert path.read_bytes()[5] == 5
    b.send(do=end)
    eventually(lambda: path.read_bytes()[5] == 99)


def test_stores_to_a_private_mapping_stay_in_the_region(pair: tuple[Client, Client], path: Path) -> None:
    """All its processes see them, and tables stay shared: no store has to be seen."""
    a, b = pair
    a.do("r.mmap(3 * H, flags=MAP_PRIVATE, offset=0, fd=f); r.buf[10] = 200")
    b.do("r.buf[H] = 201")
    assert (b.ask("r.buf[10]"), a.ask("r.buf[H]"), a.ask("r.buf[11]")) == (200, 201, 11)
    assert a.ask("r.stat().tables_shared")
    a.do("r.mprotect(0, 3 * H, 0); r.mprotect(0, 3 * H, 3)")
    assert (b.ask("r.buf[10]"), a.ask("r.buf[H]"), a.ask("r.buf[2 * H]")) == (200, 201, 2 * HUGE % 251)
    a.do("r.msync(); r.munmap(0, 3 * H)")
    assert path.read_bytes() == CONTENTS


def test_a_shared_mapping_unshares_tables(pair: tuple[Client, Client]) -> None:
    a, b = pair
    assert a.ask("r.stat().tables_shared")
    a.do("r.mmap(3 * H, flags=MAP_SHARED, offset=0, fd=f)")
    assert not b.ask("r.stat().tables_shared")
    assert any("shared file" in note for note in b.ask("r.stat().notes"))


def test_pieces_and_offsets_of_small_pages(pair: tuple[Client, Client], path: Path) -> None:
    """Of the file any page may come first; of the region only whole huge pages are mapped."""
    a, b = pair
    a.do("r.mmap(2 * H, flags=MAP_SHARED, offset=H, fd=f, fd_offset=3 * 4096)")
    assert b.ask("(r.buf[H + 3], r.buf[3 * H - 1])") == [(3 * 4096 + 3) % 251, (3 * 4096 + 2 * HUGE - 1) % 251]
    a.do("r.munmap(H, H); r.buf[2 * H + 8] = 3; r.msync(2 * H, H)")
    assert path.read_bytes()[3 * 4096 + HUGE + 8] == 3
    assert (touch(b, HUGE), layout(b)) == (SIGBUS, [(2, 1, 3)])
    for call in ("fd_offset=100", "offset=4096"):
        assert a.error_of(f"r.mmap(H, flags=MAP_SHARED, fd=f, {call})").errno == errno.EINVAL
    assert a.error_of("r.mmap(MIB, flags=MAP_SHARED, fd=f)").errno == errno.EINVAL


def test_no_room_for_a_file_leaves_it_closed(
    pair: tuple[Client, Client], hugetlb: Daemon, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    a, _ = pair
    a.do("s = mshare.mshare(name + '-2', None, 1 << 40, CREATE, empty=True, backing='hugetlb')")
    before = hugetlb.descriptors()
    for _ in range(5):
        assert a.error_of("s.mmap(1 << 40, flags=MAP_SHARED, fd=f)").errno == errno.ENOMEM
    eventually(lambda: hugetlb.descriptors() <= before)
    a.do("s.mmap(4 * H, flags=MAP_SHARED, offset=0, fd=f)")
    assert a.ask("s.buf[3]") == 3


def test_children_and_readers(pair: tuple[Client, Client], path: Path, attached: Start) -> None:
    a, b = pair
    a.do("r.mmap(4 * H, flags=MAP_SHARED, offset=0, fd=f)")
    reader = attached("RO", None)
    assert reader.ask("r.buf[3]") == 3
    a.do("r.buf[3] = 100; r.buf[H] = 100")
    assert reader.ask("(r.buf[3], r.buf[H], r.buf[2 * H])") == [100, 100, 2 * HUGE % 251]
    assert b.ask("fork('assert r.buf[3] == 100; r.buf[4] = 77; r.buf[2 * H + 4] = 78; r.msync()')") == 0
    assert (path.read_bytes()[4], path.read_bytes()[2 * HUGE + 4], reader.ask("r.buf[4]")) == (77, 78, 77)


def test_no_store_is_lost_while_others_sync(pair: tuple[Client, Client], path: Path) -> None:
    a, b = pair
    a.do("r.mmap(3 * H, flags=MAP_SHARED, offset=0, fd=f)")
    a.send(do="for i in range(2000):\n    r.buf[(i % 3) * H + i % 7] = i % 256")
    b.do("for i in range(40): r.msync()")
    a.receive()
    expected = {(i % 3) * HUGE + i % 7: i % 256 for i in range(2000)}
    b.do("r.msync()")
    data = path.read_bytes()
    assert [data[at] for at in expected] == b.ask(f"[r.buf[at] for at in {list(expected)}]") == list(expected.values())


def test_an_unmapping_that_is_refused_shows_no_zeros(
    pair: tuple[Client, Client], attached: Start, before: Pool
) -> None:
    a, b = pair
    a.do("r.mmap(3 * H, flags=MAP_SHARED, offset=0, fd=f)")
    assert attached("RO", None).error_of("r.munmap(0, 3 * H)").errno == errno.EACCES
    assert pool() == before.with_region(mapped=3, touched=0)
    assert b.ask("r.buf[5]") == 5


@pytest.mark.parametrize("dirty", [False, True])
def test_who_punches_its_own_window_does_not_hang(pair: tuple[Client, Client], path: Path, dirty: bool) -> None:
    """madvise(2) past the region's own call takes the memory away; the file is what comes back."""
    a, b = pair
    a.do("r.mmap(3 * H, flags=MAP_SHARED, offset=0, fd=f); r.buf[5]")
    if dirty:
        a.do("r.buf[5] = 99")
    a.do("sc.madvise(r.address, H, 9)")
    assert a.ask("r.buf[5]") == b.ask("r.buf[5]") == 5
    a.do("r.buf[6] = 77; r.msync()")
    assert path.read_bytes()[5:7] == bytes([5, 77])
