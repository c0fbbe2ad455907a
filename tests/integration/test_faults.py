"""Who serves which fault: native memory, holes, and --paging=all."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
SIGBUS, SIGSEGV = 7, 11
CREATE_WITH_HOLE = """
base = 0x5000_0000_0000
sc.mmap(base, 2 * MIB, 3, 0x22 | sc.MAP_FIXED_NOREPLACE)
ctypes.memset(base, 7, 4)
r = mshare.mshare({name!r}, base, 4 * MIB, CREATE)
"""


def test_anonymous_memory_never_reaches_the_daemon(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 64 * MIB, CREATE); r.buf[::PAGE] = bytes(64 * MIB // PAGE)")
    assert c.ask("r.stat().faults") == 0
    assert c.ask("r.stat().resident") == 64 * MIB


@pytest.mark.parametrize("offset", [2 * MIB, 4 * MIB - 1, 3 * MIB + 5])
def test_a_touch_of_a_hole_is_a_sigbus_with_its_address(client: Callable[..., Client], name: str, offset: int) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    c.do("report_faults()")
    status, text = c.dies_of(f"r.buf[{offset}]")
    assert (status, f"SIGNAL {SIGBUS} {0x5000_0000_0000 + offset:x}\n") == (100 + SIGBUS, text)


def test_a_store_to_a_hole_is_a_sigbus_too(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    assert c.dies_of(f"r.buf[{2 * MIB}] = 1")[0] == -SIGBUS


def test_the_faulthandler_of_python_prints_the_line(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    assert "Fatal Python error: Bus error" in c.dies_of(f"r.buf[{2 * MIB}]")[1]


def test_a_later_process_meets_the_hole_where_it_attaches(client: Callable[..., Client], name: str) -> None:
    donor, later = client(), client()
    donor.do(CREATE_WITH_HOLE.format(name=name))
    later.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW); report_faults()")
    assert later.ask("r.buf[0]") == 7
    status, text = later.dies_of(f"r.buf[{2 * MIB + 9}]")
    assert (status, text) == (100 + SIGBUS, f"SIGNAL {SIGBUS} {0x6000_0000_0000 + 2 * MIB + 9:x}\n")
    assert donor.ask("r.buf[0]") == 7


def test_a_reader_meets_the_hole(client: Callable[..., Client], name: str) -> None:
    donor, reader = client(), client()
    donor.do(CREATE_WITH_HOLE.format(name=name))
    reader.do(f"r = mshare.mshare({name!r}, None, 0, RO)")
    assert reader.ask("r.buf[3]") == 7
    assert reader.dies_of(f"r.buf[{2 * MIB}]")[0] == -SIGBUS


def test_forked_children_and_their_children_meet_the_hole(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    assert c.ask(f"fork('r.buf[{2 * MIB}]')") == -SIGBUS
    assert c.ask(f"fork('os._exit(50 + -fork(\"r.buf[{3 * MIB}]\"))')") == 50 + SIGBUS
    assert c.ask("r.buf[0]") == 7


def test_another_thread_of_the_process_gets_its_own_signal(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    c.do("report_faults()")
    status, text = c.dies_of(f"t = threading.Thread(target=lambda: r.buf[{2 * MIB + 1}]); t.start(); t.join()")
    assert (status, text) == (100 + SIGBUS, f"SIGNAL {SIGBUS} {0x5000_0000_0000 + 2 * MIB + 1:x}\n")


def test_a_thread_that_blocks_the_signal_dies_all_the_same(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    c.do("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])")
    assert c.dies_of(f"r.buf[{2 * MIB}]")[0] == -SIGBUS


def test_an_empty_region_is_one_hole(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, empty=True)")
    assert c.ask("r.maps()") == []
    assert c.dies_of("r.buf[0]")[0] == -SIGBUS


def test_the_signal_of_holes_can_be_chosen(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str
) -> None:
    c = client(start_daemon("--hole-signal", "SIGSEGV"))
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, empty=True)")
    assert c.dies_of("r.buf[0]")[0] == -SIGSEGV


@pytest.mark.parametrize("backing", ["thp", "4k"])
def test_paging_all_counts_each_first_touch_once_for_all(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str, backing: str
) -> None:
    paging = start_daemon("--paging", "all", "--backing", backing)
    a, b = client(paging), client(paging)
    a.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
    b.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    a.do("r.buf[: 64 * PAGE : PAGE] = b'a' * 64")
    assert (a.ask("r.stat().faults"), a.ask("r.stat().tables['pte']")) == (64, 1)
    assert b.ask("bytes(r.buf[: 64 * PAGE : PAGE]).decode()") == "a" * 64
    b.do("r.buf[64 * PAGE : 80 * PAGE : PAGE] = b'b' * 16")
    assert a.ask("bytes(r.buf[64 * PAGE : 80 * PAGE : PAGE]).decode()") == "b" * 16
    assert b.ask("r.stat().faults") == 80
    assert a.ask("fork('r.buf[100 * PAGE] = 1; assert r.buf[0] == 97')") == 0
    assert (a.ask("r.buf[100 * PAGE]"), a.ask("r.stat().faults")) == (1, 81)


def test_paging_all_serves_readers(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str
) -> None:
    paging = start_daemon("--paging", "all", "--backing", "4k")
    writer, reader = client(paging), client(paging)
    writer.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
    reader.do(f"r = mshare.mshare({name!r}, None, 0, RO)")
    assert reader.ask("sum(r.buf[: 16 * PAGE : PAGE])") == 0
    writer.do("r.buf[: 16 * PAGE : PAGE] = b'x' * 16")
    assert reader.ask("bytes(r.buf[: 16 * PAGE : PAGE]).decode()") == "x" * 16
    assert reader.ask("r.stat().faults") == 16


@pytest.mark.parametrize(
    "call",
    [
        "os.write(pipe[1], r.buf[2 * MIB : 2 * MIB + 10])",
        "os.preadv(zero, [r.buf[2 * MIB : 2 * MIB + 10]], 0)",
        "os.preadv(zero, [r.buf[3 * MIB + 5 : 3 * MIB + 6]], 0)",
        "pair[0].recv_into(r.buf[2 * MIB : 2 * MIB + 10])",
        "pair[1].send(r.buf[2 * MIB : 2 * MIB + 10])",
    ],
)
def test_a_system_call_on_a_hole_fails_and_the_process_lives(
    client: Callable[..., Client], name: str, call: str
) -> None:
    c = client()
    c.do(CREATE_WITH_HOLE.format(name=name))
    c.do("pipe, pair = os.pipe(), socket.socketpair(); pair[1].send(b'x' * 10)")
    c.do("zero = os.open('/dev/zero', os.O_RDONLY)")
    assert c.error_of(call).errno == errno.EFAULT
    assert c.ask("r.buf[0]") == 7


def test_system_calls_work_on_native_and_paged_memory(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], daemon: Daemon, name: str
) -> None:
    for of in (daemon, start_daemon("--paging", "all")):
        c = client(of)
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); pipe = os.pipe()")
        c.do("os.write(pipe[1], r.buf[: 2 * PAGE]); os.readv(pipe[0], [r.buf[4 * PAGE : 6 * PAGE]])")
        c.do("os.write(pipe[1], b'hello'); os.readv(pipe[0], [r.buf[8 * PAGE - 2 : 8 * PAGE + 3]])")
        assert c.ask("bytes(r.buf[8 * PAGE - 2 : 8 * PAGE + 3]).decode()") == "hello"


def test_a_system_call_that_stores_to_read_only_memory_fails(client: Callable[..., Client], name: str) -> None:
    """It gets EFAULT, nothing is stored, and a store by an instruction is a SIGSEGV as before."""
    c, other = client(), client()
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.buf[0] = 1; r.mprotect(0, PAGE, 1)")
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW); zero = os.open('/dev/zero', os.O_RDONLY)")
    for _ in range(3):
        assert other.error_of("os.preadv(zero, [r.buf[:10]], 0)").errno == errno.EFAULT
    assert (other.ask("r.buf[0]"), c.ask("r.buf[0]")) == (1, 1)
    c.do("r.mprotect(0, PAGE, 3)")
    assert other.ask("os.preadv(zero, [r.buf[:10]], 0)") == 10
    c.do("r.buf[0] = 1; r.mprotect(0, PAGE, 1)")
    assert other.error_of("os.preadv(zero, [r.buf[:10]], 0)").errno == errno.EFAULT
    assert other.dies_of("time.sleep(0.1); r.buf[0] = 1")[0] == -SIGSEGV


def test_a_forked_child_that_makes_such_a_call_does_not_hang(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.buf[0] = 1; r.mprotect(0, PAGE, 1)")
    assert c.ask("fork('os.preadv(os.open(\"/dev/zero\", os.O_RDONLY), [r.buf[:10]], 0)')") in (-9, -SIGSEGV)
    assert c.ask("r.buf[0]") == 1
