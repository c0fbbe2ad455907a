"""Calls of the C library: errors are OSErrors, and 64 bits arrive as 64 bits."""

from __future__ import annotations

import errno
import os

import pytest

from mshared import libc, processes
from msharefs.addr import PAGE_SIZE, Address

SYS_GETPID = 39


def test_a_call_that_fails_is_an_oserror_that_says_which() -> None:
    with pytest.raises(FileNotFoundError, match=r"umount2: No such file") as caught:
        libc.call("umount2", b"/nowhere/at/all", 0)
    assert caught.value.errno == errno.ENOENT


def test_system_calls_by_number() -> None:
    assert libc.syscall(SYS_GETPID) == os.getpid()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        libc.syscall(100_000)


def test_numbers_of_64_bits_are_not_cut() -> None:
    """An offset above 4 GiB, which a C int would lose."""
    fd = os.memfd_create("long")
    try:
        libc.call("ftruncate", fd, (5 << 32) + 1)
        assert os.fstat(fd).st_size == (5 << 32) + 1
    finally:
        os.close(fd)


def test_a_shared_mapping_comes_and_goes() -> None:
    fd = os.memfd_create("mapped")
    os.ftruncate(fd, 3 * PAGE_SIZE)
    start = Address(libc.map_shared(fd, 3 * PAGE_SIZE))
    os.close(fd)
    assert processes.mapping_sizes(os.getpid(), {start}) == {start: 3 * PAGE_SIZE}
    libc.unmap(start, 3 * PAGE_SIZE)
    assert processes.mapping_sizes(os.getpid(), {start}) == {}


def test_what_cannot_be_mapped_is_an_oserror() -> None:
    with pytest.raises(OSError, match=r"mmap: Bad file descriptor"):
        libc.map_shared(-1, PAGE_SIZE)
