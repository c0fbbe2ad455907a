"""Reference pages in memory of huge pages: each page is 2 MiB of the pattern."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Client
from hugepages import HUGE, SIGBUS, SIGSEGV, Pool, pool, touch

pytestmark = pytest.mark.pool

SHOW = """
SHOW = MAP_PRIVATE | MAP_ANONYMOUS | mshare.MAP_REFPAGE
def is_aa(page): return bytes(r.buf[page * H : page * H + H]) == b'\\xaa' * H
"""


@pytest.fixture
def pair(creator: Client, other: Client) -> tuple[Client, Client]:
    """Two processes on a region of 1 GiB, whose pages 8 to 23 show 0xAA."""
    for c in (creator, other):
        c.do(SHOW)
    creator.do("r.mmap(16 * H, flags=SHOW | 0x10, offset=8 * H, refpage=mshare.refpage_create(b'\\xaa'))")
    return creator, other


def test_pages_show_the_pattern_and_are_taken_as_they_are_touched(pair: tuple[Client, Client], before: Pool) -> None:
    a, b = pair
    assert pool() == before.with_region(mapped=512, touched=4)
    assert a.ask("is_aa(8) and is_aa(23)")
    b.do("r.buf[9 * H + 5] = 1")
    assert pool() == before.with_region(mapped=512, touched=7)
    for c in pair:
        assert c.ask("(is_aa(8), r.buf[9 * H + 4], r.buf[9 * H + 5], r.buf[7 * H], r.buf[3 * H])") == [
            True,
            0xAA,
            1,
            0,
            1,
        ]
    assert a.ask("r.stat().clean // H") == 2


def test_clean_pages_go_back_and_stay_promised(pair: tuple[Client, Client], before: Pool) -> None:
    a, b = pair
    a.do("for page in range(8, 16): r.buf[page * H]")
    b.do("r.buf[8 * H] = r.buf[20 * H] = 1; r.madvise(8 * H, 16 * H, 20)")
    assert pool() == before.with_region(mapped=512, touched=6)
    assert a.ask("(r.buf[8 * H], is_aa(9), r.buf[20 * H], r.buf[20 * H + 1])") == [1, True, 1, 0xAA]
    b.do("r.madvise(8 * H, 16 * H, MADV_REMOVE)")
    assert a.ask("all(map(is_aa, range(8, 24)))")


def test_protected_unmapped_and_forked(pair: tuple[Client, Client], attached: Callable[..., Client]) -> None:
    a, b = pair
    a.do("r.buf[8 * H] = 1; r.buf[9 * H]; r.mprotect(8 * H, 2 * H, 1)")
    assert touch(b, 8 * HUGE, store=True) == touch(b, 9 * HUGE, store=True) == SIGSEGV
    assert b.ask("(r.buf[8 * H], is_aa(9))") == [1, True]
    b.do("r.mprotect(8 * H, 2 * H, 0)")
    assert touch(a, 8 * HUGE) == touch(a, 9 * HUGE) == SIGSEGV
    b.do("r.mprotect(8 * H, 2 * H, 3); r.munmap(10 * H, H)")
    assert touch(a, 10 * HUGE) == SIGBUS
    a.do("r.fork(name + '-2'); r.buf[8 * H] = 2; r.buf[9 * H] = 3; r.buf[11 * H] = 4")
    b.do("r.detach(); r = mshare.mshare(name + '-2', 0x6800_0000_0000, 0, RW)")
    assert b.ask("(r.buf[8 * H], r.buf[8 * H + 1], is_aa(9), is_aa(11))") == [1, 0xAA, True, True]
    assert a.ask("[r.buf[page * H] for page in (8, 9, 11, 12)]") == [2, 3, 4, 0xAA]
    assert attached("RO", None).ask("[r.buf[page * H] for page in (8, 9, 11, 12)]") == [2, 3, 4, 0xAA]
    b.do("r.detach(); mshare.remove(name + '-2')")
