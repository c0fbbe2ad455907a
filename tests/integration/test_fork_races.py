"""Forks while others store, fork, change and die: each side has its own bytes, and a snapshot is of one instant."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from conftest import Client
from twins import MIB, started

SIZE = 16 * MIB

STORING = """
import random
def storing(region, tag, slot, pages, stop):
    "Store ever higher numbers, with a tag, to one slot of some pages in any order. What was lost, or came from others."
    last, wrong, n = {}, [], 0
    while not stop.is_set() or n < 200:
        n += 1; page = random.choice(pages); at = page * PAGE + 8 * slot
        seen = struct.unpack_from('Q', region.buf, at)[0]
        if page in last and seen != last[page]: wrong.append((page, slot, hex(seen), hex(last[page])))
        last[page] = tag << 32 | n; struct.pack_into('Q', region.buf, at, last[page])
    return wrong
def in_threads(*jobs):
    stop, wrong = threading.Event(), []
    threads = [threading.Thread(target=lambda job=job: wrong.extend(storing(*job, stop))) for job in jobs]
    for thread in threads: thread.start()
    def end():
        stop.set()
        for thread in threads: thread.join()
        return wrong
    return end
def tags(region, pages):
    return sorted({word >> 32 for page in pages for word in struct.unpack_from('16Q', region.buf, page * PAGE)})
"""

COUNTING = """
COUNTED = [3000, 0, 511, 1024, 2047, 2048, 1]
def words(region, pages):
    "One machine word in each page: what struct packs appears byte by byte."
    return [ctypes.c_uint64.from_address(region.address + page * PAGE) for page in pages]
def numbers(region, pages=COUNTED): return [word.value for word in words(region, pages)]
def count(stop):
    "One number after the other to each of some pages, which lie in different tables, in order."
    n, places = 0, words(r, COUNTED)
    while not stop.is_set():
        n += 1
        for word in places: word.value = n
