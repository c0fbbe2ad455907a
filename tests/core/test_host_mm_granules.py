"""Where the backing has huge pages: 2 MiB that hold part of a hole are paged as a whole."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import Arm, Effect, Punch, Stash, Unstash
from msharefs.host_mm import HostMm
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import Arming

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 4 * PMD_SIZE)
END = REGION.size // PAGE_SIZE
NATIVE, MISSING, WP = Arming.NATIVE, Arming.MISSING, Arming.WP


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def mm_with(*mapped: tuple[int, int, Prot]) -> HostMm:
    """A region on huge pages, with these pages mapped."""
    mm = HostMm(REGION, granule=PMD_SIZE)
    for first, end, prot in mapped:
        mm.mmap(pages(first, end), (end - first) * PAGE_SIZE, prot, fixed=True)
    return mm


def joined(effects: Iterable[Effect]) -> list[Effect]:
    """The same effects with ranges that are armed alike, one after the other, as one."""
    found: list[Effect] = []
    for effect in effects:
        match found[-1:], effect:
            case [Arm(below, before)], Arm(above, now) if before == now and below.end == above.start:
                found[-1] = Arm(AddrRange(below.start, above.end), now)
            case _:
                found.append(effect)
    return found


@pytest.mark.parametrize(
    ("mapped", "armings"),
    [
        ([(0, END, PROT_RW)], []),
        ([(0, 511, PROT_RW)], [(pages(0, END), MISSING)]),
        ([(0, 512, PROT_RW)], [(pages(512, END), MISSING)]),
        ([(0, 513, PROT_RW)], [(pages(512, END), MISSING)]),
        ([(5, END, PROT_RW)], [(pages(0, 512), MISSING)]),
        ([(0, 600, PROT_RW), (601, END, PROT_RW)], [(pages(512, 1024), MISSING)]),
        ([(0, 600, PROT_RW), (600, 601, Prot.NONE), (601, END, PROT_RW)], [(pages(512, 1024), MISSING)]),
        ([(0, 600, PROT_RW), (600, 601, Prot.READ), (601, END, PROT_RW)], [(pages(600, 601), WP)]),
        (
            [(0, 600, Prot.READ), (601, END, PROT_RW)],
            [(pages(0, 512), WP), (pages(512, 600), MISSING | WP), (pages(600, 1024), MISSING)],
        ),
    ],
)
def test_what_is_missing_anywhere_in_2_mib_is_reported_everywhere_in_them(
    mapped: list[tuple[int, int, Prot]], armings: list[tuple[AddrRange, Arming]]
) -> None:
    assert list(mm_with(*mapped).armings()) == armings


def test_a_hole_makes_the_2_mib_around_it_paged_before_it_is_punched() -> None:
    mm = mm_with((0, END, PROT_RW))
    assert joined(mm.munmap(pages(600, 601))) == [Arm(pages(512, 1024), MISSING), Punch(pages(600, 601))]


def test_a_second_hole_in_2_mib_that_are_paged_already_needs_no_arming() -> None:
    mm = mm_with((0, END, PROT_RW))
    mm.munmap(pages(600, 601))
    assert mm.munmap(pages(700, 701)) == [Punch(pages(700, 701))]


def test_the_last_hole_filled_makes_its_2_mib_native_again() -> None:
    mm = mm_with((0, END, PROT_RW))
    mm.munmap(pages(600, 602))
    assert mm.mmap(pages(600, 601), PAGE_SIZE, fixed=True)[1] == []
    assert joined(mm.mmap(pages(601, 602), PAGE_SIZE, fixed=True)[1]) == [Arm(pages(512, 1024), NATIVE)]


def test_contents_leave_a_page_while_only_its_own_stores_are_kept_out() -> None:
    mm = mm_with((0, END, PROT_RW))
    assert mm.mprotect(pages(600, 601), Prot.NONE) == [
        Arm(pages(512, 600), MISSING),
        Arm(pages(600, 601), MISSING | WP),
        Arm(pages(601, 1024), MISSING),
        Stash(pages(600, 601)),
        Arm(pages(600, 601), MISSING),
    ]


def test_contents_are_back_before_the_2_mib_around_them_are_native() -> None:
    """Else a touch beside them would fill zeros in their place."""
    mm = mm_with((0, END, PROT_RW))
    mm.mprotect(pages(600, 601), Prot.NONE)
    assert joined(mm.mprotect(pages(600, 601), PROT_RW)) == [Unstash(pages(600, 601)), Arm(pages(512, 1024), NATIVE)]


def test_write_protection_stays_with_its_own_pages() -> None:
    mm = mm_with((0, END, PROT_RW))
    assert mm.mprotect(pages(600, 601), Prot.READ) == [Arm(pages(600, 601), WP)]


def test_a_change_over_several_2_mib_arms_those_at_both_ends_whole() -> None:
    mm = mm_with((0, END, PROT_RW))
    effects = joined(mm.munmap(pages(511, 1025)))
    assert effects == [Arm(pages(0, 1536), MISSING), Punch(pages(511, 1025))]


def test_2_mib_that_stick_out_of_the_region_are_cut_to_it() -> None:
    ar = AddrRange.sized(BASE + 500 * PAGE_SIZE, 100 * PAGE_SIZE)
    mm = HostMm(ar, granule=PMD_SIZE)
    mm.mmap(ar, ar.size, fixed=True)
    assert joined(mm.munmap(pages(505, 506))) == [Arm(pages(500, 512), MISSING), Punch(pages(505, 506))]


class TestSharedGranuleHoles:
    """Parts of holes that are filled by a write through the file to the memory beside them."""

    @pytest.mark.parametrize(
        ("mapped", "holes"),
        [
            ([], []),
            ([(0, END, PROT_RW)], []),
            ([(512, 1024, PROT_RW)], []),
            ([(5, 6, PROT_RW)], [pages(0, 5), pages(6, 512)]),
            ([(5, 1000, PROT_RW)], [pages(0, 5), pages(1000, 1024)]),
            ([(5, 6, PROT_RW), (8, 9, Prot.READ)], [pages(0, 5), pages(6, 8), pages(9, 512)]),
            ([(511, 513, PROT_RW)], [pages(0, 511), pages(513, 1024)]),
            ([(0, 512, PROT_RW), (1530, END, PROT_RW)], [pages(1024, 1530)]),
        ],
    )
    def test_they_end_where_the_2_mib_do(self, mapped: list[tuple[int, int, Prot]], holes: list[AddrRange]) -> None:
        assert mm_with(*mapped).shared_granule_holes() == holes

    def test_small_pages_share_nothing(self) -> None:
        mm = HostMm(REGION)
        mm.mmap(pages(5, 6), PAGE_SIZE, fixed=True)
        assert mm.shared_granule_holes() == []

    def test_they_stay_inside_the_region(self) -> None:
        ar = AddrRange.sized(BASE + 500 * PAGE_SIZE, 100 * PAGE_SIZE)
        mm = HostMm(ar, granule=PMD_SIZE)
        mm.mmap(pages(505, 506), PAGE_SIZE, fixed=True)
        assert mm.shared_granule_holes() == [pages(500, 505), pages(506, 512)]
