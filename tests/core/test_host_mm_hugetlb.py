"""A host mm of 2 MiB pages, whose whole GiB are armed alike: one table for all processes maps a GiB, or none does."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from msharefs.addr import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Address, AddrRange
from msharefs.effects import (
    Allow,
    Arm,
    Change,
    Deliver,
    Fill,
    Protect,
    Punch,
    Signal,
    Stash,
    Unstash,
    WriteBack,
    ZeroFill,
)
from msharefs.errors import AccessDeniedError, ExistsError, InvalidArgumentError, NoMemoryError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.pte import PteFlag
from msharefs.vma import Arming, FileId, FileSource

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 4 * PUD_SIZE)
GIB = PUD_SIZE // PMD_SIZE
"""Pages in a GiB."""
END = REGION.size // PMD_SIZE
NATIVE, MISSING, WP = Arming.NATIVE, Arming.MISSING, Arming.WP
SHARED = FileSource(FileId(1), 0, shared=True, writable=True)
PRIVATE = FileSource(FileId(1), 0, shared=False, writable=False)
HUGE = PteFlag.PRESENT | PteFlag.HUGE
STORABLE = HUGE | PteFlag.WRITE
CLEAN = HUGE | PteFlag.UFFD_WP
DIRTY = STORABLE | PteFlag.DIRTY


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PMD_SIZE, (end - first) * PMD_SIZE)


def gib(first: int, end: int) -> AddrRange:
    return pages(first * GIB, end * GIB)


def new(*, paging_all: bool = False) -> HostMm:
    return HostMm(REGION, page=PMD_SIZE, granule=PUD_SIZE, paging_all=paging_all)


def mm_with(*mapped: tuple[int, int, Prot]) -> HostMm:
    """A region with these pages mapped."""
    mm = new()
    for first, end, prot in mapped:
        mm.mmap(pages(first, end), (end - first) * PMD_SIZE, prot, fixed=True)
        check_mm(mm)
    return mm


def full() -> HostMm:
    return mm_with((0, END, PROT_RW))


def done(mm: HostMm, effects: list[Change]) -> list[Change]:
    """What a call came to, after a look whether all is well."""
    check_mm(mm)
    return effects


def touch(mm: HostMm, number: int, access: Access = Access.READ, *, protected: bool = False) -> object:
    """What a fault somewhere in a page comes to."""
    addr = Address(pages(number, number + 1).start + PMD_SIZE // 2 + 5)
    effect = mm.fault(Fault(addr, access, protected=protected)).effect
    check_mm(mm)
    return effect


def installed(mm: HostMm) -> list[tuple[int, PteFlag]]:
    """Number and flags of each page that is installed."""
    return [((run.start - BASE) // PMD_SIZE, pte.flags) for run, pte in mm.table.runs(REGION)]


def show(mm: HostMm, first: int, end: int, source: FileSource, prot: Prot = PROT_RW) -> list[Change]:
    """Map a file."""
    return done(mm, mm.mmap(pages(first, end), (end - first) * PMD_SIZE, prot, fixed=True, source=source)[1])


class TestPages:
    """Everything is made of 2 MiB."""

    @pytest.mark.parametrize(("off", "size"), [(PAGE_SIZE, PUD_SIZE), (0, PMD_SIZE + PAGE_SIZE)])
    def test_a_region_is(self, off: int, size: int) -> None:
        with pytest.raises(InvalidArgumentError, match="whole pages"):
            HostMm(AddrRange.sized(BASE + off, size), page=PMD_SIZE, granule=PUD_SIZE)

    @pytest.mark.parametrize(
        "call",
        [
            lambda mm, ar: mm.mmap(ar, ar.size, fixed=True, replace=True),
            lambda mm, ar: mm.mmap(ar, ar.size),
            lambda mm, ar: mm.munmap(ar),
            lambda mm, ar: mm.mprotect(ar, Prot.READ),
            lambda mm, ar: mm.madvise_remove(ar),
            lambda mm, ar: mm.check_mapped(ar),
        ],
        ids=["MAP_FIXED", "a hint", "munmap", "mprotect", "MADV_REMOVE", "a check"],
    )
    @pytest.mark.parametrize(
        "ar",
        [
            AddrRange.sized(BASE, PAGE_SIZE),
            AddrRange.sized(BASE + PAGE_SIZE, PMD_SIZE),
            AddrRange.sized(BASE + PMD_SIZE, PMD_SIZE + PAGE_SIZE),
        ],
        ids=["small", "off", "odd"],
    )
    def test_a_change_is_or_changes_nothing(self, call: Callable[[HostMm, AddrRange], object], ar: AddrRange) -> None:
        mm = full()
        with pytest.raises(InvalidArgumentError, match=f"multiple of {PMD_SIZE}|pages of {PMD_SIZE} bytes"):
            call(mm, ar)
        assert [vma.ar for vma in mm.vmas] == [REGION]

    def test_a_size_without_a_place_is(self) -> None:
        with pytest.raises(InvalidArgumentError, match=f"multiple of {PMD_SIZE}"):
            new().mmap(None, PMD_SIZE + PAGE_SIZE)

    def test_a_mapping_is_placed_at_one(self) -> None:
        mm = mm_with((0, 3, PROT_RW), (5, 6, PROT_RW))
        assert mm.mmap(None, 2 * PMD_SIZE, align=PMD_SIZE)[0] == pages(3, 5)
        assert mm.mmap(None, 2 * PMD_SIZE, align=PMD_SIZE)[0] == pages(6, 8)
        check_mm(mm)

    def test_a_fault_installs_one(self) -> None:
        mm = mm_with((0, 10, PROT_RW))
        assert touch(mm, 3) == ZeroFill(pages(3, 4))
        assert touch(mm, 5, Access.WRITE) == ZeroFill(pages(5, 6))
        assert installed(mm) == [(3, STORABLE), (5, STORABLE)]
        assert (mm.table.pages, mm.table.huge_pages, mm.table.tables_by_name()["pte"]) == (0, 2, 0)
        assert mm.table.resident == 2 * PMD_SIZE

    def test_a_fault_of_read_only_memory_installs_one_that_is_protected(self) -> None:
        mm = mm_with((0, 10, Prot.READ))
        assert touch(mm, 3) == ZeroFill(pages(3, 4), protected=True)
        assert touch(mm, 3, Access.WRITE) == Deliver(Signal.SIGSEGV, Address(pages(3, 4).start + PMD_SIZE // 2 + 5))
        assert installed(mm) == [(3, CLEAN)]

    def test_a_fault_of_a_hole_installs_none(self) -> None:
        mm = mm_with((0, 10, PROT_RW))
        assert touch(mm, 10) == Deliver(Signal.SIGBUS, Address(pages(10, 11).start + PMD_SIZE // 2 + 5))
        assert installed(mm) == []

    def test_what_the_backing_holds_is_installed_in_them(self) -> None:
        mm = mm_with((0, 4, PROT_RW), (4, 6, Prot.READ), (6, 8, Prot.NONE))
        mm.sync([pages(1, 3), pages(5, 12)], huge=True)
        check_mm(mm)
        assert installed(mm) == [(1, STORABLE), (2, STORABLE), (5, CLEAN)]
        assert mm.table.pages == 0


class TestArming:
    """A GiB that holds anything which must be reported is armed as a whole, by one effect.

    The kernel shares a table only while no window is split inside its GiB, and what was split once stays so.
    """

    @pytest.mark.parametrize(
        ("mapped", "armings"),
        [
            ([(0, END, PROT_RW)], []),
            ([], [(REGION, MISSING)]),
            ([(0, GIB, PROT_RW)], [(gib(1, 4), MISSING)]),
            ([(0, GIB + 1, PROT_RW)], [(gib(1, 4), MISSING)]),
            ([(1, END, PROT_RW)], [(gib(0, 1), MISSING)]),
            ([(0, GIB + 7, PROT_RW), (GIB + 8, END, PROT_RW)], [(gib(1, 2), MISSING)]),
            ([(0, GIB - 1, PROT_RW), (GIB + 1, END, PROT_RW)], [(gib(0, 2), MISSING)]),
            ([(0, 5, PROT_RW), (5, 6, Prot.NONE), (6, END, PROT_RW)], [(gib(0, 1), MISSING)]),
            ([(0, 5, PROT_RW), (5, 6, Prot.READ), (6, END, PROT_RW)], [(pages(5, 6), WP)]),
            (
                [(1, 5, Prot.READ), (5, END, PROT_RW)],
                [(pages(0, 1), MISSING), (pages(1, 5), MISSING | WP), (pages(5, GIB), MISSING)],
            ),
        ],
    )
    def test_of_what_is_mapped(
        self, mapped: list[tuple[int, int, Prot]], armings: list[tuple[AddrRange, Arming]]
    ) -> None:
        assert list(mm_with(*mapped).armings()) == armings

    def test_a_hole(self) -> None:
        mm = full()
        assert done(mm, mm.munmap(pages(600, 601))) == [Arm(gib(1, 2), MISSING), Punch(pages(600, 601))]
        assert done(mm, mm.munmap(pages(700, 701))) == [Punch(pages(700, 701))]
        assert done(mm, mm.mmap(pages(600, 601), PMD_SIZE, fixed=True)[1]) == []
        assert done(mm, mm.mmap(pages(700, 701), PMD_SIZE, fixed=True)[1]) == [Arm(gib(1, 2), NATIVE)]

    def test_a_hole_over_a_border(self) -> None:
        mm = full()
        effects = done(mm, mm.munmap(pages(GIB - 1, 2 * GIB + 1)))
        assert effects == [Arm(gib(0, 3), MISSING), Punch(pages(GIB - 1, 2 * GIB + 1))]

    def test_memory_over_memory_needs_none(self) -> None:
        mm = full()
        assert done(mm, mm.mmap(pages(5, 6), PMD_SIZE, fixed=True, replace=True)[1]) == [Punch(pages(5, 6))]
        assert done(mm, mm.madvise_remove(pages(7, 9))) == [Punch(pages(7, 9))]

    def test_read_only_memory_is_armed_alone(self) -> None:
        mm = full()
        mm.sync([pages(0, 10)], huge=True)
        assert done(mm, mm.mprotect(pages(5, 7), Prot.READ)) == [Arm(pages(5, 7), WP)]
        assert installed(mm)[4:8] == [(4, STORABLE), (5, CLEAN), (6, CLEAN), (7, STORABLE)]
        assert done(mm, mm.mprotect(pages(5, 7), PROT_RW)) == [Arm(pages(5, 7), NATIVE)]
        assert {flags for _, flags in installed(mm)} == {STORABLE}

    def test_read_only_memory_beside_a_hole(self) -> None:
        mm = full()
        mm.munmap(pages(0, 1))
        assert done(mm, mm.mprotect(pages(5, 7), Prot.READ)) == [Arm(pages(5, 7), MISSING | WP)]
        assert done(mm, mm.mmap(pages(0, 1), PMD_SIZE, fixed=True)[1]) == [
            Arm(pages(0, 5), NATIVE),
            Arm(pages(5, 7), WP),
            Arm(pages(7, GIB), NATIVE),
        ]

    def test_hidden_memory_leaves_while_its_stores_are_kept_out(self) -> None:
        mm = full()
        mm.sync([pages(0, 10)], huge=True)
        assert done(mm, mm.mprotect(pages(5, 7), Prot.NONE)) == [
            Arm(pages(0, 5), MISSING),
            Arm(pages(5, 7), MISSING | WP),
            Arm(pages(7, GIB), MISSING),
            Stash(pages(5, 7)),
            Arm(pages(5, 7), MISSING),
        ]
        assert [number for number, _ in installed(mm)] == [0, 1, 2, 3, 4, 7, 8, 9]
        assert done(mm, mm.mprotect(pages(5, 7), PROT_RW)) == [Unstash(pages(5, 7)), Arm(gib(0, 1), NATIVE)]

    def test_all_of_it_may_be_asked_for(self) -> None:
        mm = new(paging_all=True)
        mm.mmap(REGION, REGION.size, fixed=True)
        assert list(mm.armings()) == [(REGION, MISSING)]
        assert done(mm, mm.munmap(pages(5, 6))) == [Punch(pages(5, 6))]


class TestFiles:
    """They come and go in 2 MiB, too."""

    def test_a_fault_asks_for_what_shows_there(self) -> None:
        mm = new()
        show(mm, 2, 10, attrs.evolve(SHARED, offset=3 * PAGE_SIZE))
        assert touch(mm, 4) == Fill(pages(4, 5), FileId(1), 3 * PAGE_SIZE + 2 * PMD_SIZE)
        assert installed(mm) == []
        mm.filled(pages(4, 6))
        check_mm(mm)
        assert installed(mm) == [(4, CLEAN), (5, CLEAN)]

    def test_the_first_store_makes_2_mib_dirty(self) -> None:
        mm = new()
        show(mm, 0, 10, SHARED)
        mm.filled(pages(2, 6))
        assert touch(mm, 3, Access.WRITE, protected=True) == Allow(pages(3, 4))
        assert installed(mm) == [(2, CLEAN), (3, DIRTY), (4, CLEAN), (5, CLEAN)]
        assert mm.dirty(REGION) == [pages(3, 4)]

    def test_dirty_neighbours_are_written_back_at_once_and_clean_then(self) -> None:
        mm = new()
        show(mm, 2, 10, attrs.evolve(SHARED, offset=PAGE_SIZE))
        mm.filled(pages(2, 10))
        for number in (3, 4, 7):
            touch(mm, number, Access.WRITE, protected=True)
        assert done(mm, mm.write_back(REGION)) == [
            Protect(pages(3, 5)),
            WriteBack(pages(3, 5), FileId(1), PAGE_SIZE + PMD_SIZE),
            Protect(pages(7, 8)),
            WriteBack(pages(7, 8), FileId(1), PAGE_SIZE + 5 * PMD_SIZE),
        ]
        assert {flags for _, flags in installed(mm)} == {CLEAN}
        assert mm.write_back(REGION) == []
        touch(mm, 4, Access.WRITE, protected=True)
        assert mm.dirty(REGION) == [pages(4, 5)]

    def test_dirty_pages_stay_so_when_the_tables_are_brought_up_to_date(self) -> None:
        mm = new()
        show(mm, 0, 10, SHARED)
        mm.filled(pages(2, 6))
        touch(mm, 3, Access.WRITE, protected=True)
        mm.sync([pages(1, 5)], huge=True)
        check_mm(mm)
        assert installed(mm) == [(1, CLEAN), (2, CLEAN), (3, DIRTY), (4, CLEAN)]
        assert mm.table.pages == 0

    def test_a_clean_page_that_the_kernel_misses_is_forgotten(self) -> None:
        mm = new()
        show(mm, 0, 10, SHARED)
        mm.filled(pages(2, 4))
        touch(mm, 3, Access.WRITE, protected=True)
        for number, there in ((2, False), (3, True)):
            assert touch(mm, number) == Fill(pages(number, number + 1), FileId(1), number * PMD_SIZE, there)
        assert installed(mm) == [(3, DIRTY)]

    def test_stores_reach_the_file_before_an_unmapping(self) -> None:
        mm = full()
        mm.mmap(pages(0, 10), 10 * PMD_SIZE, fixed=True, replace=True, source=SHARED)
        mm.filled(pages(2, 4))
        touch(mm, 3, Access.WRITE, protected=True)
        assert done(mm, mm.munmap(pages(3, 10))) == [
            Protect(pages(3, 4)),
            WriteBack(pages(3, 4), FileId(1), 3 * PMD_SIZE),
            Punch(pages(3, 10)),
            Arm(pages(3, 10), MISSING),
        ]
        assert installed(mm) == [(2, CLEAN)]

    @pytest.mark.parametrize(("source", "armed"), [(SHARED, MISSING | WP), (PRIVATE, MISSING)])
    def test_memory_in_its_gib_is_paged_too(self, source: FileSource, armed: Arming) -> None:
        mm = full()
        effects = done(mm, mm.mmap(pages(5, 7), 2 * PMD_SIZE, fixed=True, replace=True, source=source)[1])
        assert effects[-1] == Punch(pages(5, 7))
        found = [(ar, MISSING) for ar in (pages(0, 5), pages(7, GIB))]
        expected = [(gib(0, 1), MISSING)] if armed == MISSING else [found[0], (pages(5, 7), armed), found[1]]
        assert list(mm.armings()) == expected
        assert effects[:-1] == [Arm(ar, arming) for ar, arming in expected]

    def test_pages_of_a_private_file_are_never_dirty(self) -> None:
        mm = new()
        show(mm, 0, 4, PRIVATE)
        mm.filled(pages(0, 2))
        mm.stored_to(pages(0, 1))
        check_mm(mm)
        assert installed(mm) == [(0, STORABLE), (1, STORABLE)]
        assert mm.write_back(REGION) == []


class TestReserve:
    """Whoever maps says first that there is memory; if there is none, nothing has changed."""

    def test_it_is_asked_for_the_place_that_was_found(self) -> None:
        mm, asked = mm_with((0, 3, PROT_RW)), list[AddrRange]()
        mm.mmap(None, 4 * PMD_SIZE, align=PMD_SIZE, reserve=asked.append)
        mm.mmap(pages(1, 2), PMD_SIZE, fixed=True, replace=True, reserve=asked.append)
        assert asked == [pages(3, 7), pages(1, 2)]

    def test_without_memory_nothing_changes(self) -> None:
        def refuse(_ar: AddrRange) -> None:
            raise NoMemoryError("none")

        mm = mm_with((0, 3, PROT_RW))
        mm.sync([pages(0, 2)], huge=True)
        for ar, replace in ((pages(1, 5), True), (pages(5, 6), False), (None, False)):
            with pytest.raises(NoMemoryError, match="none"):
                mm.mmap(ar, 4 * PMD_SIZE if ar is None else ar.size, replace=replace, reserve=refuse)
        check_mm(mm)
        assert [vma.ar for vma in mm.vmas] == [pages(0, 3)]
        assert installed(mm) == [(0, STORABLE), (1, STORABLE)]

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            (lambda mm, ask: mm.mmap(pages(0, 1), PMD_SIZE, fixed=True, reserve=ask), ExistsError),
            (lambda mm, ask: mm.mmap(pages(0, 1), PMD_SIZE, Prot.EXEC, replace=True, reserve=ask), AccessDeniedError),
            (lambda mm, ask: mm.mmap(None, REGION.size, reserve=ask), NoMemoryError),
            (lambda mm, ask: mm.mmap(None, PAGE_SIZE, reserve=ask), InvalidArgumentError),
        ],
        ids=["taken", "PROT_EXEC", "no gap", "small"],
    )
    def test_it_is_not_asked_for_what_is_refused_anyway(
        self, call: Callable[[HostMm, Callable[[AddrRange], None]], object], error: type[Exception]
    ) -> None:
        mm, asked = mm_with((0, 3, PROT_RW)), list[AddrRange]()
        with pytest.raises(error):
            call(mm, asked.append)
        assert asked == []


def test_its_checker_sees_small_pages() -> None:
    mm = full()
    mm.table.set_range(AddrRange.sized(BASE, PAGE_SIZE), mm.frame_at(REGION.start), STORABLE)
    with pytest.raises(Exception, match="small, in a region of 2 MiB pages"):
        check_mm(mm)
