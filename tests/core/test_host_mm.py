"""The calls of a host mm: what they change, the effects they return, and the order of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from msharefs.addr import PAGE_SIZE, PMD_SIZE, USER_MAX, USER_MIN, AddrRange, FrameNo
from msharefs.effects import Arm, Effect, Punch, Signal, Stash, Unstash
from msharefs.errors import AccessDeniedError, ExistsError, InvalidArgumentError, MshareError, NoMemoryError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Advice, Prot
from msharefs.pte import PteFlag
from msharefs.rules import check_user_range
from msharefs.vma import Arming, Vma

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 4 * PMD_SIZE)
END = REGION.size // PAGE_SIZE
NATIVE, MISSING, WP = Arming.NATIVE, Arming.MISSING, Arming.WP


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def mm_with(*mapped: tuple[int, int, Prot], paging_all: bool = False) -> HostMm:
    """A region with these pages mapped and nothing installed."""
    mm = HostMm(REGION, paging_all=paging_all)
    for first, end, prot in mapped:
        map_fixed(mm, first, end, prot)
    return mm


def map_fixed(mm: HostMm, first: int, end: int, prot: Prot = PROT_RW, *, replace: bool = False) -> list[Effect]:
    place, effects = mm.mmap(pages(first, end), (end - first) * PAGE_SIZE, prot, fixed=True, replace=replace)
    assert place == pages(first, end)
    check_mm(mm)
    return effects


def mapped(mm: HostMm) -> list[tuple[int, int, Prot]]:
    """The VMAs, in pages."""
    return [((v.ar.start - BASE) // PAGE_SIZE, (v.ar.end - BASE) // PAGE_SIZE, v.prot) for v in mm.vmas]


def installed(mm: HostMm) -> list[tuple[AddrRange, PteFlag]]:
    return [(run, pte.flags) for run, pte in mm.table.runs(REGION)]


class TestMmap:
    """Where mappings go, and what that does to the kernel."""

    def test_a_mapping_in_a_hole_only_changes_what_is_reported(self) -> None:
        mm = mm_with()
        assert map_fixed(mm, 0, END) == [Arm(REGION, NATIVE)]
        assert mapped(mm) == [(0, END, PROT_RW)]

    @pytest.mark.parametrize(
        ("prot", "effects"),
        [(Prot.READ, [Arm(pages(2, 4), WP)]), (Prot.NONE, []), (PROT_RW, [Arm(pages(2, 4), NATIVE)])],
    )
    def test_a_hole_reports_everything_and_each_protection_less(self, prot: Prot, effects: list[Effect]) -> None:
        assert map_fixed(mm_with(), 2, 4, prot) == effects

    def test_with_paging_all_mapped_memory_stays_reported(self) -> None:
        assert map_fixed(mm_with(paging_all=True), 2, 4) == []
        assert map_fixed(mm_with(paging_all=True), 2, 4, Prot.READ) == [Arm(pages(2, 4), MISSING | WP)]

    def test_without_a_place_it_goes_into_the_lowest_gap_that_fits(self) -> None:
        mm = mm_with((1, 2, PROT_RW), (3, 6, Prot.READ))
        assert mm.mmap(None, PAGE_SIZE) == (pages(0, 1), [Arm(pages(0, 1), NATIVE)])
        assert mm.mmap(None, 2 * PAGE_SIZE)[0] == pages(6, 8)
        assert mm.mmap(None, PAGE_SIZE)[0] == pages(2, 3)

    def test_without_a_place_it_keeps_to_the_alignment(self) -> None:
        mm = mm_with((0, 1, PROT_RW))
        assert mm.mmap(None, PAGE_SIZE, align=PMD_SIZE)[0] == pages(512, 513)

    def test_a_hint_is_taken_when_it_is_free(self) -> None:
        assert mm_with((0, 2, PROT_RW)).mmap(pages(5, 7), 2 * PAGE_SIZE)[0] == pages(5, 7)

    def test_a_hint_that_is_taken_gives_the_lowest_gap(self) -> None:
        mm = mm_with((0, 6, PROT_RW))
        assert mm.mmap(pages(5, 7), 2 * PAGE_SIZE)[0] == pages(6, 8)

    def test_fixed_without_replace_refuses_a_taken_place(self) -> None:
        mm = mm_with((0, 6, PROT_RW))
        with pytest.raises(ExistsError):
            mm.mmap(pages(5, 7), 2 * PAGE_SIZE, fixed=True)
        assert mapped(mm) == [(0, 6, PROT_RW)]

    def test_no_gap_is_enomem(self) -> None:
        mm = mm_with((1, END, PROT_RW))
        with pytest.raises(NoMemoryError, match="no gap"):
            mm.mmap(None, 2 * PAGE_SIZE)
        with pytest.raises(NoMemoryError):
            mm.mmap(pages(5, 7), 2 * PAGE_SIZE)

    def test_replacing_frees_the_old_contents(self) -> None:
        mm = mm_with((0, 8, PROT_RW))
        mm.sync([pages(0, 8)], huge=False)
        assert map_fixed(mm, 2, 4, replace=True) == [Punch(pages(2, 4))]
        assert mapped(mm) == [(0, 8, PROT_RW)]
        assert [run for run, _ in installed(mm)] == [pages(0, 2), pages(4, 8)]

    def test_replacing_protects_before_it_frees(self) -> None:
        """Else a store could land in the new page of a mapping that nobody may write."""
        mm = mm_with((0, 8, PROT_RW))
        assert map_fixed(mm, 2, 4, Prot.READ, replace=True) == [Arm(pages(2, 4), WP), Punch(pages(2, 4))]

    @pytest.mark.parametrize("old", [Prot.NONE, Prot.READ])
    def test_replacing_lets_stores_in_only_after_it_freed(self, old: Prot) -> None:
        """Else a store into the new mapping could be freed with the old contents."""
        mm = mm_with((0, 8, old))
        assert map_fixed(mm, 2, 4, PROT_RW, replace=True) == [Punch(pages(2, 4)), Arm(pages(2, 4), NATIVE)]

    def test_replacing_over_different_neighbours_treats_each_in_its_own_way(self) -> None:
        mm = mm_with((0, 2, PROT_RW), (2, 4, Prot.READ), (4, 6, Prot.NONE))
        assert map_fixed(mm, 0, 8, Prot.READ, replace=True) == [
            Arm(pages(0, 2), WP),
            Arm(pages(4, 8), MISSING | WP),
            Punch(pages(0, 8)),
            Arm(pages(4, 8), WP),
        ]
        assert mapped(mm) == [(0, 8, Prot.READ)]

    @pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1])
    def test_a_length_that_is_no_whole_pages_is_refused(self, size: int) -> None:
        with pytest.raises(InvalidArgumentError, match="length"):
            mm_with().mmap(None, size)


class TestMunmap:
    """Taking memory away."""

    def test_faults_are_caught_before_memory_is_freed(self) -> None:
        mm = mm_with((0, 8, PROT_RW))
        mm.sync([pages(0, 8)], huge=False)
        assert mm.munmap(pages(2, 4)) == [Arm(pages(2, 4), MISSING), Punch(pages(2, 4))]
        assert mapped(mm) == [(0, 2, PROT_RW), (4, 8, PROT_RW)]
        assert [run for run, _ in installed(mm)] == [pages(0, 2), pages(4, 8)]
        check_mm(mm)

    def test_read_only_memory_stays_protected_until_it_is_freed(self) -> None:
        mm = mm_with((0, 8, Prot.READ))
        assert mm.munmap(pages(2, 4)) == [
            Arm(pages(2, 4), MISSING | WP),
            Punch(pages(2, 4)),
            Arm(pages(2, 4), MISSING),
        ]

    def test_holes_and_inaccessible_memory_are_armed_already(self) -> None:
        mm = mm_with((0, 2, Prot.NONE))
        assert mm.munmap(pages(0, 4)) == [Punch(pages(0, 4))]
        assert mapped(mm) == []

    def test_every_mapping_in_the_range_goes(self) -> None:
        mm = mm_with((0, 3, PROT_RW), (4, 6, PROT_RW), (7, 9, PROT_RW))
        mm.munmap(pages(1, 8))
        assert mapped(mm) == [(0, 1, PROT_RW), (8, 9, PROT_RW)]

    def test_tables_that_become_empty_are_freed(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([REGION], huge=False)
        assert mm.table.tables == [4, 1, 1, 1]
        mm.munmap(REGION)
        assert mm.table.tables == [0, 0, 0, 1]


class TestMprotect:
    """Changing protections, with contents kept."""

    def test_write_protecting_is_one_effect(self) -> None:
        mm = mm_with((0, 8, PROT_RW))
        mm.sync([pages(0, 8)], huge=False)
        assert mm.mprotect(pages(2, 4), Prot.READ) == [Arm(pages(2, 4), WP)]
        assert mapped(mm) == [(0, 2, PROT_RW), (2, 4, Prot.READ), (4, 8, PROT_RW)]
        readonly, writable = PteFlag.PRESENT | PteFlag.UFFD_WP, PteFlag.PRESENT | PteFlag.WRITE
        assert installed(mm) == [(pages(0, 2), writable), (pages(2, 4), readonly), (pages(4, 8), writable)]
        check_mm(mm)

    def test_letting_stores_in_again_is_one_effect(self) -> None:
        mm = mm_with((0, 8, Prot.READ))
        mm.sync([pages(0, 8)], huge=False)
        assert mm.mprotect(pages(0, 8), PROT_RW) == [Arm(pages(0, 8), NATIVE)]
        assert installed(mm) == [(pages(0, 8), PteFlag.PRESENT | PteFlag.WRITE)]

    def test_contents_are_stashed_while_nobody_can_touch_or_change_them(self) -> None:
        """A store after the copy and before the pages are gone would be lost: WP keeps it out as long."""
        mm = mm_with((0, 8, PROT_RW))
        mm.sync([pages(0, 8)], huge=False)
        assert mm.mprotect(pages(2, 4), Prot.NONE) == [
            Arm(pages(2, 4), MISSING | WP),
            Stash(pages(2, 4)),
            Arm(pages(2, 4), MISSING),
        ]
        assert [run for run, _ in installed(mm)] == [pages(0, 2), pages(4, 8)]
        check_mm(mm)

    def test_contents_are_back_before_anybody_is_let_in(self) -> None:
        mm = mm_with((0, 8, Prot.NONE))
        assert mm.mprotect(pages(2, 4), PROT_RW) == [Unstash(pages(2, 4)), Arm(pages(2, 4), NATIVE)]

    def test_contents_that_come_back_read_only_are_protected_before(self) -> None:
        """A page that is back is served by the kernel, even where MISSING is armed."""
        mm = mm_with((0, 8, Prot.NONE))
        assert mm.mprotect(pages(2, 4), Prot.READ) == [
            Arm(pages(2, 4), MISSING | WP),
            Unstash(pages(2, 4)),
            Arm(pages(2, 4), WP),
        ]

    def test_over_different_neighbours_each_is_treated_in_its_own_way(self) -> None:
        mm = mm_with((0, 2, PROT_RW), (2, 4, Prot.NONE), (4, 6, Prot.READ))
        assert mm.mprotect(pages(0, 6), Prot.READ) == [
            Arm(pages(0, 2), WP),
            Arm(pages(2, 4), MISSING | WP),
            Unstash(pages(2, 4)),
            Arm(pages(2, 4), WP),
        ]
        assert mapped(mm) == [(0, 6, Prot.READ)]
        check_mm(mm)

    def test_only_accessible_parts_are_stashed(self) -> None:
        mm = mm_with((0, 2, PROT_RW), (2, 4, Prot.NONE), (4, 6, Prot.READ))
        effects = mm.mprotect(pages(0, 6), Prot.NONE)
        assert [e for e in effects if isinstance(e, Stash)] == [Stash(pages(0, 2)), Stash(pages(4, 6))]
        assert mapped(mm) == [(0, 6, Prot.NONE)]

    def test_with_paging_all_only_stores_and_contents_change(self) -> None:
        mm = mm_with((0, 8, PROT_RW), paging_all=True)
        assert mm.mprotect(pages(0, 8), Prot.READ) == [Arm(pages(0, 8), MISSING | WP)]
        assert mm.mprotect(pages(0, 8), PROT_RW) == [Arm(pages(0, 8), MISSING)]
        assert mm.mprotect(pages(0, 8), Prot.NONE) == [
            Arm(pages(0, 8), MISSING | WP),
            Stash(pages(0, 8)),
            Arm(pages(0, 8), MISSING),
        ]
        assert mm.mprotect(pages(0, 8), PROT_RW) == [Unstash(pages(0, 8))]

    @pytest.mark.parametrize("prot", [PROT_RW, Prot.READ, Prot.NONE])
    def test_the_same_protection_again_has_no_effect(self, prot: Prot) -> None:
        mm = mm_with((0, 8, prot))
        assert mm.mprotect(pages(2, 4), prot) == []
        assert mapped(mm) == [(0, 8, prot)]

    def test_a_part_of_a_huge_leaf_splits_it_and_the_rest_keeps_its_frames(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([REGION], huge=True)
        mm.mprotect(pages(600, 601), Prot.READ)
        assert (mm.table.huge_pages, mm.table.pages) == (3, 512)
        check_mm(mm)

    @pytest.mark.parametrize("ar", [pages(0, 3), pages(3, 5), pages(0, 9)])
    def test_a_hole_in_the_range_is_enomem_and_changes_nothing(self, ar: AddrRange) -> None:
        mm = mm_with((0, 2, PROT_RW), (4, 8, PROT_RW))
        with pytest.raises(NoMemoryError, match="not mapped throughout"):
            mm.mprotect(ar, Prot.READ)
        assert mapped(mm) == [(0, 2, PROT_RW), (4, 8, PROT_RW)]


class TestMadviseRemove:
    """Memory back, zeros in its place, for everybody."""

    def test_contents_go_and_the_mapping_stays(self) -> None:
        mm = mm_with((0, 8, PROT_RW))
        mm.sync([pages(0, 8)], huge=False)
        assert mm.madvise_remove(pages(2, 4)) == [Punch(pages(2, 4))]
        assert mapped(mm) == [(0, 8, PROT_RW)]
        assert [run for run, _ in installed(mm)] == [pages(0, 2), pages(4, 8)]
        check_mm(mm)

    @pytest.mark.parametrize("prot", [Prot.READ, Prot.NONE])
    def test_what_may_not_be_written_may_not_be_zeroed(self, prot: Prot) -> None:
        mm = mm_with((0, 4, PROT_RW), (4, 8, prot))
        mm.sync([pages(0, 8)], huge=False)
        resident = mm.table.resident
        with pytest.raises(AccessDeniedError, match="may not be written"):
            mm.madvise_remove(pages(2, 6))
        assert mm.table.resident == resident

    def test_a_hole_in_the_range_is_enomem(self) -> None:
        with pytest.raises(NoMemoryError, match="not mapped throughout"):
            mm_with((0, 4, PROT_RW)).madvise_remove(pages(2, 6))


BAD_RANGES = {
    "outside": pages(END, END + 1),
    "sticking out above": pages(END - 1, END + 1),
    "sticking out below": AddrRange.sized(BASE - PAGE_SIZE, 2 * PAGE_SIZE),
    "no whole page": AddrRange.sized(BASE, 100),
    "within a page": AddrRange.sized(BASE + 100, PAGE_SIZE),
}
CALLS: dict[str, Callable[[HostMm, AddrRange], object]] = {
    "mmap": lambda mm, ar: mm.mmap(ar, ar.size, fixed=True, replace=True),
    "munmap": lambda mm, ar: mm.munmap(ar),
    "mprotect": lambda mm, ar: mm.mprotect(ar, Prot.READ),
    "madvise_remove": lambda mm, ar: mm.madvise_remove(ar),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("ar", BAD_RANGES.values(), ids=BAD_RANGES)
def test_a_range_that_is_not_whole_pages_of_the_region_is_refused(
    call: Callable[[HostMm, AddrRange], object], ar: AddrRange
) -> None:
    mm = mm_with((0, END, PROT_RW))
    with pytest.raises(InvalidArgumentError):
        call(mm, ar)
    assert mapped(mm) == [(0, END, PROT_RW)]


@pytest.mark.parametrize(
    ("prot", "error"),
    [
        (Prot.EXEC, AccessDeniedError),
        (PROT_RW | Prot.EXEC, AccessDeniedError),
        (Prot(8), InvalidArgumentError),
        (Prot(0x1000000) | PROT_RW, InvalidArgumentError),
    ],
)
def test_memory_is_never_executable_and_unknown_protections_are_refused(prot: Prot, error: type[MshareError]) -> None:
    mm = mm_with((0, 8, PROT_RW))
    with pytest.raises(error):
        mm.mmap(pages(4, 12), 8 * PAGE_SIZE, prot, fixed=True, replace=True)
    with pytest.raises(error):
        mm.mprotect(pages(0, 8), prot)
    assert mapped(mm) == [(0, 8, PROT_RW)]


def test_a_region_is_made_of_whole_pages() -> None:
    with pytest.raises(InvalidArgumentError, match="whole pages"):
        HostMm(AddrRange.sized(BASE, PAGE_SIZE + 1))


class TestArmings:
    """What a new attachment is armed with before anybody may touch it."""

    def test_an_empty_region_reports_everything(self) -> None:
        assert list(mm_with().armings()) == [(REGION, MISSING)]

    def test_a_read_write_region_reports_nothing(self) -> None:
        assert list(mm_with((0, END, PROT_RW)).armings()) == []

    def test_ranges_come_in_order_with_equal_neighbours_as_one(self) -> None:
        mm = mm_with((2, 4, Prot.NONE), (4, 6, Prot.READ), (6, 8, PROT_RW))
        assert list(mm.armings()) == [(pages(0, 4), MISSING), (pages(4, 6), WP), (pages(8, END), MISSING)]

    def test_with_paging_all_everything_reports_missing_pages(self) -> None:
        mm = mm_with((2, 4, Prot.READ), (4, END, PROT_RW), paging_all=True)
        assert list(mm.armings()) == [
            (pages(0, 2), MISSING),
            (pages(2, 4), MISSING | WP),
            (pages(4, END), MISSING),
        ]


class TestSync:
    """Tables follow the backing's allocation map: the kernel fills native memory itself, and tells nobody."""

    def test_whole_2_mib_become_leaves_and_the_rest_small_pages(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([pages(510, 1026)], huge=True)
        writable = PteFlag.PRESENT | PteFlag.WRITE
        assert installed(mm) == [
            (pages(510, 512), writable),
            (pages(512, 1024), writable | PteFlag.HUGE),
            (pages(1024, 1026), writable),
        ]
        check_mm(mm)

    def test_without_huge_there_are_no_leaves(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([REGION], huge=False)
        assert (mm.table.pages, mm.table.huge_pages) == (END, 0)
        check_mm(mm)

    def test_a_region_between_2_mib_borders_has_no_leaves(self) -> None:
        """A leaf needs both its address and its frame at a border."""
        ar = AddrRange.sized(BASE + PAGE_SIZE, 2 * PMD_SIZE)
        mm = HostMm(ar)
        mm.mmap(ar, ar.size, fixed=True)
        mm.sync([ar], huge=True)
        assert (mm.table.pages, mm.table.huge_pages) == (1024, 0)
        check_mm(mm)

    def test_what_the_backing_no_longer_holds_goes(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([pages(0, 600)], huge=True)
        mm.sync([pages(5, 6), pages(9, 10)], huge=True)
        assert [run for run, _ in installed(mm)] == [pages(5, 6), pages(9, 10)]
        assert (mm.table.huge_pages, mm.table.tables) == (0, [1, 1, 1, 1])

    def test_pages_follow_the_protection_of_their_mapping(self) -> None:
        mm = mm_with((0, 2, PROT_RW), (2, 4, Prot.READ))
        mm.sync([pages(0, 4)], huge=False)
        assert installed(mm) == [
            (pages(0, 2), PteFlag.PRESENT | PteFlag.WRITE),
            (pages(2, 4), PteFlag.PRESENT | PteFlag.UFFD_WP),
        ]
        check_mm(mm)

    def test_holes_and_inaccessible_memory_hold_nothing_whatever_the_backing_says(self) -> None:
        mm = mm_with((2, 4, PROT_RW), (4, 6, Prot.NONE))
        mm.sync([REGION], huge=True)
        assert [run for run, _ in installed(mm)] == [pages(2, 4)]

    def test_paged_memory_follows_too(self) -> None:
        """Pages that came back from the stash are in the backing, and only there."""
        mm = mm_with((0, END, PROT_RW), paging_all=True)
        mm.fault(Fault(pages(7, 8).start, Access.WRITE))
        mm.sync([pages(0, 3), pages(7, 8)], huge=True)
        assert [run for run, _ in installed(mm)] == [pages(0, 3), pages(7, 8)]

    def test_what_the_backing_holds_beyond_the_region_is_left_out(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([AddrRange.sized(BASE - PMD_SIZE, PMD_SIZE), pages(END - 1, END + 1)], huge=True)
        assert [run for run, _ in installed(mm)] == [pages(END - 1, END)]
        check_mm(mm)

    def test_frames_count_from_the_start_of_the_region(self) -> None:
        mm = mm_with((0, END, PROT_RW))
        mm.sync([pages(600, 602)], huge=False)
        assert [pte.frame for _, pte in mm.table.runs(REGION)] == [600]
        assert mm.frame_at(pages(600, 601).start) == FrameNo(600)


@pytest.mark.parametrize("levels", [4, 5])
def test_page_tables_have_the_levels_asked_for(levels: int) -> None:
    assert HostMm(REGION, levels=levels).table.levels == levels


def test_holes_signal_as_asked() -> None:
    mm = HostMm(REGION, hole_signal=Signal.SIGSEGV)
    assert mm.fault(Fault(REGION.start, Access.READ)).signal is Signal.SIGSEGV


def test_vmas_are_what_was_asked_for() -> None:
    assert list(mm_with((1, 2, Prot.READ)).vmas) == [Vma(pages(1, 2), Prot.READ)]


class TestCheckUserRange:
    """Which addresses a region may have."""

    def test_a_good_range_is_returned(self) -> None:
        assert check_user_range(BASE, PMD_SIZE, PMD_SIZE) == AddrRange.sized(BASE, PMD_SIZE)

    @pytest.mark.parametrize("size", [0, -PMD_SIZE])
    def test_a_region_has_bytes(self, size: int) -> None:
        with pytest.raises(InvalidArgumentError, match="at least"):
            check_user_range(BASE, size, PMD_SIZE)

    @pytest.mark.parametrize(("start", "size"), [(BASE + PAGE_SIZE, PMD_SIZE), (BASE, PMD_SIZE + PAGE_SIZE), (BASE, 1)])
    def test_address_and_length_are_multiples_of_the_alignment(self, start: int, size: int) -> None:
        with pytest.raises(InvalidArgumentError, match="multiples of 0x200000"):
            check_user_range(start, size, PMD_SIZE)

    @pytest.mark.parametrize(
        ("start", "size"),
        [
            (0, PMD_SIZE),
            (-PMD_SIZE, PMD_SIZE),
            (USER_MIN - PAGE_SIZE, PAGE_SIZE),
            (USER_MAX, PAGE_SIZE),
            (USER_MAX - PAGE_SIZE, 2 * PAGE_SIZE),
            (BASE, 1 << 47),
            (1 << 63, PAGE_SIZE),
            (BASE, 1 << 64),
        ],
    )
    def test_only_user_addresses(self, start: int, size: int) -> None:
        with pytest.raises(InvalidArgumentError, match="user addresses"):
            check_user_range(start, size, PAGE_SIZE)

    def test_the_first_and_the_last_user_page_are_allowed(self) -> None:
        assert check_user_range(USER_MIN, PAGE_SIZE, PAGE_SIZE).start == USER_MIN
        assert check_user_range(USER_MAX - PAGE_SIZE, PAGE_SIZE, PAGE_SIZE).end == USER_MAX


class TestAdviceOnReading:
    """RANDOM, SEQUENTIAL and NORMAL: properties of a VMA."""

    def test_it_splits_what_is_advised_in_part_and_merges_it_again(self) -> None:
        mm = mm_with((0, 8, PROT_RW))
        mm.madvise_reading(pages(2, 4), Advice.RANDOM)
        assert [(vma.ar, vma.advice) for vma in mm.vmas] == [
            (pages(0, 2), Advice.NORMAL),
            (pages(2, 4), Advice.RANDOM),
            (pages(4, 8), Advice.NORMAL),
        ]
        mm.madvise_reading(pages(0, 8), Advice.NORMAL)
        assert [vma.ar for vma in mm.vmas] == [pages(0, 8)]
        check_mm(mm)

    def test_it_stays_when_the_protection_changes(self) -> None:
        mm = mm_with((0, 8, PROT_RW))
        mm.madvise_reading(pages(0, 8), Advice.SEQUENTIAL)
        mm.mprotect(pages(0, 8), Prot.READ)
        assert [vma.advice for vma in mm.vmas] == [Advice.SEQUENTIAL]

    def test_of_a_hole_it_is_refused_and_changes_nothing(self) -> None:
        mm = mm_with((0, 2, PROT_RW))
        with pytest.raises(NoMemoryError):
            mm.madvise_reading(pages(1, 4), Advice.RANDOM)
        assert [(vma.ar, vma.advice) for vma in mm.vmas] == [(pages(0, 2), Advice.NORMAL)]
