"""Files mapped with MAP_SHARED_PT where the daemon has no privileges: forks are not reported to it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

NOBODY = pwd.getpwnam("nobody").pw_uid
SIZE = 4 << 20


@pytest.fixture(scope="module")
def server(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon(uid=NOBODY)


@pytest.mark.parametrize("directory", ["/dev/shm", "/var/tmp"])
@pytest.mark.parametrize(("prot", "flags"), [(3, os.O_RDWR), (1, os.O_RDONLY)], ids=["writers", "readers"])
def test_files_of_memory_and_of_a_disk(
    server: Daemon,
    client: Callable[..., Client],
    name: str,
    directory: str,
    prot: int,
    flags: int,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    path = Path(directory) / name
    try:
        path.write_bytes(b"x" * SIZE)
        os.chown(path, NOBODY, NOBODY)
        a, b = client(server, NOBODY), client(server, NOBODY)
        for c in (a, b):
            c.do(f"f = os.open({str(path)!r}, {flags}); m = mshare.mmap(f, {SIZE}, prot={prot})")
            assert c.ask("m.why") is None
            assert c.ask("m.buf[SIZE // 2 :][:1] == b'x'".replace("SIZE", str(SIZE)))
        if prot & 2:
            assert a.ask("fork('m.buf[5] = 1; m.msync()')") == 0
            assert b.ask("m.buf[5]") == 1
            assert path.read_bytes()[5] == 1
        else:
            assert a.ask("fork('assert m.buf[5] == 120; m.munmap()')") == 0
        for c in (a, b):
            c.do("m.munmap()")
        eventually(lambda: bool(a.ask("os.listdir(find_mount() / '.regions' / '.files') == []")))  # Of the child, too.
    finally:
        path.unlink(missing_ok=True)
