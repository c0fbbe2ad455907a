"""A daemon with huge pages of its own, and processes on regions of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon
from hugepages import ELSEWHERE, GIB, Pool, need_memory, pool


@pytest.fixture(scope="module")
def hugetlb(start_daemon: Callable[..., Daemon]) -> Daemon:
    """It adds 2 GiB to the machine's pool."""
    need_memory(2 * GIB)
    return start_daemon("--hugetlb-pool", "2G")


@pytest.fixture
def before(hugetlb: Daemon, eventually: Callable[[Callable[[], bool]], None]) -> Iterator[Pool]:
    """The pool before the test. Afterwards, when all its processes and names are gone, nothing more may be taken.

    Less may be: pages of a test before this one, whose last descriptor another process had still to close.
    """
    found = pool()
    yield found
    with contextlib.closing(Client(hugetlb.mount)) as c:
        for name in os.listdir(hugetlb.mount):
            if not name.startswith(".") and name != "mshare_info":
                c.do(f"remove_if_there({name!r})")

    def is_given_back() -> bool:
        now = pool()
        return now.used <= found.used and now.promised <= found.promised

    eventually(is_given_back)


@pytest.fixture
def attached(hugetlb: Daemon, before: Pool, client: Callable[..., Client], name: str) -> Callable[..., Client]:
    """Start a process on the region of the test."""

    def start(flags: str = "RW", address: int | None = ELSEWHERE, uid: int | None = None) -> Client:
        c = client(hugetlb, uid)
        c.do(f"from mmap import *\nname, H = {name!r}, 2 * MIB\nr = mshare.mshare(name, {address}, 0, {flags})")
        return c

    return start


@pytest.fixture
def creator(hugetlb: Daemon, before: Pool, client: Callable[..., Client], name: str) -> Client:
    """A process on a new region of 1 GiB, whose first 4 pages are full of 1s."""
    c = client(hugetlb)
    c.do(f"from mmap import *\nname, H = {name!r}, 2 * MIB")
    c.do("r = mshare.mshare(name, None, GIB, CREATE, backing='hugetlb'); r.buf[: 4 * H] = bytes([1]) * 4 * H")
    return c


@pytest.fixture
def other(creator: Client, attached: Callable[..., Client]) -> Client:
    """A second process on the same region, elsewhere."""
    return attached()
