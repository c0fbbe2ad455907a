"""Single pages in a backing file, whatever the size of its pages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import processes
from mshared.filler import Filler
from mshared.sparse import extents
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange

SIZE = 2 * PMD_SIZE


@pytest.fixture(params=["huge tmpfs", "memfd"])
def fd(request: pytest.FixtureRequest) -> Iterator[int]:
    """An empty file where the kernel would give huge pages, and one where it would not."""
    if request.param == "memfd":
        fd = os.memfd_create("backing")
    else:
        place = request.getfixturevalue("tmpfs")("huge=always,size=16M")
        fd = os.open(place / "backing", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def filler(fd: int) -> Iterator[Filler]:
    filler = Filler(fd, SIZE, None)
    yield filler
    filler.close()


def page(number: int) -> AddrRange:
    return AddrRange.sized(number * PAGE_SIZE, PAGE_SIZE)


def test_a_page_appears_and_none_of_its_neighbours(fd: int, filler: Filler) -> None:
    assert list(extents(fd)) == []
    filler.zero(5 * PAGE_SIZE)
    assert list(extents(fd)) == [page(5)]
    filler.zero(600 * PAGE_SIZE)
    assert list(extents(fd)) == [page(5), page(600)]
    assert os.pread(fd, PAGE_SIZE, 5 * PAGE_SIZE) == bytes(PAGE_SIZE)


def test_the_first_and_the_last_page_can_be_had(fd: int, filler: Filler) -> None:
    last = SIZE // PAGE_SIZE - 1
    filler.zero(0)
    filler.zero(last * PAGE_SIZE)
    assert list(extents(fd)) == [page(0), page(last)]


def test_a_page_that_is_there_keeps_what_it_holds(fd: int, filler: Filler) -> None:
    filler.zero(0)
    os.pwrite(fd, b"something", 0)
    filler.zero(0)
    assert os.pread(fd, 9, 0) == b"something"


def test_data_appears_with_its_pages_only(fd: int, filler: Filler) -> None:
    assert filler.copy(4 * PAGE_SIZE, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    assert list(extents(fd)) == [AddrRange.sized(4 * PAGE_SIZE, 2 * PAGE_SIZE)]
    assert os.pread(fd, 2, 5 * PAGE_SIZE - 1) == b"ab"


def test_data_does_not_replace_what_is_there(fd: int, filler: Filler) -> None:
    filler.zero(5 * PAGE_SIZE)
    os.pwrite(fd, b"kept", 5 * PAGE_SIZE)
    assert not filler.copy(5 * PAGE_SIZE, b"n" * PAGE_SIZE)
    assert not filler.copy(4 * PAGE_SIZE, b"n" * 3 * PAGE_SIZE)
    assert os.pread(fd, 4, 5 * PAGE_SIZE) == b"kept"
    assert page(6) not in list(extents(fd))


def test_another_files_pages_are_taken_where_there_are_none(fd: int, filler: Filler) -> None:
    other, piece = os.memfd_create("other"), AddrRange.sized(4 * PAGE_SIZE, 3 * PAGE_SIZE)
    os.pwrite(other, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE + b"c" * PAGE_SIZE, piece.start)
    maps = Path("/proc/self/maps").read_text().count("\n")
    assert filler.take(piece, other)
    assert list(extents(fd)) == [piece]
    assert os.pread(fd, 3 * PAGE_SIZE, piece.start) == os.pread(other, 3 * PAGE_SIZE, piece.start)
    os.pwrite(fd, b"kept", piece.start)
    assert not filler.take(piece, other)
    assert os.pread(fd, 4, piece.start) == b"kept"
    assert Path("/proc/self/maps").read_text().count("\n") == maps
    os.close(other)


def test_making_and_closing_one_leaves_nothing(fd: int, open_descriptors: Callable[[], int]) -> None:
    def here() -> tuple[int, int]:
        return open_descriptors(), Path("/proc/self/maps").read_text().count("backing")

    before = here()
    filler = Filler(fd, SIZE, None)
    assert here() == (before[0] + 1, before[1] + 1)
    filler.close()
    assert here() == before


def test_it_works_with_the_device_too(fd: int) -> None:
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/userfaultfd: {error.strerror}")
    filler = Filler(fd, SIZE, device)
    os.close(device)
    filler.zero(PAGE_SIZE)
    filler.close()
    assert list(extents(fd)) == [page(1)]


def test_its_mapping_can_be_read_by_nobody(filler: Filler) -> None:
    """So that a mistake in the daemon is a SIGSEGV there, not a page in somebody's region."""
    assert processes.mapping_sizes(os.getpid(), {filler._start}) == {filler._start: SIZE}
    (line,) = [
        line for line in Path("/proc/self/maps").read_text().split("\n") if line.startswith(f"{filler._start:x}-")
    ]
    assert line.split()[1] == "---s"