"""


@pytest.fixture(params=["thp", "4k"])
def origin(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> Client:
    """A process on a region of 16 MiB."""
    c = started(client(), name, f"mshare.mshare(name, None, {SIZE}, CREATE, backing={request.param!r})")
    c.do(STORING + COUNTING)
    return c


@pytest.fixture
def on(client: Callable[..., Client], name: str) -> Callable[..., Client]:
    """Start another process on the origin."""

    def start() -> Client:
        c = started(client(), name, "on(name)")
        c.do(STORING + COUNTING)
        return c

    return start


def is_a_cut(numbers: list[int]) -> bool:
    """Whether they can have been there at one instant, stored in order."""
    return numbers == sorted(numbers, reverse=True) and numbers[0] - numbers[-1] <= 1


def finish(busy: list[Client], call: str) -> None:
    """Have processes end what they do, and find nothing wrong."""
    for c in busy:
        c.send(ask=call)
    for c in busy:
        assert c.receive() == []


def test_everybody_stores_to_the_same_pages(origin: Client, on: Callable[..., Client]) -> None:
    """Two processes with two threads each, of both sides, while forks are made: no store is lost, none crosses over."""
    others = [on() for _ in range(3)]
    pages = "[0, 1, 511, 512, 3000]"
    origin.do("r.buf[:] = bytes(len(r.buf)); r.fork(name + '-s')")
    for number, c in enumerate(others):
        c.do("s = on(name + '-s')")
        jobs = [
            f"({side}, {tag}, {2 * number + thread}, {pages})"
            for side, tag in (("r", 1), ("s", 2))
            for thread in (0, 1)
        ]
        c.do(f"end = in_threads({', '.join(jobs)})")
    origin.do(f"""
        s = on(name + '-s')
        for number in range(20):
            r.fork(f'{{name}}-{{number}}'); s.fork(f'{{name}}-s{{number}}')
            one, two = on(f'{{name}}-{{number}}'), on(f'{{name}}-s{{number}}')
            assert set(tags(one, {pages})) <= {{0, 1}} and set(tags(two, {pages})) <= {{0, 2}}
            if number % 2: mshare.mshare_unlink(one.name)
            if number % 3: mshare.mshare_unlink(two.name)
        """)
    finish(others, "end()")
    assert origin.ask(f"(tags(r, {pages}), tags(s, {pages}))") == [[0, 1], [0, 2]]


def test_a_snapshot_of_a_thread_that_counts_is_a_cut(origin: Client, on: Callable[..., Client]) -> None:
    """Of numbers stored in order none is newer than one before it; and it stays so, whatever comes later."""
    counting = on()
    counting.do("stop = threading.Event(); thread = threading.Thread(target=count, args=(stop,)); thread.start()")
    origin.do("""
        taken = []
        for number in range(40):
            r.fork(f'{name}-{number}'); taken.append(on(f'{name}-{number}'))
        seen = [numbers(region) for region in reversed(taken)][::-1]
        """)
    counting.do("stop.set(); thread.join()")
    seen = origin.ask("seen")
    assert [numbers for numbers in seen if not is_a_cut(numbers)] == []
    assert [numbers[0] for numbers in seen] == sorted(numbers[0] for numbers in seen)
    assert origin.ask("[numbers(region) for region in taken]") == seen


def test_so_is_one_of_two_processes_that_take_turns(origin: Client, on: Callable[..., Client]) -> None:
    """The first stores, and tells the second by a pipe, which stores then, and tells the first."""
    origin.do("""
        there, back = os.pipe(), os.pipe()
        pids = []
        for mine, reader, writer in ((0, back[0], there[1]), (2000, there[0], back[1])):
            pid = os.fork()
            if pid == 0:
                word = words(r, [mine])[0]
                for n in range(1, 1 << 40):
                    if mine or n > 1: os.read(reader, 1)
                    word.value = n; os.write(writer, b'.')
            pids.append(pid)
        seen = []
        for number in range(60):
            r.fork(f'{name}-{number}'); s = on(f'{name}-{number}')
            seen.append(numbers(s, [0, 2000])); assert numbers(s, [0, 2000]) == seen[-1]; mshare.mshare_unlink(s.name)
        for pid in pids: os.kill(pid, 9); os.waitpid(pid, 0)
        """)
    seen = origin.ask("seen")
    assert all(second <= first <= second + 1 for first, second in seen), seen
    assert seen[-1][0] > seen[0][0]


def test_processes_that_fork_meanwhile(origin: Client, on: Callable[..., Client]) -> None:
    """The kernel has a fork seen to before it protects anything more: no store slips through then."""
    busy = [on() for _ in range(2)]
    origin.do("r.fork(name + '-s')")
    for c in busy:
        c.do("""
            s = on(name + '-s'); go_on = True
            stop = threading.Event(); thread = threading.Thread(target=count, args=(stop,))
            def forking():
                n = 0
                while not stop.is_set() or n < 20:
                    n += 1
                    if (pid := os.fork()) == 0:
                        struct.pack_into('Q', r.buf, 3500 * PAGE, n); os._exit(0)
                    os.waitpid(pid, 0)
                return []
            forks = threading.Thread(target=forking); forks.start()
            """)
    busy[0].do("thread.start()")
    origin.do("""
        seen = []
        for number in range(40):
            r.fork(f'{name}-{number}'); s = on(f'{name}-{number}')
            seen.append(numbers(s)); assert numbers(s) == seen[-1]; mshare.mshare_unlink(s.name)
        """)
    busy[0].do("stop.set(); thread.join(); forks.join()")
    busy[1].do("stop.set(); forks.join()")
    assert [numbers for numbers in origin.ask("seen") if not is_a_cut(numbers)] == []


def test_a_twin_unmaps_while_its_origin_stores(origin: Client, on: Callable[..., Client]) -> None:
    """What the origin leaves to the older twin, it holds for the younger one too: unmapping must not take it away."""
    other = on()
    origin.do("""
        pages = range(0, 4096, 16)
        mark(r, 1000, pages)
        for twin in 'stu': r.fork(name + twin)
        s, t = on(name + 's'), on(name + 't')
        """)
    other.send(do="for page in reversed(range(0, 4096, 16)): mark(r, 2000, [page])")
    origin.do(f"s.munmap(0, {SIZE}); t.mprotect(0, {SIZE}, 0)")
    other.receive()
    origin.do(f"t.mprotect(0, {SIZE}, 3); u = on(name + 'u')")
    for region in "tu":
        assert origin.ask(f"marks({region}, pages)") == [1000] * 256, region
    assert origin.ask("marks(r, pages)") == [2000] * 256


def test_changes_on_both_sides_while_both_store(origin: Client, on: Callable[..., Client]) -> None:
    """Where nobody changes anything, all bytes stay right."""
    busy = [on() for _ in range(2)]
    origin.do("r.buf[:] = bytes(len(r.buf)); r.fork(name + '-s'); s = on(name + '-s')")
    pages = "[0, 511, 2047, 2048 + 600, 4095]"
    for number, c in enumerate(busy):
        c.do(f"s = on(name + '-s'); end = in_threads((r, 1, {number}, {pages}), (s, 2, {number}, {pages}))")
    origin.do("""
        for number in range(15):
            for x in (r, s):
                x.munmap(2 * MIB, MIB); x.mmap(MIB, offset=2 * MIB)
                x.mprotect(3 * MIB, 2 * MIB, number % 4 & 3); x.mprotect(3 * MIB, 2 * MIB, 3)
                x.madvise(5 * MIB, MIB, MADV_REMOVE)
                x.mmap(MIB, offset=6 * MIB, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10)
            r.fork(f'{name}-{number}')
            if number % 2: mshare.mshare_unlink(f'{name}-{number}')
        """)
    finish(busy, "end()")
    assert origin.ask(f"(tags(r, {pages}), tags(s, {pages}))") == [[0, 1], [0, 2]]


def test_processes_that_die(
    origin: Client, on: Callable[..., Client], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """In the middle of a fork, or of a store that waits for a copy: nobody else notices, nothing stays behind."""
    chance = random.Random(11)
    origin.do("mark(r, 1000, range(0, 4096, 8)); r.fork(name + '-s'); s = on(name + '-s')")
    for number in range(4):
        victims = [on(), on()]
        victims[0].do("s = on(name + '-s')")
        victims[0].send(do="for page in range(1, 4096, 8): r.buf[page * PAGE + 100] = 1; s.buf[page * PAGE + 100] = 2")
        victims[1].send(do=f"for twin in range(1000): r.fork(f'{{name}}-{number}-{{twin}}')")
        origin.do(f"for page in range(0, {chance.randrange(2000)}, 8): s.buf[page * PAGE]")  # Which takes a while.
        for victim in victims:
            victim.kill()
        eventually(lambda: origin.ask("(r.stat().attached, s.stat().attached)") == [1, 1])
    for region in "rs":
        assert origin.ask(f"marks({region}, range(0, 4096, 8))") == [1000] * 512
