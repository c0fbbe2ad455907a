"""Creating a region over memory that is there already: contents, gaps, protections, and stores meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client

MIB = 1 << 20
BASE = 0x5100_0000_0000
SIGBUS, SIGSEGV = 7, 11
MAP = f"""
BASE = {BASE}
def anon(at, n, prot=3, flags=0x22):
    return sc.mmap(BASE + at, n, prot, flags | sc.MAP_FIXED_NOREPLACE)
"""


@pytest.fixture
def donor(client: Callable[..., Client]) -> Client:
    c = client()
    c.do(MAP)
    return c


def test_contents_become_everybodys(donor: Client, client: Callable[..., Client], name: str) -> None:
    donor.do("anon(0, 4 * MIB); ctypes.memset(BASE, 65, 4 * MIB)")
    donor.do(f"r = mshare.mshare({name!r}, BASE, 4 * MIB, CREATE)")
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    assert other.ask("r.address") == BASE
    assert other.ask("r.buf.tobytes() == b'A' * 4 * MIB")
    donor.do("ctypes.memset(BASE + 5, 66, 1)")
    assert other.ask("r.buf[5]") == 66
    other.do("r.buf[6] = 67")
    assert donor.ask("ctypes.string_at(BASE + 4, 4).decode()") == "ABCA"


def test_gaps_are_holes_and_parts_are_split_at_the_border(
    donor: Client, client: Callable[..., Client], name: str
) -> None:
    donor.do("anon(-MIB, 2 * MIB); anon(3 * MIB, PAGE); anon(4 * MIB - PAGE, 2 * PAGE); ctypes.memset(BASE - 4, 9, 8)")
    donor.do("ctypes.memset(BASE + 3 * MIB, 8, 1); ctypes.memset(BASE + 4 * MIB - 1, 7, 2)")
    donor.do(f"r = mshare.mshare({name!r}, BASE, 4 * MIB, CREATE)")
    assert donor.ask("[(v.offset, v.length, v.prot) for v in r.maps()]") == [
        [0, MIB, 3],
        [3 * MIB, 4096, 3],
        [4 * MIB - 4096, 4096, 3],
    ]
    assert donor.ask("list(ctypes.string_at(BASE - 4, 8))") == [9] * 8
    assert donor.ask("list(ctypes.string_at(BASE + 4 * MIB - 1, 2))") == [7, 7]
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    assert other.ask("[r.buf[0], r.buf[3], r.buf[4], r.buf[3 * MIB], r.buf[4 * MIB - 1]]") == [9, 9, 0, 8, 7]
    other.do("ctypes.memset(r.address, 1, 4)")
    assert donor.ask("list(ctypes.string_at(BASE - 4, 8))") == [9, 9, 9, 9, 1, 1, 1, 1]
    assert other.dies_of("r.buf[MIB]")[0] == -SIGBUS
    assert donor.dies_of(f"r.buf[{3 * MIB + 4096}]")[0] == -SIGBUS


def test_untouched_memory_is_not_copied(donor: Client, name: str) -> None:
    donor.do("anon(0, 64 * MIB); ctypes.memset(BASE + 32 * MIB, 1, 1)")
    donor.do(f"r = mshare.mshare({name!r}, BASE, 64 * MIB, CREATE, backing='4k')")
    assert donor.ask("r.stat().resident") == 4096
    assert donor.ask("[r.buf[0], r.buf[32 * MIB], r.buf[64 * MIB - 1]]") == [0, 1, 0]


@pytest.mark.parametrize("prot", [1, 0])
def test_protections_are_kept_for_everybody(donor: Client, client: Callable[..., Client], name: str, prot: int) -> None:
    donor.do("anon(0, 2 * MIB); anon(2 * MIB, 2 * MIB); ctypes.memset(BASE, 3, 4 * MIB)")
    donor.do(f"sc.mprotect(BASE + 2 * MIB, 2 * MIB, {prot})")
    donor.do(f"r = mshare.mshare({name!r}, BASE, 4 * MIB, CREATE)")
    assert donor.ask("[v.prot for v in r.maps()]") == [3, prot]
    other = client()
    other.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW); r.buf[0] = 1; report_faults()")
    if prot:
        assert other.ask("r.buf[2 * MIB]") == 3
        assert donor.ask("r.buf[4 * MIB - 1]") == 3
    touch = "r.buf[2 * MIB] = 5" if prot else "r.buf[2 * MIB]"
    assert donor.ask(f"fork('{touch}')") == -SIGSEGV
    status, text = other.dies_of(touch)
    assert (status, text) == (100 + SIGSEGV, f"SIGNAL {SIGSEGV} {0x6000_0000_0000 + 2 * MIB:x}\n")
    assert donor.dies_of(touch)[0] == -SIGSEGV


def test_shared_anonymous_memory_can_be_donated(donor: Client, client: Callable[..., Client], name: str) -> None:
    donor.do("anon(0, 2 * MIB, 3, 0x21); ctypes.memset(BASE, 9, 2 * MIB)")
    donor.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE)")
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW); r.buf[0] = 1")
    assert donor.ask("list(ctypes.string_at(BASE, 2))") == [1, 9]


@pytest.mark.parametrize(("count", "fits"), [(1000, True), (3000, False)])
def test_a_thousand_mappings_can_be_donated(donor: Client, name: str, count: int, fits: bool) -> None:
    donor.do(f"for i in range({count}): anon(i * 2 * PAGE, PAGE); ctypes.memset(BASE + i * 2 * PAGE, i % 251, PAGE)")
    create = f"mshare.mshare({name!r}, BASE, 32 * MIB, CREATE, backing='4k')"
    if fits:
        donor.do(f"r = {create}")
        assert donor.ask("[(v.offset, v.length) for v in r.maps()]") == [[i * 8192, 4096] for i in range(count)]
    else:
        assert donor.error_of(create).errno == errno.E2BIG
    assert donor.ask(f"[ctypes.string_at(BASE + i * 2 * PAGE, 1)[0] for i in range({count})]") == [
        i % 251 for i in range(count)
    ]


def test_an_executable_mapping_is_refused(donor: Client, name: str) -> None:
    donor.do("anon(0, 2 * MIB, 7); ctypes.memset(BASE, 9, 10)")
    error = donor.error_of(f"mshare.mshare({name!r}, BASE, 2 * MIB, CREATE)")
    assert (error.errno, "execut" in error.text) == (errno.EACCES, True)
    assert donor.ask("list(ctypes.string_at(BASE, 2))") == [9, 9]


@pytest.mark.parametrize("kind", ["anonymous", "shared"])
def test_stores_of_python_threads_are_not_lost(
    donor: Client, client: Callable[..., Client], name: str, kind: str
) -> None:
    """Each thread counts up in a place of its own, before, during and after; what it wrote last must be there."""
    donor.do(f"anon(0, 32 * MIB, 3, {0x22 if kind == 'anonymous' else 0x21}); ctypes.memset(BASE, 1, 16 * MIB)")
    donor.do("""
        class Counter(threading.Thread):
            def __init__(self, at):
                super().__init__(daemon=True)
                self.cell = ctypes.c_uint64.from_address(BASE + at); self.cell.value = self.count = 0; self.stop = False
            def run(self):
                while not self.stop:
                    self.count += 1
                    assert self.cell.value == self.count - 1, (self.cell.value, self.count)
                    self.cell.value = self.count
        counters = [Counter(8 * n + n * 4 * MIB) for n in range(8)]
        for c in counters: c.start()
        while any(c.count < 1000 for c in counters): pass
        """)
    donor.do(f"r = mshare.mshare({name!r}, BASE, 32 * MIB, CREATE)")
    donor.do("""
        reached = [c.count for c in counters]
        while any(c.count < n + 1000 for c, n in zip(counters, reached)): pass
        for c in counters: c.stop = True
        for c in counters: c.join()
        """)
    assert donor.ask("[c.cell.value == c.count for c in counters]") == [True] * 8
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    counts = donor.ask("[c.count for c in counters]")
    assert other.ask("[struct.unpack_from('Q', r.buf, 8 * n + n * 4 * MIB)[0] for n in range(8)]") == counts


@pytest.mark.parametrize("kind", ["anonymous", "shared"])
def test_stores_of_native_threads_are_not_lost(donor: Client, name: str, kind: str) -> None:
    """A thread that holds no interpreter lock turns all bits of a pattern over and over: none may miss a turn."""
    donor.do(f"anon(0, 16 * MIB, 3, {0x22 if kind == 'anonymous' else 0x21})")
    donor.do("""
        libc = ctypes.CDLL(None); libc.memfrob.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        def turn():
            while len(turns) < enough: libc.memfrob(BASE, 16 * MIB); turns.append(0)
        turns, enough = [], 1 << 62; t = threading.Thread(target=turn); t.start()
        while len(turns) < 3: pass
        """)
    donor.do(f"r = mshare.mshare({name!r}, BASE, 16 * MIB, CREATE); enough = len(turns) + 2")
    donor.do("t.join()")
    assert donor.ask("r.buf.tobytes() == bytes([42 * (len(turns) % 2)]) * 16 * MIB")


def test_a_region_without_room_for_the_copy_changes_nothing(
    start_daemon: Callable[..., object], client: Callable[..., Client], name: str
) -> None:
    small = start_daemon("--max-bytes", "8M")
    c = client(small)
    c.do(MAP + "anon(0, 16 * MIB); ctypes.memset(BASE, 3, 16 * MIB)")
    assert c.error_of(f"mshare.mshare({name!r}, BASE, 16 * MIB, CREATE)").errno == errno.ENOSPC
    assert c.ask("ctypes.string_at(BASE, 16 * MIB) == bytes([3]) * 16 * MIB")
    assert c.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT
    c.do("mshare.mshare('x', None, 4 * MIB, CREATE).buf[:] = bytes([1]) * 4 * MIB")
