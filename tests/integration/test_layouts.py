"""What is mapped inside a region is the same for every process from its first access on, however it came to be there.

Each access that is looked at is made by a child that is forked for it and does nothing else: so it is that process's
first, and a signal ends it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client

MIB = 1 << 20
PAGE = 4096
SIGBUS, SIGSEGV = 7, 11
ELSEWHERE = 0x6000_0000_0000
Probes = list[tuple[int, int]]
Seen = list[list[int]]

LOOKING = """
import ctypes, json, os
raw = ctypes.PyDLL(None)
def raw_fork(): return raw.fork()  # Python hears nothing of it: no hook of the client's runs in the child.
def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def touched(at, fork, value=None):
    "What a child gets that loads one byte, or stores a value there: 0 or the signal, negative."
    if not (pid := fork()):
        ctypes.string_at(at, 1) if value is None else ctypes.memset(at, value, 1)
        os._exit(0)
    return ended(pid)
def look(base, probes, fork=os.fork):
    "For each offset and the value that should be there: what a load and a store get, and the value, or -1."
    seen = []
    for offset, value in probes:
        load, store = touched(base + offset, fork), touched(base + offset, fork, max(value, 0))
        seen.append([load, store, -1 if load else ctypes.string_at(base + offset, 1)[0]])
    return seen
def start(work, fork=os.fork, wait=None):
    "Start a child that does ``work``, once there is a byte in the pipe ``wait``; where it will tell, and its pid."
    told, tell = os.pipe()
    if not (pid := fork()):
        try: os.write(tell, json.dumps((wait is None or os.read(wait, 1)) and work()).encode())
        finally: os._exit(0)
    os.close(tell)
    return told, pid
def result(child):
    "What a child tells that was started."
    with open(child[0]) as words: said = words.read()
    assert ended(child[1]) == 0
    return json.loads(said)
