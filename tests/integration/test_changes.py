"""The address space inside a region: one call, every process."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
PAGE = 4096
SIGBUS, SIGSEGV = 7, 11
PROT = "from mmap import *"


@pytest.fixture(params=["thp", "4k"])
def pair(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> tuple[Client, Client]:
    """Two processes on one region of 8 MiB, full of 1s, at different addresses."""
    a, b = client(), client()
    a.do(f"from mmap import *\nr = mshare.mshare({name!r}, None, 8 * MIB, CREATE, backing={request.param!r})")
    a.do("r.buf[:] = bytes([1]) * 8 * MIB")
    b.do(f"from mmap import *\nr = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    assert b.ask("r.buf[8 * MIB - 1]") == 1
    return a, b


def touch(c: Client, offset: int, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    status: int = -c.ask(f"fork('r.buf[{offset}] = 2')" if store else f"fork('r.buf[{offset}]')")
    return status


def layout(c: Client) -> list[tuple[int, int, int]]:
    return [tuple(v) for v in c.ask("[(v.offset, v.length, v.prot) for v in r.maps()]")]


@pytest.mark.parametrize(("offset", "length"), [(2 * MIB, 4 * MIB), (3 * PAGE, PAGE), (2 * MIB - PAGE, 2 * PAGE)])
def test_munmap_makes_a_hole_everywhere(pair: tuple[Client, Client], offset: int, length: int) -> None:
    a, b = pair
    a.do(f"r.munmap({offset}, {length})")
    for c in pair:
        assert touch(c, offset) == touch(c, offset + length - 1, store=True) == SIGBUS
        assert touch(c, offset - 1) == touch(c, offset + length, store=True) == 0
        assert layout(c) == [(0, offset, 3), (offset + length, 8 * MIB - offset - length, 3)]
    a.do(f"assert r.mmap({length}, offset={offset}) == {offset}")
    for c in pair:
        assert c.ask(f"sum(r.buf[{offset}:{offset + length}])") == 0
        assert c.ask(f"(r.buf[{offset - 1}], r.buf[{offset + length + 1}])") == [1, 1]
        assert layout(c) == [(0, 8 * MIB, 3)]
    b.do(f"r.buf[{offset}] = 9")
    assert a.ask(f"r.buf[{offset}]") == 9


def test_munmap_gives_the_memory_back(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    a.do("r.munmap(0, 2 * MIB); r.munmap(4 * MIB, PAGE)")
    assert a.ask("r.stat().resident") == 6 * MIB - PAGE


@pytest.mark.parametrize(("offset", "length"), [(0, 8 * MIB), (2 * MIB, 2 * MIB), (5 * PAGE, 3 * PAGE)])
def test_mprotect_read_only(pair: tuple[Client, Client], offset: int, length: int) -> None:
    a, b = pair
    b.do(f"r.mprotect({offset}, {length}, PROT_READ)")
    for c in pair:
        assert touch(c, offset) == touch(c, offset + length - 1) == 0
        assert touch(c, offset, store=True) == touch(c, offset + length - 1, store=True) == SIGSEGV
    a.do(f"r.mprotect({offset}, {length}, PROT_READ | PROT_WRITE); r.buf[{offset}] = 7")
    assert b.ask(f"r.buf[{offset}]") == 7
    assert touch(b, offset + length - 1, store=True) == 0


def test_a_fault_has_the_address_of_its_own_process(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.do("r.mprotect(2 * MIB, PAGE, PROT_READ)")
    b.do("report_faults()")
    status, text = b.dies_of("r.buf[2 * MIB + 5] = 1")
    assert (status, text) == (100 + SIGSEGV, f"SIGNAL {SIGSEGV} {0x6000_0000_0000 + 2 * MIB + 5:x}\n")


@pytest.mark.parametrize(("offset", "length"), [(0, 8 * MIB), (2 * MIB, 4 * MIB), (5 * PAGE, 3 * PAGE), (MIB, 2 * MIB)])
def test_mprotect_none_keeps_the_contents(pair: tuple[Client, Client], offset: int, length: int) -> None:
    a, b = pair
    a.do(f"r.buf[{offset}:{offset + length}] = bytes(range(256)) * ({length} // 256)")
    a.do(f"r.mprotect({offset}, {length}, 0)")
    for c in pair:
        assert touch(c, offset) == touch(c, offset + length - 1, store=True) == SIGSEGV
    b.do(f"r.mprotect({offset}, {length}, PROT_READ)")
    for c in pair:
        assert c.ask(f"r.buf[{offset}:{offset + length}] == bytes(range(256)) * ({length} // 256)")
        assert touch(c, offset, store=True) == SIGSEGV
    b.do(f"r.mprotect({offset}, {length}, PROT_READ | PROT_WRITE); r.buf[{offset}] = 3")
    assert a.ask(f"r.buf[{offset}]") == 3
    assert a.ask("r.stat().resident") == 8 * MIB


def test_what_was_hidden_does_not_come_back_after_munmap(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.do("r.mprotect(0, 2 * MIB, 0); r.munmap(0, 2 * MIB); r.mmap(2 * MIB, 0, offset=0)")
    b.do("r.mprotect(0, 2 * MIB, PROT_READ)")
    assert b.ask("sum(r.buf[: 2 * MIB])") == 0


def test_processes_that_are_stopped_do_not_delay_it(pair: tuple[Client, Client]) -> None:
    a, b = pair
    b.signal(signal.SIGSTOP)
    a.do("r.mprotect(0, 2 * MIB, PROT_READ); r.munmap(4 * MIB, 2 * MIB)")
    b.signal(signal.SIGCONT)
    assert b.dies_of("r.buf[5] = 1")[0] == -SIGSEGV
    assert layout(a) == [(0, 2 * MIB, 1), (2 * MIB, 2 * MIB, 3), (6 * MIB, 2 * MIB, 3)]


def test_processes_that_are_busy_do_not_delay_it(
    pair: tuple[Client, Client], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """One of them is in an iterator written in C, which holds the interpreter, until it finds a 0."""
    a, b = pair
    b.do("import itertools")
    b.send(do="r.buf[3 * MIB] = 7; next(itertools.dropwhile(r.buf.__getitem__, itertools.repeat(2 * MIB)))")
    eventually(lambda: bool(a.ask("r.buf[3 * MIB]") == 7))
    a.do("r.mprotect(0, 2 * MIB, PROT_READ); r.munmap(4 * MIB, 2 * MIB)")
    assert b.is_silent()
    a.do("r.buf[2 * MIB] = 0")
    b.receive()
    assert b.dies_of("r.buf[5] = 1")[0] == -SIGSEGV


def test_later_processes_and_readers_find_the_same_layout(
    pair: tuple[Client, Client], client: Callable[..., Client], name: str
) -> None:
    a, _ = pair
    a.do("r.mprotect(0, PAGE, PROT_READ); r.mprotect(2 * MIB, PAGE, 0); r.munmap(4 * MIB, PAGE)")
    later, reader = client(), client()
    later.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    reader.do(f"r = mshare.mshare({name!r}, None, 0, RO)")
    assert layout(later) == layout(reader) == layout(a)
    assert (touch(later, 0), touch(later, 0, store=True), touch(reader, 0)) == (0, SIGSEGV, 0)
    for c in (later, reader):
        assert (touch(c, 2 * MIB), touch(c, 4 * MIB), touch(c, PAGE)) == (SIGSEGV, SIGBUS, 0)
    assert touch(later, PAGE, store=True) == 0


def test_children_forked_at_any_moment_follow(pair: tuple[Client, Client]) -> None:
    """A process forks without pause while another changes the layout: each child sees one layout or the other."""
    a, b = pair
    b.do("""
        stop, outcomes = threading.Event(), []
        def forker():
            while not stop.is_set():
                pid = os.fork()
                if pid == 0: r.buf[2 * MIB]; os._exit(0)
                outcomes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        t = threading.Thread(target=forker); t.start()
        """)
    for _ in range(25):
        a.do("r.munmap(2 * MIB, 2 * MIB)")
        a.do("r.mmap(2 * MIB, offset=2 * MIB)")
    a.do("r.munmap(2 * MIB, 2 * MIB)")
    b.do("stop.set(); t.join()")
    assert set(b.ask("outcomes")) <= {0, -SIGBUS}
    assert touch(b, 2 * MIB) == SIGBUS
    assert a.ask("r.stat().resident") == 6 * MIB


def test_placement(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    error = a.error_of("r.mmap(PAGE)")
    assert (error.errno, "unmap" in error.text) == (errno.ENOMEM, True)
    a.do("r.munmap(2 * MIB, 4 * MIB)")
    assert a.ask("r.mmap(2 * MIB, offset=4 * MIB)") == 4 * MIB
    assert a.ask("r.mmap(PAGE, offset=4 * MIB)") == 2 * MIB
    assert a.error_of("r.mmap(PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS | 0x100000, offset=0)").errno == errno.EEXIST
    a.do("assert r.mmap(2 * PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS | 0x10, offset=PAGE) == PAGE")
    assert a.ask("(r.buf[0], r.buf[PAGE], r.buf[3 * PAGE])") == [1, 0, 1]
    assert touch(a, PAGE, store=True) == SIGSEGV
    a.do("r.munmap(6 * MIB, 2 * MIB)")
    assert a.ask("r.mmap(2 * MIB, flags=MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE)") == 6 * MIB
    assert a.ask("[v.resident for v in r.maps() if v.offset == 4 * MIB]") == [2 * MIB]


def test_madvise(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.do("r.madvise(0, 2 * MIB, MADV_DONTNEED)")
    assert a.ask("r.buf[5]") == b.ask("r.buf[5]") == 1
    a.do("r.madvise(0, 2 * MIB, MADV_REMOVE)")
    assert a.ask("sum(r.buf[:2 * MIB])") == b.ask("sum(r.buf[:2 * MIB])") == 0
    assert a.ask("sum(r.buf[2 * MIB:])") == 6 * MIB
    a.do("r.madvise(0, 2 * MIB, 23); r.madvise(0, 8 * MIB, 22)")
    for advice in ("NORMAL", "RANDOM", "SEQUENTIAL", "WILLNEED", "HUGEPAGE", "NOHUGEPAGE"):
        a.do(f"r.madvise(2 * MIB, 2 * MIB, MADV_{advice})")
    a.do("r.madvise(2 * MIB, 2 * MIB, 20); r.madvise(2 * MIB, 2 * MIB, 21)")
    assert a.ask("sum(r.buf[2 * MIB:])") == 6 * MIB
    a.do("r.mprotect(0, PAGE, PROT_READ); r.munmap(4 * MIB, PAGE)")
    assert a.error_of("r.madvise(0, 2 * MIB, MADV_REMOVE)").errno == errno.EACCES
    assert a.error_of("r.madvise(0, PAGE, 23)").errno == errno.EINVAL
    assert a.error_of("r.madvise(2 * MIB, 4 * MIB, MADV_REMOVE)").errno == errno.ENOMEM
    assert a.error_of("r.madvise(4 * MIB, PAGE, 22)").errno == errno.ENOMEM
    assert a.error_of("r.madvise(0, PAGE, 999)").errno == errno.EINVAL


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("r.mmap(0)", errno.EINVAL),
        ("r.mmap(-PAGE)", errno.EINVAL),
        ("r.mmap(100)", errno.EINVAL),
        ("r.mmap(PAGE, offset=100)", errno.EINVAL),
        ("r.mmap(PAGE, offset=8 * MIB)", errno.EINVAL),
        ("r.mmap(PAGE, offset=-PAGE)", errno.EINVAL),
        ("r.mmap(16 * MIB)", errno.ENOMEM),
        ("r.mmap(PAGE, PROT_EXEC)", errno.EACCES),
        ("r.mmap(PAGE, 64)", errno.EINVAL),
        ("r.mmap(PAGE, flags=MAP_ANONYMOUS)", errno.EINVAL),
        ("r.mmap(PAGE, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10)", errno.EINVAL),
        ("r.mmap(PAGE, flags=MAP_SHARED | MAP_ANONYMOUS | 0x40000)", errno.EINVAL),
        ("r.munmap(0, 0)", errno.EINVAL),
        ("r.munmap(1, PAGE)", errno.EINVAL),
        ("r.munmap(0, 16 * MIB)", errno.EINVAL),
        ("r.munmap(1 << 62, PAGE)", errno.EINVAL),
        ("r.mprotect(0, 16 * MIB, 1)", errno.EINVAL),
        ("r.mprotect(0, PAGE, PROT_EXEC)", errno.EACCES),
        ("r.mprotect(0, PAGE, 99)", errno.EINVAL),
    ],
)
def test_bad_input_changes_nothing(client: Callable[..., Client], name: str, call: str, number: int) -> None:
    c = client()
    c.do(f"{PROT}\nr = mshare.mshare({name!r}, None, 8 * MIB, CREATE); r.buf[0] = 5")
    assert c.error_of(call).errno == number
    assert layout(c) == [(0, 8 * MIB, 3)]
    assert c.ask("r.buf[0]") == 5


def test_readers_change_nothing(pair: tuple[Client, Client], client: Callable[..., Client], name: str) -> None:
    reader = client()
    reader.do(f"{PROT}\nr = mshare.mshare({name!r}, None, 0, RO)")
    for call in ("r.mmap(PAGE)", "r.munmap(0, PAGE)", "r.mprotect(0, PAGE, 1)", "r.madvise(0, PAGE, MADV_REMOVE)"):
        assert reader.error_of(call).errno == errno.EACCES
    assert layout(pair[0]) == [(0, 8 * MIB, 3)]


def test_who_spoils_its_own_window_harms_itself_only(
    pair: tuple[Client, Client], client: Callable[..., Client], name: str
) -> None:
    """One unmapped its window, one replaced it, one moved it: changes reach all the others."""
    a, b = pair
    spoilers = [client() for _ in range(3)]
    for c in spoilers:
        c.do(f"r = mshare.mshare({name!r}, None, 0, RW); r.buf[0] = 1")
    spoilers[0].do("sc.munmap(r.address, r.size)")
    spoilers[1].do("sc.mmap(r.address, r.size, 3, 0x32)")
    spoilers[2].do("mremap = ctypes.CDLL(None).mremap; mremap.argtypes = [ctypes.c_size_t] * 5")
    spoilers[2].do("mremap(r.address, r.size, r.size, 3, 0x6300_0000_0000)")
    a.do("r.mprotect(0, 2 * MIB, 1); r.munmap(4 * MIB, 2 * MIB)")
    assert (touch(b, 0, store=True), touch(b, 4 * MIB), b.ask("r.buf[0]")) == (SIGSEGV, SIGBUS, 1)
    assert all(c.is_alive() for c in spoilers)


def test_hiding_contents_needs_no_room_among_the_regions(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client]
) -> None:
    c = client(start_daemon("--max-bytes", "8M"))
    c.do(f"{PROT}\nr = mshare.mshare('x', None, 8 * MIB, CREATE); r.buf[:] = bytes([4]) * 8 * MIB")
    c.do("r.mprotect(0, 8 * MIB, 0)")
    c.do("r.mprotect(0, 8 * MIB, PROT_READ | PROT_WRITE)")
    assert c.ask("r.buf.tobytes() == bytes([4]) * 8 * MIB")


def test_races_between_changes_and_touches(
    pair: tuple[Client, Client], client: Callable[..., Client], name: str
) -> None:
    """Two processes change the same pages while a third touches what stays: no hang, no wrong byte."""
    a, b = pair
    third = client()
    third.do(f"r = mshare.mshare({name!r}, 0x6200_0000_0000, 0, RW)")
    third.do("""
        stop, wrong = threading.Event(), []
        def work():
            n = 0
            while not stop.is_set():
                n += 1; r.buf[6 * MIB + 8] = n % 251
                if r.buf[6 * MIB + 8] != n % 251 or r.buf[0] != 1: wrong.append(n)
        t = threading.Thread(target=work); t.start()
        """)
    change = """
        for i in range(60):
            try:
                r.mprotect(2 * MIB, 2 * MIB, i % 4); r.munmap(3 * MIB, 2 * MIB); r.mmap(2 * MIB, offset=3 * MIB)
                r.mprotect(2 * MIB, 4 * MIB, 3)
            except OSError as error: assert error.errno in (errno.ENOMEM,), error
        """
    for c in pair:
        c.send(do=change.replace("\n        ", "\n"))
    for c in pair:
        c.receive()
    third.do("stop.set(); t.join()")
    assert third.ask("wrong") == []
    a.do("r.mmap(8 * MIB - 2 * MIB, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10, offset=0)")
    assert b.ask("sum(r.buf[:6 * MIB])") == 0


def test_a_crowd_is_protected_when_the_call_returns(client: Callable[..., Client], name: str) -> None:
    """So many processes that the daemon changes them with several threads."""
    a = client()
    a.do(f"from mmap import *\nr = mshare.mshare({name!r}, None, 2 * MIB, CREATE)\nr.buf[0] = 1")
    a.do(
        """
            told, tell = os.pipe()
            children = []
            for _ in range(50):
                children.append(os.fork())
                if not children[-1]:
                    os.close(tell)
                    os.read(told, 1)  # Until the parent has closed its end.
                    value = r.buf[0]
                    r.buf[0] = 2
                    os._exit(value)
            r.mprotect(0, r.size, PROT_READ)
            os.close(tell)
        """
    )
    assert a.ask("[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]") == [-SIGSEGV] * 50
    a.do("r.mprotect(0, r.size, PROT_READ | PROT_WRITE)")
    assert a.ask("r.buf[0]") == 1
