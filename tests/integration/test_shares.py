"""One user's share of the daemon's descriptors: reached in every way, told in words, and nobody else's trouble."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon
from hostile import EVIL, GOOD, Bystander, bystander, speaking

FEW = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
"""For a daemon whose descriptors can be used up: a user's share is 200."""


@pytest.fixture(scope="module")
def poor(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon(prelude=FEW)


@pytest.fixture
def by(poor: Daemon, client: Callable[..., Client], name: str, eventually: Callable[..., None]) -> Iterator[Bystander]:
    """Somebody else, who is well before and after; and no descriptor is left."""
    with bystander(poor, client(poor, GOOD), f"{name}-bystander", eventually) as found:
        yield found


@pytest.fixture
def c(poor: Daemon, by: Bystander, client: Callable[..., Client]) -> Iterator[Client]:
    found = speaking(client(poor, EVIL))
    yield found
    found.kill_all()


def test_connections(c: Client, by: Bystander) -> None:
    """One more than a share is refused in words, many more are hung up on, and later there is room again."""
    c.do("""
        kept, told = [], None
        while told is None:
            kept.append(hello(greet=False)); answer = say(kept[-1], protocol.Hello('evil'))
            if isinstance(answer, protocol.Failed): told = answer
        """)
    assert c.ask("told.errno") == errno.EDQUOT
    assert "open files" in c.ask("told.message")
    by.check()
    assert c.error_of("mshare.mshare('more', None, 2 * MIB, CREATE)").errno == errno.EDQUOT
    c.do("""
        def hung_up(sock):
            try: return not sock.recv(1)
            except ConnectionResetError: return True
        for _ in range(1000):
            kept.append(hello(greet=False))
        assert hung_up(kept[-1])
        """)
    by.check()
    c.do("for sock in kept: sock.close()\nkept.clear()")
    c.do("""
        for _ in range(1000):
            try: mshare.mshare('mine', None, 2 * MIB, CREATE).detach(); mshare.mshare_unlink('mine'); break
            except OSError as e: assert e.errno == errno.EDQUOT, e; time.sleep(0.01)
        else: assert False
        """)


def test_windows(c: Client, by: Bystander) -> None:
    c.do("r = mshare.mshare('windows', None, 2 * MIB, CREATE); more = []")
    error = c.error_of(
        "[more.append(mshare.mshare('windows', (0x6000 << 32) + i * 2 * MIB, 0, RW)) for i in range(100)]"
    )
    assert (error.errno, "detach" in error.text) == (errno.EDQUOT, True)
    by.check()
    c.do("more.pop().detach(); more.append(mshare.mshare('windows', 0x5000_0000_0000, 0, RW))")
    c.do("while more: more.pop().detach()\nmshare.mshare_unlink('windows')")


def test_files(c: Client, by: Bystander) -> None:
    c.do("r = mshare.mshare('files', None, 4 * MIB, CREATE, empty=True)")
    c.do("fd = os.memfd_create('x'); os.truncate(fd, PAGE)")
    error = c.error_of("[r.mmap(PAGE, offset=i * PAGE, fd=fd, flags=mmap.MAP_SHARED) for i in range(1000)]")
    assert error.errno == errno.EDQUOT
    by.check()
    c.do("r.munmap(0, 4 * MIB); r.mmap(PAGE, fd=fd, flags=mmap.MAP_SHARED); mshare.mshare_unlink('files')")


@pytest.mark.parametrize("made_by", ["mshare.mshare(f'many{i}', None, 2 * MIB, CREATE)", "r.fork(f'many{i}')"])
def test_regions(c: Client, by: Bystander, made_by: str) -> None:
    c.do("r = mshare.mshare('many', None, 2 * MIB, CREATE)")
    assert c.error_of(f"[{made_by} for i in range(100)]").errno == errno.EDQUOT
    by.check()
    c.do("""
        for name in os.listdir(find_mount()):
            if name.startswith('many'): mshare.remove(name)
        r.detach()
        """)


def test_snapshots(c: Client, by: Bystander) -> None:
    c.do("r = mshare.mshare('snaps', None, 2 * MIB, CREATE); link = connect(find_mount())")
    one = "link.call(protocol.Snapshot((r._attachment,)), protocol.Snapshots)"
    assert c.error_of(f"[{one} for i in range(100)]").errno == errno.EDQUOT
    assert c.error_of("link.call(protocol.Snapshot((r._attachment,) * 1000), protocol.Snapshots)").errno == errno.EDQUOT
    by.check()
    c.do("mshare.mshare_unlink('snaps')")
