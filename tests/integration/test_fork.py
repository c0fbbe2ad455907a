"""Forks of regions: contents of one instant, sides that are apart, families of any shape, and who may."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest
from conftest import Client, Daemon
from twins import MIB, PAGE, SIGBUS, SIGSEGV, file_of, files_of_regions, started

NOBODY = 65534
SIZE = 8 * MIB
SOME = [0, 1, 7, 511, 512, 513, 1023, 1024, 1500, 2047]
"""Pages: those at borders of tables and of the region, and some between."""

SHUFFLED = "import random; shuffled = lambda pages: random.Random(1).sample(pages, len(pages))"
UNSEEN = """
import itertools
numbers = itertools.count(520)
def unseen():
    "Whether a store to a page that was not stored to before goes unseen."
    before = r.stat().faults
    r.buf[next(numbers) * PAGE] = 1
    return r.stat().faults == before
"""


@pytest.fixture(params=["thp", "4k"])
def origin(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> Client:
    """A process on a region of 8 MiB; some of its pages are marked 1000."""
    c = started(client(), name, f"mshare.mshare(name, None, {SIZE}, CREATE, backing={request.param!r})")
    c.do(f"mark(r, 1000, {SOME})")
    return c


@pytest.fixture
def on(client: Callable[..., Client], name: str) -> Callable[..., Client]:
    """Start a process on a twin, or on the origin."""
    return lambda suffix="", flags="RW": started(client(), name + suffix, f"mshare.mshare(name, None, 0, {flags})")


class TestContents:
    """A twin is what its origin was."""

    def test_it_has_what_was_there_at_that_instant(self, origin: Client, on: Callable[..., Client]) -> None:
        origin.do(f"r.fork(name + '-s'); mark(r, 2000, {SOME}); r.buf[3 * PAGE] = 9")
        twin = on("-s")
        assert twin.ask(f"marks(r, {SOME})") == [1000] * len(SOME)
        assert twin.ask("(r.buf[3 * PAGE], sum(r.buf[100 * PAGE:200 * PAGE]))") == [0, 0]
        assert origin.ask(f"marks(r, {SOME})") == [2000] * len(SOME)

    def test_every_byte_of_it(self, origin: Client) -> None:
        origin.do(f"r.buf[:] = os.urandom(251) * ({SIZE} // 251) + bytes({SIZE} % 251); before = bytes(r.buf)")
        origin.do(f"r.fork(name + '-s'); r.buf[:] = bytes([5]) * {SIZE}")
        origin.do("s = on(name + '-s')")
        assert origin.ask("bytes(s.buf) == before")
        assert origin.ask(f"bytes(r.buf) == bytes([5]) * {SIZE}")

    @pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
    def test_all_of_it_takes_few_faults(self, origin: Client, on: Callable[..., Client], order: str) -> None:
        """Of two twins each page is copied once, and each of both has what was there."""
        pages = SIZE // PAGE
        origin.do(f"mark(r, 1000, range({pages})); r.fork(name + '-s'); r.fork(name + '-t')")
        origin.do(SHUFFLED)
        origin.do(f"faults = r.stat().faults; mark(r, 2000, {order}(range({pages})))")
        assert origin.ask("r.stat().faults - faults") <= 26 * SIZE // (2 * MIB)
        assert origin.ask("r.stat().copied") == SIZE
        twins = on("-s"), on("-t")
        for twin in twins:
            twin.do(SHUFFLED)
            assert twin.ask(f"marks(r, {order}(range({pages})))") == [1000] * pages
        assert twins[1].ask("r.stat().faults") <= 26 * SIZE // (2 * MIB)
        assert origin.ask(f"marks(r, range({pages}))") == [2000] * pages

    @pytest.mark.parametrize(("advice", "faults"), [("SEQUENTIAL", SIZE // (2 * MIB)), ("RANDOM", SIZE // PAGE)])
    def test_who_knows_better_says_how_much_comes_at_once(
        self, origin: Client, on: Callable[..., Client], advice: str, faults: int
    ) -> None:
        """Also who may only read."""
        origin.do(f"mark(r, 1000, range({SIZE // PAGE})); r.fork(name + '-s')")
        reader = on("-s", "RO")
        reader.do(f"r.madvise(0, {SIZE}, MADV_{advice})")
        assert reader.ask(f"marks(r, range({SIZE // PAGE}))") == [1000] * (SIZE // PAGE)
        assert reader.ask("r.stat().faults") == faults

    def test_who_has_mapped_over_some_of_its_window_goes_on_beside_that(
        self, origin: Client, on: Callable[..., Client]
    ) -> None:
        """What comes along with a page may not be there any more in the process that has touched it."""
        origin.do("mark(r, 1000, range(16)); r.fork(name + '-s')")
        over = "sc.mmap(r.address + {} * PAGE, PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | sc.MAP_FIXED, -1, 0)"
        origin.do(over.format(6))
        beside = [*range(6), *range(7, 16)]
        origin.do(f"mark(r, 2000, {beside})")
        twin = on("-s")
        twin.do(over.format(9))
        beside = [*range(9), *range(10, 16)]
        assert twin.ask(f"marks(r, {beside})") == [1000] * len(beside)
        twin.do(f"mark(r, 3000, {beside})")
        assert on("-s").ask("marks(r, range(16))") == [1000 if page == 9 else 3000 for page in range(16)]
        origin.do("r.fork(name + '-t'); mark(r, 4000, [3, 12])")
        assert on("-t").ask("marks(r, [3, 6, 12])") == [2000, 1000, 2000]

    def test_it_lies_where_its_origin_lies_and_is_a_region_like_any_other(
        self, origin: Client, on: Callable[..., Client], daemon: Daemon
    ) -> None:
        origin.do("r.fork(name + '-s')")
        twin = on("-s")
        assert twin.ask("(r.address, r.size)") == origin.ask("(r.address, r.size)")
        assert twin.ask("(r.stat().backing, r.stat().attached)") == [origin.ask("r.stat().backing"), 1]
        assert origin.ask("r.stat().attached") == 1
        assert (daemon.mount / ".regions" / twin.ask("name") / "maps").read_text().count("rw") == 1

    def test_it_takes_memory_only_for_what_is_touched(self, origin: Client, on: Callable[..., Client]) -> None:
        origin.do(f"r.buf[:] = bytes([1]) * {SIZE}; r.fork(name + '-s')")
        twin = on("-s")
        assert twin.ask("r.stat().resident") == 0
        twin.do("r.buf[5 * PAGE] = 2; r.buf[6 * PAGE]")
        origin.do("r.buf[7 * PAGE] = 2")
        assert twin.ask("r.stat().resident") == 3 * PAGE
        assert origin.ask("r.stat().resident") == SIZE

    def test_a_region_nobody_has_touched(self, client: Callable[..., Client], name: str) -> None:
        c = started(client(), name, f"mshare.mshare(name, None, {SIZE}, CREATE)")
        c.do("r.fork(name + '-s'); s = on(name + '-s'); s.buf[0] = 1; r.buf[PAGE] = 2")
        assert c.ask("(r.buf[0], s.buf[0], r.buf[PAGE], s.buf[PAGE])") == [0, 1, 2, 0]

    def test_an_empty_region(self, client: Callable[..., Client], name: str) -> None:
        c = started(client(), name, f"mshare.mshare(name, None, {SIZE}, CREATE, empty=True)")
        c.do("r.fork(name + '-s'); s = on(name + '-s'); r.mmap(PAGE, offset=0)")
        assert c.ask("(len(r.maps()), len(s.maps()))") == [1, 0]


class TestSides:
    """What is stored on one side is seen there, by every process, and nowhere else."""

    def test_both_go_on_as_they_like(self, origin: Client, on: Callable[..., Client]) -> None:
        other = on()
        origin.do("r.fork(name + '-s')")
        sides = (origin, other), (on("-s"), on("-s"))
        for number, (one, two) in enumerate(sides, 1):
            one.do(f"mark(r, {number}, {SOME[::2]})")
            two.do(f"mark(r, {number + 10}, {SOME[1::2]})")
        for number, pair in enumerate(sides, 1):
            for c in pair:
                assert c.ask(f"marks(r, {SOME[::2]})") == [number] * 5
                assert c.ask(f"marks(r, {SOME[1::2]})") == [number + 10] * 5

    @pytest.mark.parametrize("first", ["r", "s"])
    def test_a_page_that_both_store_to(self, origin: Client, first: str) -> None:
        origin.do("r.fork(name + '-s'); s = on(name + '-s')")
        second = "rs".replace(first, "")
        origin.do(f"{first}.buf[PAGE + 100] = 1; {second}.buf[PAGE + 200] = 2")
        assert origin.ask(f"[{first}.buf[PAGE + 100], {first}.buf[PAGE + 200], *marks({first}, [1])]") == [1, 0, 1000]
        assert origin.ask(f"[{second}.buf[PAGE + 100], {second}.buf[PAGE + 200], *marks({second}, [1])]") == [
            0,
            2,
            1000,
        ]

    @pytest.mark.parametrize("side", ["r", "s"])
    def test_system_calls_store_too(self, origin: Client, side: str) -> None:
        origin.do("r.fork(name + '-s'); s = on(name + '-s'); pipe = os.pipe(); os.write(pipe[1], b'x' * 2 * PAGE)")
        origin.do(f"os.readv(pipe[0], [{side}.buf[PAGE - 8:3 * PAGE - 8]])")
        assert origin.ask(f"bytes({side}.buf[PAGE - 8:3 * PAGE - 8]) == b'x' * 2 * PAGE")
        assert origin.ask(f"marks({'rs'.replace(side, '')}, [0, 1])") == [1000, 1000]

    def test_readers_of_both(self, origin: Client, on: Callable[..., Client]) -> None:
        """Attached before the fork, after it, and after the stores."""
        early = on(flags="RO")
        origin.do("r.fork(name + '-s', 0o600)")
        readers = [on("-s", "RO"), on(flags="RO")]
        origin.do(f"mark(r, 2000, {SOME[:5]})")
        twin = on("-s")
        twin.do(f"mark(r, 3000, {SOME[5:]})")
        for c in (*readers[:1], on("-s", "RO"), twin):
            assert c.ask(f"marks(r, {SOME})") == [1000] * 5 + [3000] * 5
        for c in (early, readers[1], origin):
            assert c.ask(f"marks(r, {SOME})") == [2000] * 5 + [1000] * 5
        assert readers[0].ask("fork('ctypes.memset(r.address, 1, 1)')") == -SIGSEGV

    def test_children_of_attached_processes(self, origin: Client) -> None:
        """A child of before the fork, and one of after it, store to both regions and see what their parent sees."""
        origin.do("""
            go, done = os.pipe(), os.pipe()
            pid = os.fork()
            if pid == 0:
                os.read(go[0], 1); mark(r, 2000, [0, 511]); seen = marks(r, [0, 1])
                os.write(done[1], bytes([seen == [2000, 1000]])); os._exit(0)
            r.fork(name + '-s'); s = on(name + '-s')
            os.write(go[1], b'.'); told = os.read(done[0], 1)[0]; os.waitpid(pid, 0)
            """)
        assert origin.ask("told") == 1
        assert origin.ask("(marks(r, [0, 511]), marks(s, [0, 511]))") == [[2000, 2000], [1000, 1000]]
        assert origin.ask("fork('mark(s, 3000, [1, 7]); mark(r, 4000, [7])')") == 0
        assert origin.ask("(marks(r, [1, 7]), marks(s, [1, 7]))") == [[1000, 4000], [3000, 3000]]

    def test_a_child_may_fork_the_region(self, origin: Client) -> None:
        assert origin.ask("fork(\"r.fork(name + '-s'); mark(r, 2000, [0])\")") == 0
        origin.do("s = on(name + '-s')")
        assert origin.ask("(marks(r, [0]), marks(s, [0]))") == [[2000], [1000]]


class TestFamilies:
    """Forks of forks, several of one, and their ends."""

    def test_each_of_a_chain_is_of_its_own_time(self, origin: Client) -> None:
        """Each has a page that it stored to itself, before and after it was forked, and else what its origin had."""
        origin.do("""
            regions = [r]
            for number in range(1, 8):
                regions[-1].fork(f'{name}-{number}'); regions.append(on(f'{name}-{number}'))
                mark(regions[-1], 2000 + number, [500 + number]); mark(regions[-2], 3000, [500 + number - 1, 7])
            """)
        for number in range(8):
            own = 3000 if number < 7 else 2007
            expected = [2000 + n if n < number else own if n == number else -500 - n for n in range(1, 8)]
            assert origin.ask(f"marks(regions[{number}], range(501, 508))") == expected
            assert origin.ask(f"marks(regions[{number}], [0, 7, 511])") == [1000, 3000 if number < 7 else 1000, 1000]

    def test_several_of_one_region(self, origin: Client) -> None:
        origin.do(f"""
            twins = []
            for number in range(6):
                mark(r, number, {SOME}); r.fork(f'{{name}}-{{number}}'); twins.append(on(f'{{name}}-{{number}}'))
            mark(r, 77, {SOME})
            """)
        for number in range(6):
            assert origin.ask(f"marks(twins[{number}], {SOME})") == [number] * len(SOME)

    def test_a_page_is_kept_once_for_all_that_refer_to_it(self, origin: Client) -> None:
        """Until they touch it themselves."""
        origin.do(f"""
            r.buf[:] = bytes([1]) * {SIZE}
            for number in range(5): r.fork(f'{{name}}-{{number}}')
            r.buf[:] = bytes([2]) * {SIZE}
            twins = [on(f'{{name}}-{{number}}') for number in range(5)]
            """)
        assert origin.ask("sum(t.stat().resident for t in twins)") == SIZE
        assert origin.ask(f"all(bytes(t.buf) == bytes([1]) * {SIZE} for t in twins)")

    def test_ends_in_every_order(
        self, origin: Client, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        """r, its forks s and u, and t, a fork of s: whoever is left has what it had, and memory goes with the last."""
        before = len(files_of_regions(daemon.state))
        origin.do(f"""
            def family():
                regions = dict(r=mshare.mshare(name + 'r', None, {SIZE}, CREATE, backing=r.stat().backing))
                def add(origin, twin):
                    regions[origin].fork(name + twin); regions[twin] = on(name + twin)
                mark(regions['r'], 1, {SOME}); add('r', 's'); mark(regions['r'], 2, [0, 511]); add('s', 't')
                mark(regions['s'], 3, [512]); add('r', 'u'); mark(regions['r'], 4, [1023])
                mark(regions['t'], 5, [2047])
                return regions
            seen = lambda regions: {{each: marks(region, {SOME}) for each, region in regions.items()}}
            regions = family(); right = seen(regions)
            """)
        assert origin.ask("right['r'] != right['s'] != right['t'] != right['u'] != right['r']")
        for order in itertools.permutations("rstu"):
            origin.do(f"""
                for each in {order}:
                    mshare.mshare_unlink(name + each); del regions[each]
                    for other in regions: assert marks(regions[other], [0]) == right[other][:1], {order}
                    left = sorted(regions)
                    if {order}.index(each) == 2: assert seen(regions) == {{left[0]: right[left[0]]}}, {order}
                regions = family()
                """)
        origin.do("for each in 'rstu': mshare.mshare_unlink(name + each)")
        eventually(lambda: len(files_of_regions(daemon.state)) <= before)

    def test_the_memory_of_an_origin_goes_when_nobody_needs_it(
        self, origin: Client, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        origin.do(f"r.buf[:] = bytes([1]) * {SIZE}; r.fork(name + '-s'); s = on(name + '-s'); s.munmap(0, 2 * MIB)")
        files = [file_of(origin, each, daemon.state) for each in "rs"]
        origin.do("mshare.mshare_unlink(name)")
        assert set(files) <= set(files_of_regions(daemon.state))
        held = lambda: sum(file.stat().st_blocks * 512 for file in files if file.exists())  # noqa: E731
        assert held() <= SIZE - 2 * MIB
        assert origin.ask("sum(s.buf[2 * MIB:4 * MIB])") == 2 * MIB
        assert held() <= SIZE - 2 * MIB + 2 * MIB
        origin.do(f"s.buf[4 * MIB:] = bytes([1]) * {SIZE - 4 * MIB}")
        assert held() == SIZE - 2 * MIB
        assert [file.exists() for file in files] == [False, True]
        origin.do("mshare.mshare_unlink(name + '-s')")
        eventually(lambda: not any(file.exists() for file in files))

    def test_removing_names_leaves_memory_to_those_attached(self, origin: Client, on: Callable[..., Client]) -> None:
        origin.do("r.fork(name + '-s'); r.fork(name + '-t')")
        twin = on("-s")
        for suffix in ("", "-s", "-t"):
            origin.do(f"mshare.remove(name + {suffix!r})")
        origin.do(f"mark(r, 2000, {SOME[:5]})")
        twin.do(f"mark(r, 3000, {SOME[5:]}); r.fork(name + '-v')")
        assert on("-s-v").ask(f"marks(r, {SOME})") == [1000] * 5 + [3000] * 5

    def test_forking_over_and_over_leaves_nothing(
        self, origin: Client, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        origin.do("r.fork('once'); mshare.mshare_unlink('once')")
        files, descriptors = files_of_regions(daemon.state), daemon.descriptors()
        origin.do(f"""
            for number in range(100):
                r.fork(f'{{name}}-{{number}}'); mark(r, number, {SOME})
                s = on(f'{{name}}-{{number}}'); s.buf[0]; mshare.mshare_unlink(f'{{name}}-{{number}}')
            """)
        eventually(lambda: daemon.descriptors() <= descriptors + 3)  # What puts single pages into the origin's memory.
        assert set(files_of_regions(daemon.state)) <= set(files)  # Those of tests before this one may have ended.
        assert origin.ask(f"marks(r, {SOME})") == [99] * len(SOME)


class TestForkingAgain:
    """The second fork protects only what may have been stored to since the first: the rest must be protected still."""

    @pytest.mark.parametrize("advice", ["DONTNEED", "COLLAPSE", "PAGEOUT", "POPULATE_READ", "POPULATE_WRITE"])
    def test_whatever_a_process_did_to_its_window_meanwhile(self, origin: Client, advice: str) -> None:
        number = {"DONTNEED": 4, "COLLAPSE": 25, "PAGEOUT": 21, "POPULATE_READ": 22, "POPULATE_WRITE": 23}[advice]
        origin.do(f"""
            r.fork(name + '-s'); mark(r, 2000, [1, 600])
            advise = lambda: ctypes.CDLL(None).madvise(ctypes.c_void_p(r.address), ctypes.c_size_t(r.size), {number})
            advise(); r.fork(name + '-t'); advise()
            mark(r, 3000, range(2048))
            s, t = on(name + '-s'), on(name + '-t')
            """)
        assert origin.ask("marks(s, [0, 1, 7, 600])") == [1000, 1000, 1000, -600]
        assert origin.ask("marks(t, [0, 1, 7, 600])") == [1000, 2000, 1000, 2000]
        assert origin.ask("set(marks(r, range(2048))) == {3000}")

    def test_pages_that_went_and_came_again(self, origin: Client) -> None:
        """By a change of mapping, which takes the marks of protection along."""
        origin.do("""
            r.fork(name + '-s'); r.madvise(0, MIB, MADV_REMOVE); r.mmap(MIB, offset=MIB, flags=MAP_SHARED | 0x30)
            r.munmap(2 * MIB, MIB); r.mmap(MIB, offset=2 * MIB)
            mark(r, 2000, [0, 300, 600]); r.fork(name + '-t')
            mark(r, 3000, [0, 1, 300, 301, 600, 601])
            s, t = on(name + '-s'), on(name + '-t')
            """)
        assert origin.ask("marks(s, [0, 1, 7, 511, 512, 513])") == [1000] * 6
        assert origin.ask("marks(t, [0, 300, 600])") == [2000] * 3
        assert origin.ask("[t.buf[page * PAGE] for page in (1, 301, 601)]") == [0] * 3


class TestAlone:
    """A region whose forks have ended is native again."""

    def test_no_store_is_reported_any_more(
        self, origin: Client, on: Callable[..., Client], eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        other, reader = on(), on(flags="RO")
        origin.do("r.fork(name + '-s'); r.fork(name + '-t'); s = on(name + '-s'); mark(r, 2000, [0])")
        origin.do(UNSEEN)
        assert not origin.ask("unseen()")
        origin.do("for twin in 'st': mshare.mshare_unlink(f'{name}-{twin}')")
        eventually(lambda: origin.ask("unseen()"))
        origin.do("before = r.stat().faults")
        for number, c in enumerate((origin, other)):
            c.do(f"mark(r, {3000 + number}, {SOME[number::2]})")
        seen = [3000 + number % 2 for number in range(len(SOME))]
        assert [c.ask(f"marks(r, {SOME})") for c in (origin, other, reader)] == [seen] * 3
        assert origin.ask("r.stat().faults - before") == 0
        origin.do(f"r.fork(name + '-u'); mark(r, 4000, {SOME})")
        assert on("-u").ask(f"marks(r, {SOME})") == seen

    def test_so_is_one_that_has_outlived_its_origin_and_was_touched_throughout(
        self, origin: Client, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        origin.do("r.fork(name + '-s'); mshare.mshare_unlink(name); r = on(name + '-s')")
        origin.do(f"seen = sum(r.buf[:{SIZE}])" + UNSEEN)
        eventually(lambda: origin.ask("unseen()"))
        assert origin.ask(f"marks(r, {SOME[:4]})") == [1000] * 4

    def test_what_was_armed_otherwise_stays_so(
        self, origin: Client, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        origin.do("r.munmap(0, MIB); r.mprotect(4 * MIB, MIB, 1)")
        origin.do(UNSEEN + "r.fork(name + '-s'); mshare.mshare_unlink(name + '-s')")
        eventually(lambda: origin.ask("unseen()"))
        assert origin.ask("fork('ctypes.memset(r.address + 4 * MIB, 1, 1)')") == -SIGSEGV
        assert origin.ask("fork('r.buf[0]')") == -SIGBUS


class TestWhoMay:
    """Forking is writing, and creating."""

    def test_the_mode_less_the_umask_and_the_forker_is_the_owner(
        self, origin: Client, daemon: Daemon, client: Callable[..., Client], name: str
    ) -> None:
        origin.do("os.umask(0o027); r.fork(name + '-s', 0o666); os.chmod(connect(find_mount()).mount / name, 0o604)")
        made = (daemon.mount / f"{name}-s").stat()
        assert (made.st_mode & 0o777, made.st_uid) == (0o640, 0)
        reader = started(client(uid=NOBODY), name, "mshare.mshare(name, None, 0, RO)")
        assert reader.error_of(f"mshare.mshare({name + '-s'!r}, 0x6000_0000_0000, 0, RO)").errno == errno.EACCES
        assert reader.error_of("r.fork(name + '-u')").errno == errno.EACCES
        origin.do("os.chmod(connect(find_mount()).mount / name, 0o606)")
        reader.do("r.detach(); r = mshare.mshare(name, None, 0, RW); r.fork(name + '-u'); u = on(name + '-u')")
        made = (daemon.mount / f"{name}-u").stat()
        assert (made.st_mode & 0o777, made.st_uid) == (0o600, NOBODY)
        reader.do(f"mark(u, 2000, {SOME})")
        assert origin.ask(f"marks(r, {SOME})") == [1000] * len(SOME)

    @pytest.mark.parametrize(
        ("mask", "mode", "left"), [(0o277, 0o600, 0o400), (0o077, 0o600, 0o600), (0o777, 0o700, 0)]
    )
    def test_the_umask_binds_the_owner_too(
        self, origin: Client, daemon: Daemon, name: str, mask: int, mode: int, left: int
    ) -> None:
        origin.do(f"os.umask({mask}); r.fork(name + '-s', {mode}); os.umask(0o022)")
        assert (daemon.mount / f"{name}-s").stat().st_mode & 0o777 == left

    def test_names_that_cannot_be(self, origin: Client, daemon: Daemon) -> None:
        origin.do("r.fork(name + '-s')")
        before = sorted(daemon.mount.iterdir())
        for bad, number in [
            ("name", errno.EEXIST),
            ("name + '-s'", errno.EEXIST),
            ("''", errno.EINVAL),
            ("'a/b'", errno.EINVAL),
            ("'.hidden'", errno.EINVAL),
            ("'mshare_info'", errno.EINVAL),
            ("'x' * 256", errno.ENAMETOOLONG),
        ]:
            assert origin.error_of(f"r.fork({bad})").errno == number, bad
        assert origin.error_of("r.fork('modes', 0o2600)").errno == errno.EINVAL
        assert sorted(daemon.mount.iterdir()) == before
        assert origin.ask(f"marks(r, {SOME})") == [1000] * len(SOME)

    def test_a_detached_region_cannot(self, origin: Client) -> None:
        origin.do("r.detach()")
        assert origin.error_of("r.fork(name + '-s')").kind == "ValueError"

    def test_it_takes_write_permission_on_the_mount(
        self, start_daemon: Callable[..., Daemon], client: Callable[..., Client]
    ) -> None:
        closed = start_daemon("--mode", "755")
        c = started(client(closed), "it", f"mshare.mshare('it', None, {SIZE}, CREATE, 0o666)")
        c.do("os.chmod(connect(find_mount()).mount / 'it', 0o666)")
        other = started(client(closed, uid=NOBODY), "it", "mshare.mshare('it', None, 0, RW)")
        assert other.error_of("r.fork('twin')").errno == errno.EACCES
        assert c.error_of("r.fork('it')").errno == errno.EEXIST
        c.do("r.fork('twin')")

    def test_limits(self, start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
        """ENOSPC, and nothing has changed."""
        small = start_daemon("--max-bytes", "20M", "--max-regions", "3")
        c = started(client(small), "it", f"mshare.mshare('it', None, {SIZE}, CREATE)")
        c.do(f"mark(r, 1000, {SOME}); r.fork('twin')")
        error = c.error_of("r.fork('second')")
        assert (error.errno, "--max-bytes" in error.text) == (errno.ENOSPC, True)
        c.do("mshare.mshare('third', None, 2 * MIB, CREATE)")
        assert "--max-regions" in c.error_of("r.fork('second')").text
        assert len(files_of_regions(small.state)) == 3
        c.do(f"mark(r, 2000, {SOME}); s = on('twin')")
        assert c.ask(f"(marks(r, {SOME}), marks(s, {SOME}))") == [[2000] * len(SOME), [1000] * len(SOME)]
        c.do("mshare.mshare_unlink('twin'); r.fork('second')")


def test_every_first_touch_by_the_daemon(start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
    """Forks of regions whose every page is reported once."""
    watching = start_daemon("--paging", "all")
    for backing in ("thp", "4k"):
        c = started(client(watching), backing, f"mshare.mshare(name, None, {SIZE}, CREATE, backing={backing!r})")
        c.do(f"mark(r, 1000, {SOME}); r.fork(name + '-s'); s = on(name + '-s')")
        c.do(f"mark(r, 2000, {SOME[:5]}); mark(s, 3000, {SOME[5:]}); r.buf[100 * PAGE] = 7; s.buf[101 * PAGE] = 8")
        assert c.ask(f"marks(r, {SOME})") == [2000] * 5 + [1000] * 5
        assert c.ask(f"marks(s, {SOME})") == [1000] * 5 + [3000] * 5
        assert c.ask("[x.buf[page * PAGE] for x in (r, s) for page in (100, 101)]") == [7, 0, 0, 8]
        c.do("s.fork(name + '-t'); t = on(name + '-t'); mshare.mshare_unlink(name); mshare.mshare_unlink(name + '-s')")
        assert c.ask(f"marks(t, {SOME})") == [1000] * 5 + [3000] * 5


def test_a_user_without_privileges(start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
    """A daemon that hears of user code's faults only, and of no forks."""
    own = start_daemon(uid=NOBODY)
    c = started(client(own, uid=NOBODY), "it", f"mshare.mshare('it', None, {SIZE}, CREATE)")
    c.do(f"mark(r, 1000, {SOME}); r.fork('twin'); s = on('twin'); mark(r, 2000, {SOME[:5]}); mark(s, 3000, {SOME[5:]})")
    assert c.ask("fork('mark(r, 4000, [1500]); mark(s, 5000, [1]); mark(r, 6000, [0])')") == 0
    assert c.ask(f"marks(r, {SOME})") == [6000, *[2000] * 4, *[1000] * 3, 4000, 1000]
    assert c.ask(f"marks(s, {SOME})") == [1000, 5000, *[1000] * 3, *[3000] * 5]
