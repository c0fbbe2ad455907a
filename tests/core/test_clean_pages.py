"""Reference pages in a host mm: what is clean, what a touch comes to, and what may be let go."""

from __future__ import annotations

import pytest

from msharefs import clean_pages, forking
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import Allow, Arm, Change, FillPattern, Punch, Signal, Stash, Unstash
from msharefs.errors import AccessDeniedError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_lineage, check_mm
from msharefs.perms import PROT_RW, Access, Advice, Prot
from msharefs.pte import PteFlag
from msharefs.refpage import RefPage
from msharefs.vma import Arming, FileId, FileSource, Source

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 4 * PMD_SIZE)
AA, BB = RefPage(b"\xaa"), RefPage(b"\xbb")
PAGED = Arming.MISSING | Arming.WP_CLEAN
READ, WRITE = Access.READ, Access.WRITE


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def mm_with(first: int = 0, end: int = 16, prot: Prot = PROT_RW) -> HostMm:
    mm = HostMm(REGION)
    put(mm, first, end, AA, prot)
    return mm


def put(mm: HostMm, first: int, end: int, source: Source | None, prot: Prot = PROT_RW) -> list[Change]:
    place = pages(first, end)
    effects = mm.mmap(place, place.size, prot, fixed=True, replace=True, source=source)[1]
    check_mm(mm)
    return effects


def touch(mm: HostMm, number: int, access: Access, *, protected: bool = False) -> AddrRange:
    """A touch, and all that it brings, as a daemon does it; what came, or may be stored to."""
    effect = mm.fault(Fault(pages(number, number + 1).start, access, protected)).effect
    if isinstance(effect, FillPattern):
        clean_pages.came(mm, effect.ar, clean=effect.clean)
    else:
        assert isinstance(effect, Allow)
    check_mm(mm)
    return effect.ar


def flags(mm: HostMm, number: int) -> PteFlag:
    pte = mm.table.walk(pages(number, number + 1).start)
    assert pte is not None
    return pte.flags


def test_a_mapping_is_armed_so_that_first_touches_and_stores_to_clean_pages_are_seen() -> None:
    assert put(HostMm(REGION), 0, 16, AA) == [Arm(pages(0, 16), PAGED)]
    assert put(HostMm(REGION), 0, 16, AA, Prot.READ) == [Arm(pages(0, 16), Arming.MISSING | Arming.WP)]
    assert put(HostMm(REGION), 0, 16, AA, Prot.NONE) == []


def test_mappings_of_equal_reference_pages_are_one() -> None:
    mm = mm_with(0, 4)
    put(mm, 4, 8, RefPage.of(b"\xaa" * 64))
    put(mm, 8, 12, BB)
    put(mm, 12, 16, None)
    assert [(vma.ar, vma.source) for vma in mm.vmas] == [
        (pages(0, 8), AA),
        (pages(8, 12), BB),
        (pages(12, 16), None),
    ]


def test_a_load_brings_a_clean_page() -> None:
    mm = mm_with()
    fault = Fault(pages(3, 4).start, READ)
    assert mm.fault(fault).effect == FillPattern(pages(3, 4), AA, clean=True)
    assert mm.table.resident == 0, "nothing is noted before it has come"
    touch(mm, 3, READ)
    assert clean_pages.clean(mm, REGION) == [pages(3, 4)]
    assert flags(mm, 3) == PteFlag.PRESENT | PteFlag.UFFD_WP | PteFlag.CLEAN


def test_a_store_brings_a_page_that_is_never_let_go() -> None:
    mm = mm_with()
    assert mm.fault(Fault(pages(3, 4).start, WRITE)).effect == FillPattern(pages(3, 4), AA, clean=False)
    touch(mm, 3, WRITE)
    assert clean_pages.clean(mm, REGION) == []
    assert clean_pages.drop(mm, REGION) == []
    assert flags(mm, 3) == PteFlag.PRESENT | PteFlag.WRITE


def test_a_store_to_a_clean_page_makes_it_written() -> None:
    mm = mm_with()
    touch(mm, 3, READ)
    assert touch(mm, 3, WRITE, protected=True) == pages(3, 4)
    assert clean_pages.clean(mm, REGION) == []


def test_clean_pages_are_let_go_and_written_ones_stay() -> None:
    mm = mm_with()
    for number, access in ((1, READ), (2, WRITE), (9, READ)):
        touch(mm, number, access)
    assert clean_pages.drop(mm, pages(0, 8)) == [Punch(pages(1, 2))]
    assert clean_pages.drop(mm, REGION) == [Punch(pages(9, 10))]
    assert mm.table.present(REGION) == [pages(2, 3)]
    check_mm(mm)


def test_a_page_that_was_let_go_comes_again() -> None:
    mm = mm_with()
    touch(mm, 1, READ)
    clean_pages.drop(mm, REGION)
    assert touch(mm, 1, WRITE, protected=True).covers(pages(1, 2)), "who waits for a page that is gone tries again"
    assert mm.table.resident == 0
    assert touch(mm, 1, READ) == pages(1, 2)


