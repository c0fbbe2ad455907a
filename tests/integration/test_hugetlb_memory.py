"""Memory in huge pages: tables that the kernel shares, faults, protections and files, seen from several processes."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client, Daemon
from hugepages import ELSEWHERE, GIB, HUGE, SIGBUS, SIGSEGV, Pool, layout, pool, touch

pytestmark = pytest.mark.pool

Start = Callable[..., Client]

MANY = 128
"""Pages that are touched by one process, so that another would have as many faults, were tables not shared."""
FEW = 50
SCAN = """
import resource
def faults_of(work):
    "How many faults of its own memory this process has while it does that."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def scan(first, end): return sum(r.buf[first * H : end * H : H])
"""


def faults(c: Client, first: int = 0, end: int = MANY) -> int:
    """How many faults it takes to look at pages that others have made."""
    c.do(SCAN)
    found: int = c.ask(f"faults_of(lambda: scan({first}, {end}))")
    return found


def told(hugetlb: Daemon, c: Client) -> tuple[bool, str, str]:
    """Whether tables are shared, in what words, and what the file says of it."""
    lines = (hugetlb.mount / ".regions" / c.ask("name") / "pagetables").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("shared by the kernel:")]
    (note,) = [note for note in c.ask("r.stat().notes") if note.startswith("page tables are")]
    return c.ask("r.stat().tables_shared"), note, line


@pytest.fixture
def full(creator: Client) -> Client:
    """The creator, when it has stored to many pages."""
    creator.do(f"for page in range({MANY}): r.buf[page * H] = 1")
    return creator


class TestSharedTables:
    """What one process has touched the others have, with no fault of theirs."""

    def test_for_whoever_attaches(self, full: Client, attached: Start, hugetlb: Daemon) -> None:
        for c in (attached(), attached(address=None), attached(address=ELSEWHERE + 7 * GIB)):
            assert faults(c) < FEW
        shared, note, line = told(hugetlb, full)
        assert (shared, note) == (True, "page tables are shared by the kernel")
        assert line == "shared by the kernel: yes (page tables are shared by the kernel)"

    def test_for_who_was_attached_before(self, creator: Client, other: Client) -> None:
        other.do(f"for page in range({MANY}): r.buf[page * H] = 2")
        assert faults(creator) < FEW

    def test_around_a_hole_and_where_one_was(self, full: Client, other: Client, attached: Start) -> None:
        full.do(f"r.munmap({MANY + 7} * H, 3 * H)")
        assert faults(other) < FEW
        assert faults(attached(address=None)) < FEW
        other.do(f"r.munmap({MANY} * H, 100 * H); r.mmap(100 * H, offset={MANY} * H); r.mmap(H, flags=0x31, offset=0)")
        full.do(f"for page in range({MANY}, 2 * {MANY}): r.buf[page * H] = 1")
        assert faults(other, MANY, 2 * MANY) < FEW
        assert faults(attached(address=None), 0, 2 * MANY) < FEW

    def test_for_children(self, full: Client, other: Client) -> None:
        other.do(SCAN)
        assert other.ask(f"fork('assert faults_of(lambda: scan(0, {MANY})) < {FEW} + 50')") == 0
        full.do(f"for page in range({MANY}, 2 * {MANY}): r.buf[page * H] = 1")
        assert other.ask(f"fork('assert scan(0, 2 * {MANY}) == 2 * {MANY}')") == 0

    def test_until_stores_must_be_seen(self, full: Client, other: Client, attached: Start, hugetlb: Daemon) -> None:
        """From then on tables are each process's own; it is told since when, and why."""
        other.do("r.mprotect(H, H, PROT_READ)")
        shared, note, line = told(hugetlb, full)
        assert not shared
        assert note.startswith("page tables are per process since 20")
        assert "stores to" in note
        assert line == f"shared by the kernel: no ({note})"
        later = attached(address=None)
        assert faults(later) >= MANY
        assert later.ask("r.stat().tables_shared") is False
        full.do("r.mprotect(H, H, 3); r.buf[H] = 2")
        assert later.ask("r.buf[H]") == 2

    @pytest.mark.usefixtures("other")
    def test_and_again_with_who_comes_when_they_need_not_be_any_more(
        self, full: Client, attached: Start, hugetlb: Daemon
    ) -> None:
        """They share among each other; who was there keeps what it has, and it is told of how many that holds."""
        full.do("r.mprotect(H, H, PROT_READ); r.mprotect(H, H, 3)")
        shared, note, _ = told(hugetlb, full)
        assert (shared, "since stores had to be seen for a while; new windows share" in note) == (False, True)
        faults(attached(address=None))
        assert faults(attached(address=ELSEWHERE + 5 * GIB)) < FEW
        assert told(hugetlb, full)[:2] == (
            True,
            "page tables are shared by the kernel, but not with all of 2 windows that stood when stores had to be seen"
            " for a while",
        )

    def test_but_not_with_readers(self, full: Client, other: Client, attached: Start, hugetlb: Daemon) -> None:
        reader = attached("RO", None)
        assert faults(reader) >= MANY
        assert told(hugetlb, full)[:2] == (
            True,
            "page tables are shared by the kernel, but not with 1 read-only windows",
        )
        assert faults(other) < FEW

    def test_cost_as_much_for_many_processes_as_for_one(self, full: Client, attached: Start) -> None:
        processes = [attached(address=None) for _ in range(4)]
        for c in processes:
            assert faults(c) < FEW
        stat = full.ask("(lambda s: (s.attached, s.table_bytes_private, s.table_bytes_shared, s.huge_bytes))(r.stat())")
        assert stat == [5, 5 * 12288, 12288, MANY * HUGE]


