"""Reference pages: memory that nobody has stored to shows the pattern, in every process, and costs little."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
PAGE = 4096
SIGBUS, SIGSEGV = 7, 11

SETUP = """
from mmap import *
import pickle
MAP_FIXED = 0x10
SHOW = MAP_PRIVATE | MAP_ANONYMOUS | mshare.MAP_REFPAGE
aa = mshare.refpage_create(b'\\xaa')
def is_aa(first, end):
    "Whether pages show the pattern."
    return bytes(r.buf[first * PAGE : end * PAGE]) == b'\\xaa' * ((end - first) * PAGE)
def clean(): return r.stat().clean // PAGE
def resident(): return r.stat().resident // PAGE
"""

REFUSED = [
    "r.mmap(MIB, 3, SHOW)",
    "r.mmap(MIB, 3, MAP_PRIVATE | MAP_ANONYMOUS, refpage=aa)",
    "r.mmap(MIB, 3, SHOW, refpage=aa, fd=0)",
    "r.mmap(MIB, 3, SHOW, fd=0)",
    "r.mmap(MIB, 3, MAP_PRIVATE | mshare.MAP_REFPAGE, fd=0)",
    "r.mmap(MIB, 3, MAP_PRIVATE | mshare.MAP_REFPAGE, refpage=aa)",
    "r.mmap(MIB, 3, MAP_SHARED | MAP_ANONYMOUS | mshare.MAP_REFPAGE, refpage=aa)",
    "r.mmap(MIB + 1, 3, SHOW, refpage=aa)",
    "mshare.refpage_create(b'')",
    "mshare.refpage_create(b'abc')",
    "mshare.refpage_create(bytes(8192))",
    "mshare.refpage_create(b'ab', 3)",
    "mshare.refpage_create(b'ab', 8192)",
    "mshare.refpage_create(b'ab', 1)",
]


@pytest.fixture(params=["thp", "4k"])
def pair(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> tuple[Client, Client]:
    """Two processes on one region of 8 MiB, whose first 4 MiB show 0xAA; the rest is a hole."""
    return started(client, name, request.param)


def started(client: Callable[..., Client], name: str, backing: str) -> tuple[Client, Client]:
    a, b = client(), client()
    for c in (a, b):
        c.do(f"{SETUP}\nname = {name!r}")
    a.do(f"r = mshare.mshare(name, None, 8 * MIB, CREATE, empty=True, backing={backing!r})")
    a.do("r.mmap(4 * MIB, 3, SHOW | MAP_FIXED, offset=0, refpage=aa)")
    b.do("r = mshare.mshare(name, 0x6000_0000_0000, 0, RW)")
    return a, b


def touch(c: Client, offset: int, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    status: int = -c.ask(f"fork('r.buf[{offset}] = 2')" if store else f"fork('r.buf[{offset}]')")
    return status


class TestContents:
    """What processes see."""

    def test_every_page_shows_the_pattern_until_somebody_stores_to_it(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        for c in pair:
            assert c.ask("is_aa(0, 1024)")
        a.do("r.buf[5 * PAGE + 7] = 1")
        b.do("r.buf[6 * PAGE] = 2; r.buf[5 * PAGE + 8] = 3")
        for c in pair:
            assert c.ask("is_aa(0, 5) and is_aa(7, 1024)")
            assert c.ask("list(r.buf[5 * PAGE + 6 : 5 * PAGE + 9])") == [0xAA, 1, 3]
            assert c.ask("(r.buf[6 * PAGE], r.buf[6 * PAGE + 1])") == [2, 0xAA]
            assert touch(c, 4 * MIB) == SIGBUS

    @pytest.mark.parametrize("order", ["range(0, 1024)", "range(1023, -1, -1)", "range(0, 1024, 3)"])
    def test_stores_in_any_order_keep_what_is_beside_them(self, pair: tuple[Client, Client], order: str) -> None:
        a, b = pair
        a.do(f"for page in {order}: r.buf[page * PAGE + 9] = page % 251")
        assert b.ask(f"all(r.buf[page * PAGE + 9] == page % 251 for page in {order})")
        assert b.ask(f"all(bytes(r.buf[page * PAGE:][:9]) == b'\\xaa' * 9 for page in {order})")
        assert b.ask("all(r.buf[page * PAGE + 4000] == 0xAA for page in range(1024))")

    def test_a_longer_pattern_repeats(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("p = mshare.refpage_create(bytes(range(256)) * 8, 4096)")
        a.do("r.mmap(MIB, 3, SHOW | MAP_FIXED, offset=MIB, refpage=p)")
        assert b.ask("bytes(r.buf[MIB : 2 * MIB]) == bytes(range(256)) * (MIB // 256)")
        assert b.ask("is_aa(0, 256) and is_aa(512, 1024)")

    def test_later_attachers_children_and_readers_see_the_same(
        self, pair: tuple[Client, Client], client: Callable[..., Client]
    ) -> None:
        a, b = pair
        a.do("r.buf[0]; r.buf[PAGE] = 1")
        assert b.ask("fork('assert is_aa(2, 600) and r.buf[PAGE] == 1; r.buf[0] = 5; r.buf[3 * PAGE] = 6')") == 0
        later, reader = client(), client()
        for c, flags in ((later, "RW"), (reader, "RO")):
            c.do(f"{SETUP}\nr = mshare.mshare({b.ask('name')!r}, 0x6200_0000_0000, 0, {flags})")
            assert c.ask("is_aa(4, 1024) and list(r.buf[0 : 4 * PAGE : PAGE]) == [5, 1, 0xAA, 6]")
        later.do("r.buf[2 * PAGE] = 9; r.buf[1000 * PAGE] = 8; r.buf[0] = 7")
        for c in (a, b, reader):
            assert c.ask("list(r.buf[0 : 4 * PAGE : PAGE]) == [7, 1, 9, 6] and r.buf[1000 * PAGE]") == 8

    def test_what_a_reader_touches_first_is_seen_when_another_stores_to_it(
        self, pair: tuple[Client, Client], client: Callable[..., Client]
    ) -> None:
        reader = client()
        reader.do(f"{SETUP}\nr = mshare.mshare({pair[0].ask('name')!r}, None, 0, RO)")
        assert reader.ask("is_aa(0, 1024)")
        assert pair[0].ask("clean()") == 1024
        pair[1].do("for page in range(1024): r.buf[page * PAGE] = 1")
        assert reader.ask("all(r.buf[page * PAGE] == 1 for page in range(1024))")
        assert pair[0].ask("clean()") == 0

    def test_system_calls_read_and_write_it(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("ends = os.pipe(); left, right = socket.socketpair()")
        assert a.ask("(os.write(ends[1], r.buf[0 : 3 * PAGE]), os.read(ends[0], 3 * PAGE) == b'\\xaa' * 3 * PAGE)") == [
            3 * PAGE,
            True,
        ]
        assert a.ask("(left.send(r.buf[8 * PAGE - 5 : 8 * PAGE + 5]), right.recv(10) == b'\\xaa' * 10)") == [10, True]
        a.do("os.write(ends[1], b'x' * PAGE); assert os.readv(ends[0], [r.buf[20 * PAGE + 100 :][:PAGE]]) == PAGE")
        a.do("right.send(b'y' * 10); assert left.recv_into(r.buf[2 * PAGE :][:10]) == 10")
        assert b.ask("bytes(r.buf[2 * PAGE:][:12]) == b'y' * 10 + b'\\xaa\\xaa'")
        assert b.ask("bytes(r.buf[20 * PAGE:][:101]) == b'\\xaa' * 100 + b'x' and r.buf[21 * PAGE + 100] == 0xAA")

    def test_a_process_that_is_not_attached_reads_and_writes_it(
        self, pair: tuple[Client, Client], client: Callable[..., Client]
    ) -> None:
        outsider = client()
        outsider.do(
            f"""
            own, at = (ctypes.c_char * 8192)(), {pair[0].ask("r.address") + 9 * PAGE}
            def move(how, at, size):
                here, there = (ctypes.c_uint64 * 2)(ctypes.addressof(own), size), (ctypes.c_uint64 * 2)(at, size)
                return getattr(ctypes.CDLL(None), 'process_vm_' + how)({pair[0].pid}, here, 1, there, 1, 0)
            """
        )
        assert outsider.ask("(move('readv', at, 8192), own.raw == b'\\xaa' * 8192)") == [8192, True]
        outsider.do("own.raw = b'z' * 8192; assert move('writev', at + PAGE, 10) == 10")
        assert pair[1].ask("bytes(r.buf[10 * PAGE:][:11]) == b'z' * 10 + b'\\xaa' and is_aa(9, 10)")


class TestMemory:
    """What it costs."""

    def test_an_untouched_page_costs_nothing(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        assert a.ask("(resident(), clean())") == [0, 0]
        b.do("r.buf[700 * PAGE] = 1; r.buf[3 * PAGE]")
        assert a.ask("(resident(), clean())") == [2, 1]

    @pytest.mark.parametrize("advice", ["MADV_COLD", "MADV_PAGEOUT"])
    def test_pages_that_were_only_read_are_given_back_and_written_ones_never(
        self, pair: tuple[Client, Client], advice: str
    ) -> None:
        a, b = pair
        number = {"MADV_COLD": 20, "MADV_PAGEOUT": 21}[advice]
        a.do("for page in range(0, 200, 2): r.buf[page * PAGE]")
        b.do("for page in range(0, 200, 8): r.buf[page * PAGE + 5] = page")
        assert a.ask("(resident(), clean())") == [100, 75]
        a.do(f"r.madvise(0, 100 * PAGE, {number})")
        assert a.ask("(resident(), clean())") == [63, 38]
        b.do(f"r.madvise(0, 4 * MIB, {number})")
        assert a.ask("(resident(), clean())") == [25, 0]
        for c in pair:
            assert c.ask("all(r.buf[page * PAGE + 5] == (0xAA if page % 8 else page) for page in range(200))")
            assert c.ask("all(r.buf[page * PAGE + 6] == 0xAA for page in range(200))")

    def test_given_back_pages_can_be_stored_to(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        for value in (1, 2, 3):
            assert b.ask("is_aa(50, 60)")
            a.do(f"r.madvise(0, 4 * MIB, 20); r.buf[55 * PAGE] = {value}")
            assert b.ask(f"r.buf[55 * PAGE] == {value} and is_aa(50, 55)")
            a.do("r.madvise(55 * PAGE, PAGE, MADV_REMOVE)")

    def test_removal_brings_the_pattern_back(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("for page in range(1024): r.buf[page * PAGE] = 1")
        b.do("r.madvise(MIB, 2 * MIB, MADV_REMOVE)")
        for c in pair:
            assert c.ask("is_aa(256, 768)")
            assert c.ask("(r.buf[255 * PAGE], r.buf[768 * PAGE])") == [1, 1]

    def test_touches_in_order_take_few_faults(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("for page in range(512): r.buf[page * PAGE] = 1")
        assert a.ask("r.stat().faults") <= 12
        b.do("for page in range(512, 1024): r.buf[page * PAGE]")
        assert a.ask("r.stat().faults") <= 24
        assert a.ask("clean()") == 512

    def test_stores_in_even_steps_take_few_faults(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("for page in range(0, 1000, 10): r.buf[page * PAGE] = 1")
        assert a.ask("r.stat().faults") <= 12
        assert a.ask("resident()") <= 200
        assert b.ask("list(r.buf[0 : 11 * PAGE : PAGE]) == [1] + [0xAA] * 9 + [1] and r.buf[1023 * PAGE] == 0xAA")

    def test_who_fills_one_mapping_after_the_other_takes_few_faults_from_the_third_on(
        self, client: Callable[..., Client], name: str
    ) -> None:
        """A quarter of each: what comes beside it, and what nobody has stored to since, shows the pattern."""
        a, b = client(), client()
        for c in (a, b):
            c.do(f"{SETUP}\nname = {name!r}\nstarts = range(0, 16 * MIB, 4 * MIB)")
        a.do("r = mshare.mshare(name, None, 16 * MIB, CREATE, empty=True)")
        b.do("r = mshare.mshare(name, 0x6000_0000_0000, 0, RW)")
        a.do("assert [r.mmap(4 * MIB - PAGE, 3, SHOW, refpage=aa) for _ in starts] == list(starts)")
        a.do("for start in starts: r.buf[start : start + MIB : PAGE] = bytes(256)")
        first, second, third, fourth = a.ask("[vma.faults for vma in r.maps()]")
        assert first == second >= 5
        assert third <= 2
        assert fourth <= 2
        assert a.ask("resident()") <= 4 * 2 * MIB // PAGE
        assert b.ask("all(not any(r.buf[start : start + MIB : PAGE]) for start in starts)")
        assert b.ask("all(set(r.buf[start + MIB : start + 4 * MIB - PAGE]) == {0xAA} for start in starts)")
        assert b.ask("all(set(r.buf[start + 1 : start + MIB : PAGE]) == {0xAA} for start in starts)")

    def test_every_process_can_read_what_one_has_read_without_a_fault(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        assert a.ask("is_aa(0, 1024)")
        before = a.ask("r.stat().faults")
        assert b.ask("is_aa(0, 1024)")
        assert a.ask("r.stat().faults") == before


class TestChanges:
    """Calls on such memory."""

    def test_unmapped_it_is_a_hole(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("r.buf[MIB]; r.buf[MIB + PAGE] = 1; r.munmap(MIB, MIB)")
        for c in pair:
            assert touch(c, MIB) == touch(c, MIB + PAGE, store=True) == SIGBUS
            assert c.ask("is_aa(0, 256) and is_aa(512, 1024)")
        b.do("r.mmap(MIB, offset=MIB)")
        assert a.ask("bytes(r.buf[MIB : 2 * MIB]) == bytes(MIB)")

    @pytest.mark.parametrize("prot", [0, 1])
    def test_protected_and_back_everything_is_as_it_was(self, pair: tuple[Client, Client], prot: int) -> None:
        a, b = pair
        a.do("r.buf[0]; r.buf[PAGE] = 1; r.buf[2 * PAGE] = 2")
        b.do(f"r.mprotect(0, 2 * MIB, {prot})")
        for c in pair:
            assert touch(c, 3 * PAGE, store=True) == touch(c, PAGE, store=True) == touch(c, 0, store=True) == SIGSEGV
            assert touch(c, PAGE) == touch(c, 0) == touch(c, 9 * PAGE) == (0 if prot else SIGSEGV)
        a.do("r.mprotect(0, 2 * MIB, 3)")
        assert a.ask("clean()") == (2 if prot else 0)
        b.do("r.buf[2 * PAGE] += 1; r.buf[0] += 1; r.buf[5 * PAGE] += 1")
        a.do("r.madvise(0, 4 * MIB, 20)")
        for c in pair:
            assert c.ask("list(r.buf[0 : 6 * PAGE : PAGE])") == [0xAB, 1, 3, 0xAA, 0xAA, 0xAB]
            assert c.ask("is_aa(6, 1024)")

    def test_it_takes_the_place_of_memory_and_the_other_way_round(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("r.mmap(2 * MIB, offset=4 * MIB); r.buf[5 * MIB] = 1")
        b.do("r.mmap(MIB, 3, SHOW | MAP_FIXED, offset=5 * MIB, refpage=mshare.refpage_create(b'\\xbb'))")
        b.do("r.mmap(MIB, flags=MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, offset=MIB)")
        for c in pair:
            assert c.ask("bytes(r.buf[5 * MIB : 6 * MIB]) == b'\\xbb' * MIB")
            assert c.ask("bytes(r.buf[MIB : 2 * MIB]) == bytes(MIB)")
            assert c.ask("bytes(r.buf[4 * MIB : 5 * MIB]) == bytes(MIB)")

    def test_populating_it_takes_no_time_later(self, pair: tuple[Client, Client]) -> None:
        a, _ = pair
        a.do("at = r.mmap(2 * MIB, 3, SHOW | 0x8000, refpage=aa); before = r.stat().faults")
        a.do("for page in range(512): r.buf[at + page * PAGE] = 1")
        assert a.ask("(r.stat().faults - before, resident())") == [0, 512]

    @pytest.mark.parametrize("order", ["SEQUENTIAL", "RANDOM"])
    def test_advice_says_how_much_comes_at_once(self, pair: tuple[Client, Client], order: str) -> None:
        a, _ = pair
        a.do(f"r.madvise(0, 4 * MIB, MADV_{order}); r.buf[0] = r.buf[PAGE] = 1")
        assert a.ask("resident()") == (512 if order == "SEQUENTIAL" else 2)
        assert a.ask("is_aa(2, 1024)")

    def test_what_it_shows_is_told(self, pair: tuple[Client, Client], daemon: Daemon) -> None:
        a, _ = pair
        a.do("r.buf[0]; r.buf[PAGE] = 1")
        (vma,) = a.ask("[[v.offset, v.length, v.refpage, v.clean, v.paged, v.file] for v in r.maps()]")
        assert vma == [0, 4 * MIB, "aa", PAGE, True, None]
        texts = daemon.mount / ".regions" / a.ask("name")
        assert (texts / "maps").read_text().endswith("rw-s 000000000000 [refpage aa]\n")
        assert "Clean:                 4 kB\n" in (texts / "smaps").read_text()
        assert "clean 4096\n" in (texts / "stat").read_text()


class TestForks:
    """Copies of regions that have such memory."""

    @pytest.mark.parametrize("how", ["r.fork(name + '-2')", "odfork"])
    def test_both_sides_show_the_same_and_go_their_own_ways(self, pair: tuple[Client, Client], how: str) -> None:
        a, b = pair
        a.do("r.buf[0]; r.buf[PAGE] = 1; r.buf[2 * PAGE] = 2; r.mmap(MIB, 3, SHOW, offset=5 * MIB, refpage=aa)")
        if how == "odfork":
            a.do(
                """
                told, tell = os.pipe(); go, ready = os.pipe()
                if not (pid := mshare.odfork(r)):
                    os.read(go, 1)
                    r.buf[2 * PAGE] += 1; r.buf[4 * PAGE] += 1; r.buf[MIB]
                    seen = [*r.buf[0 : 6 * PAGE : PAGE], is_aa(6, 512), is_aa(512, 1024), clean()]
                    os.write(tell, json.dumps(seen).encode()); os._exit(0)
                """
            )
        else:
            b.do(f"{how}; origin, r = r, mshare.mshare(name + '-2', 0x6300_0000_0000, 0, RW)")
        a.do("r.buf[0] += 1; r.buf[PAGE] += 1; r.buf[3 * PAGE] += 1")
        if how == "odfork":
            a.do("os.write(ready, b'g'); seen = json.loads(os.read(told, 500)); os.waitpid(pid, 0)")
            seen = a.ask("seen")
        else:
            b.do("r.buf[2 * PAGE] += 1; r.buf[4 * PAGE] += 1; r.buf[MIB]")
            seen = b.ask("[*r.buf[0 : 6 * PAGE : PAGE], is_aa(6, 512), is_aa(512, 1024), clean()]")
            b.do("r.detach(); mshare.remove(name + '-2')")
        assert seen[:-1] == [0xAA, 1, 3, 0xAA, 0xAB, 0xAA, True, True]
        assert seen[-1] >= 512
        assert a.ask("list(r.buf[0 : 6 * PAGE : PAGE])") == [0xAB, 2, 2, 0xAB, 0xAA, 0xAA]
        assert a.ask("is_aa(6, 1024)")

    def test_forks_of_forks_and_of_what_nobody_may_touch(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("r.buf[0]; r.buf[PAGE] = 1; r.mprotect(0, MIB, 0); r.fork(name + '-2')")
        b.do("origin, r = r, mshare.mshare(name + '-2', 0x6300_0000_0000, 0, RW); r.fork(name + '-3')")
        b.do("second, r = r, mshare.mshare(name + '-3', 0x6400_0000_0000, 0, RW); r.mprotect(0, MIB, 3)")
        assert b.ask("is_aa(0, 1) and r.buf[PAGE] == 1 and is_aa(2, 1024)")
        b.do("r.detach(); r = second; mshare.remove(name + '-3'); r.mprotect(0, MIB, 3); r.buf[0] = 7")
        assert b.ask("r.buf[0] == 7 and r.buf[PAGE] == 1 and is_aa(2, 1024)")
        b.do("r.detach(); r = origin; mshare.remove(name + '-2')")
        a.do("r.mprotect(0, MIB, 3)")
        assert a.ask("is_aa(0, 1) and r.buf[PAGE] == 1 and is_aa(2, 1024)")


class TestUse:
    """The object, and what is refused."""

    def test_contents_are_taken_at_once(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("content = bytearray(b'abcd'); p = mshare.refpage_create(content); content[:] = b'wxyz'")
        a.do("r.mmap(MIB, 3, SHOW, offset=4 * MIB, refpage=p); del p; gc.collect()")
        assert b.ask("bytes(r.buf[4 * MIB : 5 * MIB]) == b'abcd' * (MIB // 4)")

    def test_one_object_serves_many_mappings_regions_and_processes(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        text = a.ask("pickle.dumps(aa).hex()")
        b.do(f"p = pickle.loads(bytes.fromhex({text!r})); assert p == aa")
        b.do("places = [r.mmap(64 * 1024, 3, SHOW, refpage=p) for _ in range(2)]")
        b.do("other = mshare.mshare(name + '-other', None, 8 * MIB, CREATE, empty=True)")
        b.do("at = other.mmap(MIB, 3, SHOW, refpage=p)")
        assert a.ask("len(r.maps())") >= 1
        assert b.ask("all(bytes(r.buf[at:][:65536]) == b'\\xaa' * 65536 for at in places)")
        assert b.ask("bytes(other.buf[at : at + MIB]) == b'\\xaa' * MIB")
        b.do("other.detach(); mshare.remove(name + '-other')")

    def test_what_does_not_fit_together_is_refused(self, pair: tuple[Client, Client]) -> None:
        a, _ = pair
        for call in REFUSED:
            assert a.error_of(call).errno == errno.EINVAL, call
        assert a.ask("len(r.maps())") == 1

    def test_a_daemon_checks_what_it_is_sent(self, pair: tuple[Client, Client]) -> None:
        a, _ = pair
        for content in ("''", "'abc'", "'aabbcc'", "'zz'", "'aa' * 8192", "None"):
            request = f"protocol.Mmap(r._attachment, None, MIB, 3, SHOW, 0, {content})"
            error = a.error_of(f"connect(find_mount(None)).call({request}, protocol.Placed)")
            assert error.errno == errno.EINVAL, content

    def test_a_reader_maps_nothing(self, pair: tuple[Client, Client], client: Callable[..., Client]) -> None:
        reader = client()
        reader.do(f"{SETUP}\nr = mshare.mshare({pair[0].ask('name')!r}, None, 0, RO)")
        assert reader.error_of("r.mmap(MIB, 3, SHOW, refpage=aa)").errno == errno.EACCES

    def test_many_patterns_at_once(self, pair: tuple[Client, Client]) -> None:
        a, _ = pair
        a.do(
            """
            for n in range(200):
                p = mshare.refpage_create(n.to_bytes(2, 'little'))
                r.mmap(4 * PAGE, 3, SHOW | MAP_FIXED, offset=n * 4 * PAGE, refpage=p)
            """
        )
        for c in pair:
            c.do("def wanted(n): return n.to_bytes(2, 'little') * (2 * PAGE)")
            assert c.ask("all(bytes(r.buf[n * 4 * PAGE:][:4 * PAGE]) == wanted(n) for n in range(200))")
        assert a.ask("len(r.maps())") == 201


def test_readers_and_writers_at_once_lose_nothing(pair: tuple[Client, Client]) -> None:
    """Four processes store to bytes of their own in every page, or read and give back, in orders of their own."""
    a, b = pair
    work = """
