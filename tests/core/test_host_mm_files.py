"""Files in a host mm: what their mappings make the kernel report, and when stores go back to them."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from msharefs import host_mm
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import Allow, Arm, Effect, Fill, Protect, Punch, Stash, Unstash, WriteBack
from msharefs.errors import AccessDeniedError, NoMemoryError, NotSupportedError, OffsetTooLargeError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.pte import PteFlag
from msharefs.rules import MAX_FILE_SIZE
from msharefs.vma import Arming, FileId, FileSource

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 4 * PMD_SIZE)
END = REGION.size // PAGE_SIZE
NATIVE, MISSING, WP = Arming.NATIVE, Arming.MISSING, Arming.WP
ONE, TWO = FileId(1), FileId(2)
SHARED = FileSource(ONE, 0, shared=True, writable=True)
PRIVATE = FileSource(ONE, 0, shared=False, writable=False)
CLEAN = PteFlag.PRESENT | PteFlag.UFFD_WP
STORED = PteFlag.PRESENT | PteFlag.WRITE | PteFlag.DIRTY


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def of(source: FileSource, page: int) -> FileSource:
    """The same file from another page on."""
    return attrs.evolve(source, offset=page * PAGE_SIZE)


def mm_with(source: FileSource, prot: Prot = PROT_RW) -> HostMm:
    """Pages 2..9 of a region show pages 10..17 of a file; the rest is a hole."""
    mm = HostMm(REGION)
    map_file(mm, 2, 10, of(source, 10), prot)
    return mm


def map_file(mm: HostMm, first: int, end: int, source: FileSource | None, prot: Prot = PROT_RW) -> list[Effect]:
    place, effects = mm.mmap(
        pages(first, end), (end - first) * PAGE_SIZE, prot, fixed=True, replace=True, source=source
    )
    assert place == pages(first, end)
    check_mm(mm)
    return list(effects)


def store(mm: HostMm, *numbers: int) -> None:
    """Have pages filled and stored to, as the faults of one thread do it."""
    for number in numbers:
        page = pages(number, number + 1)
        if mm.table.walk(page.start) is None:
            mm.filled(page)
        mm.stored_to(page)
    check_mm(mm)


def wrote(first: int, end: int, file: FileId = ONE, ahead: int = 8) -> list[Effect]:
    """The effects that bring pages back to a file, in which they lie ``ahead`` pages further up."""
    return [Protect(pages(first, end)), WriteBack(pages(first, end), file, (first + ahead) * PAGE_SIZE)]


def mapped(mm: HostMm) -> list[tuple[int, int, Prot, int | None]]:
    """The VMAs, in pages, with the page of the file at their start."""
    return [
        (
            (v.ar.start - BASE) // PAGE_SIZE,
            (v.ar.end - BASE) // PAGE_SIZE,
            v.prot,
            v.source.offset // PAGE_SIZE if v.source is not None else None,
        )
        for v in mm.vmas
    ]


def installed(mm: HostMm) -> list[tuple[AddrRange, PteFlag]]:
    return [(run, pte.flags) for run, pte in mm.table.runs(REGION)]


class TestArming:
    """Pages of a file are filled one by one, and the first store to what reaches it is seen."""

    @pytest.mark.parametrize(
        ("source", "prot", "arming"),
        [
            (SHARED, PROT_RW, MISSING | WP),
            (SHARED, Prot.WRITE, MISSING | WP),
            (SHARED, Prot.READ, MISSING | WP),
            (SHARED, Prot.NONE, MISSING),
            (PRIVATE, PROT_RW, MISSING),
            (PRIVATE, Prot.WRITE, MISSING),
            (PRIVATE, Prot.READ, MISSING | WP),
            (PRIVATE, Prot.NONE, MISSING),
        ],
    )
    def test_a_mapping_in_a_hole_is_armed_for_what_it_must_see(
        self, source: FileSource, prot: Prot, arming: Arming
    ) -> None:
        mm = HostMm(REGION)
        effects = map_file(mm, 0, END, source, prot)
        assert effects == ([Arm(REGION, arming)] if arming & WP else [])
        assert list(mm.armings()) == [(REGION, arming)]

    def test_memory_that_shares_a_granule_with_a_file_is_paged_too(self) -> None:
        """Else a fault in it would bring zeros to pages that show the file."""
        mm = HostMm(REGION, granule=PMD_SIZE)
        mm.mmap(REGION, REGION.size, fixed=True)
        effects = map_file(mm, 600, 601, SHARED)
        assert effects == [
            Arm(pages(512, 600), MISSING),
            Arm(pages(600, 601), MISSING | WP),
            Arm(pages(601, 1024), MISSING),
            Punch(pages(600, 601)),
        ]
        assert list(mm.armings()) == [
            (pages(512, 600), MISSING),
            (pages(600, 601), MISSING | WP),
            (pages(601, 1024), MISSING),
        ]

    def test_a_file_over_memory_is_armed_before_the_memory_goes(self) -> None:
        mm = HostMm(REGION)
        mm.mmap(REGION, REGION.size, fixed=True)
        assert map_file(mm, 2, 4, SHARED) == [Arm(pages(2, 4), MISSING | WP), Punch(pages(2, 4))]

    def test_memory_over_a_file_lets_nobody_in_before_the_file_has_its_stores(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3)
        assert map_file(mm, 2, 10, None) == [*wrote(3, 4), Punch(pages(2, 10)), Arm(pages(2, 10), NATIVE)]


class TestOffsets:
    """Every page shows its own page of the file, however the mapping is cut."""

    def test_a_fault_asks_for_the_page_of_the_file_that_shows_there(self) -> None:
        mm = mm_with(SHARED)
        assert mm.fault(Fault(pages(4, 5).start, Access.READ)).effect == Fill(pages(4, 5), ONE, 12 * PAGE_SIZE)

    def test_what_is_left_of_a_mapping_shows_what_it_showed(self) -> None:
        mm = mm_with(SHARED)
        mm.munmap(pages(4, 5))
        mm.mprotect(pages(6, 7), Prot.READ)
        assert mapped(mm) == [(2, 4, PROT_RW, 10), (5, 6, PROT_RW, 13), (6, 7, Prot.READ, 14), (7, 10, PROT_RW, 15)]
        mm.mprotect(pages(5, 10), PROT_RW)
        assert mapped(mm) == [(2, 4, PROT_RW, 10), (5, 10, PROT_RW, 13)]
        check_mm(mm)

    def test_a_mapping_that_goes_on_in_the_file_is_one_with_it(self) -> None:
        mm = mm_with(SHARED)
        map_file(mm, 0, 2, of(SHARED, 8))
        map_file(mm, 10, 12, of(SHARED, 18))
        assert mapped(mm) == [(0, 12, PROT_RW, 8)]

    @pytest.mark.parametrize(
        "source",
        [
            None,
            of(SHARED, 19),
            of(PRIVATE, 18),
            attrs.evolve(of(SHARED, 18), file=TWO),
            attrs.evolve(of(SHARED, 18), writable=False),
        ],
        ids=["memory", "another part", "private", "another file", "read-only"],
    )
    def test_a_mapping_of_anything_else_is_one_of_its_own(self, source: FileSource | None) -> None:
        mm = HostMm(REGION)
        map_file(mm, 2, 10, of(SHARED, 10), Prot.READ)
        map_file(mm, 10, 12, source, Prot.READ)
        assert len(mm.vmas) == 2

    def test_stores_go_where_their_pages_show(self) -> None:
        mm = mm_with(SHARED)
        mm.munmap(pages(4, 5))
        store(mm, 2, 3, 5, 9)
        assert mm.write_back(REGION) == [*wrote(2, 4), *wrote(5, 6), *wrote(9, 10)]

    def test_stores_to_neighbours_with_different_files_go_to_each(self) -> None:
        mm = mm_with(SHARED)
        map_file(mm, 10, 12, attrs.evolve(SHARED, file=TWO))
        store(mm, 8, 9, 10)
        assert mm.dirty(REGION) == [pages(8, 11)]
        assert mm.write_back(REGION) == [*wrote(8, 10), *wrote(10, 11, TWO, -10)]

    def test_the_last_page_that_a_file_can_have(self) -> None:
        mm = HostMm(REGION)
        last = FileSource(ONE, MAX_FILE_SIZE - 2 * PAGE_SIZE, shared=True, writable=True)
        map_file(mm, 0, 2, last)
        for source in (attrs.evolve(last, offset=last.offset + PAGE_SIZE), attrs.evolve(last, offset=1 << 63)):
            with pytest.raises(OffsetTooLargeError):
                mm.mmap(None, 2 * PAGE_SIZE, source=source)
        assert len(mm.vmas) == 1


class TestDirty:
    """A page of a shared file is clean until it is stored to, and again when it was written back."""

    def test_a_filled_page_is_protected_and_a_stored_one_dirty(self) -> None:
        mm = mm_with(SHARED)
        mm.filled(pages(2, 6))
        assert installed(mm) == [(pages(2, 6), CLEAN)]
        assert mm.fault(Fault(pages(3, 4).start, Access.WRITE, protected=True)).effect == Allow(pages(3, 4))
        assert installed(mm) == [(pages(2, 3), CLEAN), (pages(3, 4), STORED), (pages(4, 6), CLEAN)]
        assert mm.dirty(REGION) == [pages(3, 4)]

    def test_a_second_store_changes_nothing(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3, 3)
        assert mm.dirty(REGION) == [pages(3, 4)]

    def test_a_page_that_was_written_back_is_protected_and_clean(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3)
        assert mm.write_back(REGION) == wrote(3, 4)
        assert installed(mm) == [(pages(3, 4), CLEAN)]
        assert mm.write_back(REGION) == []
        store(mm, 3)
        assert mm.write_back(REGION) == wrote(3, 4)

    def test_only_what_was_asked_for_is_written_back(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3, 4, 5)
        assert mm.write_back(pages(4, 5)) == wrote(4, 5)
        assert mm.dirty(REGION) == [pages(3, 4), pages(5, 6)]

    def test_dirty_pages_stay_dirty_when_the_tables_are_brought_up_to_date(self) -> None:
        mm = mm_with(SHARED)
        mm.filled(pages(2, 6))
        store(mm, 3)
        mm.sync([pages(0, 8)], huge=False)
        assert installed(mm) == [(pages(2, 3), CLEAN), (pages(3, 4), STORED), (pages(4, 8), CLEAN)]
        check_mm(mm)

    def test_dirty_pages_split_a_leaf_that_the_tables_are_told_of(self) -> None:
        mm = HostMm(REGION)
        map_file(mm, 0, END, SHARED)
        store(mm, 700)
        mm.sync([REGION], huge=True)
        assert (mm.table.huge_pages, mm.table.pages) == (3, 512)
        assert mm.dirty(REGION) == [pages(700, 701)]
        check_mm(mm)

    def test_pages_of_a_private_file_are_never_dirty(self) -> None:
        mm = mm_with(PRIVATE)
        mm.filled(pages(2, 6))
        mm.stored_to(pages(3, 4))
        assert installed(mm) == [(pages(2, 6), PteFlag.PRESENT | PteFlag.WRITE)]
        assert mm.dirty(REGION) == mm.write_back(REGION) == []

    def test_a_store_where_nothing_is_mapped_any_more_leaves_no_trace(self) -> None:
        mm = mm_with(SHARED)
        mm.stored_to(pages(20, 21))
        assert installed(mm) == []

    @pytest.mark.parametrize("prot", [Prot.READ, PROT_RW])
    def test_clean_pages_stay_protected_when_stores_are_allowed(self, prot: Prot) -> None:
        """The kernel still reports the first store to each; the tables say the same."""
        mm = mm_with(SHARED, prot)
        mm.filled(pages(2, 6))
        assert mm.mprotect(pages(2, 10), PROT_RW) == []
        assert installed(mm) == [(pages(2, 6), CLEAN)]
        check_mm(mm)


class TestChanges:
    """What was stored is in the file before its page goes, or can no longer be stored to."""

    def test_munmap(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3, 8)
        assert mm.munmap(pages(2, 6)) == [*wrote(3, 4), Punch(pages(2, 6)), Arm(pages(2, 6), MISSING)]
        assert mm.dirty(REGION) == [pages(8, 9)]
        check_mm(mm)

    def test_another_mapping_over_it(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3)
        assert map_file(mm, 2, 10, attrs.evolve(SHARED, file=TWO)) == [*wrote(3, 4), Punch(pages(2, 10))]
        assert installed(mm) == []

    def test_read_only(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3)
        assert mm.mprotect(pages(2, 10), Prot.READ) == wrote(3, 4)
        assert installed(mm) == [(pages(3, 4), CLEAN)]
        check_mm(mm)

    def test_inaccessible(self) -> None:
        """The file keeps the contents, so the memory is given back."""
        mm = mm_with(SHARED)
        store(mm, 3)
        assert mm.mprotect(pages(2, 10), Prot.NONE) == [*wrote(3, 4), Punch(pages(2, 10)), Arm(pages(2, 10), MISSING)]
        assert installed(mm) == []
        assert mm.mprotect(pages(2, 10), PROT_RW) == [Arm(pages(2, 10), MISSING | WP)]

    def test_a_protection_that_lets_stores_in_writes_nothing_back(self) -> None:
        mm = mm_with(SHARED)
        store(mm, 3)
        assert mm.mprotect(pages(2, 10), Prot.WRITE) == []
        assert mm.dirty(REGION) == [pages(3, 4)]
        check_mm(mm)

    def test_private_contents_wait_in_the_stash_and_reach_no_file(self) -> None:
        mm = mm_with(PRIVATE)
        mm.filled(pages(2, 6))
        assert mm.mprotect(pages(2, 10), Prot.NONE) == [
            Arm(pages(2, 10), MISSING | WP),
            Stash(pages(2, 10)),
            Arm(pages(2, 10), MISSING),
        ]
        assert mm.mprotect(pages(2, 10), PROT_RW) == [Unstash(pages(2, 10))]
        assert mm.munmap(pages(2, 10)) == [Punch(pages(2, 10))]

    def test_files_that_are_mapped_somewhere(self) -> None:
        mm = mm_with(SHARED)
        mm.mmap(None, PAGE_SIZE)
        map_file(mm, 20, 22, attrs.evolve(PRIVATE, file=TWO))
        assert mm.files() == {ONE, TWO}
        mm.munmap(pages(2, 9))
        assert mm.files() == {ONE, TWO}
        mm.munmap(pages(9, 10))
        assert mm.files() == {TWO}


READONLY = attrs.evolve(SHARED, writable=False)
REFUSED: dict[str, tuple[FileSource, Prot, Callable[[HostMm], object], type[Exception]]] = {
    "a writable mapping": (READONLY, Prot.READ, lambda mm: map_file(mm, 4, 6, READONLY), AccessDeniedError),
    "stores": (READONLY, Prot.READ, lambda mm: mm.mprotect(pages(4, 6), PROT_RW), AccessDeniedError),
    "stores to one of two": (
        READONLY,
        Prot.READ,
        lambda mm: (mm.mmap(pages(0, 2), 2 * PAGE_SIZE), mm.mprotect(pages(0, 4), Prot.WRITE)),
        AccessDeniedError,
    ),
    "zeros in a shared file": (SHARED, PROT_RW, lambda mm: mm.madvise_remove(pages(4, 6)), NotSupportedError),
    "zeros in a private one": (PRIVATE, PROT_RW, lambda mm: mm.madvise_remove(pages(4, 6)), NotSupportedError),
    "zeros where none may store": (SHARED, Prot.READ, lambda mm: mm.madvise_remove(pages(4, 6)), AccessDeniedError),
    "zeros in a hole": (SHARED, PROT_RW, lambda mm: mm.madvise_remove(pages(9, 11)), NoMemoryError),
    "a check of a hole": (SHARED, PROT_RW, lambda mm: mm.check_mapped(pages(9, 11)), NoMemoryError),
}


@pytest.mark.parametrize(("source", "prot", "call", "error"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_does_not_allow_changes_nothing(
    source: FileSource, prot: Prot, call: Callable[[HostMm], object], error: type[Exception]
) -> None:
    mm = mm_with(source, prot)
    mm.filled(pages(4, 5))
    before = installed(mm)
    with pytest.raises(error):
        call(mm)
    assert mapped(mm)[-1] == (2, 10, prot, 10)
    assert installed(mm) == before


def test_a_file_that_is_read_only_may_be_stored_to_privately() -> None:
    mm = mm_with(PRIVATE, Prot.READ)
    assert mm.mprotect(pages(2, 10), PROT_RW) == [Arm(pages(2, 10), MISSING)]


def test_a_region_with_all_the_mappings_it_may_have_takes_no_more_and_keeps_its_stores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mm = mm_with(SHARED)
    store(mm, 3)
    monkeypatch.setattr(host_mm, "MAX_VMAS", 2)
    calls: list[Callable[[], object]] = [
        lambda: map_file(mm, 4, 6, SHARED),
        lambda: mm.munmap(pages(4, 6)),
        lambda: mm.mprotect(pages(4, 6), Prot.READ),
    ]
    for call in calls:
        with pytest.raises(NoMemoryError, match="at most 2"):
            call()
    assert mapped(mm) == [(2, 10, PROT_RW, 10)]
    assert mm.dirty(REGION) == [pages(3, 4)]