class TestFaults:
    """Holes are holes to everybody, and nobody waits for ever."""

    def test_a_touch_of_a_hole_has_its_own_address(self, creator: Client, other: Client) -> None:
        creator.do("r.munmap(10 * H, H)")
        other.do("report_faults()")
        status, text = other.dies_of("r.buf[10 * H + 77]")
        assert (status, text) == (100 + SIGBUS, f"SIGNAL {SIGBUS} {ELSEWHERE + 10 * HUGE + 77:x}\n")
        assert touch(creator, 10 * HUGE - 1) == touch(creator, 11 * HUGE, store=True) == 0

    def test_system_calls_fail_in_holes(self, creator: Client, other: Client) -> None:
        creator.do("r.munmap(10 * H, 2 * H); ends = os.pipe()")
        other.do("ends = os.pipe()")
        for c in (creator, other):
            for call in ("os.readv(ends[0], [r.buf[10 * H :][:5]])", "os.write(ends[1], r.buf[11 * H :][:5])"):
                c.do("os.write(ends[1], b'five!')")
                assert c.error_of(call).errno == errno.EFAULT
                assert c.ask("os.read(ends[0], 5).decode()") == "five!"
            assert touch(c, 10 * HUGE) == touch(c, 11 * HUGE) == SIGBUS
        assert creator.ask("r.mmap(2 * H, offset=10 * H)") == 10 * HUGE
        for c in (creator, other):
            c.do("os.write(ends[1], b'seven'); os.readv(ends[0], [r.buf[10 * H : 10 * H + 5]])")
            assert c.ask("(r.buf[10 * H : 10 * H + 5].tobytes().decode(), r.buf[11 * H])") == ["seven", 0]

    @pytest.mark.parametrize("late", [False, True], ids=["before the other looks", "after"])
    def test_a_system_call_in_a_hole_leaves_nothing_to_others(
        self, creator: Client, other: Client, attached: Start, late: bool
    ) -> None:
        """Its process may be gone when the hole is mapped again: pages there are as good as any."""
        third = attached(address=None)
        creator.do("r.munmap(10 * H, H); r.buf[11 * H] = 1")
        if late:
            assert third.ask("r.buf[11 * H]") == 1
        other.do("r.buf[11 * H]; ends = os.pipe()")
        assert other.error_of("os.write(ends[1], r.buf[10 * H : 10 * H + 5])").errno == errno.EFAULT
        assert third.ask("r.buf[11 * H]") == 1
        other.kill()
        third.do("r.mmap(H, offset=10 * H)")
        assert touch(third, 10 * HUGE, store=True) == touch(creator, 10 * HUGE) == touch(attached(), 10 * HUGE) == 0

    def test_a_signal_that_a_thread_blocks_does_not_save_it(self, creator: Client) -> None:
        creator.do("r.munmap(10 * H, H); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])")
        assert creator.ask("fork('r.buf[10 * H]')") == -SIGBUS

    @pytest.mark.usefixtures("hugetlb")
    def test_every_first_touch_can_be_seen(
        self, before: Pool, start_daemon: Callable[..., Daemon], client: Start
    ) -> None:
        daemon = start_daemon("--paging", "all")
        a, b = client(daemon), client(daemon)
        a.do("H = 2 * MIB; r = mshare.mshare('x', None, GIB, CREATE, backing='hugetlb'); r.buf[0] = r.buf[5 * H] = 1")
        b.do(f"H = 2 * MIB; r = mshare.mshare('x', {ELSEWHERE}, 0, RW); r.buf[6 * H] = 1")
        assert a.ask("(r.buf[0], r.buf[5 * H], r.buf[6 * H], r.stat().faults)") == [1, 1, 1, 3]
        assert pool() == before.with_region(mapped=512, touched=3)
        b.do("mshare.remove('x')")

    @pytest.mark.usefixtures("before")
    def test_layouts_of_regions_of_several_gib(self, hugetlb: Daemon, client: Start, name: str) -> None:
        """Borders of GiB are nothing special, and two may ask for everything at once."""
        a, b = client(hugetlb), client(hugetlb)
        a.do(f"H = 2 * MIB; r = mshare.mshare({name!r}, None, 4 * GIB, CREATE, empty=True, backing='hugetlb')")
        b.do(f"H = 2 * MIB; r = mshare.mshare({name!r}, {ELSEWHERE}, 0, RW)")
        for gib in (1, 2, 3):
            a.do(f"r.mmap(4 * H, offset={gib} * GIB - 2 * H)")
            b.do(f"for page in range(-2, 2): r.buf[{gib} * GIB + page * H] = {gib}")
        b.do("r.mprotect(2 * GIB - H, 2 * H, 0); r.mprotect(2 * GIB - H, 2 * H, 3); r.buf[2 * GIB] = 7")
        assert a.ask("[r.buf[gib * GIB + page * H] for gib in (1, 2, 3) for page in range(-2, 2)]") == [
            *(1, 1, 1, 1),
            *(2, 2, 7, 2),
            *(3, 3, 3, 3),
        ]
        for c in (a, b):
            c.send(do="for _ in range(30): assert r.stat().resident == 12 * H")
        for c in (a, b):
            c.receive()
            assert touch(c, 2 * GIB - 3 * HUGE) == touch(c, 2 * GIB + 2 * HUGE, store=True) == SIGBUS
        assert a.ask("[(v.offset // H, v.resident // H) for v in r.maps()]") == [[510, 4], [1022, 4], [1534, 4]]