"""
LAYOUT = """
r = mshare.mshare(name, None, 8 * MIB, CREATE, backing=backing)
r.buf[:] = b"m" * (8 * MIB)
r.mprotect(2 * MIB, 3 * PAGE, 1)
r.munmap(3 * MIB, MIB)
r.mprotect(4 * MIB, 2 * MIB, 0)
f = os.open(path, os.O_RDWR)
r.mmap(5 * PAGE, flags=0x11, offset=6 * MIB, fd=f)
r.mmap(MIB - 5 * PAGE, flags=0x12, offset=6 * MIB + 5 * PAGE, fd=f)
r.mprotect(7 * MIB, PAGE, 0)
r.mmap(MIB - PAGE, flags=0x31, offset=7 * MIB + PAGE)
"""
MEMORY, NO_STORE, NOTHING, HOLE = (0, 0), (0, -SIGSEGV), (-SIGSEGV, -SIGSEGV), (-SIGBUS, -SIGBUS)
PARTS = [
    (0, 2 * MIB, MEMORY, ord("m")),
    (2 * MIB, 2 * MIB + 3 * PAGE, NO_STORE, ord("m")),
    (2 * MIB + 3 * PAGE, 3 * MIB, MEMORY, ord("m")),
    (3 * MIB, 4 * MIB, HOLE, -1),
    (4 * MIB, 6 * MIB, NOTHING, -1),
    (6 * MIB, 6 * MIB + 5 * PAGE, MEMORY, ord("f")),
    (6 * MIB + 5 * PAGE, 7 * MIB, MEMORY, ord("f")),
    (7 * MIB, 7 * MIB + PAGE, NOTHING, -1),
    (7 * MIB + PAGE, 8 * MIB, MEMORY, 0),
]
CHANGE = """
r.mprotect(0, PAGE, 1)
r.munmap(PAGE, PAGE)
r.mprotect(2 * MIB, 3 * PAGE, 3)
r.mmap(2 * PAGE, flags=0x31, offset=3 * MIB)
r.mprotect(4 * MIB, MIB, 1)
r.munmap(6 * MIB, 5 * PAGE)
r.mprotect(6 * MIB + 5 * PAGE, PAGE, 0)
r.mmap(PAGE, 1, 0x11, offset=7 * MIB, fd=f)
"""
CHANGED_PARTS = [
    (0, PAGE, NO_STORE, ord("m")),
    (PAGE, 2 * PAGE, HOLE, -1),
    (2 * PAGE, 3 * MIB, MEMORY, ord("m")),
    (3 * MIB, 3 * MIB + 2 * PAGE, MEMORY, 0),
    (3 * MIB + 2 * PAGE, 4 * MIB, HOLE, -1),
    (4 * MIB, 5 * MIB, NO_STORE, ord("m")),
    (5 * MIB, 6 * MIB, NOTHING, -1),
    (6 * MIB, 6 * MIB + 5 * PAGE, HOLE, -1),
    (6 * MIB + 5 * PAGE, 6 * MIB + 6 * PAGE, NOTHING, -1),
    (6 * MIB + 6 * PAGE, 7 * MIB, MEMORY, ord("f")),
    (7 * MIB, 7 * MIB + PAGE, NO_STORE, ord("f")),
    (7 * MIB + PAGE, 8 * MIB, MEMORY, 0),
]
LAST_PARTS = [
    (2 * MIB, 2 * MIB + PAGE, NO_STORE, 0),
    (2 * MIB + PAGE, 2 * MIB + 3 * PAGE, NO_STORE, ord("m")),
    *PARTS[2:],
]
Part = tuple[int, int, tuple[int, int], int]


def probes_of(parts: list[Part]) -> Probes:
    """The first and the last byte of each part, and what lies there."""
    return [(offset, value) for start, end, _, value in parts for offset in (start, end - 1)]


def expected(parts: list[Part]) -> Seen:
    """What looking at them must come to."""
    return [[*outcome, value] for _, _, outcome, value in parts for _ in range(2)]


def expected_of_reader(parts: list[Part]) -> Seen:
    """The same where nothing may be stored at all: the kernel looks at that first."""
    return [[load, -SIGSEGV, value] for load, _, value in expected(parts)]


PROBES, CHANGED_PROBES, LAST_PROBES = probes_of(PARTS), probes_of(CHANGED_PARTS), probes_of(LAST_PARTS)


@pytest.fixture
def start(client: Callable[..., Client], name: str) -> Callable[..., Client]:
    """Start clients that can look; with an argument, attached in that way."""

    def start(how: str = "") -> Client:
        c = client()
        c.do(f"{LOOKING}\nname = {name!r}")
        if how:
            c.do(f"r = mshare.mshare(name, {how})")
        return c

    return start


@pytest.fixture(params=["thp", "4k"])
def creator(request: pytest.FixtureRequest, start: Callable[..., Client], tmp_path: Path) -> Client:
    """A process that made a region of all kinds of memory, ``LAYOUT``."""
    path = tmp_path / "file"
    path.write_bytes(b"f" * MIB)
    c = start()
    c.do(f"path, backing = {str(path)!r}, {request.param!r}\n{LAYOUT}")
    return c


def test_whoever_attaches_sees_it(creator: Client, start: Callable[..., Client]) -> None:
    """The creator, one that comes later, one at another address, one that may only read."""
    for c in (creator, start("None, 0, RW"), start(f"{ELSEWHERE}, 0, RW")):
        assert c.ask(f"look(r.address, {PROBES})") == expected(PARTS)
    for how in ("None, 0, RO", f"{ELSEWHERE}, 0, RO"):
        assert start(how).ask(f"look(r.address, {PROBES})") == expected_of_reader(PARTS)


@pytest.mark.parametrize("fork", ["os.fork", "raw_fork"])
def test_children_and_grandchildren_see_it(creator: Client, start: Callable[..., Client], fork: str) -> None:
    """With Python's fork, after which the client sees to its own, and with the C library's, after which nobody does."""
    look = f"lambda: look(r.address, {PROBES}, {fork})"
    for c in (creator, start(f"{ELSEWHERE}, 0, RW")):
        assert c.ask(f"result(start({look}, {fork}))") == expected(PARTS)
        assert c.ask(f"result(start(lambda: result(start({look}, {fork})), {fork}))") == expected(PARTS)
    reader = start("None, 0, RO")
    assert reader.ask(f"result(start({look}, {fork}))") == expected_of_reader(PARTS)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_see_it(creator: Client, method: str, name: str) -> None:
    """Forked ones have their parent's window; spawned ones know the name."""
    attach = f"import mshare\nr = mshare.mshare({name!r}, None, 0, os.O_RDWR)\n" if method == "spawn" else ""
    code = f"{LOOKING}{attach}queue.put(look(r.address, {PROBES}))"
    creator.do(f"""
        context = multiprocessing.get_context({method!r})
        queue = context.SimpleQueue()
        names = dict(queue=queue) if {method!r} == "spawn" else dict(queue=queue, r=r)
        process = context.Process(target=exec, args=({code!r}, names))
        process.start()
        """)
    assert creator.ask("queue.get()") == expected(PARTS)
    creator.do("process.join(); assert process.exitcode == 0; queue.close()")
    creator.do("del process, names, queue; gc.collect()")  # With the queue go its semaphores, which have names.


