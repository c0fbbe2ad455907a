from __future__ import annotations
import os, time, errno
from collections.abc import Callable
from pathlib import Path
import pytest
from conftest import Client, Daemon, ClientError

def test_offset_overflow(start_daemon, client, tmp_path):
    daemon = start_daemon()
    c = client(daemon)
    p = tmp_path / "f"; p.write_bytes(b"x" * 8192)
    c.do(f"r = mshare.mshare('x', None, 4 * MIB, CREATE, empty=True); f = os.open({str(p)!r}, os.O_RDWR)")
    try:
        c.do("r.mmap(MIB, flags=1, offset=0, fd=f, fd_offset=2**63)")
        c.send(do="r.buf[0]")
        time.sleep(1)
    except ClientError as e:
        print("refused", e)
    print("daemon alive?", daemon._process.poll() if hasattr(daemon, "_process") else daemon.__dict__)
    assert 0

def test_munmap_during_msync(start_daemon, client, tmp_path):
    daemon = start_daemon()
    a, b = client(daemon), client(daemon)
    p = tmp_path / "f"; p.write_bytes(b"x" * (64 << 20))
    a.do(f"r = mshare.mshare('x', None, 64 * MIB, CREATE, empty=True); f = os.open({str(p)!r}, os.O_RDWR)")
    b.do("r = mshare.mshare('x', None, 0, RW)")
    a.do("r.mmap(64*MIB, flags=1, offset=0, fd=f); r.buf[:] = b'y' * (64*MIB)")
    a.send(do="r.msync()")
    time.sleep(0.005)
    b.do("r.munmap(0, 64*MIB)")
    try: a.receive()
    except Exception as e: print("A", e)
    data = p.read_bytes()
    print({v: data.count(v) for v in set(data)})
    assert 0

def test_kill_during_msync(start_daemon, client, tmp_path):
    daemon = start_daemon()
    a = client(daemon)
    p = tmp_path / "f"; p.write_bytes(b"x" * (64 << 20))
    a.do(f"r = mshare.mshare('x', None, 64 * MIB, CREATE, empty=True); f = os.open({str(p)!r}, os.O_RDWR)")
    a.do("r.mmap(64*MIB, flags=1, offset=0, fd=f)\nfor i in range(0, 64*MIB, 2*PAGE): r.buf[i] = 121")
    a.send(do="r.msync()")
    time.sleep(0.03)
    os.kill(a.pid, 9)
    time.sleep(2)
    data = p.read_bytes()
    print({v: data.count(v) for v in set(data)})
    assert 0
def test_remove_by_hand(start_daemon, client, tmp_path):
    daemon = start_daemon()
    a = client(daemon)
    p = tmp_path / "f"; p.write_bytes(b"x" * (1 << 20))
    a.do(f"r = mshare.mshare('x', None, 4 * MIB, CREATE, empty=True); f = os.open({str(p)!r}, os.O_RDWR)")
    a.do("r.mmap(MIB, flags=1, offset=0, fd=f); r.buf[0]; r.buf[PAGE] = 1; sc.madvise(r.address, 2*PAGE, 9)")
    for i in (0, 4096):
        a.send(ask=f"r.buf[{i}]")
        import select
        print(i, select.select([a._process.stdout], [], [], 3)[0] and a.receive())
    assert 0
