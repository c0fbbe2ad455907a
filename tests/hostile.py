"""Processes that mean harm to a daemon, and one that must not notice."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon

EVIL, GOOD = 65534, 1
"""Two users."""

SPEAK = textwrap.dedent("""
    path = str(next(line.split()[1] for line in open(find_mount() / 'mshare_info') if line.startswith('socket')))
    def hello(greet=True):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.settimeout(15); sock.connect(path)
        if greet: assert isinstance(say(sock, protocol.Hello('evil')), protocol.Welcome)
        return sock
    def send(sock, message, fds=()):
        socket.send_fds(sock, [protocol.encode(message, len(fds))], list(fds))
    def heard(sock):
        packet, fds, _, _ = socket.recv_fds(sock, 65536, 16)
        for fd in fds: os.close(fd)
        return protocol.decode(packet)[0] if packet else None
    def say(sock, message, fds=()):
        send(sock, message, fds); return heard(sock)
    """)
"""Statements by which a client can speak to the control socket itself."""

_EVERYTHING = """
    start = time.monotonic()
    b.mmap(PAGE, offset=0, flags=0x31); b.buf[0] = 7; b.mprotect(0, PAGE, mmap.PROT_READ)
    assert b.buf[0] == 7 and fork('b.buf[0] = 1') == -signal.SIGSEGV
    b.munmap(PAGE, PAGE); assert fork('b.buf[PAGE]') == -signal.SIGBUS
    with mshare.mshare(b.name, 0x7100_0000_0000, 0, RW) as again: assert again.buf[0] == 7
    took = time.monotonic() - start
    """


class Bystander:
    """A process of the other user on a region of its own, which must go on working whatever others do."""

    def __init__(self, c: Client, region: str) -> None:
        self._client = c
        self.region = region
        c.do(f"b = mshare.mshare({region!r}, 0x7000_0000_0000, 4 * MIB, CREATE)")
        self.check()

    def check(self) -> None:
        """Attach, change mappings, have faults refused; how long that took is printed."""
        self._client.do(_EVERYTHING)
        sys.stdout.write(f"bystander: everything took {self._client.ask('took') * 1000:.1f} ms\n")


def speaking(c: Client) -> Client:
    """A client that can speak to the socket itself."""
    c.do(SPEAK)
    return c


@contextlib.contextmanager
def harmful(daemon: Daemon, c: Client, name: str) -> Iterator[Client]:
    """A process that means harm, with a region ``r`` of its own; its name goes with it."""
    speaking(c).do(f"name = {name!r}; r = mshare.mshare(name, None, 4 * MIB, CREATE); r.buf[:4] = b'mine'")
    yield c
    c.kill_all()
    if (daemon.mount / name).exists():
        with contextlib.closing(Client(daemon.mount)) as root:
            root.do(f"remove_if_there({name!r})")


@contextlib.contextmanager
def bystander(daemon: Daemon, c: Client, region: str, eventually: Callable[..., None]) -> Iterator[Bystander]:
    """Somebody else, who is well before and after; and the daemon holds no more descriptors then than before."""
    found = Bystander(c, region)
    before = _descriptors(daemon)
    yield found
    found.check()
    try:
        eventually(lambda: _descriptors(daemon).total() <= before.total())
    except pytest.fail.Exception:
        pytest.fail(f"left open: {_descriptors(daemon) - before}")
    c.do("mshare.mshare_unlink(b.name)")


def _descriptors(daemon: Daemon) -> Counter[str]:
    """What the daemon has open, and how often; but for the one file that it has ready for the next fork."""
    found: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = Path(f"/proc/{daemon.pid}/fd/{fd}")
            name = re.sub(r"(?<=memory-)[0-9a-f]+|\d+", "N", str(link.readlink()))
            found[name] += "/memory-" not in name or link.stat().st_size > 0
    return found
