"""Children with private snapshots of their parent's regions."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from conftest import PATIENCE, Client, Daemon

MIB = 1 << 20
PAGE = 4096


@pytest.fixture(params=["thp", "4k"])
def parent(client: Callable[..., Client], name: str, request: pytest.FixtureRequest) -> Client:
    """A process with two regions, each page of which says its number; ``snap(code)`` runs code in a child by odfork."""
    c = client()
    c.do(
        f"""
        r = mshare.mshare({name!r}, None, 4 * MIB, CREATE, backing={request.param!r})
        q = mshare.mshare({name + "-2"!r}, None, 2 * MIB, CREATE, backing={request.param!r})
        for n in range(0, 200): r.buf[n * PAGE] = q.buf[n * PAGE] = n
        def snap(code, *regions):
            pid = mshare.odfork(*regions)
            if pid == 0:
                try:
                    exec(code, globals())
                except BaseException:
                    traceback.print_exc(); os._exit(99)
                os._exit(0)
            return pid
        def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        """
    )
    return c


def test_the_child_has_the_contents_of_the_fork_at_the_same_addresses(parent: Client) -> None:
    parent.do("go, gone = os.pipe()")
    parent.do(
        """
        code = "\\n".join((
            "os.read(go, 1)",
            "assert [r.buf[n * PAGE] for n in range(200)] == list(range(200))",
            "assert [q.buf[n * PAGE] for n in range(200)] == list(range(200))",
            "assert ctypes.string_at(r.address + 7 * PAGE, 1) == bytes([7])",
        ))
        pid = snap(code)
        r.buf[: 200 * PAGE : PAGE] = b'p' * 200
        os.write(gone, b'x')
        """
    )
    assert parent.ask("ended(pid)") == 0
    assert parent.ask("bytes(r.buf[: 200 * PAGE : PAGE]) == b'p' * 200")


def test_what_the_child_stores_nobody_else_sees(parent: Client, client: Callable[..., Client], name: str) -> None:
    other = client()
    other.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    assert (
        parent.ask("ended(snap('r.buf[: 200 * PAGE : PAGE] = bytes(200); q.buf[0] = 99; assert r.buf[PAGE] == 0'))")
        == 0
    )
    for c in (parent, other):
        assert c.ask("[r.buf[n * PAGE] for n in range(200)] == list(range(200))")
    assert parent.ask("q.buf[0]") == 0


def test_regions_that_are_not_given_stay_shared(parent: Client) -> None:
    assert parent.ask("ended(snap('r.buf[0] = 1; q.buf[0] = 2', r))") == 0
    assert parent.ask("(r.buf[0], q.buf[0])") == [0, 2]


def test_snapshots_end_with_the_child(
    parent: Client, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None], directory: object
) -> None:
    before = daemon.descriptors()
    names = sorted(os.listdir(daemon.mount))
    parent.do("pids = [snap('r.buf[0] = 5; time.sleep(60)') for _ in range(4)]")
    assert sorted(os.listdir(daemon.mount)) == names
    assert parent.ask("r.stat().attached") == 1
    parent.do("for pid in pids: os.kill(pid, 9); os.waitpid(pid, 0)")
    eventually(lambda: daemon.descriptors() <= before)


def test_a_child_of_the_child_has_the_childs(parent: Client) -> None:
    code = """
r.buf[0] = 50
assert fork('r.buf[1] = r.buf[0] + 1') == 0 and r.buf[1] == 51
"""
    assert parent.ask(f"ended(snap({code!r}))") == 0
    nested = "r.buf[0] = 60; assert ended(snap('assert r.buf[0] == 60; r.buf[0] = 61')) == 0; assert r.buf[0] == 60"
    assert parent.ask(f"ended(snap({nested!r}))") == 0
    assert parent.ask("r.buf[0]") == 0


def test_mappings_and_protections_are_the_parents_and_change_apart(parent: Client) -> None:
    parent.do("r.munmap(MIB, MIB); r.mprotect(2 * MIB, MIB, 1)")
    code = """