class TestReaders:
    """They see every store, and make none."""

    def test_they_see_later_stores_even_where_nobody_had_been(self, creator: Client, attached: Start) -> None:
        reader = attached("RO")
        assert reader.ask("(r.buf[0], r.buf[50 * H], r.buf[GIB - 1])") == [1, 0, 0]
        creator.do("r.buf[0] = 2; r.buf[50 * H] = 3; r.buf[GIB - 1] = 4; r.buf[60 * H] = 5")
        assert reader.ask("(r.buf[0], r.buf[50 * H], r.buf[GIB - 1], r.buf[60 * H])") == [2, 3, 4, 5]
        creator.do("r.madvise(0, H, MADV_REMOVE); r.munmap(50 * H, H); r.mmap(H, offset=50 * H)")
        assert reader.ask("(r.buf[0], r.buf[50 * H])") == [0, 0]
        creator.do("r.buf[0] = 6; r.buf[50 * H] = 7")
        assert reader.ask("(r.buf[0], r.buf[50 * H])") == [6, 7]

    def test_they_do_not_write(self, creator: Client, attached: Start, before: Pool) -> None:
        """One that makes its window writable by itself has private pages there."""
        reader = attached("RO")
        assert reader.error_of("r.buf.__setitem__(0, 9)").kind == "TypeError"
        reader.do("raw = (ctypes.c_char * 8).from_address(r.address)")
        assert reader.ask("fork('raw[0] = 9')") == -SIGSEGV
        assert reader.ask("fork('sc.mprotect(r.address, r.size, 3); raw[0] = 9; assert r.buf[0] == 9')") == 0
        for call in ("r.mmap(H)", "r.munmap(0, H)", "r.mprotect(0, H, 0)", "r.madvise(0, H, MADV_REMOVE)"):
            assert reader.error_of(call).errno == errno.EACCES
        assert (creator.ask("r.buf[0]"), reader.ask("r.buf[0]"), layout(creator)) == (1, 1, [(0, 512, 3)])
        assert pool() == before.with_region(mapped=512, touched=4, kept=1)

    def test_what_they_may_not_see(self, creator: Client, attached: Start) -> None:
        reader = attached("RO")
        creator.do("r.munmap(10 * H, H); r.mprotect(H, H, 0); r.mprotect(2 * H, H, PROT_READ)")
        for c in (reader, attached("RO", None)):
            assert (touch(c, 10 * HUGE), touch(c, HUGE), c.ask("r.buf[2 * H]")) == (SIGBUS, SIGSEGV, 1)
        creator.do("r.mprotect(H, 2 * H, 3); r.buf[2 * H] = 8")
        assert reader.ask("(r.buf[H], r.buf[2 * H])") == [1, 8]

    def test_an_unmapping_that_is_refused_makes_no_pages(self, creator: Client, attached: Start, before: Pool) -> None:
        """What was hidden would be seen as zeros, and memory be taken."""
        creator.do("r.mprotect(0, H, 0)")
        reader = attached("RO")
        assert reader.error_of("r.munmap(0, GIB)").errno == errno.EACCES
        assert pool() == before.with_region(mapped=512, touched=3)
        assert touch(creator, 0) == touch(reader, 0) == SIGSEGV
        creator.do("r.mprotect(0, H, 3)")
        assert (creator.ask("r.buf[0]"), reader.ask("r.buf[H - 1]")) == (1, 1)


