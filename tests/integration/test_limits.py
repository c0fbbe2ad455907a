"""Limits, each one reached: the documented error, everybody else unharmed, and work that goes on when there is room."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon
from hostile import EVIL, GOOD, Bystander, bystander

MIB = 1 << 20
SIGBUS = 7
FEW = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
NAMES = "abc"


@pytest.fixture(scope="module")
def limited(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon("--max-bytes-per-user", "12M", "--max-regions-per-user", "3", "--max-bytes", "64M")


@pytest.fixture
def by(
    limited: Daemon, client: Callable[..., Client], name: str, eventually: Callable[..., None]
) -> Iterator[Bystander]:
    with bystander(limited, client(limited, GOOD), f"{name}-by", eventually) as found:
        yield found


@pytest.fixture
def c(limited: Daemon, by: Bystander, client: Callable[..., Client]) -> Iterator[Client]:
    found = client(limited, EVIL)
    yield found
    found.kill_all()
    with contextlib.closing(Client(limited.mount)) as root:
        root.do("""
            for name in os.listdir(find_mount()):
                if (find_mount() / name).stat().st_uid == 65534: mshare.remove(name)
            """)


@pytest.mark.parametrize(
    ("sizes", "option"), [([6, 6, 2], "--max-bytes-per-user"), ([2, 2, 2, 2], "--max-regions-per-user")]
)
@pytest.mark.parametrize("how", ["mshare.mshare(f'{i}', None, {size} * MIB, CREATE)", "rs[-1].fork(f'{i}')"])
def test_a_user_s_quota(c: Client, by: Bystander, sizes: list[int], option: str, how: str) -> None:
    """Forks count as well. Whoever ends a region has room for another; others never notice."""
    c.do("rs = []")
    for number, size in enumerate(sizes[:-1]):
        c.do(f"rs.append(mshare.mshare('q{number}', None, {size} * MIB, CREATE))")
    last = how.replace("{i}", "last").replace("{size}", str(sizes[-1]))
    error = c.error_of(last)
    assert (error.errno, option in error.text) == (errno.EDQUOT, True), error.text
    by.check()
    c.do("mshare.mshare_unlink('q0')")
    c.do(f"rs[-1].buf[0] = 1\n{last}")


def test_private_snapshots_count_too(c: Client) -> None:
    c.do("rs = [mshare.mshare(f's{i}', None, 2 * MIB, CREATE) for i in range(2)]")
    assert c.error_of("mshare.odfork(*rs)").errno == errno.EDQUOT
    c.do("pid = mshare.odfork(rs[0])\nif pid == 0: os._exit(0)\nassert os.waitpid(pid, 0)[1] == 0")


def test_all_bytes(limited: Daemon, c: Client, by: Bystander, client: Callable[..., Client]) -> None:
    """Root has no quota, but what all may have is a limit for root, too."""
    with contextlib.closing(Client(limited.mount)) as root:
        root.do("r = mshare.mshare('most', None, 4 * MIB, CREATE)")
        error = root.error_of("mshare.mshare('more', None, 64 * MIB, CREATE)")
        assert (error.errno, "--max-bytes" in error.text) in ((errno.ENOSPC, True), (errno.EDQUOT, True))
        by.check()
        root.do("mshare.mshare_unlink('most')")


def test_a_full_tmpfs(limited: Daemon, c: Client, by: Bystander, client: Callable[..., Client], name: str) -> None:
    """A first touch is a SIGBUS, as with any tmpfs; what is there stays, and when there is room it can be touched."""
    c.do(f"r = mshare.mshare({name!r}, None, 6 * MIB, CREATE); r.buf[0] = 1; file = os.memfd_create('x')")
    c.do("os.truncate(file, MIB); r.mmap(PAGE, offset=4 * MIB, fd=file, flags=0x11)")
    filler = limited.state / "thp" / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, bytes(4096))
        assert os.statvfs(filler).f_bavail == 0
        assert c.ask("fork('r.buf[2 * MIB] = 1')") == -SIGBUS
        assert c.ask("fork('r.buf[4 * MIB]')") == -SIGBUS
        assert c.ask("r.buf[0]") == 1
        c.do(f"r.mprotect(0, PAGE, mmap.PROT_READ); r.fork({name + 'twin'!r})")
        assert c.ask("fork('r.buf[PAGE] = 2')") in (0, -SIGBUS)
    finally:
        os.close(fd)
        filler.unlink()
    by.check()
    assert c.ask("(fork('r.buf[2 * MIB] = 1'), fork('r.buf[4 * MIB]'), r.buf[0], r.buf[2 * MIB])") == [0, 0, 1, 1]


class TestDescriptors:
    """A daemon that has used up its descriptors, by root, who has no share: errors, and it goes on."""

    @pytest.fixture
    def poor(self, start_daemon: Callable[..., Daemon]) -> Daemon:
        return start_daemon(prelude=FEW)

    @pytest.mark.parametrize(
        "more",
        [
            "mshare.mshare(f'r{i}', None, 2 * MIB, CREATE)",
            "mshare.mshare('first', 0x5000_0000_0000 + i * 2 * MIB, 0, RW)",
            "first.fork(f'r{i}')",
            "first.mmap(PAGE, offset=(i + 1) * PAGE, fd=file, flags=0x11)",
        ],
    )
    def test_none_left(self, poor: Daemon, client: Callable[..., Client], more: str) -> None:
        c = client(poor)
        c.do("first = mshare.mshare('first', None, 2 * MIB, CREATE); first.buf[0] = 9; kept = []")
        c.do("file = os.memfd_create('x'); os.truncate(file, MIB)")
        error = c.error_of(f"[kept.append({more}) for i in range(200)]")
        assert error.errno in (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ECONNRESET, errno.EPROTO), error.text
        assert c.ask("first.buf[0]") == 9
        c.do("""
            while kept:
                each = kept.pop()
                if hasattr(each, 'detach'): each.detach()
            for name in os.listdir(find_mount()):
                if name.startswith('r'): mshare.remove(name)
            first.munmap(0, 2 * MIB)
            """)
        c.do("r = mshare.mshare('again', None, 2 * MIB, CREATE); r.buf[0] = 1; assert r.stat().attached == 1")
