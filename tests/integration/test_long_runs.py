"""What is done often leaves nothing: the daemon's descriptors and memory stay flat. MSHAREFS_CYCLES sets how often."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

CYCLES = int(os.environ.get("MSHAREFS_CYCLES", "10000"))
ROUNDS = 20
"""In which they are done, after one that warms up."""
MIB = 1 << 20
SLACK = 6 * MIB
"""What an allocator may keep, whatever the number of cycles."""


def memory(daemon: Daemon) -> int:
    """Bytes of memory of its own that a daemon has."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{daemon.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@pytest.fixture
def lone(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon()


@pytest.mark.parametrize(
    ("cycle", "share", "processes"),
    [
        ("mshare.mshare('it', 0x6000_0000_0000, 0, RW).detach()", 1, 4),
        ("mine = mshare.mshare('mine', None, 2 * MIB, CREATE); mine.buf[0] = 1; mshare.mshare_unlink('mine')", 25, 1),
        ("it.mprotect(0, PAGE, 1); it.mprotect(0, PAGE, 3)", 5, 1),
        ("connect(find_mount()).forget(); it.stat()", 25, 1),
        ("(find_mount() / '.regions/it/stat').read_text()", 25, 1),
    ],
    ids=["attach", "create", "protect", "connect", "look"],
)
@pytest.mark.timeout(3600)
def test_cycles(
    lone: Daemon,
    client: Callable[..., Client],
    cycle: str,
    share: int,
    processes: int,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    """Once it has warmed up, they take no more memory, and no descriptor.

    Of what takes long a share is enough; attaching and detaching several processes do at the same time.
    """
    clients, some = [client(lone) for _ in range(processes)], CYCLES // share // processes // ROUNDS
    clients[0].do("it = mshare.mshare('it', None, 4 * MIB, CREATE)")

    def go() -> None:
        for c in clients:
            c.send(do=f"for _ in range({some}): {cycle}")
        for c in clients:
            c.receive()

    go()
    descriptors, before = lone.descriptors(), memory(lone)
    for _ in range(ROUNDS):
        go()
    eventually(lambda: lone.descriptors() <= descriptors)
    grown = memory(lone) - before
    sys.stdout.write(f"{ROUNDS * some * processes} cycles took {grown} bytes\n")
    assert grown < SLACK


def test_a_thousand_regions(
    lone: Daemon, client: Callable[..., Client], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Three descriptors each while they are there, and nothing afterwards; the second thousand takes no more memory."""
    c = client(lone)
    c.do("""
        def thousand():
            for i in range(1000): mshare.mshare(f'region-{i}', None, 2 * MIB, CREATE).detach()
        def away():
            for i in range(1000): mshare.remove(f'region-{i}')
        mshare.mshare('first', None, 2 * MIB, CREATE).detach()
        """)
    before = lone.descriptors()
    c.do("thousand()")
    assert lone.descriptors() <= before + 3100
    assert len(os.listdir(lone.mount)) == 1004
    c.do("away()")
    eventually(lambda: lone.descriptors() <= before)
    grown = memory(lone)
    c.do("thousand(); away()")
    eventually(lambda: lone.descriptors() <= before)
    assert memory(lone) - grown < SLACK