class TestProtections:
    """As anywhere else, in huge pages: contents stay, and every process obeys at once."""

    @pytest.mark.parametrize(("first", "count"), [(0, 512), (1, 2), (3, 1), (3, 200)])
    def test_read_only_and_back(self, creator: Client, other: Client, first: int, count: int) -> None:
        other.do(f"r.mprotect({first} * H, {count} * H, PROT_READ)")
        last = (first + count) * HUGE - 1
        for c in (creator, other):
            assert touch(c, first * HUGE) == touch(c, last) == 0
            assert touch(c, first * HUGE, store=True) == touch(c, last, store=True) == SIGSEGV
            assert c.ask("[r.buf[page * H + 1] for page in range(5)]") == [1, 1, 1, 1, 0]
        creator.do(f"r.mprotect({first} * H, {count} * H, 3); r.buf[{first} * H] = r.buf[{last}] = 7")
        assert other.ask(f"(r.buf[{first} * H], r.buf[{last}])") == [7, 7]
        assert touch(other, first * HUGE, store=True) == touch(other, last, store=True) == 0

    @pytest.mark.parametrize(("first", "count"), [(0, 512), (1, 2), (3, 1), (3, 200)])
    def test_hidden_and_back(self, creator: Client, other: Client, first: int, count: int) -> None:
        creator.do("for page in range(4): r.buf[page * H : page * H + 256] = bytes(range(256))")
        other.do(f"r.mprotect({first} * H, {count} * H, 0)")
        last = (first + count) * HUGE - 1
        for c in (creator, other):
            assert touch(c, first * HUGE) == touch(c, last, store=True) == SIGSEGV
        creator.do(f"r.mprotect({first} * H, {count} * H, PROT_READ)")
        for c in (creator, other):
            assert c.ask("[r.buf[page * H : page * H + 256] == bytes(range(256)) for page in range(4)]") == [True] * 4
            assert touch(c, first * HUGE, store=True) == SIGSEGV
        other.do(f"r.mprotect({first} * H, {count} * H, 3); r.buf[{first} * H] = 9; r.buf[{last}] = 8")
        assert creator.ask(f"(r.buf[{first} * H], r.buf[{last}])") == [9, 8]

    def test_untouched_pages_are_protected_as_well(self, creator: Client, other: Client, attached: Start) -> None:
        creator.do("r.mprotect(100 * H, 10 * H, PROT_READ); r.mprotect(200 * H, H, 0)")
        later = attached(address=None)
        for page, c in enumerate((creator, other, later), 100):
            assert touch(c, page * HUGE, store=True) == SIGSEGV
            assert (touch(c, page * HUGE), touch(c, page * HUGE, store=True)) == (0, SIGSEGV)
            assert touch(c, 200 * HUGE) == SIGSEGV
            assert touch(c, (page - 10) * HUGE, store=True) == 0
        for c in (creator, other, later):
            assert c.ask("[r.buf[page * H] for page in (90, 91, 92, 100, 101, 102)]") == [2, 2, 2, 0, 0, 0]
            assert touch(c, 102 * HUGE, store=True) == SIGSEGV

    @pytest.mark.parametrize("beside", ["memory", "a hole", "hidden memory"])
    def test_system_calls_obey(self, creator: Client, other: Client, beside: str) -> None:
        """They store nothing, however often it is tried."""
        creator.do("r.mprotect(H, 3 * H, PROT_READ)")
        creator.do({"memory": "", "a hole": "r.munmap(0, H)", "hidden memory": "r.mprotect(0, H, 0)"}[beside])
        for c in (creator, other):
            c.do("ends = os.pipe(); os.write(ends[1], b'x' * 20)")
            for _ in range(10):
                for page in (1, 2):
                    error = c.error_of(f"os.readv(ends[0], [r.buf[{page} * H : {page} * H + 5]])")
                    assert (error.kind, error.errno) == ("OSError", errno.EFAULT)
            assert c.ask("[r.buf[page * H] for page in (1, 2, 3)]") == [1, 1, 1]
            assert c.ask("os.write(ends[1], r.buf[H : H + 5])") == 5
            assert touch(c, 3 * HUGE, store=True) == SIGSEGV
        other.do("r.mprotect(H, 3 * H, 3)")
        for c in (creator, other):
            assert c.ask("(os.readv(ends[0], [r.buf[H : H + 5]]), r.buf[H], r.buf[2 * H])") == [5, ord("x"), 1]

    def test_system_calls_fail_in_hidden_memory(self, creator: Client, other: Client) -> None:
        creator.do("r.mprotect(2 * H, H, 0)")
        for c in (creator, other):
            c.do("ends = os.pipe()")
            assert c.error_of("os.write(ends[1], r.buf[2 * H : 2 * H + 5])").errno == errno.EFAULT
            assert touch(c, 2 * HUGE) in (SIGBUS, SIGSEGV)
        other.do("r.mprotect(2 * H, H, PROT_READ)")
        for c in (creator, other):
            assert c.ask("(os.write(ends[1], r.buf[2 * H : 2 * H + 5]), os.read(ends[0], 5)[0])") == [5, 1]

    def test_a_fault_has_the_address_of_its_own_process(self, creator: Client, other: Client) -> None:
        creator.do("r.mprotect(H, H, PROT_READ)")
        other.do("report_faults()")
        status, text = other.dies_of("r.buf[H + 5] = 1")
        assert (status, text) == (100 + SIGSEGV, f"SIGNAL {SIGSEGV} {ELSEWHERE + HUGE + 5:x}\n")

    def test_a_mix_is_told_as_it_is(self, creator: Client, attached: Start) -> None:
        creator.do("r.mprotect(H, H, PROT_READ); r.mprotect(2 * H, H, 0); r.munmap(5 * H, H)")
        expected = [(0, 1, 3), (1, 1, 1), (2, 1, 0), (3, 2, 3), (6, 506, 3)]
        assert layout(creator) == layout(attached("RO")) == expected
        assert creator.ask("[v.resident // H for v in r.maps()]") == [1, 1, 0, 1, 0]