@pytest.mark.parametrize("access", Access)
def test_touches_in_order_bring_ever_more(access: Access) -> None:
    mm = mm_with(0, 1536)
    number, came = 0, []
    while number < 1536:
        came.append(touch(mm, number, access).size // PAGE_SIZE)
        number += came[-1]
    assert len(came) <= 8
    assert came[-2:] == [512, 512]
    clean = [pages(0, 1536)] if access is READ else []
    assert clean_pages.clean(mm, REGION) == clean


def test_stores_in_order_to_clean_pages_are_let_through_in_ever_larger_pieces() -> None:
    mm = mm_with(0, 512)
    mm.madvise_reading(pages(0, 512), Advice.SEQUENTIAL)
    touch(mm, 0, READ)
    mm.madvise_reading(pages(0, 512), Advice.NORMAL)
    number, allowed = 0, []
    while number < 512:
        allowed.append(touch(mm, number, WRITE, protected=True).size // PAGE_SIZE)
        number += allowed[-1]
    assert allowed[0] == 1
    assert len(allowed) <= 6


def test_stores_in_steps_bring_the_next_ones() -> None:
    """In all mappings of the same reference page that may be stored to, where nothing is; loads bring nothing."""
    mm = mm_with(0, 300)
    put(mm, 100, 140, BB)
    put(mm, 200, 205, AA, Prot.READ)
    for number in (0, 20):
        touch(mm, number, WRITE)
    for number, ahead in ((40, [60]), (80, []), (140, [160, 180, 220])):
        effect = mm.fault(Fault(pages(number, number + 1).start, WRITE)).effect
        assert isinstance(effect, FillPattern)
        assert effect.ahead == tuple(pages(n, n + 1) for n in ahead)
        for ar in (effect.ar, *effect.ahead):
            clean_pages.came(mm, ar, clean=False)
    loads = mm_with(0, 300)
    assert all(touch(loads, number, READ).size == PAGE_SIZE for number in range(0, 300, 30))


def test_what_comes_along_ends_before_what_is_there() -> None:
    mm = mm_with()
    touch(mm, 3, WRITE)
    mm.madvise_reading(pages(0, 16), Advice.SEQUENTIAL)
    assert touch(mm, 0, READ) == pages(0, 3)
    assert touch(mm, 4, READ) == pages(4, 16)


def test_written_pages_that_are_protected_still_are_let_through_at_once() -> None:
    """After a while as read-only memory each of them is protected in every process."""
    mm = mm_with()
    for number, access in ((1, WRITE), (2, WRITE), (4, READ), (5, WRITE)):
        touch(mm, number, access)
    mm.mprotect(pages(0, 16), Prot.READ)
    mm.mprotect(pages(0, 16), PROT_RW)
    assert touch(mm, 2, WRITE, protected=True) == pages(0, 4)
    assert touch(mm, 5, WRITE, protected=True) == pages(5, 16)
    assert clean_pages.clean(mm, REGION) == [pages(4, 5)]


def test_read_only_and_back_the_same_pages_are_clean() -> None:
    mm = mm_with()
    touch(mm, 1, READ)
    touch(mm, 2, WRITE)
    assert mm.mprotect(pages(0, 16), Prot.READ) == [Arm(pages(0, 16), Arming.MISSING | Arming.WP)]
    assert mm.fault(Fault(pages(2, 3).start, WRITE, protected=True)).signal is Signal.SIGSEGV
    assert mm.mprotect(pages(0, 16), PROT_RW) == [Arm(pages(0, 16), PAGED)]
    assert clean_pages.clean(mm, REGION) == [pages(1, 2)]
    assert flags(mm, 2) & PteFlag.WRITE
    check_mm(mm)


def test_what_nobody_may_touch_keeps_written_pages_only() -> None:
    mm = mm_with()
    touch(mm, 1, READ)
    touch(mm, 2, WRITE)
    effects = mm.mprotect(pages(0, 16), Prot.NONE)
    assert [effect for effect in effects if not isinstance(effect, Arm)] == [Punch(pages(1, 2)), Stash(pages(0, 16))]
    assert mm.table.resident == 0
    effects = mm.mprotect(pages(0, 16), PROT_RW)
    assert [effect for effect in effects if not isinstance(effect, Arm)] == [Unstash(pages(0, 16))]
    mm.sync([pages(2, 3)], huge=False)
    assert clean_pages.drop(mm, REGION) == [], "what came back from the stash was written once"


def test_removal_brings_the_pattern_back() -> None:
    mm = mm_with()
    touch(mm, 2, WRITE)
    assert mm.madvise_remove(pages(0, 16)) == [Punch(pages(0, 16))]
    assert mm.table.resident == 0
    mm.mprotect(pages(0, 16), Prot.READ)
    with pytest.raises(AccessDeniedError):
        mm.madvise_remove(pages(0, 16))


def test_bringing_the_tables_up_to_date_keeps_what_is_clean() -> None:
    mm = mm_with(0, 600)
    touch(mm, 1, READ)
    touch(mm, 2, WRITE)
    mm.sync([pages(1, 5), pages(512, 520)], huge=True)
    assert clean_pages.clean(mm, REGION) == [pages(1, 2)]
    check_mm(mm)


def test_what_was_restored_is_clean_once_it_was_looked_at() -> None:
    mm = mm_with(0, 16)
    mm.sync([pages(2, 8)], huge=False)
    mm.unsure = [pages(2, 8)]
    assert clean_pages.clean(mm, REGION) == []
    assert clean_pages.unsure(mm, pages(0, 6)) == [pages(2, 6)]
    assert clean_pages.look(mm, pages(0, 6)) == [(pages(2, 6), AA)]
    clean_pages.found_clean(mm, pages(3, 5))
    check_mm(mm)
    assert (clean_pages.unsure(mm, REGION), clean_pages.clean(mm, REGION)) == ([pages(6, 8)], [pages(3, 5)])
    assert clean_pages.look(mm, pages(0, 6)) == [(pages(2, 3), AA), (pages(5, 6), AA)]
    assert clean_pages.drop(mm, REGION) == [Punch(pages(3, 5))]
    assert touch(mm, 2, WRITE, protected=True).covers(pages(2, 3))


def test_what_has_relatives_is_not_looked_at() -> None:
    mm = mm_with(0, 16)
    mm.unsure = [pages(0, 4)]
    forking.shield(mm)
    assert clean_pages.unsure(mm, REGION) == []


def test_whole_huge_pages_are_leaves() -> None:
    mm = mm_with(0, 1024)
    clean_pages.came(mm, pages(512, 1024), clean=False, huge=True)
    assert mm.table.huge_pages == 1
    check_mm(mm)


def test_a_fork_shares_written_pages_and_has_clean_ones_from_the_reference_page() -> None:
    mm = mm_with()
    touch(mm, 1, READ)
    touch(mm, 2, WRITE)
    assert Arm(pages(0, 16), PAGED | Arming.WP) in forking.shield(mm)
    twin = forking.fork(mm)
    assert forking.to_preserve(mm, pages(1, 2)) == []
    assert [copy.ar for copy in forking.to_preserve(mm, REGION)] == [pages(2, 3)]
    assert touch(mm, 1, WRITE, protected=True) == pages(1, 2), "the others here may be a relative's"
    assert touch(twin, 1, READ) == pages(1, 2)
    assert clean_pages.clean(twin, REGION) == [pages(1, 2)]
    check_mm(twin)
    check_lineage(mm.lineage)


def test_replacing_a_mapping_frees_all_of_it() -> None:
    mm = mm_with()
    touch(mm, 1, READ)
    assert put(mm, 0, 16, BB) == [Punch(pages(0, 16))]
    assert clean_pages.clean(mm, REGION) == []
    assert mm.fault(Fault(pages(1, 2).start, READ)).effect == FillPattern(pages(1, 2), BB, clean=True)


def test_a_file_next_to_it_stays_a_file() -> None:
    mm = mm_with(0, 4)
    put(mm, 4, 8, FileSource(FileId(1), 0, shared=True, writable=True))
    mm.filled(pages(4, 8))
    touch(mm, 0, READ)
    assert clean_pages.clean(mm, REGION) == [pages(0, 1)]
    assert mm.files() == {FileId(1)}


def test_in_memory_of_huge_pages_a_page_is_a_huge_one() -> None:
    mm = HostMm(REGION, page=PMD_SIZE)
    put(mm, 0, 1024, AA)
    assert touch(mm, 3, READ) == pages(0, 512)
    assert touch(mm, 600, WRITE) == pages(512, 1024)
    assert clean_pages.drop(mm, REGION) == [Punch(pages(0, 512))]
    assert mm.table.huge_pages == 1
    check_mm(mm)


def test_counts_hold_for_more_pages_than_32_bits_number() -> None:
    """One reference page under 2^32 pages at a time, and under as many again and again."""
    span = AddrRange.sized(BASE, 1 << 44)
    mm = HostMm(span)
    corners = [AddrRange.sized(at, PAGE_SIZE) for at in (span.start, span.start + (1 << 43), span.end - PAGE_SIZE)]
    mapped = 0
    for _ in range(3):
        mm.mmap(span, span.size, fixed=True, source=AA)
        mapped += sum(vma.ar.size for vma in mm.vmas) // PAGE_SIZE
        for page in corners:
            assert mm.fault(Fault(page.start, READ)).effect == FillPattern(page, AA, clean=True)
            clean_pages.came(mm, page, clean=True)
        assert clean_pages.clean(mm, span) == corners
        assert mm.table.resident == 3 * PAGE_SIZE
        check_mm(mm)
        assert clean_pages.drop(mm, span) == [Punch(page) for page in corners]
        mm.munmap(span)
        assert sum(mm.table.tables) == 1
        check_mm(mm)
    assert mapped == 3 << 32


def test_faults_are_counted_beyond_32_bits() -> None:
    mm = mm_with(0, 4)
    put(mm, 8, 12, AA)
    for vma in mm.vmas:
        vma.count.served = 1 << 32
    put(mm, 4, 8, AA)
    (vma,) = mm.vmas
    assert vma.count.served == 2 << 32
