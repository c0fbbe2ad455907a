"""Forks of regions with holes, protections and files in them, and changes of either side afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client
from twins import MIB, PAGE, SIGBUS, SIGSEGV, started, touch

SIZE = 8 * MIB
ALL = f"range({SIZE // PAGE})"
FIXED = "flags=MAP_SHARED | MAP_ANONYMOUS | 0x10"


@pytest.fixture(params=["thp", "4k"])
def origin(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> Client:
    """A process on a region of 8 MiB whose pages are all marked 1000; ``twin()`` forks it, as ``s`` of that process."""
    c = started(client(), name, f"mshare.mshare(name, None, {SIZE}, CREATE, backing={request.param!r})")
    c.do(f"""
        mark(r, 1000, {ALL})
        def twin(mark='-s'):
            global s
            r.fork(name + mark); s = on(name + mark)
        def layout(region): return [(v.offset, v.length, v.prot) for v in region.maps()]
        """)
    return c


def touches(c: Client, region: str, *offsets: int) -> list[int]:
    """What loads from some places end in."""
    return [touch(c, f"{region}.buf[{offset}]") for offset in offsets]


class TestLayouts:
    """A twin has the mappings of its origin."""

    def test_holes_and_protections(self, origin: Client) -> None:
        origin.do("r.munmap(MIB, MIB); r.mprotect(2 * MIB, MIB, PROT_READ); r.mprotect(4 * MIB, 2 * MIB, 0); twin()")
        assert origin.ask("layout(s) == layout(r) and len(layout(s)) == 5")
        for region in "rs":
            assert touches(origin, region, 0, MIB, 2 * MIB - 1, 2 * MIB, 4 * MIB) == [0, SIGBUS, SIGBUS, 0, SIGSEGV]
            assert touch(origin, f"{region}.buf[2 * MIB]", store=True) == SIGSEGV
            assert touch(origin, f"{region}.buf[6 * MIB]", store=True) == 0

    def test_what_was_hidden_each_side_has_for_itself(self, origin: Client) -> None:
        origin.do("r.mprotect(4 * MIB, 2 * MIB, 0); twin()")
        origin.do("r.mprotect(4 * MIB, 2 * MIB, 3); mark(r, 2000, range(1024, 1300))")
        origin.do("s.mprotect(4 * MIB, MIB, PROT_READ)")
        assert origin.ask("sorted(set(marks(s, range(1024, 1280))))") == [1000]
        origin.do("s.mprotect(4 * MIB, 2 * MIB, 3); mark(s, 3000, range(1400, 1536))")
        assert origin.ask("sorted(set(marks(s, range(1024, 1536))))") == [1000, 3000]
        assert origin.ask("sorted(set(marks(r, range(1024, 1300))))") == [2000]
        assert origin.ask("sorted(set(marks(r, range(1300, 1536))))") == [1000]

    def test_what_is_hidden_and_shown_again_in_a_twin(self, origin: Client) -> None:
        """Before it has touched it: it gets what it refers to first."""
        origin.do("twin(); s.mprotect(0, 4 * MIB, 0); mark(r, 2000, range(2048))")
        assert touches(origin, "s", 0, 4 * MIB - 1, 4 * MIB) == [SIGSEGV, SIGSEGV, 0]
        origin.do("s.mprotect(0, 4 * MIB, PROT_READ)")
        assert origin.ask(f"set(marks(s, {ALL})) == {{1000}}")
        assert touch(origin, "s.buf[0]", store=True) == SIGSEGV

    def test_read_only_memory_that_may_be_written_later(self, origin: Client) -> None:
        origin.do(f"r.mprotect(0, {SIZE}, PROT_READ); twin()")
        origin.do(f"r.mprotect(0, {SIZE}, 3); mark(r, 2000, range(0, 2048, 3))")
        assert touch(origin, "s.buf[0]", store=True) == SIGSEGV
        assert origin.ask(f"set(marks(s, {ALL})) == {{1000}}")
        origin.do(f"s.mprotect(0, {SIZE}, 3); mark(s, 3000, [5])")
        assert origin.ask("(marks(s, [4, 5, 6]), marks(r, [5, 6, 7]))") == [[1000, 3000, 1000], [1000, 2000, 1000]]


class TestChanges:
    """What one side does to its mappings the other does not notice."""

    @pytest.mark.parametrize("side", ["r", "s"])
    @pytest.mark.parametrize("change", ["munmap", "map over", "remove", "hide"])
    def test_one_side_changes(self, origin: Client, side: str, change: str) -> None:
        call = {
            "munmap": "munmap(MIB + PAGE, 3 * MIB)",
            "map over": f"mmap(3 * MIB, offset=MIB + PAGE, {FIXED})",
            "remove": "madvise(MIB + PAGE, 3 * MIB, MADV_REMOVE)",
            "hide": "mprotect(MIB + PAGE, 3 * MIB, 0)",
        }[change]
        other = "rs".replace(side, "")
        origin.do(f"twin(); mark({other}, 1000, [700]); before = layout({other}); {side}.{call}")
        assert origin.ask(f"layout({other}) == before")
        assert origin.ask(f"set(marks({other}, {ALL})) == {{1000}}")
        assert origin.ask(f"marks({side}, [0, 256, 1025, 2047])") == [1000] * 4
        expected = {"munmap": SIGBUS, "hide": SIGSEGV}.get(change, 0)
        assert touches(origin, side, MIB + PAGE, 4 * MIB) == [expected] * 2
        if not expected:
            assert origin.ask(f"sum({side}.buf[MIB + PAGE:4 * MIB + PAGE])") == 0
        if change == "hide":
            origin.do(f"{side}.mprotect(MIB + PAGE, 3 * MIB, 3)")
            assert origin.ask(f"set(marks({side}, {ALL})) == {{1000}}")

    def test_new_memory_is_of_its_own_side(self, origin: Client) -> None:
        origin.do("r.munmap(0, 2 * MIB); twin()")
        origin.do("r.mmap(2 * MIB, offset=0); mark(r, 5, range(512)); s.mmap(MIB, offset=0)")
        assert origin.ask("sum(s.buf[:MIB])") == 0
        origin.do("s.buf[7] = 9; r.fork(name + '-t'); t = on(name + '-t'); mark(r, 6, range(512))")
        assert origin.ask("(r.buf[7], s.buf[7], sorted(set(marks(t, range(512)))))") == [0, 9, [5]]

    def test_an_origin_that_ends_in_the_middle_of_it(self, origin: Client) -> None:
        origin.do("twin(); r.munmap(0, 2 * MIB); r.mprotect(2 * MIB, 2 * MIB, 0); mshare.mshare_unlink(name)")
        assert origin.ask(f"set(marks(s, {ALL})) == {{1000}}")


class TestFiles:
    """Mapped files: shared ones stay shared with the file, of private ones each side has its copy."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """A file of 512 pages, each with its number and 100."""
        path = tmp_path / "data"
        path.write_bytes(b"".join((100 + page).to_bytes(8, "little") + bytes(PAGE - 8) for page in range(512)))
        return path

    @pytest.fixture
    def mapped(self, origin: Client, path: Path) -> Client:
        """The file in place of the second 2 MiB of the region, shared, and of the third, private."""
        origin.do(f"f = os.open({str(path)!r}, os.O_RDWR)")
        for number, flag in ((1, "MAP_SHARED"), (2, "MAP_PRIVATE")):
            origin.do(f"r.mmap(2 * MIB, flags={flag} | 0x10, offset={number} * 2 * MIB, fd=f)")
        origin.do("os.close(f)")
        return origin

    def seen(self, c: Client, region: str, first: int, pages: list[int]) -> list[int]:
        """What stands at the start of pages of a mapping that starts at page ``first``, beyond what the file had."""
        numbers = c.ask(f"marks({region}, {[first + page for page in pages]})")
        return [number + first - 100 for number in numbers]

    def store(self, c: Client, region: str, first: int, pages: list[int], number: int) -> None:
        c.do(f"mark({region}, {100 + number - first}, {[first + page for page in pages]})")

    def in_file(self, path: Path, pages: list[int]) -> list[int]:
        data = path.read_bytes()
        return [int.from_bytes(data[page * PAGE : page * PAGE + 8], "little") - 100 - page for page in pages]

    def test_private_pages(self, mapped: Client, path: Path) -> None:
        """Those that were stored to, read, or never touched before the fork."""
        self.store(mapped, "r", 1024, [0, 1, 100], 1000)
        assert self.seen(mapped, "r", 1024, [2]) == [0]
        mapped.do("twin()")
        self.store(mapped, "r", 1024, [1, 2, 3], 2000)
        self.store(mapped, "s", 1024, [100, 4], 3000)
        assert self.seen(mapped, "r", 1024, [0, 1, 2, 3, 4, 100, 511]) == [1000, 2000, 2000, 2000, 0, 1000, 0]
        assert self.seen(mapped, "s", 1024, [0, 1, 2, 3, 4, 100, 511]) == [1000, 1000, 0, 0, 3000, 3000, 0]
        assert self.in_file(path, [0, 1, 2, 3, 4, 100]) == [0] * 6

    def test_shared_pages(self, mapped: Client, path: Path) -> None:
        """What was stored before the fork both have, from the file; and both bring to it what they store."""
        self.store(mapped, "r", 512, [0, 1], 1000)
        mapped.do("twin()")
        assert self.in_file(path, [0, 1, 2]) == [1000, 1000, 0]
        self.store(mapped, "r", 512, [1, 500], 2000)
        self.store(mapped, "s", 512, [3], 3000)
        assert self.seen(mapped, "s", 512, [0, 1, 3]) == [1000, 1000, 3000]
        mapped.do("r.msync()")
        assert self.in_file(path, [0, 1, 500, 3]) == [1000, 2000, 2000, 0]
        assert self.seen(mapped, "s", 512, [500]) == [2000]
        mapped.do("s.msync()")
        assert self.in_file(path, [0, 1, 500, 3]) == [1000, 2000, 2000, 3000]

    def test_a_twin_needs_neither_origin_nor_descriptor(self, mapped: Client, path: Path) -> None:
        self.store(mapped, "r", 512, [0], 1000)
        self.store(mapped, "r", 1024, [0], 1000)
        mapped.do("twin(); mshare.mshare_unlink(name)")
        self.store(mapped, "s", 512, [1], 2000)
        assert self.seen(mapped, "s", 512, [0, 1, 2]) == [1000, 2000, 0]
        assert self.seen(mapped, "s", 1024, [0, 1]) == [1000, 0]
        mapped.do("mshare.mshare_unlink(name + '-s')")
        assert self.in_file(path, [0, 1, 2]) == [1000, 2000, 0]

    def test_forks_while_a_shared_file_is_stored_to(self, mapped: Client, path: Path) -> None:
        """No store is lost to the file."""
        mapped.do("""
            stop = threading.Event()
            def work():
                n = 0
                while not stop.is_set():
                    n += 1
                    for page in (512, 513, 900, 1030): struct.pack_into('Q', r.buf, page * PAGE + 8, n)
            thread = threading.Thread(target=work); thread.start()
            for number in range(10): twin(f'-{number}'); mshare.mshare_unlink(s.name)
            stop.set(); thread.join(); r.msync()
            """)
        data = path.read_bytes()
        for page in (0, 1, 388):
            seen = mapped.ask(f"bytes(r.buf[(512 + {page}) * PAGE:][:16]).hex()")
            assert data[page * PAGE : page * PAGE + 16].hex() == seen
