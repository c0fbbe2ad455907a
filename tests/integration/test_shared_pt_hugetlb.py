"""Files of huge pages mapped with MAP_SHARED_PT: the kernel shares their page tables, until stores have to be seen."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hugepages import GIB, HUGE, SIGSEGV, Pool

pytestmark = pytest.mark.pool

PAGES = GIB // HUGE
FEW = 8
"""Page faults that a process takes for other reasons at most."""

Start = Callable[..., Client]


@pytest.fixture
def file(
    hugetlb: Daemon, before: Pool, client: Start, eventually: Callable[[Callable[[], bool]], None]
) -> Iterator[str]:
    """Where a file of 1 GiB of huge pages can be opened. It is the only one that is shared."""
    eventually(lambda: os.listdir(hugetlb.mount / ".regions" / ".files") == [])
    c = client(hugetlb)
    c.do("f = os.memfd_create('huge', os.MFD_HUGETLB | os.MFD_HUGE_2MB); os.ftruncate(f, GIB)")
    yield f"/proc/{c.pid}/fd/{c.ask('f')}"
    c.close()


@pytest.fixture
def mapper(hugetlb: Daemon, before: Pool, client: Start, file: str) -> Start:
    """Start a process that maps it as ``m``."""

    def start(prot: str = "PROT_READ | PROT_WRITE", flags: str = "os.O_RDWR") -> Client:
        c = client(hugetlb)
        c.do(f"""
            from mmap import *
            import resource
            f = os.open({file!r}, {flags})
            m = mshare.mmap(f, GIB, prot={prot})
            assert m.shared, m.why
            def faults(advice):
                "How many it takes to have all of it mapped."
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                sc.madvise(m.address, GIB, advice)
                return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        """)
        return c

    return start


def stat(daemon: Daemon) -> str:
    (only,) = (daemon.mount / ".regions" / ".files").iterdir()
    return (only / "stat").read_text()


def test_what_one_has_touched_is_there_for_all(mapper: Start, hugetlb: Daemon) -> None:
    a, b = mapper(), mapper()
    assert a.ask("m.address % GIB") == 0
    assert a.ask("faults(23)") >= PAGES
    assert b.ask("faults(23)") <= FEW
    assert "tables_shared true" in stat(hugetlb)
    a.do("m.buf[GIB - 1] = 5")
    assert b.ask("m.buf[GIB - 1]") == 5


def test_readers_share_among_themselves(mapper: Start, hugetlb: Daemon) -> None:
    """By a descriptor that was opened for reading only, too."""
    a, b = mapper("PROT_READ", "os.O_RDONLY"), mapper("PROT_READ", "os.O_RDONLY")
    writer = mapper()
    writer.do("m.buf[7] = 70")
    assert a.ask("faults(22)") >= PAGES
    assert b.ask("faults(22)") <= FEW
    assert b.ask("m.buf[7]") == 70
    assert b.error_of("sc.mprotect(m.address, m.size, 3)").errno == errno.EACCES


def test_stores_that_must_be_seen_end_the_sharing_of_tables(mapper: Start, hugetlb: Daemon) -> None:
    a, b = mapper(), mapper()
    a.do("m.buf[0] = 1; m.buf[GIB - 1] = 2")
    b.do("m.mprotect(PROT_READ)")
    assert -a.ask("fork('(ctypes.c_char * 1).from_address(m.address)[0] = 9')") == SIGSEGV
    assert b.ask("(m.buf[0], m.buf[GIB - 1])") == [1, 2]
    assert "note page tables are per process since" in stat(hugetlb)
    a.do("m.mprotect(PROT_READ | PROT_WRITE); m.buf[0] = 3")
    assert b.ask("m.buf[0]") == 3


def test_pages_that_are_not_there_are_refused_when_it_is_mapped(hugetlb: Daemon, before: Pool, client: Start) -> None:
    c = client(hugetlb)
    files = hugetlb.mount / ".regions" / ".files"
    earlier = set(os.listdir(files))  # Of processes that have just ended, perhaps.
    c.do("f = os.memfd_create('huge', os.MFD_HUGETLB | os.MFD_HUGE_2MB); os.ftruncate(f, 1 << 45)")
    assert c.error_of("mshare.mmap(f, 1 << 40)").errno == errno.ENOMEM
    assert set(os.listdir(files)) <= earlier


def test_a_file_on_a_mount(hugetlb: Daemon, before: Pool, client: Start, directory: Path) -> None:
    """As databases have them: made by open(2), longer than what is mapped of it."""
    a, b = client(hugetlb), client(hugetlb)
    a.do(f"from mshared import mounts, libc\nmounts.mount_hugetlbfs(Path({str(directory)!r}))")
    try:
        for c in (a, b):
            c.do(f"f = os.open({str(directory / 'data')!r}, RW | os.O_CREAT); os.ftruncate(f, 8 * MIB)")
            c.do("m = mshare.mmap(f, 4 * MIB, offset=2 * MIB)")
            assert c.ask("m.why") is None
        a.do("m.buf[4 * MIB - 1] = 4")
        assert b.ask("m.buf[4 * MIB - 1]") == 4
        resident = next(line for line in stat(hugetlb).splitlines() if line.startswith("resident"))
        assert resident == f"resident {HUGE}"
    finally:
        a.do(f"mounts.unmount(Path({str(directory)!r}))")
