"""Forks when there is no memory for a copy: who stored gets a SIGBUS, and every other byte stays right."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from twins import MIB, PAGE, SIGBUS, files_of_regions, started, touch

SIZE = 4 * MIB
ALL = f"range({SIZE // PAGE})"


class Ballast:
    """A file that takes up the memory of the daemon's regions of one kind."""

    def __init__(self, place: Path) -> None:
        self._path = place / "ballast"
        self._place = place

    def fill(self, leave: int = 0) -> None:
        """Leave some pages free, and no more."""
        with self._path.open("ab") as file:
            held = os.fstat(file.fileno()).st_size
            os.posix_fallocate(file.fileno(), held, self._free() * PAGE)
            os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - leave * PAGE)
        assert self._free() == leave

    def _free(self) -> int:
        return os.statvfs(self._place).f_bavail

    def drop(self) -> None:
        self._path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def small(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon("--max-bytes", "32M")


@pytest.fixture
def ballast(small: Daemon, c: Client) -> Iterator[Ballast]:
    """Whose memory is that of the regions of ``c``."""
    ballast = Ballast(small.state / c.ask("r.stat().backing"))
    yield ballast
    ballast.drop()
    c.do("for x in [r, *family.values()]: x.closed or mshare.mshare_unlink(x.name)")
    assert files_of_regions(small.state) == []


@pytest.fixture(params=["thp", "4k"])
def c(client: Callable[..., Client], small: Daemon, name: str, request: pytest.FixtureRequest) -> Client:
    """A process on a region of 4 MiB whose pages are all marked 1000, and on its forks s, t and u."""
    c = started(client(small), name, f"mshare.mshare(name, None, {SIZE}, CREATE, backing={request.param!r})")
    c.do(f"mark(r, 1000, {ALL})")
    c.do("family = {}\nfor twin in 'stu': r.fork(name + twin); family[twin] = globals()[twin] = on(name + twin)")
    return c


def right(c: Client, *regions: str) -> bool:
    """Whether regions are as the origin was."""
    return all(c.ask(f"set(marks({region}, {ALL})) == {{1000}}") for region in regions)


def test_a_store_that_leaves_no_memory_for_the_copy(c: Client, ballast: Ballast) -> None:
    """On the older side, or on the younger one, where a load needs it too; when there is memory, work goes on."""
    ballast.fill()
    assert touch(c, "r.buf[0]", store=True) == SIGBUS
    assert touch(c, "s.buf[0]", store=True) == SIGBUS
    assert touch(c, "s.buf[0]") == SIGBUS
    assert right(c, "r")
    ballast.drop()
    assert right(c, "s", "t")
    c.do(f"mark(r, 2000, {ALL}); mark(t, 3000, {ALL})")
    assert right(c, "s", "u")


def test_pages_that_nobody_has_touched(c: Client, ballast: Ballast) -> None:
    """Are zeros, and need memory too."""
    c.do("r.munmap(0, 2 * MIB); r.mmap(2 * MIB, offset=0); r.fork(name + 'v'); v = family['v'] = on(name + 'v')")
    c.do("w = on(name + 'v', RO)")
    ballast.fill()
    for region in "vw":
        assert touch(c, f"{region}.buf[5 * PAGE]") == SIGBUS
    ballast.drop()
    assert c.ask("(sum(w.buf[:MIB]), sum(v.buf[:2 * MIB]))") == [0, 0]
    c.do("w.detach()")


def test_as_many_copies_as_there_is_memory_for(c: Client, ballast: Ballast) -> None:
    ballast.fill(leave=3)
    c.do("mark(r, 2000, [0, 5]); s.buf[9 * PAGE]")
    assert [touch(c, f"r.buf[{page} * PAGE]", store=True) for page in (0, 5, 6)] == [0, 0, SIGBUS]
    ballast.drop()
    assert right(c, "s", "t", "u")


def test_where_there_is_not_enough_for_many_at_once_each_comes_alone(c: Client, ballast: Ballast) -> None:
    ballast.fill(leave=10)
    c.do("mark(r, 2000, range(6)); s.buf[9 * PAGE]; mark(s, 3000, range(10, 13))")
    assert [touch(c, f"r.buf[{page} * PAGE]", store=True) for page in (3, 6)] == [0, SIGBUS]
    ballast.drop()
    c.do("mark(r, 1000, range(6)); mark(s, 1000, range(10, 13))")
    assert right(c, "r", "s", "t", "u")
    c.do(f"mark(r, 2000, {ALL})")
    assert right(c, "s", "t", "u")


def test_system_calls_fail_and_go_on_later(c: Client, ballast: Ballast) -> None:
    """With EFAULT, and nothing is there in place of what was not copied."""
    c.do("reader, writer = os.pipe(); os.write(writer, b'x' * 64)")
    ballast.fill()
    assert c.error_of("os.write(writer, s.buf[:8])").errno == errno.EFAULT
    assert c.error_of("os.readv(reader, [s.buf[PAGE:PAGE + 8]])").errno == errno.EFAULT
    assert c.error_of("os.readv(reader, [r.buf[PAGE:PAGE + 8]])").errno == errno.EFAULT
    ballast.drop()
    c.do("s.mprotect(0, 16 * PAGE, 1); s.mprotect(0, 16 * PAGE, 3)")
    assert c.ask("(marks(s, [0, 1]), marks(r, [1]), marks(t, [1]))") == [[1000, 1000], [1000], [1000]]


@pytest.mark.parametrize("call", ["munmap(0, SIZE)", "mprotect(0, SIZE, 0)", "madvise(0, SIZE, MADV_REMOVE)", "mmap"])
def test_a_change_that_leaves_no_memory_for_the_copies(c: Client, ballast: Ballast, call: str) -> None:
    """It fails, changes nothing, and of what was copied half way nothing is ever seen."""
    call = call.replace("SIZE", str(SIZE))
    if call == "mmap":
        call = f"mmap({SIZE}, offset=0, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10)"
    ballast.fill(leave=300)
    assert c.error_of(f"r.{call}").errno == errno.ENOMEM
    ballast.fill()
    assert right(c, "r")
    c.do("for page in range(0, 1024, 64): fork(f'mark(s, 3000, [{page}])')")
    ballast.drop()
    stored = c.ask(f"[page for page in {ALL} if marks(s, [page]) == [3000]]")
    c.do(f"r.{call}")
    assert right(c, "t", "u")
    assert c.ask(f"[page for page in {ALL} if marks(s, [page]) != [1000]]") == stored
    if call.startswith("mprotect"):
        c.do(f"r.mprotect(0, {SIZE}, 3)")
        assert right(c, "r")


def test_pages_of_an_origin_that_has_ended_go_one_by_one(c: Client, ballast: Ballast) -> None:
    """With the last twin that refers to them, so that reading all of it takes a page more, not twice the memory."""
    c.do("for x in (r, t, u): mshare.mshare_unlink(x.name)")
    ballast.fill(leave=1)
    assert right(c, "s")


def test_what_nobody_needs_any_more_is_given_back_before_anybody_suffers(c: Client, ballast: Ballast) -> None:
    """Pages of an origin that has ended, which its last twin does not map any more."""
    c.do("for x in (r, t, u): mshare.mshare_unlink(x.name)")
    c.do(f"s.munmap(2 * MIB, {SIZE} - 2 * MIB)")
    ballast.fill()
    assert c.ask("set(marks(s, range(512))) == {1000}")
    c.do("s.fork(name + 'v'); mark(s, 2000, range(512)); mshare.mshare_unlink(name + 'v')")


def test_a_fork_of_hidden_memory_needs_none_of_the_regions(c: Client, ballast: Ballast) -> None:
    c.do(f"r.mprotect(0, {SIZE}, 0)")
    ballast.fill()
    c.do("r.fork(name + 'v'); family['v'] = v = on(name + 'v')")
    ballast.drop()
    c.do(f"v.mprotect(0, {SIZE}, 1); r.mprotect(0, {SIZE}, 3)")
    assert right(c, "r", "s", "v")
