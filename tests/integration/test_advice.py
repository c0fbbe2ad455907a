"""Advice about a region's memory: what has a meaning there has it for everybody; none of it loses or uncovers bytes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
PAGE = 4096
SIGBUS, SIGSEGV = 7, 11
ELSEWHERE = 0x6000_0000_0000

ADVISING = """
from mmap import *
def advise(offset, length, advice):
    "0, or the errno."
    try: r.madvise(offset, length, advice)
    except OSError as error: return error.errno
    return 0
def resident():
    "Offset, and how many pages are there, of each mapping."
    return [(v.offset, v.resident // PAGE) for v in r.maps()]
"""
WILLNEED, DONTNEED, REMOVE, HUGEPAGE, NOHUGEPAGE, COLD, PAGEOUT = 3, 4, 9, 14, 15, 20, 21
POPULATE_READ, POPULATE_WRITE, COLLAPSE = 22, 23, 25
HARMLESS = [WILLNEED, DONTNEED, COLD, PAGEOUT, HUGEPAGE, NOHUGEPAGE]
MAP_FILE_SHARED, MAP_FILE_PRIVATE, MAP_MEMORY, MAP_POPULATE = 1, 2, 0x21, 0x8000


@pytest.fixture(scope="module")
def daemons(start_daemon: Callable[..., Daemon]) -> dict[str, Daemon]:
    """One that pages what it must, and one that pages everything."""
    return {paging: start_daemon("--paging", paging) for paging in ("auto", "all")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 2 MiB without a zero in it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(1, 256)) * (2 * MIB // 255) + b"f" * (2 * MIB % 255))
    return path


@pytest.fixture(params=["thp-auto", "4k-auto", "4k-all"])
def pair(
    request: pytest.FixtureRequest, daemons: dict[str, Daemon], client: Callable[..., Client], path: Path, name: str
) -> tuple[Client, Client]:
    """Two processes on one region of 8 MiB, empty of pages, at different addresses."""
    backing, paging = request.param.split("-")
    a, b = client(daemons[paging]), client(daemons[paging])
    a.do(f"r = mshare.mshare({name!r}, None, 8 * MIB, CREATE, backing={backing!r})")
    b.do(f"r = mshare.mshare({name!r}, {ELSEWHERE}, 0, RW)")
    for c in (a, b):
        c.do(f"{ADVISING}\nbacking, paging, f = {backing!r}, {paging!r}, os.open({str(path)!r}, os.O_RDWR)")
    return a, b


def granules(c: Client, pages: int) -> int:
    """How many pages come when one after the other is touched from the start of a granule on."""
    whole = c.ask("(backing, paging)") == ["thp", "auto"]
    return -(-pages // 512) * 512 if whole else pages


def touch(c: Client, offset: int, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    status: int = -c.ask(f"fork('r.buf[{offset}] = 2')" if store else f"fork('r.buf[{offset}]')")
    return status


def test_contents_stay(pair: tuple[Client, Client]) -> None:
    """Of memory, of both kinds of files, stored to and not; and what is stored later reaches the file as before."""
    a, b = pair
    a.do("r.buf[:] = b'm' * (8 * MIB)")
    a.do("r.mmap(MIB, flags=0x11, offset=2 * MIB, fd=f); r.mmap(MIB, flags=0x12, offset=4 * MIB, fd=f)")
    a.do("r.buf[2 * MIB : 2 * MIB + 8192] = r.buf[4 * MIB : 4 * MIB + 8192] = b's' * 8192")
    for number, advice in enumerate(HARMLESS):
        for c in pair:
            for offset in (0, 2 * MIB, 4 * MIB, 6 * MIB):
                assert c.ask(f"advise({offset}, MIB, {advice})") == 0
            assert c.ask("r.buf[:2 * MIB] == r.buf[6 * MIB:] == b'm' * (2 * MIB)")
            assert c.ask("r.buf[2 * MIB : 2 * MIB + 8192] == r.buf[4 * MIB : 4 * MIB + 8192] == b's' * 8192")
            assert c.ask("r.buf[2 * MIB + 8192 : 3 * MIB] == os.pread(f, MIB, 0)[8192:]")
            assert c.ask("r.buf[4 * MIB + 128 * PAGE : 5 * MIB] == os.pread(f, 128 * PAGE, 128 * PAGE)")
        for page in (2, 20 + number):
            b.do(f"r.buf[2 * MIB + {page} * PAGE] = {number}; r.msync()")
            assert a.ask(f"os.pread(f, 1, {page} * PAGE)[0]") == number
    assert a.ask("os.pread(f, 8192, 0) == b's' * 8192")


def test_protections_stay(pair: tuple[Client, Client]) -> None:
    """Of what may only be read and what may not be touched, and holes beside them, whatever becomes of the advice."""
    a, b = pair
    a.do("r.buf[:] = b'm' * (8 * MIB); r.mprotect(0, 2 * MIB, 1); r.mprotect(2 * MIB, 2 * MIB, 0)")
    a.do("r.munmap(4 * MIB, 2 * MIB)")
    for advice in (*HARMLESS, COLLAPSE):
        may_fail = {errno.EAGAIN, errno.EBUSY, errno.EINVAL} if advice == COLLAPSE else set()
        for c in pair:
            assert set(c.ask(f"[advise(0, 2 * MIB, {advice}), advise(2 * MIB, 2 * MIB, {advice})]")) <= {0, *may_fail}
            assert c.ask(f"advise(4 * MIB, 2 * MIB, {advice})") == errno.ENOMEM
        for c in pair:
            assert (touch(c, PAGE), touch(c, PAGE, store=True)) == (0, SIGSEGV)
            assert (touch(c, 3 * MIB), touch(c, 4 * MIB, store=True)) == (SIGSEGV, SIGBUS)
    b.do("r.mprotect(0, 4 * MIB, 3)")
    assert a.ask("r.buf[:4 * MIB] == b'm' * (4 * MIB)")


def test_remove_makes_zeros_for_everybody(pair: tuple[Client, Client]) -> None:
    """And gives the memory back, of whole granules and of single pages; others stay."""
    a, b = pair
    a.do("r.buf[:] = b'm' * (8 * MIB)")
    assert b.ask(f"(advise(2 * MIB, 2 * MIB, {REMOVE}), advise(5 * MIB, 3 * PAGE, {REMOVE}))") == [0, 0]
    assert a.ask("resident()") == [[0, 2048 - 512 - 3]]
    for c in pair:
        assert c.ask("sum(r.buf[2 * MIB : 4 * MIB]) + sum(r.buf[5 * MIB : 5 * MIB + 3 * PAGE])") == 0
        assert c.ask("r.buf[5 * MIB - 1] + r.buf[5 * MIB + 3 * PAGE] + r.buf[4 * MIB] + r.buf[2 * MIB - 1]") == 4 * 109
    b.do("r.buf[3 * MIB] = 7")
    assert a.ask("r.buf[3 * MIB]") == 7


@pytest.mark.parametrize("advice", [POPULATE_READ, POPULATE_WRITE])
def test_populate_brings_pages(pair: tuple[Client, Client], advice: int) -> None:
    """Zeros of memory and bytes of files are there afterwards, and touching them asks the daemon for nothing more."""
    a, b = pair
    a.do("r.mmap(MIB, flags=0x11, offset=2 * MIB, fd=f); r.mmap(MIB, flags=0x12, offset=4 * MIB, fd=f)")
    assert a.ask("resident()") == [[0, 0], [2 * MIB, 0], [3 * MIB, 0], [4 * MIB, 0], [5 * MIB, 0]]
    assert b.ask(f"[advise(part * MIB, MIB, {advice}) for part in (0, 2, 4)]") == [0] * 3
    assert a.ask("resident()") == [[0, granules(a, 256)], [2 * MIB, 256], [3 * MIB, 0], [4 * MIB, 256], [5 * MIB, 0]]
    before = a.ask("r.stat().faults")
    assert b.ask("sum(r.buf[:MIB])") == 0
    assert b.ask("r.buf[2 * MIB : 3 * MIB] == r.buf[4 * MIB : 5 * MIB] == os.pread(f, MIB, 0)")
    if advice == POPULATE_WRITE:
        b.do("for part in (0, 2, 4): r.buf[part * MIB : (part + 1) * MIB : PAGE] = b's' * 256")
    assert a.ask("r.stat().faults") == before


def test_populate_of_what_may_not_be_touched(pair: tuple[Client, Client]) -> None:
    """Pages that may only be read come for reading, and stay protected."""
    a, _ = pair
    a.do("r.mprotect(0, 2 * MIB, 1); r.mprotect(2 * MIB, PAGE, 0)")
    a.do("r.munmap(4 * MIB, 4 * MIB); r.mmap(MIB, 1, 0x11, offset=4 * MIB, fd=f)")
    for c in pair:
        assert c.ask(f"(advise(0, MIB, {POPULATE_READ}), advise(4 * MIB, MIB, {POPULATE_READ}))") == [0, 0]
        assert (
            c.ask(f"(advise(0, MIB, {POPULATE_WRITE}), advise(4 * MIB, MIB, {POPULATE_WRITE}))") == [errno.EINVAL] * 2
        )
        assert c.ask(f"advise(2 * MIB, PAGE, {POPULATE_READ})") == errno.EINVAL
    assert a.ask("resident()[0][1]") == granules(a, 256)
    assert a.ask("resident()[-1]") == [4 * MIB, 256]
    for c in pair:
        assert touch(c, 0, store=True) == touch(c, 4 * MIB, store=True) == SIGSEGV
        assert c.ask("(r.buf[5], r.buf[4 * MIB] == os.pread(f, 1, 0)[0])") == [0, True]


@pytest.mark.parametrize("prot", [1, 3])
def test_map_populate(pair: tuple[Client, Client], prot: int) -> None:
    """Pages are there when mmap returns; of native memory without the daemon, else by one fault a page at most."""
    a, b = pair
    a.do("r.munmap(0, 8 * MIB)")
    native = a.ask("paging") == "auto"
    for offset, flags, fd in ((0, MAP_MEMORY, -1), (2 * MIB, MAP_FILE_SHARED, "f"), (4 * MIB, MAP_FILE_PRIVATE, "f")):
        before = a.ask("r.stat().faults")
        assert a.ask(f"r.mmap(2 * MIB, {prot}, {flags | MAP_POPULATE}, offset={offset}, fd={fd})") == offset
        assert a.ask("resident()[-1]") == [offset, 512]
        faults = a.ask("r.stat().faults") - before
        assert faults == 0 if native and not offset else 0 < faults <= 2 * 512
        assert b.ask(
            f"r.buf[{offset}:{offset} + 2 * MIB] == {'os.pread(f, 2 * MIB, 0)' if offset else 'bytes(2 * MIB)'}"
        )
        assert a.ask("r.stat().faults") - before == faults
    assert touch(b, MIB, store=True) == (0 if prot == 3 else SIGSEGV)


def test_map_populate_of_what_nobody_may_touch(pair: tuple[Client, Client]) -> None:
    """Brings nothing and is no error, as with mmap(2)."""
    a, _ = pair
    a.do(f"r.munmap(0, 8 * MIB); r.mmap(2 * MIB, 0, {MAP_MEMORY | MAP_POPULATE}, offset=0)")
    assert a.ask("resident()") == [[0, 0]]
    assert touch(a, 0) == SIGSEGV


def test_collapse_makes_huge_pages_of_small_ones(pair: tuple[Client, Client]) -> None:
    """Of a granule that was filled page by page since a hole was in it; contents stay, for everybody."""
    a, b = pair
    a.do("r.munmap(2 * MIB + PAGE, PAGE); r.buf[2 * MIB : 2 * MIB + PAGE] = b'm' * PAGE")
    a.do("r.buf[2 * MIB + 2 * PAGE : 4 * MIB] = b'm' * (2 * MIB - 2 * PAGE); r.mmap(PAGE, offset=2 * MIB + PAGE)")
    b.do("r.buf[2 * MIB + PAGE : 2 * MIB + 2 * PAGE] = b'b' * PAGE")
    expected = "r.buf[2 * MIB : 4 * MIB] == b'm' * PAGE + b'b' * PAGE + b'm' * (2 * MIB - 2 * PAGE)"
    assert a.ask("(r.stat().huge_bytes, r.maps()[0].resident)") == [0, 2 * MIB]
    assert a.ask(f"advise(2 * MIB, 2 * MIB, {COLLAPSE})") == 0
    assert [c.ask(expected) for c in pair] == [True, True]
    assert a.ask("(r.stat().huge_bytes, r.maps()[0].resident)") == [2 * MIB, 2 * MIB]
    b.do("r.buf[3 * MIB] = 9")
    assert a.ask("r.buf[3 * MIB]") == 9


def test_collapse_after_protections_went_and_came(pair: tuple[Client, Client]) -> None:
    """What mprotect split becomes one again; while a part may not be stored to, the kernel refuses."""
    a, b = pair
    a.do("r.buf[:2 * MIB] = b'm' * (2 * MIB); r.mprotect(PAGE, PAGE, 1)")
    assert a.ask(f"advise(0, 2 * MIB, {COLLAPSE})") in (errno.EINVAL, errno.EBUSY)
    assert touch(a, PAGE, store=True) == touch(b, PAGE, store=True) == SIGSEGV
    b.do("r.mprotect(PAGE, PAGE, 3)")
    if a.ask("paging") == "all":  # The kernel keeps a range apart for which it has reported stores.
        assert a.ask(f"advise(0, 2 * MIB, {COLLAPSE})") in (0, errno.EINVAL)
    else:
        assert a.ask(f"(advise(0, 2 * MIB, {COLLAPSE}), r.stat().huge_bytes)") == [0, 2 * MIB]
    assert b.ask("r.buf[:2 * MIB] == b'm' * (2 * MIB)")


def test_collapse_without_pages_is_refused(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    assert a.ask(f"advise(0, 2 * MIB, {COLLAPSE})") == errno.EINVAL
    assert a.ask("resident()") == [[0, 0]]


def test_other_advice_is_refused(pair: tuple[Client, Client]) -> None:
    """Unknown, or of no use for shared memory: FREE, DONTFORK, MERGEABLE, DONTDUMP, HWPOISON, guard pages."""
    a, b = pair
    a.do("r.buf[0] = 3")
    for advice in (-1, 1 << 40, 5, 8, 10, 12, 16, 18, 24, 100, 101, 102, 999):
        assert a.ask(f"advise(0, 2 * MIB, {advice})") == errno.EINVAL
    assert b.ask("r.buf[0]") == 3
    assert touch(a, 0, store=True) == 0


def test_ranges_of_advice(pair: tuple[Client, Client]) -> None:
    """Whole pages of the region, mapped throughout."""
    a, _ = pair
    a.do("r.munmap(4 * MIB, PAGE)")
    for advice in (*HARMLESS, REMOVE, POPULATE_READ, POPULATE_WRITE, COLLAPSE):
        for offset, length in ((4 * MIB, PAGE), (4 * MIB - PAGE, 2 * PAGE), (0, 8 * MIB)):
            assert a.ask(f"advise({offset}, {length}, {advice})") == errno.ENOMEM
        for offset, length in ((1, PAGE), (0, PAGE + 1), (0, 0), (-PAGE, PAGE), (8 * MIB, PAGE), (0, 9 * MIB)):
            assert a.ask(f"advise({offset}, {length}, {advice})") == errno.EINVAL
    assert a.ask("resident()") == [[0, 0], [4 * MIB + PAGE, 0]]


def test_files_cannot_be_removed_from(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    a.do("r.mmap(MIB, flags=0x11, offset=2 * MIB, fd=f); r.mmap(MIB, flags=0x12, offset=4 * MIB, fd=f); r.buf[9] = 9")
    assert a.ask(f"[advise(part * MIB, MIB, {REMOVE}) for part in (2, 4, 1)]") == [
        errno.EOPNOTSUPP,
        errno.EOPNOTSUPP,
        0,
    ]
    assert a.ask("(r.buf[2 * MIB : 3 * MIB] == r.buf[4 * MIB : 5 * MIB] == os.pread(f, MIB, 0), r.buf[9])") == [True, 9]


def test_advice_of_readers(
    pair: tuple[Client, Client], client: Callable[..., Client], daemons: dict[str, Daemon]
) -> None:
    """They may have pages brought, and change nothing."""
    a, b = pair
    reader = client(daemons[a.ask("paging")])
    reader.do(f"r = mshare.mshare({a.ask('r.name')!r}, None, 0, RO)\n{ADVISING}")
    a.do("r.buf[2 * MIB : 4 * MIB] = b'm' * (2 * MIB)")
    assert reader.ask(f"advise(0, MIB, {POPULATE_READ})") == 0
    assert reader.ask(f"advise(2 * MIB, MIB, {REMOVE})") == errno.EACCES
    for advice in HARMLESS:
        assert reader.ask(f"advise(2 * MIB, 2 * MIB, {advice})") == 0
    assert reader.ask(f"advise(0, MIB, {POPULATE_WRITE})") == errno.EINVAL
    assert a.ask("resident()") == [[0, granules(a, 256) + 512]]
    b.do("r.buf[0] = 5")
    assert reader.ask("(r.buf[0], r.buf[2 * MIB : 4 * MIB] == b'm' * (2 * MIB))") == [5, True]
