"""Huge pages while somebody else takes every one that is free: what is mapped stays promised, or nothing changes."""

from __future__ import annotations

import errno
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hugepages import ELSEWHERE, HUGE, SIGSEGV, Pool, pages_left, rival, touch

pytestmark = pytest.mark.pool

NOBODY = pwd.getpwnam("nobody").pw_uid
Start = Callable[..., Client]

ROUNDS = """
PAGES, FILE = 16, 7
def check():
    "Whoever touches a page that nobody can give him dies."
    for page, value in enumerate(holds):
        if value is not None and prots[page]:
            assert r.buf[page * H] == r.buf[page * H + H - 1] == value, (page, value, r.buf[page * H])
def change(kind, at, pages):
    "One change; what the pages hold then, or None where that stays, and their protection."
    size = len(pages) * H
    mapped = all(holds[page] is not None for page in pages)
    if kind == "remove" and mapped and all(prots[page] == 3 and not files[page] for page in pages):
        r.madvise(at, size, MADV_REMOVE); return 0, 3, False
    if kind == "mmap":
        r.mmap(size, flags=0x31, offset=at); return 0, 3, False
    if kind == "hidden":
        r.mmap(size, 0, flags=0x31, offset=at); return 0, 0, False
    if kind == "file":
        r.mmap(size, flags=0x12, offset=at, fd=f); return FILE, 3, True
    if kind == "munmap":
        r.munmap(at, size); return "hole", 0, False
    if kind in (0, 1, 3) and mapped:
        r.mprotect(at, size, kind); return None, kind, None
    return None, None, None
def rounds(seed, count, kinds):
    "Change and touch; how often there was no memory, each time with nothing changed."
    global holds, prots, files
    rng, short = random.Random(seed), 0
    holds, prots, files = [0] * PAGES, [3] * PAGES, [False] * PAGES
    for number in range(count):
        first = rng.randrange(PAGES)
        pages = range(first, min(PAGES, first + rng.randrange(1, 5)))
        kind = rng.choice(kinds)
        try:
            value, prot, file = change(kind, first * H, pages)
        except OSError as error:
            needs = [page for page in pages if holds[page] is None or soft and not prots[page]]
            assert needs and error.errno == errno.ENOMEM and "vm.nr_hugepages" in error.strerror, (kind, error)
            short += 1
        else:
            for page in pages:
                holds[page] = holds[page] if value is None else None if value == "hole" else value
                prots[page] = prots[page] if prot is None else prot
                files[page] = files[page] if file is None else file
        check()
        for page in rng.sample(range(PAGES), 4):
            if holds[page] is not None and prots[page] == 3:
                r.buf[page * H] = r.buf[page * H + H - 1] = holds[page] = number % 251
        if number % 20 == 0:
            assert fork("check()") == 0
    return short
"""


@pytest.fixture
def users(start_daemon: Callable[..., Daemon], hugetlb: Daemon) -> Daemon:
    """A daemon of an ordinary user's."""
    return start_daemon(uid=NOBODY)


@pytest.fixture
def file(directory: Path) -> Path:
    path = directory / "file"
    path.write_bytes(bytes([7]) * 4 * HUGE)
    path.chmod(0o666)
    return path


@pytest.fixture(params=["root", "user"])
def pair(
    request: pytest.FixtureRequest, hugetlb: Daemon, before: Pool, client: Start, file: Path
) -> Iterator[tuple[Client, Client]]:
    """Two processes on a region, of root's daemon and of an ordinary user's."""
    is_users = request.param == "user"
    of, uid = (request.getfixturevalue("users"), NOBODY) if is_users else (hugetlb, None)
    a, b = client(of, uid=uid), client(of, uid=uid)
    for c in (a, b):
        c.do(f"from mmap import *\nH, soft, f = 2 * MIB, {is_users}, os.open({str(file)!r}, os.O_RDWR)\n{ROUNDS}")
    a.do("r = mshare.mshare('x', None, GIB, CREATE, backing='hugetlb')")
    b.do(f"r = mshare.mshare('x', {ELSEWHERE}, 0, RW)")
    yield a, b
    a.do("mshare.remove('x')")


@pytest.fixture
def kinds(request: pytest.FixtureRequest, pair: tuple[Client, Client]) -> list[str | int]:
    """What can be done; a user's daemon maps no file over memory in use."""
    return ["remove", "mmap", "hidden", "munmap", 0, 0, 1, 3, 3] + ([] if pair[0].ask("soft") else ["file"])


@pytest.mark.parametrize("seed", range(2))
def test_all_that_is_mapped_can_be_touched_after_every_change(
    pair: tuple[Client, Client], kinds: list[str | int], seed: int
) -> None:
    a, b = pair
    with rival():
        for c, number in ((a, seed), (b, seed + 10)):
            c.ask(f"rounds({number}, 300, {kinds})")
            c.do("r.munmap(0, PAGES * H)")
            while c is a and not _mapped(c):
                pass


def _mapped(c: Client) -> bool:
    """Whether there were pages enough to map all that was unmapped."""
    c.do("""
        try: r.mmap(PAGES * H, flags=0x31, offset=0)
        except OSError as error: assert error.errno == errno.ENOMEM
        """)
    return bool(c.ask("r.maps()[0].offset == 0"))


def test_who_stores_meanwhile_never_misses_a_page(pair: tuple[Client, Client]) -> None:
    """All the time, in pages that are replaced again and again."""
    a, b = pair
    b.do("""
        stop = []
        def store():
            while not stop:
                for page in range(8): r.buf[page * H + H - 1] = 1
        threads = [threading.Thread(target=store) for _ in range(2)]
        for thread in threads: thread.start()
        """)
    with rival():
        for _ in range(100):
            a.do("r.madvise(0, 8 * H, MADV_REMOVE); r.mmap(8 * H, flags=0x31, offset=0)")
        b.do("stop.append(1)\nfor thread in threads: thread.join()")
    assert pages_left() > 0


@pytest.mark.parametrize("pair", ["user"], indirect=True)
class TestWithoutMount:
    """A user's daemon keeps no page that it lets go: it does without, or says so."""

    def test_what_is_hidden_may_be_lost_to_others_and_then_stays_hidden(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("r.buf[: 4 * H] = bytes([5]) * 4 * H")
        b.do("""
            def show():
                "Whether it can be; if not, the error says what to do."
                try: r.mprotect(0, 4 * H, 3)
                except OSError as error: return error.errno == errno.ENOMEM and "vm.nr_hugepages" not in error.strerror
                return True
            """)
        with rival():
            a.do("r.mprotect(0, 4 * H, 0)")
            while b.ask("show()"):
                a.do("r.mprotect(0, 4 * H, 0)")
            assert touch(a, 0) == touch(b, 3 * HUGE) == SIGSEGV
        b.do("r.mprotect(0, 4 * H, 3)")
        assert a.ask("sum(r.buf[: 4 * H]) == 5 * 4 * H")

    def test_a_file_takes_no_place_of_pages_in_use(self, pair: tuple[Client, Client]) -> None:
        a, b = pair
        a.do("r.buf[H] = 1")
        error = b.error_of("r.mmap(2 * H, flags=0x12, offset=0, fd=f)")
        assert (error.errno, "munmap them first" in error.text) == (errno.EOPNOTSUPP, True)
        assert a.ask("r.buf[H]") == 1
        a.do("r.munmap(0, 2 * H); r.mmap(2 * H, flags=0x12, offset=0, fd=f)")
        assert b.ask("(r.buf[0], r.buf[H])") == [7, 7]
