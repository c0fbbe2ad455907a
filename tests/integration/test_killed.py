"""Clients killed at random moments of all that they do: no reference, name or descriptor is left, nothing is stuck."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon
from hostile import GOOD, Bystander, bystander

MIB = 1 << 20
KILLS = 15

LOOPS = {
    "attaching": "mshare.mshare(name, 0x6000_0000_0000, 0, RW).detach()",
    "creating": "mshare.mshare(own, None, 2 * MIB, CREATE).buf[0] = 1; mshare.mshare_unlink(own)",
    "donating": """
sc.mmap(0x5100_0000_0000, 64 * PAGE, 3, 0x22 | sc.MAP_FIXED_NOREPLACE); ctypes.memset(0x5100_0000_0000, 7, 64 * PAGE)
assert mshare.mshare(own, 0x5100_0000_0000, 2 * MIB, CREATE).buf[PAGE] == 7; mshare.mshare_unlink(own)
""",
    "mapping": """
at = random.randrange(1, 500) * PAGE
w.mmap(PAGE, offset=at, flags=0x31); w.buf[at] = 1; w.mprotect(at, PAGE, 0); w.mprotect(at, PAGE, 3); w.munmap(at, PAGE)
""",
    "mapping files": """
at = random.randrange(1, 500) * PAGE
w.mmap(PAGE, offset=at, fd=file, flags=0x11); w.buf[at] = 1; w.msync(); w.munmap(at, PAGE)
""",
    "forking regions": "w.fork(own); mshare.remove(own)",
    "forking": "fork('w.buf[0]'); mshare.odfork(w) or os._exit(0); os.wait()",
    "faulting": "fork('w.buf[700 * PAGE]'); w.mprotect(0, PAGE, 1); fork('w.buf[0] = 1'); w.mprotect(0, PAGE, 3)",
}


@pytest.fixture
def by(
    daemon: Daemon, client: Callable[..., Client], name: str, eventually: Callable[..., None]
) -> Iterator[Bystander]:
    with bystander(daemon, client(daemon, GOOD), f"{name}-by", eventually) as found:
        yield found


@pytest.mark.parametrize("what", LOOPS)
def test_while(
    what: str, daemon: Daemon, by: Bystander, client: Callable[..., Client], name: str, eventually: Callable[..., None]
) -> None:
    watcher, other = client(), client()
    watcher.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.munmap(700 * PAGE, PAGE); r.buf[0] = 5")
    other.do(f"import random; name = {name!r}; file = os.memfd_create('x'); os.truncate(file, PAGE)")
    moments = random.Random(what)
    for kill in range(KILLS):
        other.do(f"""
pid = os.fork()
if pid == 0:
    try:
        os.setpgid(0, 0); own = f'own-{{name}}-{kill}'; w = mshare.mshare(name, 0x7200_0000_0000, 0, RW)
        while True:
            exec({LOOPS[what]!r})
    except BaseException:
        traceback.print_exc()
    os._exit(3)
""")
        other.do(f"time.sleep({moments.random() * 0.06})")
        other.do("""
            try: os.killpg(pid, 9)
            except ProcessLookupError: os.kill(pid, 9)
            assert os.waitpid(pid, 0)[1] == 9, "it had ended by itself"
            """)
    eventually(lambda: watcher.ask("r.stat().attached") == 1)
    for leftover in [entry for entry in os.listdir(daemon.mount) if entry.startswith(f"own-{name}")]:
        watcher.do(f"remove_if_there({leftover!r})")
    watcher.do(f"again = mshare.mshare({name!r}, 0x7200_0000_0000, 0, RW)")
    watcher.do("r.mmap(4 * MIB, offset=0, flags=0x31); r.buf[1] = 6; again.mprotect(0, PAGE, 1); again.munmap(0, PAGE)")
    watcher.do("again.detach(); mshare.mshare_unlink(r.name)")
    other.kill_all()
    watcher.kill_all()


TOLD_IN_VAIN = """
import random, trio
wait = trio.lowlevel.wait_readable
async def wait_sometimes(file):
    fd = file if isinstance(file, int) else file.fileno()
    if os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse" and random.random() < 0.5:
        return await trio.lowlevel.checkpoint()
    await wait(file)
trio.lowlevel.wait_readable = wait_sometimes
"""
"""Has the daemon believe that there is something to be read."""


def test_what_is_taken_back_does_not_stop_the_daemon(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str
) -> None:
    """The kernel takes back what a killed process has asked the mount, though the daemon was told of it already."""
    daemon = start_daemon(prelude=TOLD_IN_VAIN)
    c = client(daemon)
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
    for _ in range(20):
        c.do(f"os.stat({str(daemon.mount / name)!r})")
        assert c.ask("r.stat().attached") == 1
    c.do("mshare.mshare_unlink(r.name)")
