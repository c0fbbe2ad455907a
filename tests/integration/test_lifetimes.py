"""References: made, inherited, and lost, however a process ends."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import pytest
from conftest import Client, ClientError, Daemon

MIB = 1 << 20


@pytest.fixture
def watcher(client: Callable[..., Client], name: str) -> Client:
    """A process that is attached and asks how many are."""
    c = client()
    c.do(f"name = {name!r}; r = mshare.mshare(name, None, 4 * MIB, CREATE); r.buf[0] = 1")
    return c


def attached(c: Client) -> int:
    value: int = c.ask("r.stat().attached")
    return value


def test_a_killed_process_loses_its_reference_at_once(
    watcher: Client, client: Callable[..., Client], name: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    others = [client() for _ in range(5)]
    for other in others:
        other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    assert attached(watcher) == 6
    for other in others:
        other.kill()
    eventually(lambda: attached(watcher) == 1)


@pytest.mark.parametrize("end", ["os._exit(3)", "sys.exit()", "os.abort()", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_every_way_to_end(
    watcher: Client,
    client: Callable[..., Client],
    name: str,
    end: str,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    other.send(do=end)
    eventually(lambda: not other.is_alive() and attached(watcher) == 1)


def test_exec_drops_the_reference(
    watcher: Client, client: Callable[..., Client], name: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    other.send(do="os.execvp('sleep', ['sleep', '100'])")
    eventually(lambda: attached(watcher) == 1)
    assert other.is_alive()


def test_a_forked_child_that_execs_is_no_longer_attached(
    watcher: Client, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    watcher.do("pid = os.fork()\nif pid == 0: os.execvp('sleep', ['sleep', '100'])")
    eventually(lambda: attached(watcher) == 1)
    watcher.do("os.kill(pid, 9); os.waitpid(pid, 0)")


def test_subprocesses_are_never_attached(watcher: Client) -> None:
    watcher.do("p = subprocess.Popen(['sleep', '100'])")
    assert attached(watcher) == 1
    watcher.do("p.kill(); p.wait()")


def test_forked_children_are_attached_until_they_end(watcher: Client) -> None:
    watcher.do("""
        ready, go = os.pipe(), os.pipe()
        children = []
        for i in range(10):
            pid = os.fork()
            if pid == 0:
                r.buf[i] = i + 10; os.write(ready[1], b'.'); os.read(go[0], 1); os._exit(0)
            children.append(pid)
        for _ in children: os.read(ready[0], 1)
        """)
    assert attached(watcher) == 11
    assert watcher.ask("list(r.buf[:10])") == [i + 10 for i in range(10)]
    text = watcher.ask("(connect(find_mount()).mount / '.regions' / name / 'attachments').read_text()")
    assert {int(line.split()[0]) for line in text.splitlines()} == {watcher.pid, *watcher.ask("children")}
    assert text.count(f"forked-from {watcher.pid}") == 10
    watcher.do("os.write(go[1], b'.' * 10)\nfor p in children: os.waitpid(p, 0)")
    assert attached(watcher) == 1


def test_children_outlive_their_parent(
    watcher: Client, client: Callable[..., Client], name: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    parent = client()
    parent.do(f"""
        r = mshare.mshare({name!r}, None, 0, RW); go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go[1]); os.read(go[0], 1); r.buf[1] = 77; os._exit(0)
        """)
    assert attached(watcher) == 3
    parent.kill()  # Which closes its end of the pipe too.
    eventually(lambda: attached(watcher) == 1 and watcher.ask("r.buf[1]") == 77)


def test_a_child_that_outlives_an_unlink_by_its_parent(watcher: Client, daemon: Daemon, name: str) -> None:
    watcher.do("""
        go, done = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(go[0], 1); r.buf[1] = 5; before = r.stat().attached; mshare.mshare_unlink(name)
            os.write(done[1], bytes([before])); os._exit(0)
        mshare.mshare_unlink(name)
        """)
    assert (daemon.mount / name).exists()
    watcher.do("os.write(go[1], b'.'); told = os.read(done[0], 1)[0]; os.waitpid(pid, 0)")
    assert watcher.ask("told") == 1
    assert not (daemon.mount / name).exists()


def test_a_child_uses_its_own_connection(watcher: Client) -> None:
    code = "assert r.stat().attached == 2; assert len(r.maps()) == 1; r.buf[9] = 9; r.detach(); assert r.closed"
    assert watcher.ask(f"fork({code!r})") == 0
    assert watcher.ask("(r.buf[9], r.stat().attached)") == [9, 1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(watcher: Client, method: str) -> None:
    """Children made by multiprocessing: forked ones inherit, spawned ones attach by name."""
    target = "child" if method == "fork" else "print"
    watcher.do(f"""
        def child(n): r.buf[n] = n
        context = multiprocessing.get_context({method!r})
        ps = [context.Process(target={target}, args=(n,)) for n in range(1, 5)]
        for p in ps: p.start()
        for p in ps: p.join()
        """)
    assert watcher.ask("[p.exitcode for p in ps]") == [0] * 4
    if method == "fork":
        assert watcher.ask("list(r.buf[1:5])") == [1, 2, 3, 4]
    assert attached(watcher) == 1


def test_a_daemonized_grandchild_is_attached(watcher: Client) -> None:
    watcher.do("""
        ready, go = os.pipe(), os.pipe()
        if (middle := os.fork()) == 0:
            if os.fork(): os._exit(0)
            os.setsid(); os.write(ready[1], b'.'); os.read(go[0], 1)
            r.buf[2] = 42; os.write(ready[1], b'.'); os._exit(0)
        os.waitpid(middle, 0); os.read(ready[0], 1)
        """)
    assert attached(watcher) == 2
    watcher.do("os.write(go[1], b'.'); os.read(ready[0], 1)")
    assert watcher.ask("r.buf[2]") == 42


def test_a_connection_that_closes_ends_no_reference(watcher: Client, client: Callable[..., Client], name: str) -> None:
    other = client()
    other.do(f"r = mshare.mshare({name!r}, None, 0, RW); connect(find_mount()).forget()")
    assert attached(watcher) == 2
    assert other.ask("r.stat().attached") == 2


def unlinked(c: Client, orphan: str) -> bool:
    """Whether an unlink went through: not before the daemon has seen the death of the last that was attached.

    It may be nobody's any more, if the last thing that one had asked for was that.
    """
    try:
        c.do(f"mshare.mshare_unlink({orphan!r})")
    except ClientError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.ENOENT:
            raise
    return True


def test_clients_killed_while_they_attach_leave_nothing(
    watcher: Client,
    client: Callable[..., Client],
    name: str,
    daemon: Daemon,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    loop = f"""
        pid = os.fork()
        if pid == 0:
            while True:
                mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW).detach()
                own = f'own{{os.getpid()}}'
                mshare.mshare(own, 0x6100_0000_0000, 2 * MIB, CREATE); mshare.mshare_unlink(own)
        """
    other = client()
    before = daemon.descriptors()
    random.seed(7)
    for _ in range(20):
        other.do(loop)
        other.do(f"time.sleep({random.random() * 0.03}); os.kill(pid, 9); os.waitpid(pid, 0)")
    eventually(lambda: attached(watcher) == 1)
    for leftover in [entry for entry in os.listdir(daemon.mount) if entry.startswith("own")]:
        eventually(lambda orphan=leftover: unlinked(watcher, orphan))  # type: ignore[misc]
    eventually(lambda: daemon.descriptors() <= before)


def test_a_creator_that_dies_before_it_is_done_leaves_no_name(
    client: Callable[..., Client], name: str, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    creator, waiting = client(), client()
    creator.do(f"""
        link = connect(find_mount())
        offer, fds = link.exchange(protocol.Create({name!r}, None, 2 * MIB, 0o600, True, False))
        """)
    assert not (daemon.mount / name).exists()
    waiting.send(do=f"r = mshare.mshare({name!r}, None, 2 * MIB, os.O_CREAT | os.O_RDWR); r.buf[0] = 1")
    creator.kill()
    waiting.receive()
    assert waiting.ask("r.stat().attached") == 1


def test_two_hundred_processes_attach_at_once(watcher: Client) -> None:
    watcher.do("""
        ready, go, end = os.pipe(), os.pipe(), os.pipe()
        children = []
        for i in range(200):
            pid = os.fork()
            if pid == 0:
                os.close(end[1]); status = 1
                try:
                    os.read(go[0], 1); other = mshare.mshare(name, 0x6000_0000_0000, 0, RW)
                    other.buf[i + 1000] = 1; status = 0
                finally:
                    os.write(ready[1], bytes([status])); os.read(end[0], 1); os._exit(status)
            children.append(pid)
        os.write(go[1], b'.' * 200)
        answers = b''
        while len(answers) < 200: answers += os.read(ready[0], 200)
        """)
    assert watcher.ask("set(answers) == {0}")
    assert watcher.ask("sum(r.buf[1000:1200])") == 200
    assert attached(watcher) == 201
    watcher.do("os.close(end[1])\nfor p in children: assert os.waitpid(p, 0)[1] == 0")
    assert attached(watcher) == 1