assert [(v.offset, v.length, v.prot) for v in r.maps()] == [(0, MIB, 3), (2 * MIB, MIB, 1), (3 * MIB, MIB, 3)]
assert fork('r.buf[MIB]') == -7 and fork('r.buf[2 * MIB] = 1') == -11
r.mmap(MIB, offset=MIB); r.buf[MIB] = 1; r.mprotect(0, 4 * MIB, 3); r.buf[2 * MIB] = 2
"""
    assert parent.ask(f"ended(snap({code!r}))") == 0
    assert parent.ask("[(v.offset, v.length, v.prot) for v in r.maps()]") == [
        [0, MIB, 3],
        [2 * MIB, MIB, 1],
        [3 * MIB, MIB, 3],
    ]
    assert parent.ask("fork('r.buf[MIB]')") == -7


def test_a_reader_stays_one(parent: Client, client: Callable[..., Client], name: str) -> None:
    reader = client()
    reader.do(f"r = mshare.mshare({name!r}, None, 0, RO)")
    reader.do(
        """
        pid = mshare.odfork()
        if pid == 0:
            ok = r.buf[7 * PAGE] == 7 and r.buf.readonly and fork('ctypes.memset(r.address, 1, 1)') == -11
            os._exit(0 if ok else 1)
        """
    )
    assert reader.ask("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 0


def test_by_default_when_switched_on(parent: Client) -> None:
    parent.do("mshare.set_odfork_default(True)")
    assert parent.ask("fork('r.buf[0] = 77; assert q.buf[3 * PAGE] == 3')") == 0
    parent.do(
        "p = multiprocessing.get_context('fork').Process(target=lambda: r.buf.__setitem__(0, 78)); p.start(); p.join()"
    )
    assert parent.ask("(p.exitcode, r.buf[0])") == [0, 0]
    parent.do("mshare.set_odfork_default(False)")
    assert parent.ask("fork('r.buf[0] = 79')") == 0
    assert parent.ask("r.buf[0]") == 79


def test_without_regions_it_is_a_fork(client: Callable[..., Client]) -> None:
    c = client()
    assert (
        c.ask("(lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else os._exit(5))(mshare.odfork())")
        == 5
    )


def test_one_instant_for_all_regions(parent: Client, client: Callable[..., Client], name: str) -> None:
    """A writer stores to one region, then to the other; no snapshot has the second store without the first."""
    writer = client()
    writer.do(
        f"""
        r = mshare.mshare({name!r}, None, 0, RW); q = mshare.mshare({name + "-2"!r}, None, 0, RW)
        stop = threading.Event()
        def work():
            n = 0
            while not stop.is_set():
                n += 1; r.buf[8:16] = n.to_bytes(8, 'little'); q.buf[8:16] = n.to_bytes(8, 'little')
        t = threading.Thread(target=work); t.start()
        """
    )
    code = "a, b = (int.from_bytes(x.buf[8:16], 'little') for x in (r, q)); assert b <= a <= b + 1, (a, b)"
    for _ in range(20):
        assert parent.ask(f"ended(snap({code!r}))") == 0
    writer.do("stop.set(); t.join()")


def test_what_fails_is_told_in_the_parent_and_leaves_no_child(
    parent: Client, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    before = daemon.descriptors()
    parent.do("r.detach()")
    assert parent.error_of("mshare.odfork(r)").kind == "ValueError"
    parent.do("plain = mshare.odfork.__globals__['_plain_fork']")
    parent.do("def refuse(): raise OSError(11, 'no more processes')")
    parent.do("mshare.odfork.__globals__['_plain_fork'] = refuse")
    assert parent.error_of("mshare.odfork(q)").errno == errno.EAGAIN
    parent.do("mshare.odfork.__globals__['_plain_fork'] = plain")
    assert parent.error_of("os.waitpid(-1, 0)").kind == "ChildProcessError"
    eventually(lambda: daemon.descriptors() <= before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_child_whose_parent_is_killed_meanwhile_ends_without_a_word(parent: Client, when: str) -> None:
    """Before it has its snapshots, or before it can say so: nobody waits for it, nor for what it would say."""
    parent.do(f"""
        plain, first = mshare.Region.become, os.getpid()
        def orphaned():
            os.kill(first, 9)
            while os.getppid() == first: time.sleep(0.001)
        def become(region, token):
            if {when!r} == 'before': orphaned()
            plain(region, token)
            if {when!r} == 'after': orphaned()
        mshare.Region.become = become
        """)
    parent.send(do="mshare.odfork(r); print('it goes on')")
    assert parent.answers(PATIENCE), "the child does not end"
    assert parent.stderr() == ""
