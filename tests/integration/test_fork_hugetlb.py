"""Forks of regions in huge pages: the same rules, a page being 2 MiB."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client, Daemon
from hugepages import HUGE, SIGBUS, pages_left, touch

pytestmark = pytest.mark.pool

HELPERS = """
def fork_as(mark, address):
    r.fork(name + mark); return mshare.mshare(name + mark, address, 0, RW)
def first(region, pages): return [region.buf[page * H] for page in pages]
"""


@pytest.fixture
def origin(creator: Client) -> Client:
    creator.do(HELPERS)
    return creator


def test_each_side_has_its_own(origin: Client, other: Client) -> None:
    origin.do("s = fork_as('-s', 0x5000_0000_0000); r.buf[0] = 2; s.buf[H] = 3; r.buf[9 * H] = 4; s.buf[8 * H] = 5")
    other.do(f"{HELPERS}\nr.buf[2 * H + 5] = 6; s = mshare.mshare(name + '-s', 0x5000_0000_0000, 0, RO)")
    for c in (origin, other):
        assert c.ask("first(r, [0, 1, 2, 3, 8, 9])") == [2, 1, 1, 1, 0, 4]
        assert c.ask("first(s, [0, 1, 2, 3, 8, 9])") == [1, 3, 1, 1, 5, 0]
        assert c.ask("(r.buf[2 * H + 5], s.buf[2 * H + 5], sum(s.buf[3 * H:4 * H]))") == [6, 1, 2 << 20]
    assert origin.ask("(r.stat().tables_shared, s.stat().resident // H)") == [False, 6]


def test_families(origin: Client) -> None:
    """Forks of forks, several of one; the origin ends first, and the memory with the last."""
    origin.do("""
        s = fork_as('-s', 0x5000_0000_0000); r.buf[0] = 2; t = fork_as('-t', 0x5100_0000_0000)
        s.buf[H] = 3; s.fork(name + '-u'); u = mshare.mshare(name + '-u', 0x5200_0000_0000, 0, RW)
        s.buf[2 * H] = 4; r.buf[3 * H] = 5; mshare.mshare_unlink(name)
        """)
    assert origin.ask("[first(region, range(5)) for region in (s, t, u)]") == [
        [1, 3, 4, 1, 0],
        [2, 1, 1, 1, 0],
        [1, 3, 1, 1, 0],
    ]
    origin.do("mshare.mshare_unlink(name + '-s'); u.buf[0] = 9")
    assert origin.ask("[first(region, range(5)) for region in (t, u)]") == [[2, 1, 1, 1, 0], [9, 3, 1, 1, 0]]


def test_holes_protections_and_changes(origin: Client) -> None:
    origin.do("r.munmap(2 * H, H); r.mprotect(3 * H, H, 0); s = fork_as('-s', 0x5000_0000_0000)")
    assert touch(origin, 2 * HUGE) == SIGBUS
    origin.do("r.munmap(0, H); r.mprotect(3 * H, H, 3); r.buf[3 * H] = 8; s.mprotect(3 * H, H, PROT_READ)")
    assert origin.ask("first(s, [0, 1, 3])") == [1, 1, 1]
    origin.do("s.mprotect(H, H, 0); r.buf[H] = 7; s.mprotect(H, H, PROT_READ); r.madvise(H, H, MADV_REMOVE)")
    assert origin.ask("(first(s, [0, 1, 3]), first(r, [1, 3]))") == [[1, 1, 1], [0, 8]]


def test_no_pages_for_a_copy(origin: Client, client: Callable[..., Client], hugetlb: Daemon) -> None:
    """Somebody else has all that was not promised: who stores gets SIGBUS, and goes on when there are pages again."""
    origin.do("s = fork_as('-s', 0x5000_0000_0000); t = mshare.mshare(s.name, 0x5100_0000_0000, 0, RO)")
    somebody = client(hugetlb)
    somebody.do(f"pages = mmap.mmap(-1, {pages_left()} * 2 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)")
    assert touch(origin, 0, store=True) == SIGBUS
    assert origin.error_of("r.munmap(0, H)").errno == errno.ENOMEM
    for place in ("s.buf[H]", "s.buf[100 * H]", "t.buf[H]", "t.buf[100 * H]"):  # Some that nobody has touched.
        assert origin.ask(f"-fork({place!r})") == SIGBUS, place
    assert origin.ask("first(r, range(5))") == [1, 1, 1, 1, 0]
    origin.do("r.buf[5 * H] = 5")  # What is promised, and in no fork, is there.
    somebody.do("pages.close()")
    origin.do("r.munmap(0, H); r.buf[H] = 2")
    assert origin.ask("first(s, range(6))") == [1, 1, 1, 1, 0, 0]