def test_children_follow_what_changes_after_the_fork(creator: Client, start: Callable[..., Client]) -> None:
    """Children of every kind that exist already, some of whose parents have touched memory and some have not."""
    parent = start(f"{ELSEWHERE}, 0, RW")
    parent.do(f"""
        go, work = os.pipe(), lambda: look(r.address, {CHANGED_PROBES})
        children = [start(work, fork, go[0]) for fork in (os.fork, raw_fork)]
        children.append(start(lambda: result(start(work, os.fork, go[0]))))
        assert result(start(lambda: look(r.address, {PROBES}))) == {expected(PARTS)}
        children.append(start(work, os.fork, go[0]))
        """)
    creator.do(CHANGE)
    parent.do("os.write(go[1], b'.' * 4)")
    assert parent.ask("[result(child) for child in children]") == [expected(CHANGED_PARTS)] * 4
    for c in (creator, parent, start("None, 0, RW")):
        assert c.ask(f"look(r.address, {CHANGED_PROBES})") == expected(CHANGED_PARTS)


def test_a_change_by_a_child_is_everybodys(creator: Client, start: Callable[..., Client]) -> None:
    """The child of one that attached makes the calls."""
    other = start(f"{ELSEWHERE}, 0, RW")
    other.do(f"f = os.open({creator.ask('path')!r}, os.O_RDWR)")
    assert other.ask(f"fork({CHANGE!r})") == 0
    for c in (creator, other, start("None, 0, RW")):
        assert c.ask(f"look(r.address, {CHANGED_PROBES})") == expected(CHANGED_PARTS)


def test_those_that_come_while_the_layout_changes(creator: Client, start: Callable[..., Client]) -> None:
    """Children forked and processes attached meanwhile see one of the layouts at first, and at the end the last."""
    parent, guest = start("None, 0, RW"), start()
    creator.send(
        do="""
for step in range(60):
    r.mprotect(0, 2 * MIB, step % 2); r.munmap(PAGE, 2 * MIB); r.mprotect(0, PAGE, 3)
    r.mmap(2 * MIB, flags=0x31, offset=PAGE)
r.mprotect(2 * MIB, 3 * PAGE, 1)
"""
    )
    parent.do(f"""
        go, at = os.pipe(), r.address + MIB
        work = lambda: look(r.address, {LAST_PROBES})
        children, first = [], set()
        for n in range(12):
            children.append(start(work, (os.fork, raw_fork)[n % 2], go[0]))
            first |= {{touched(at, os.fork), touched(at, raw_fork, 0)}}
        """)
    guest.do("""
        first = set()
        for n in range(10):
            with mshare.mshare(name, 0x6000_0000_0000, 0, RW) as r: first |= {touched(r.address + MIB, os.fork, 0)}
        """)
    creator.receive()
    parent.do("os.write(go[1], b'.' * 12)")
    assert {*parent.ask("list(first)"), *guest.ask("list(first)")} <= {0, -SIGBUS, -SIGSEGV}
    assert parent.ask("[result(child) for child in children]") == [expected(LAST_PARTS)] * 12
