"""What sparse files hold, and moving it from one to another."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import libc
from mshared.sparse import copy_all, extents, held, punch, punch_all, resident, write_to
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.region import BackingKind


@pytest.fixture
def file() -> Iterator[Callable[[int], int]]:
    """Make sparse files of some pages."""
    fds: list[int] = []

    def make(pages: int) -> int:
        fds.append(os.memfd_create("sparse"))
        os.ftruncate(fds[-1], pages * PAGE_SIZE)
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def pages(first: int, count: int = 1) -> AddrRange:
    return AddrRange.sized(first * PAGE_SIZE, count * PAGE_SIZE)


def fill(fd: int, *numbers: int) -> None:
    """Write pages that say their own number."""
    for number in numbers:
        os.pwrite(fd, bytes([number % 251]) * PAGE_SIZE, number * PAGE_SIZE)


class TestExtents:
    """Where a file holds data."""

    def test_of_an_empty_file(self, file: Callable[[int], int]) -> None:
        assert list(extents(file(0))) == []

    def test_of_a_file_that_holds_nothing(self, file: Callable[[int], int]) -> None:
        assert list(extents(file(100))) == []

    def test_of_a_full_file(self, file: Callable[[int], int]) -> None:
        fd = file(5)
        fill(fd, *range(5))
        assert list(extents(fd)) == [pages(0, 5)]

    @pytest.mark.parametrize(
        ("numbers", "expected"),
        [
            ([0], [(0, 1)]),
            ([9], [(9, 1)]),
            ([4, 5], [(4, 2)]),
            ([0, 2, 4], [(0, 1), (2, 1), (4, 1)]),
            ([0, 1, 8, 9], [(0, 2), (8, 2)]),
        ],
    )
    def test_of_a_sparse_file(
        self, file: Callable[[int], int], numbers: list[int], expected: list[tuple[int, int]]
    ) -> None:
        fd = file(10)
        fill(fd, *numbers)
        assert list(extents(fd)) == [pages(*each) for each in expected]
        assert resident(fd) == len(numbers) * PAGE_SIZE

    def test_the_end_of_the_file_is_the_end(self, file: Callable[[int], int]) -> None:
        fd = file(1)
        os.ftruncate(fd, 100)
        os.pwrite(fd, b"x", 0)
        assert list(extents(fd)) == [AddrRange(Address(0), Address(100))]

    def test_punching_makes_holes(self, file: Callable[[int], int]) -> None:
        fd = file(10)
        fill(fd, *range(10))
        punch(fd, pages(3, 2))
        assert list(extents(fd)) == [pages(0, 3), pages(5, 5)]
        assert resident(fd) == 8 * PAGE_SIZE
        assert os.fstat(fd).st_size == 10 * PAGE_SIZE


def moved(source: int, target: int, ar: AddrRange) -> None:
    """Move between files of small pages, as a change does: copied first, in one step, and punched in another."""
    parts = held(source, ar, BackingKind.SMALL, None)
    copy_all(source, parts, write_to(target))
    punch_all(source, parts)


class TestMove:
    """From the backing to the stash and back."""

    def test_contents_go_and_leave_holes(self, file: Callable[[int], int]) -> None:
        source, target = file(20), file(20)
        fill(source, 2, 3, 7, 12)
        moved(source, target, pages(0, 20))
        assert list(extents(source)) == []
        assert list(extents(target)) == [pages(2, 2), pages(7), pages(12)]
        for number in (2, 3, 7, 12):
            assert os.pread(target, PAGE_SIZE, number * PAGE_SIZE) == bytes([number]) * PAGE_SIZE

    def test_only_what_lies_in_the_range(self, file: Callable[[int], int]) -> None:
        source, target = file(20), file(20)
        fill(source, *range(20))
        moved(source, target, pages(5, 3))
        assert list(extents(target)) == [pages(5, 3)]
        assert list(extents(source)) == [pages(0, 5), pages(8, 12)]

    def test_what_the_target_holds_elsewhere_stays(self, file: Callable[[int], int]) -> None:
        source, target = file(20), file(20)
        fill(source, 3)
        os.pwrite(target, b"theirs", 4 * PAGE_SIZE)
        moved(source, target, pages(0, 20))
        assert os.pread(target, 6, 4 * PAGE_SIZE) == b"theirs"

    def test_nothing_to_move_is_nothing_done(self, file: Callable[[int], int]) -> None:
        source, target = file(20), file(20)
        fill(source, 1)
        moved(source, target, pages(5, 10))
        assert list(extents(source)) == [pages(1)]
        assert list(extents(target)) == []

    def test_more_than_fits_into_one_piece(self, file: Callable[[int], int]) -> None:
        count = 3 * PMD_SIZE // PAGE_SIZE + 5
        source, target = file(count), file(count)
        fill(source, *range(1, count))
        expected = os.pread(source, count * PAGE_SIZE, 0)
        moved(source, target, pages(0, count))
        assert os.pread(target, count * PAGE_SIZE, 0) == expected
        assert list(extents(target)) == [pages(1, count - 1)]
        assert list(extents(source)) == []

    def test_back_and_forth(self, file: Callable[[int], int]) -> None:
        source, target = file(20), file(20)
        fill(source, 2, 9)
        for _ in range(3):
            moved(source, target, pages(0, 20))
            moved(target, source, pages(0, 20))
        assert list(extents(source)) == [pages(2), pages(9)]
        assert list(extents(target)) == []
        assert os.pread(source, PAGE_SIZE, 9 * PAGE_SIZE) == bytes([9]) * PAGE_SIZE

    def test_short_writes_are_gone_on_with(self, file: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
        source, target = file(20), file(20)
        fill(source, *range(20))
        expected = os.pread(source, 20 * PAGE_SIZE, 0)
        plain = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: plain(fd, data[:1000], at))
        moved(source, target, pages(0, 20))
        assert os.pread(target, 20 * PAGE_SIZE, 0) == expected

    def test_pieces_are_no_longer_than_a_huge_page(self, file: Callable[[int], int]) -> None:
        count = 3 * PMD_SIZE // PAGE_SIZE
        source = file(count)
        fill(source, *range(511, 1026))
        written: list[tuple[int, int]] = []
        parts = held(source, pages(0, count), BackingKind.SMALL, None)
        copy_all(source, parts, lambda data, at: written.append((at // PAGE_SIZE, len(data) // PAGE_SIZE)))
        assert written == [(511, 1), (512, 512), (1024, 2)]

    def test_without_room_everything_stays_in_the_source(
        self, file: Callable[[int], int], tmpfs: Callable[[str], Path]
    ) -> None:
        source = file(40)
        fill(source, *range(40))
        expected = os.pread(source, 40 * PAGE_SIZE, 0)
        with (tmpfs(f"size={8 * PAGE_SIZE}") / "small").open("w+b", buffering=0) as target:
            target.truncate(40 * PAGE_SIZE)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                moved(source, target.fileno(), pages(0, 40))
        assert os.pread(source, 40 * PAGE_SIZE, 0) == expected
        assert list(extents(source)) == [pages(0, 40)]

    def test_processes_see_it_go(self, file: Callable[[int], int]) -> None:
        source, target = file(4), file(4)
        start = libc.map_shared(source, 4 * PAGE_SIZE)
        try:
            libc.call("mprotect", start, 4 * PAGE_SIZE, 3)
            ctypes.memset(start + PAGE_SIZE, 7, 1)
            moved(source, target, pages(0, 4))
            assert ctypes.string_at(start + PAGE_SIZE, 1) == b"\0"
        finally:
            libc.unmap(start, 4 * PAGE_SIZE)
        assert os.pread(target, 1, PAGE_SIZE) == b"\7"
