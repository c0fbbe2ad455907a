"""Pieces of a region, and how much of each is what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs import forking
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.heat import MOST_CELLS, heat
from msharefs.host_mm import HostMm
from msharefs.perms import PROT_RW, Ownership
from msharefs.region import BackingKind, Region, RegionId
from msharefs.vma import FileId, FileSource

BASE = Address(0x2000_0000_0000)
PAGES = 2 * PMD_SIZE // PAGE_SIZE


def pages(first: int, end: int) -> AddrRange:
    return AddrRange(Address(BASE + first * PAGE_SIZE), Address(BASE + end * PAGE_SIZE))


def region(*mapped: tuple[int, int]) -> Region:
    """A region of 1024 pages, of which these are mapped."""
    mm = HostMm(pages(0, PAGES))
    for first, end in mapped:
        mm.mmap(pages(first, end), (end - first) * PAGE_SIZE, PROT_RW, fixed=True)
    return Region(RegionId(1), "it", Ownership(0, 0, 0o600), BackingKind.SMALL, mm)


def test_what_is_there_is_told_by_its_part_of_each_piece() -> None:
    """Four pieces of 256 pages: all mapped, three quarters, a single page, a hole."""
    shown = region((0, 448), (512, 513))
    shown.mm.sync([pages(0, 64), pages(300, 301)], huge=False)
    told = heat(shown, 4)
    assert told.cell == 256 * PAGE_SIZE
    assert told.mapped == (255, 192, 1, 0)
    assert told.present == (64, 1, 0, 0)
    assert told.dirty == told.shared == (0, 0, 0, 0)


def test_pieces_are_never_smaller_than_a_page() -> None:
    told = heat(region((0, PAGES)), MOST_CELLS * 10)
    assert (told.cell, len(told.mapped)) == (PAGE_SIZE, PAGES)


@pytest.mark.parametrize("cells", [0, -5])
def test_there_is_at_least_one_piece(cells: int) -> None:
    assert heat(region((0, 1)), cells).mapped == (1,)


def test_the_last_piece_may_be_smaller() -> None:
    """1024 pages in three pieces: 342, 342 and 340."""
    assert heat(region((0, PAGES)), 3).mapped == (255, 255, 255)


def test_dirty_pages_of_a_file_are_told() -> None:
    shown = region()
    source = FileSource(FileId(1), 0, shared=True, writable=True)
    shown.mm.mmap(pages(0, PAGES), PAGES * PAGE_SIZE, PROT_RW, fixed=True, source=source)
    shown.mm.filled(pages(0, 512))
    shown.mm.stored_to(pages(5, 6))
    told = heat(shown, 2)
    assert (told.present, told.dirty) == ((255, 0), (1, 0))


def test_what_forks_have_in_common_is_told_of_both() -> None:
    shown = region((0, PAGES))
    shown.mm.sync([pages(0, 512)], huge=False)
    forking.shield(shown.mm)
    twin = Region(RegionId(2), "twin", shown.owner, BackingKind.SMALL, forking.fork(shown.mm))
    assert heat(shown, 2).shared == heat(twin, 2).shared == (255, 0)


@given(st.integers(1, 3000), st.lists(st.integers(0, PAGES - 1), max_size=20))
def test_a_page_shows_in_its_piece_and_nowhere_else(cells: int, present: list[int]) -> None:
    shown = region((0, PAGES))
    shown.mm.sync([pages(number, number + 1) for number in sorted(set(present))], huge=False)
    told = heat(shown, cells)
    assert {index for index, part in enumerate(told.present) if part} == {n * PAGE_SIZE // told.cell for n in present}
