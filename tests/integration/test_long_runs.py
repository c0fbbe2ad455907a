"""What is done often leaves nothing: the daemon's descriptors and memory stay flat. MSHAREFS_CYCLES sets how often."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

CYCLES = int(os.environ.get("MSHAREFS_CYCLES", "2000"))
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
    ("cycle", "share"),
    [
        ("mshare.mshare('it', 0x6000_0000_0000, 0, RW).detach()", 1),
        ("mine = mshare.mshare('mine', None, 2 * MIB, CREATE); mine.buf[0] = 1; mshare.mshare_unlink('mine')", 5),
        ("it.mprotect(0, PAGE, 1); it.mprotect(0, PAGE, 3)", 1),
        ("connect(find_mount()).forget(); it.stat()", 5),
        ("(find_mount() / '.regions/it/stat').read_text()", 5),
    ],
    ids=["attach", "create", "protect", "connect", "look"],
)
@pytest.mark.timeout(3600)
def test_cycles(
    lone: Daemon,
    client: Callable[..., Client],
    cycle: str,
    share: int,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    """Once it has warmed up, they take no more memory, and no descriptor. Of what takes long a share is enough."""
    c, cycles = client(lone), CYCLES // share
    c.do("it = mshare.mshare('it', None, 4 * MIB, CREATE)")
    c.do(f"def go(n):\n    for _ in range(n): {cycle}")
    c.do(f"go({cycles // 10})")
    descriptors, before = lone.descriptors(), memory(lone)
    for _ in range(10):
        c.do(f"go({cycles // 10})")
    eventually(lambda: lone.descriptors() <= descriptors)
    grown = memory(lone) - before
    sys.stdout.write(f"{cycles} cycles took {grown} bytes\n")
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