import random
def store(who):
    pages = list(range(1024)); random.Random(who).shuffle(pages)
    for page in pages if who % 2 else range(1024):
        assert r.buf[page * PAGE + 100 + who] == 0xAA
        r.buf[page * PAGE + 100 + who] = who
def look():
    for _ in range(5):
        assert all(r.buf[page * PAGE] == 0xAA for page in range(1024))
        r.madvise(0, 4 * MIB, 20)
def together(works):
    pids = []
    for work in works:
        pids.append(os.fork())
        if not pids[-1]:
            try: work()
            except BaseException: traceback.print_exc(); os._exit(1)
            os._exit(0)
    return [os.waitpid(pid, 0)[1] for pid in pids]
"""
    for c in pair:
        c.do(work)
    a.send(ask="together([lambda: store(1), lambda: store(2), look])")
    assert b.ask("together([lambda: store(3), lambda: store(4), look])") == [0, 0, 0]
    assert a.receive() == [0, 0, 0]
    for c in pair:
        assert c.ask("all(list(r.buf[page * PAGE + 101:][:4]) == [1, 2, 3, 4] for page in range(1024))")
        assert c.ask("all(r.buf[page * PAGE + 105] == 0xAA for page in range(1024))")


@pytest.mark.parametrize("backing", ["thp", "4k"])
def test_without_memory_a_touch_is_a_sigbus(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str, backing: str
) -> None:
    small = start_daemon("--max-bytes", "8M")
    c = client(small)
    c.do(f"{SETUP}\nr = mshare.mshare({name!r}, None, 8 * MIB, CREATE, empty=True, backing={backing!r})")
    c.do("r.mmap(8 * MIB, 3, SHOW, offset=0, refpage=aa)")
    filler = small.state / backing / ".filler"
    filler.write_bytes(bytes(6 * MIB))
    for order in ("range(0, 8 * MIB, 3 * PAGE)", "range(0, 8 * MIB, PAGE)"):
        assert c.ask(f"fork('for at in {order}: r.buf[at] = 1')") == -SIGBUS
    assert c.ask("fork('for at in range(0, MIB, 3 * PAGE): assert r.buf[at] == 1')") == 0
    filler.unlink()
    assert c.ask("fork('for at in range(0, 8 * MIB, PAGE): r.buf[at] = 1')") == 0
    assert c.ask("all(bytes(r.buf[at:][:PAGE]) == b'\\1' + b'\\xaa' * 4095 for at in range(0, 8 * MIB, PAGE))")
