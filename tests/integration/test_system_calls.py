"""System calls that are given a region's memory: what they move, and how they fail, is as with the kernel's own memory.

The same calls are made on a region and on plain memory that is mapped alike.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
PAGE = 4096
REFUSED = -errno.EFAULT
FUTEX_WAIT, FUTEX_WAKE = 0, 1

CALLS = """
import contextlib
libc = ctypes.CDLL(None, use_errno=True)
class Piece(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def one(at, size): return (Piece * 1)(Piece(at, size))
def two(at, size): return (Piece * 2)(Piece(at, size // 2), Piece(at + size // 2, size - size // 2))
def call(name, *args):
    "Call a function of libc; what it returns, or the negative errno."
    function = getattr(libc, name); function.restype = ctypes.c_int
    got = function(*[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])
    return got if got >= 0 else -ctypes.get_errno()
def with_pipe(work):
    ends = os.pipe()
    try: return work(*ends)
    finally: os.close(ends[0]); os.close(ends[1])
def with_sockets(work):
    left, right = socket.socketpair()
    with left, right: return work(left.fileno(), right.fileno())
def with_file(work, flags=0, name="target"):
    "``target`` is what calls read and write, ``mapped`` what shows in memory."
    fd = os.open(f"{directory}/{name}", os.O_RDWR | flags)
    try: return work(fd)
    finally: os.close(fd)
def direct(name, at, size, where):
    return with_file(lambda fd: call(name, fd, at & ~511, size + 511 & ~511, where), os.O_DIRECT)
def between(name, at, size, pid=None, data=b""):
    "process_vm_readv and its like; what it returns, and what is in this side's buffer then."
    own = ctypes.create_string_buffer(data, size)
    return call(name, pid or os.getpid(), one(ctypes.addressof(own), size), 1, one(at, size), 1, 0), own.raw
def futex(at, operation, value, milliseconds=1):
    limit = struct.pack("qq", milliseconds // 1000, milliseconds % 1000 * 1000000)
    return call("syscall", 202, at & ~3, operation, value, limit, 0, 0)
loads = {
    "write": lambda at, size: with_pipe(lambda r, w: call("write", w, at, size)),
    "writev": lambda at, size: with_pipe(lambda r, w: call("writev", w, two(at, size), 2)),
    "send": lambda at, size: with_sockets(lambda fd, _: call("send", fd, at, size, 0)),
    "vmsplice": lambda at, size: with_pipe(lambda r, w: call("vmsplice", w, one(at, size), 1, 0)),
    "pwrite": lambda at, size: with_file(lambda fd: call("pwrite64", fd, at, size, MIB)),
    "pwritev": lambda at, size: with_file(lambda fd: call("pwritev", fd, two(at, size), 2, MIB)),
    "direct pwrite": lambda at, size: direct("pwrite64", at, size, MIB),
    "process_vm_readv": lambda at, size: between("process_vm_readv", at, size)[0],
    "mlock": lambda at, size: call("mlock", at, size) or call("munlock", at, size),
    "prctl": lambda at, size: call("prctl", 15, at, 0, 0, 0),
    "futex": lambda at, size: futex(at, 0, 0x7FFFFFFF),
}
stores = {
    "read": lambda at, size: with_pipe(lambda r, w: (os.write(w, b"q" * size), call("read", r, at, size))[1]),
    "readv": lambda at, size: with_pipe(lambda r, w: (os.write(w, b"q" * size), call("readv", r, two(at, size), 2))[1]),
    "recv": lambda at, size: with_sockets(lambda fd, to: (os.write(to, b"q" * size), call("recv", fd, at, size, 0))[1]),
    "pread": lambda at, size: with_file(lambda fd: call("pread64", fd, at, size, 0)),
    "preadv": lambda at, size: with_file(lambda fd: call("preadv", fd, two(at, size), 2, 0)),
    "direct pread": lambda at, size: direct("pread64", at, size, 0),
    "process_vm_writev": lambda at, size: between("process_vm_writev", at, size, data=b"v" * size)[0],
    "getrandom": lambda at, size: call("getrandom", at, size, 0),
}
def outcomes(calls, base, spots):
    return [[name, spot, calls[name](base + spot[0], spot[1])] for spot in spots for name in calls]
def unlike(calls, spots):
    "What differs between plain memory and the region."
    return [pair for pair in zip(outcomes(calls, own, spots), outcomes(calls, base, spots)) if pair[0] != pair[1]]
def in_child(work):
    "What ``work`` returns in a forked child."
    told, tell = os.pipe()
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException): os.write(tell, json.dumps(work()).encode())
        os._exit(0)
    os.close(tell)
    with open(told) as words: said = words.read()
    os.waitpid(pid, 0)
    return json.loads(said)
def with_files(show):
    "Have the file shown shared in one part and private in the next."
    with_file(lambda fd: [show(part * MIB, shared, fd) for part, shared in ((5, 1), (6, 2))], name="mapped")
def plain():
    "Memory of this process's own, mapped as that of ``create`` is."
    base = sc.mmap(0x5000_0000_0000, 10 * MIB, 3, 0x21 | sc.MAP_FIXED_NOREPLACE)  # Where nothing will fill the holes.
    for part in (1, 4, 7, 9): sc.munmap(base + part * MIB, MIB)
    sc.mprotect(base + 2 * MIB, MIB, 1); sc.mprotect(base + 3 * MIB, MIB, 0)
    with_files(lambda at, shared, fd: sc.mmap(base + at, MIB, 3, 0x10 | shared, fd))
    return base
def create():
    "A region, a MiB each: memory, hole, read-only, no access, hole, a file twice, hole, reference page, hole."
    global r
    r = mshare.mshare(name, None, 10 * MIB, CREATE, empty=True, backing=backing)
    r.mmap(MIB, flags=0x400032, offset=8 * MIB, refpage=mshare.refpage_create(b"refpage."))
    for part, prot in ((0, 3), (2, 1), (3, 0)): r.mmap(MIB, prot, offset=part * MIB)
    with_files(lambda at, shared, fd: r.mmap(MIB, flags=shared, offset=at, fd=fd))
    return r.address
def attach(flags=RW):
    global r
    r = mshare.mshare(name, 0x6000_0000_0000, 0, flags)
    return r.address
"""
SPOTS = [
    (5 * PAGE, 10),
    (8 * PAGE - 5, 10),
    (16 * PAGE, 9 * PAGE),
    (MIB - PAGE, 2 * PAGE),  # into a hole
    (MIB - 5, 10),
    (MIB + PAGE, 10),  # in a hole
    (3 * MIB + PAGE, PAGE),  # no access
    (5 * MIB + PAGE, 3 * PAGE),  # a shared file
    (6 * MIB - PAGE, 2 * PAGE),  # from it into a private one
    (6 * MIB + 8 * PAGE, 3 * PAGE),
    (7 * MIB - PAGE, 2 * PAGE),  # from a file into a hole
    (8 * MIB - PAGE, PAGE),
    (8 * MIB + PAGE, 3 * PAGE),  # a reference page
    (9 * MIB - PAGE, 2 * PAGE),  # from it into a hole
]
READ_ONLY_SPOTS = [(2 * MIB + PAGE, 3 * PAGE), (2 * MIB - PAGE, 2 * PAGE), (3 * MIB - PAGE, 2 * PAGE)]
HOLE = SPOTS[5]


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    """A file of 4 MiB whose byte n is n % 251, beside another one, on a filesystem that has O_DIRECT."""
    for name in ("target", "mapped"):
        (tmp_path / name).write_bytes((bytes(range(251)) * (4 * MIB // 251 + 1))[: 4 * MIB])
    try:
        os.close(os.open(tmp_path / "target", os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"needs O_DIRECT, which the filesystem of {tmp_path} has not: {error.strerror}; set TMPDIR")
    return tmp_path / "mapped"


@pytest.fixture(scope="module")
def daemons(start_daemon: Callable[..., Daemon]) -> dict[str, Daemon]:
    """One that pages what it must, and one that pages everything."""
    return {paging: start_daemon("--paging", paging) for paging in ("auto", "all")}


@pytest.fixture(params=["thp-auto", "4k-auto", "4k-all"])
def start(
    request: pytest.FixtureRequest, daemons: dict[str, Daemon], client: Callable[..., Client], mapped: Path, name: str
) -> Callable[[], Client]:
    """Start clients of one daemon that know the calls."""
    backing, paging = request.param.split("-")

    def start() -> Client:
        c = client(daemons[paging])
        c.do(f"{CALLS}\nname, directory, backing = {name!r}, {str(mapped.parent)!r}, {backing!r}")
        return c

    return start


@pytest.fixture
def pair(start: Callable[[], Client]) -> tuple[Client, Client]:
    """Two processes on one region of all kinds of memory, at different addresses, both with plain memory beside it."""
    a, b = start(), start()
    a.do("own, base = plain(), create()")
    b.do("own, base = plain(), attach()")
    return a, b


def test_calls_do_as_on_plain_memory(pair: tuple[Client, Client]) -> None:
    """On each kind of memory and across borders: as many bytes, or the same errno; a second time too."""
    for calls, spots in (("loads", SPOTS + READ_ONLY_SPOTS), ("stores", SPOTS)):
        expected = pair[0].ask(f"outcomes({calls}, own, {spots})")
        assert {outcome for _, spot, outcome in expected if tuple(spot) == HOLE} <= {REFUSED, -errno.ENOMEM}
        for _ in range(2):
            for c in pair:
                assert c.ask(f"outcomes({calls}, base, {spots})") == expected


def test_calls_of_forked_children_do_so_too(pair: tuple[Client, Client]) -> None:
    """Of a child, and of its child; but a futex on read-only memory, which the kernel first tries to have writable."""
    _, b = pair
    b.do("plain_loads = {name: loads[name] for name in loads if name != 'futex'}")
    for compare in (f"loads, {SPOTS}", f"stores, {SPOTS}", f"plain_loads, {READ_ONLY_SPOTS}"):
        assert b.ask(f"in_child(lambda: in_child(lambda: unlike({compare})))") == []
        assert b.ask(f"in_child(lambda: unlike({compare}))") == []


def test_a_read_only_window_gives_and_does_not_take(pair: tuple[Client, Client], start: Callable[[], Client]) -> None:
    """Calls load from it as from memory mapped for reading; each store is EFAULT and changes nothing."""
    a, reader = pair[0], start()
    a.do("r.buf[5 * PAGE] = 77; r.buf[16 * PAGE] = 78")
    reader.do("own, base = plain(), attach(RO)")
    spots = SPOTS + READ_ONLY_SPOTS
    assert reader.ask(f"outcomes(loads, base, {spots})") == reader.ask(f"outcomes(loads, own, {spots})")
    assert {outcome for _, _, outcome in reader.ask(f"outcomes(stores, base, {spots})")} == {REFUSED}
    for c in (a, reader):
        assert c.ask("(r.buf[5 * PAGE], r.buf[16 * PAGE])") == [77, 78]
        assert c.ask("(r.buf[5 * MIB + PAGE], r.buf[6 * MIB + 8 * PAGE])") == [PAGE % 251, 8 * PAGE % 251]


GIVING = {
    "write": "with_pipe(lambda r, w: (call('write', w, at, 8192), os.read(r, 8192)))",
    "writev": "with_pipe(lambda r, w: (call('writev', w, two(at, 8192), 2), os.read(r, 8192)))",
    "vmsplice": "with_pipe(lambda r, w: (call('vmsplice', w, one(at, 8192), 1, 0), os.read(r, 8192)))",
    "send": "with_sockets(lambda fd, to: (call('send', fd, at, 8192, 0), os.read(to, 8192)))",
    "pwrite": "with_file(lambda fd: (call('pwrite64', fd, at, 8192, 3 * MIB), os.pread(fd, 8192, 3 * MIB)))",
    "O_DIRECT": "with_file(lambda fd: (direct('pwrite64', at, 8192, 3 * MIB), os.pread(fd, 8192, 3 * MIB)))",
}


def test_calls_load_what_is_there(pair: tuple[Client, Client]) -> None:
    """What another process stored; zeros, and a file's bytes, where nobody has been; and what may only be read."""
    a, b = pair
    a.do("r.mprotect(2 * MIB, MIB, 3); r.buf[2 * MIB : 2 * MIB + 8192] = b'only' * 2048; r.mprotect(2 * MIB, MIB, 1)")
    a.do("r.buf[3 * PAGE : 5 * PAGE] = b'mshr' * 2048")
    b.do("def file(at): return open(directory + '/mapped', 'rb').read()[at : at + 8192]")
    for number, (how, code) in enumerate(GIVING.items()):
        new = (16 + 2 * number) * PAGE
        b.do(f"def given(at): return {code}")
        for offset, text in ((3 * PAGE, "b'mshr' * 2048"), (new, "bytes(8192)"), (2 * MIB, "b'only' * 2048")):
            assert b.ask(f"given(base + {offset}) == (8192, {text})"), (how, offset)
        for part in (5, 6):
            assert b.ask(f"given(base + {part * MIB + new}) == (8192, file({new}))"), (how, part)


TAKING = {
    "read": "with_pipe(lambda r, w: (os.write(w, data), call('read', r, at, 8192))[1])",
    "readv": "with_pipe(lambda r, w: (os.write(w, data), call('readv', r, two(at, 8192), 2))[1])",
    "recv": "with_sockets(lambda fd, to: (os.write(to, data), call('recv', fd, at, 8192, 0))[1])",
    "pread": "with_file(lambda fd: (os.pwrite(fd, data, 3 * MIB), call('pread64', fd, at, 8192, 3 * MIB))[1])",
    "O_DIRECT": "with_file(lambda fd: (os.pwrite(fd, data, 3 * MIB), direct('pread64', at, 8192, 3 * MIB))[1])",
    "process_vm_writev": "between('process_vm_writev', at, 8192, data=data)[0]",
}


def test_what_calls_store_is_there_for_everybody(pair: tuple[Client, Client], mapped: Path) -> None:
    """On pages that nobody has touched and on others; what went to a shared file's page reaches the file."""
    a, b = pair
    a.do("r.buf[3 * PAGE : 5 * PAGE] = b'mshr' * 2048; r.buf[5 * MIB + PAGE]")
    for number, (how, code) in enumerate(TAKING.items()):
        new = (40 + 2 * number) * PAGE
        b.do(f"take = lambda at, data: {code}")
        for offset in (3 * PAGE, new, 5 * MIB + PAGE, 5 * MIB + new, 6 * MIB + new):
            assert b.ask(f"take(base + {offset}, bytes([{number + 1}]) * 8192)") == 8192, (how, offset)
            assert a.ask(f"r.buf[{offset} : {offset} + 8192] == bytes([{number + 1}]) * 8192"), (how, offset)
        a.do("r.msync()")
        data = mapped.read_bytes()
        assert data[PAGE : 3 * PAGE] == data[new : new + 8192] == bytes([number + 1]) * 8192, how


def test_a_pipe_keeps_spliced_pages_that_are_unmapped(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.do("r.buf[:8192] = b'kept' * 2048")
    b.do("reading, writing = os.pipe()")
    assert b.ask("call('vmsplice', writing, one(base, 8192), 1, 0)") == 8192
    a.do("r.munmap(0, MIB); r.mmap(MIB, offset=0)")
    assert b.ask("os.read(reading, 8192) == b'kept' * 2048")
    assert b.ask("sum(r.buf[:8192])") == 0


def test_a_process_that_is_not_attached_reads_and_writes(
    pair: tuple[Client, Client], start: Callable[[], Client], mapped: Path
) -> None:
    """process_vm_readv and process_vm_writev on the other's memory, touched and not."""
    a, debugger = pair[0], start()
    a.do("r.buf[3 * PAGE : 5 * PAGE] = b'mshr' * 2048")
    address = a.ask("base")
    debugger.do(f"def peek(at): return between('process_vm_readv', {address} + at, 8192, {a.pid})")
    for offset, text in ((3 * PAGE, "b'mshr' * 2048"), (64 * PAGE, "bytes(8192)"), (2 * MIB, "bytes(8192)")):
        assert debugger.ask(f"peek({offset}) == (8192, {text})"), offset
    debugger.do("peeked = [peek(part * MIB + 9 * PAGE)[1] for part in (5, 6)]")
    assert debugger.ask("peeked == [open(directory + '/mapped', 'rb').read()[9 * PAGE : 11 * PAGE]] * 2")
    debugger.do(f"def poke(at): return between('process_vm_writev', {address} + at, 8192, {a.pid}, b'poke' * 2048)[0]")
    for offset in (3 * PAGE, 64 * PAGE, 5 * MIB + 20 * PAGE, 6 * MIB + 20 * PAGE):
        assert debugger.ask(f"poke({offset})") == 8192
        assert pair[1].ask(f"r.buf[{offset} : {offset} + 8192] == b'poke' * 2048"), offset
    a.do("r.msync()")
    assert mapped.read_bytes()[20 * PAGE : 22 * PAGE] == b"poke" * 2048


def test_one_call_moves_much(pair: tuple[Client, Client], mapped: Path) -> None:
    """A MiB from a file's mapping, untouched, into memory, untouched, and back into the mapping."""
    a, b = pair
    assert a.ask("with_file(lambda fd: call('pwrite64', fd, base + 5 * MIB, MIB, 2 * MIB))") == MIB
    assert b.ask("with_file(lambda fd: call('pread64', fd, base, MIB, 2 * MIB))") == MIB
    assert a.ask("r.buf[:MIB] == open(directory + '/mapped', 'rb').read()[:MIB]")
    assert b.ask("with_file(lambda fd: call('pread64', fd, base + 5 * MIB, MIB, MIB))") == MIB
    a.do("r.msync()")
    assert mapped.read_bytes()[:MIB] == (bytes(range(251)) * 8500)[MIB : 2 * MIB]


def test_processes_wait_for_each_other_by_futex(
    pair: tuple[Client, Client], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """The word may lie anywhere, and at different addresses."""
    a, b = pair
    for offset in (5 * PAGE, 64 * PAGE + 8, 5 * MIB + 30 * PAGE):
        b.send(
            ask=f"futex(base + {offset}, {FUTEX_WAIT}, int.from_bytes(r.buf[{offset} : {offset} + 4], 'little'), 15000)"
        )
        eventually(lambda at=offset: a.ask(f"futex(base + {at}, {FUTEX_WAKE}, 1)") == 1)  # type: ignore[misc]
        assert b.receive() == 0


def test_a_page_that_failed_a_call_is_good_again_once_mapped(pair: tuple[Client, Client]) -> None:
    """A hole that was given to calls, and memory without access, for all who tried and for their children."""
    a, b = pair
    a.do("r.mprotect(3 * MIB, MIB, 3); r.buf[3 * MIB : 3 * MIB + 8192] = b'hide' * 2048; r.mprotect(3 * MIB, MIB, 0)")
    b.do("""
        go, done = os.pipe(), os.pipe()
        if not (pid := os.fork()):
            os.read(go[0], 1)
            seen = loads["write"](base + MIB, 10), loads["write"](base + 3 * MIB, 8192)
            os.write(done[1], repr(seen).encode()); os._exit(0)
        """)
    for c in pair:
        assert c.ask("[loads['write'](base + at, 10) for at in (MIB, 3 * MIB)]") == [REFUSED] * 2
        assert c.ask("[stores['read'](base + at, 10) for at in (MIB, 3 * MIB)]") == [REFUSED] * 2
    a.do("r.mmap(MIB, offset=MIB); r.mprotect(3 * MIB, MIB, 3)")
    b.do("os.write(go[1], b'.'); os.waitpid(pid, 0)")
    assert b.ask("os.read(done[0], 100).decode()") == "(10, 8192)"
    for c in pair:
        assert c.ask("(sum(r.buf[MIB : MIB + 8192]), r.buf[3 * MIB : 3 * MIB + 8192] == b'hide' * 2048)") == [0, True]


def test_threads_that_fail_together_live(pair: tuple[Client, Client]) -> None:
    """Threads that give the same hole, or memory without access, to calls at once: EFAULT for each, and no signal."""
    a, _ = pair
    a.do("""
        said, together = [], threading.Barrier(3)
        def work():
            for page in range(250):
                for part in (3, 4):
                    together.wait(); said.append(stores["read"](base + part * MIB + page * PAGE, 10))
        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
        """)
    assert a.ask("list(set(said))") == [REFUSED]


def test_stores_to_what_may_only_be_read_fail(pair: tuple[Client, Client]) -> None:
    """Each, on pages touched and not; the bytes stay."""
    a, _ = pair
    spots = [(2 * MIB + page * PAGE, 10) for page in range(100)]
    a.do("for page in range(0, 100, 2): r.buf[2 * MIB + page * PAGE]")
    assert {outcome for _, _, outcome in a.ask(f"outcomes(stores, base, {spots})")} == {REFUSED}
    assert a.ask("sum(r.buf[2 * MIB : 3 * MIB])") == 0


def test_a_refused_store_leaves_the_files_bytes(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.do("r.mprotect(5 * MIB, 2 * MIB, 1)")
    spots = [(part * MIB + 40 * PAGE, 10) for part in (5, 6)]
    assert {outcome for _, _, outcome in a.ask(f"outcomes(stores, base, {spots})")} == {REFUSED}
    for part in (5, 6):
        assert b.ask(f"r.buf[{part} * MIB : {part + 1} * MIB] == open(directory + '/mapped', 'rb').read()[:MIB]")


def test_past_the_end_of_a_file_nothing_appears(pair: tuple[Client, Client], mapped: Path) -> None:
    """Calls fail there; when the file grows, its bytes are there."""
    a, b = pair
    os.truncate(mapped, PAGE)
    a.do("r.munmap(5 * MIB, 2 * MIB)\nwith_files(lambda at, shared, fd: r.mmap(MIB, flags=shared, offset=at, fd=fd))")
    for part in (5, 6):
        assert a.ask(f"loads['write'](base + {part} * MIB + 8 * PAGE, 10)") == REFUSED
    a.do("r.mmap(PAGE, offset=7 * MIB)")
    assert [b.ask(f"fork('r.buf[{part} * MIB + 8 * PAGE]')") for part in (5, 6)] == [-7, -7]
    with mapped.open("ab") as file:
        file.write(b"g" * 15 * PAGE)
    assert [b.ask(f"r.buf[{part} * MIB + 8 * PAGE]") for part in (5, 6)] == [ord("g")] * 2


def test_a_file_mapped_where_a_call_failed_shows_its_bytes(pair: tuple[Client, Client]) -> None:
    a, b = pair
    assert [a.ask(f"loads['write'](base + {part} * MIB, 10)") for part in (1, 4)] == [REFUSED] * 2
    a.do("def show(fd): r.mmap(MIB, flags=1, offset=MIB, fd=fd); r.mmap(MIB, flags=2, offset=4 * MIB, fd=fd)")
    a.do("with_file(show, name='mapped')")
    for c in (b, a):
        for part in (1, 4):
            assert c.ask(f"r.buf[{part} * MIB : {part + 1} * MIB] == open(directory + '/mapped', 'rb').read()[:MIB]")


def test_a_process_that_is_not_attached_meets_what_it_may_not_touch(
    pair: tuple[Client, Client], start: Callable[[], Client]
) -> None:
    """It gets EFAULT or less than it asked for; nobody gets a signal."""
    a, debugger = pair[0], start()
    debugger.do(f"def peek(at): return between('process_vm_readv', {a.ask('base')} + at, 8192, {a.pid})[0]")
    debugger.do(f"def poke(at): return between('process_vm_writev', {a.ask('base')} + at, 8192, {a.pid})[0]")
    assert debugger.ask("[peek(at) for at in (MIB, MIB - PAGE, 3 * MIB + PAGE)]") == [REFUSED, PAGE, REFUSED]
    assert debugger.ask("[poke(at) for at in (MIB, 2 * MIB, 3 * MIB)]") == [REFUSED] * 3
    assert a.is_alive()


@pytest.mark.parametrize("store", ["futex", "direct pread", "process_vm_writev"])
def test_a_forked_childs_call_on_read_only_memory_ends(pair: tuple[Client, Client], store: str) -> None:
    """By a failure, or by the end of the child."""
    a, _ = pair
    a.do("r.buf[2 * MIB]")
    assert a.ask(f"fork('{{**loads, **stores}}[\"{store}\"](base + 2 * MIB, 10)')") in (0, -9, -11)


def test_a_file_is_written_from_memory_that_must_be_paged_while_it_is_written_back(
    pair: tuple[Client, Client], start: Callable[[], Client], name: str
) -> None:
    """write(2) holds the file while it waits for the daemon, and the daemon writes to it: nobody waits for ever."""
    a, last = pair[0], start()
    last.do(f"q = mshare.mshare({name!r} + 'q', None, 2 * MIB, CREATE, empty=True)")
    a.do("def show(at, flags, fd): flags == 1 and r.mmap(MIB, flags=1, offset=at, fd=fd)")
    for _ in range(10):
        last.do("with_file(lambda fd: q.mmap(2 * MIB, flags=0x11, offset=0, fd=fd)); q.buf[::PAGE] = b'x' * 512")
        last.do(f"q2 = mshare.mshare({name!r} + 'q', 0x7000_0000_0000, 0, RW); q.detach(); q = q2")
        a.do("r.munmap(5 * MIB, MIB); with_files(show)")
        a.send(ask="with_file(lambda fd: call('pwrite64', fd, base + 5 * MIB, MIB, 0))")
        last.do(f"q.detach(); q = mshare.mshare({name!r} + 'q', None, 0, RW)")
        assert a.receive() == MIB


def test_calls_go_on_while_others_change_the_layout(pair: tuple[Client, Client]) -> None:
    """No call on what stays mapped fails or is short, whatever happens beside it."""
    a, b = pair
    b.do("""
        stop, wrong = threading.Event(), []
        def work():
            while not stop.is_set():
                for call in ("write", "direct pwrite", "read", "direct pread", "vmsplice"):
                    for at in (5 * PAGE, 5 * MIB + PAGE, 6 * MIB + PAGE):
                        done = {**loads, **stores}[call](base + at, PAGE)
                        if done != PAGE: wrong.append((call, at, done))
        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads: t.start()
        """)
    a.do("""
        for step in range(40):
            r.mmap(MIB, flags=0x31, offset=4 * MIB); r.mprotect(4 * MIB, MIB, step % 4 % 3); r.munmap(4 * MIB, MIB)
            r.mprotect(64 * PAGE, 64 * PAGE, 1); r.mprotect(64 * PAGE, 64 * PAGE, 3); r.msync()
        """)
    b.do("stop.set()\nfor t in threads: t.join()")
    assert b.ask("wrong") == []


def test_no_store_gets_through_whatever_comes_between(pair: tuple[Client, Client], start: Callable[[], Client]) -> None:
    """Threads that store to the same pages together, and signals: each call fails, or the process ends; bytes stay."""
    storing = start()
    storing.do(
        "base, said, together = attach(), [], threading.Barrier(3)\nsignal.signal(signal.SIGALRM, lambda *_: None)"
    )
    status, _ = storing.dies_of(f"""
        def work():
            for page in range(100):
                for call in ("pread", "process_vm_writev"):
                    together.wait(); said.append(stores[call](base + 2 * MIB + page * PAGE, 10))
        threads = [threading.Thread(target=work) for _ in range(3)]
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        for t in threads: t.start()
        for t in threads: t.join()
        while set(said) != {{{REFUSED}}}: signal.pause()  # Who has stored is about to end.
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    assert status == -9
    assert pair[1].ask("sum(r.buf[2 * MIB : 3 * MIB])") == 0
