"""Memory that is given to a region of huge pages: contents are copied, gaps are holes, nothing is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client, Daemon
from hugepages import SIGBUS, SIGSEGV, Pool, pool

pytestmark = pytest.mark.pool

BASE = 0x3000_0000_0000
Start = Callable[..., Client]


@pytest.fixture
def donor(hugetlb: Daemon, before: Pool, client: Start, name: str) -> Client:
    """Private memory of 32 MiB, of which two pages are touched, and shared memory of 8 MiB, with gaps between them."""
    c = client(hugetlb)
    c.do(f"""
        from mmap import *
        name, H, BASE = {name!r}, 2 * MIB, {BASE}
        FIXED = sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE
        sc.mmap(BASE, 32 * MIB, 3, sc.MAP_PRIVATE | FIXED)
        sc.mmap(BASE + 64 * MIB, 8 * MIB, 3, sc.MAP_SHARED | FIXED)
        ctypes.memmove(BASE + 5, b'private', 7); ctypes.memmove(BASE + 17 * MIB, b'far', 3)
        ctypes.memmove(BASE + 65 * MIB, b'shared', 6)
        def give(): return mshare.mshare(name, BASE, GIB, CREATE, backing='hugetlb')
        """)
    return c


def test_contents_are_there_for_everybody_and_gaps_are_holes(
    donor: Client, attached: Start, before: Pool, hugetlb: Daemon
) -> None:
    donor.do("r = give()")
    for c in (donor, attached()):
        assert c.ask("bytes(r.buf[5:12]).decode()") == "private"
        assert c.ask("bytes(r.buf[17 * MIB : 17 * MIB + 3]).decode()") == "far"
        assert c.ask("bytes(r.buf[65 * MIB : 65 * MIB + 6]).decode()") == "shared"
        assert c.ask("r.buf[30 * MIB]") == 0
        assert -c.ask("fork('r.buf[40 * MIB]')") == SIGBUS
    assert donor.ask("[(v.offset // MIB, v.length // MIB) for v in r.maps()]") == [[0, 32], [64, 8]]
    assert pool().used - before.used == 2 + 4 + 1  # Touched pages of private memory, all of shared, and one just now.
    assert donor.ask("r.stat().tables_shared")


def test_protections_come_along(donor: Client, attached: Start) -> None:
    donor.do("sc.mprotect(BASE + 64 * MIB, 4 * MIB, 1); sc.mprotect(BASE + 68 * MIB, 4 * MIB, 0); r = give()")
    for c in (donor, attached()):
        assert c.ask("bytes(r.buf[65 * MIB : 65 * MIB + 6]).decode()") == "shared"
        assert -c.ask("fork('r.buf[65 * MIB] = 1')") == SIGSEGV
        assert -c.ask("fork('r.buf[69 * MIB]')") == SIGSEGV


def test_stores_of_other_threads_meanwhile_are_not_lost(donor: Client) -> None:
    donor.do("""
        end, count = threading.Event(), [0]
        def work():
            while not end.is_set():
                count[0] += 1; ctypes.memmove(BASE + 100, count[0].to_bytes(8, 'little'), 8)
        t = threading.Thread(target=work); t.start()
        r = give()
        end.set(); t.join()
        """)
    assert donor.ask("int.from_bytes(r.buf[100:108], 'little') == count[0] > 0")


@pytest.mark.parametrize(
    ("prepare", "number"),
    [
        ("sc.munmap(BASE + 31 * MIB, MIB)", errno.EINVAL),
        (
            "sc.mmap(BASE + 128 * MIB, H, 1, sc.MAP_PRIVATE | sc.MAP_FIXED_NOREPLACE, os.open('/bin/sh', 0))",
            errno.EOPNOTSUPP,
        ),
    ],
)
def test_what_cannot_be_given_stays_as_it_was(donor: Client, prepare: str, number: int, before: Pool) -> None:
    donor.do(prepare)
    assert donor.error_of("give()").errno == number
    assert donor.ask("ctypes.string_at(BASE + 5, 7).decode()") == "private"
    assert donor.ask("ctypes.string_at(BASE + 65 * MIB, 6).decode()") == "shared"
    assert pool() == before


def test_without_enough_pages_nothing_is_given(donor: Client, before: Pool) -> None:
    donor.do("sc.mmap(BASE + 4 * GIB, 4 * GIB, 3, sc.MAP_PRIVATE | sc.MAP_NORESERVE | FIXED)")
    error = donor.error_of("mshare.mshare(name, BASE + 4 * GIB, 4 * GIB, CREATE, backing='hugetlb')")
    assert (error.errno, "nr_hugepages" in error.text) == (errno.ENOMEM, True)
    donor.do("ctypes.memset(BASE + 4 * GIB, 1, 1)")
    assert pool() == before
