"""The checker finds every way in which a host mm can be wrong: each is made once, and must be reported."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import attrs
import pytest

from msharefs import forking
from msharefs.addr import PAGE_SIZE, PGDIR_SIZE, PMD_SIZE, Address, AddrRange, FrameNo
from msharefs.effects import Copy
from msharefs.errors import InternalError
from msharefs.frames import StoreNo, frame_in
from msharefs.host_mm import HostMm
from msharefs.invariants import check_lineage, check_mm
from msharefs.lineage import Lineage
from msharefs.perms import PROT_RW, Prot
from msharefs.pte import Pte, PteFlag
from msharefs.tables import Directory, Leaf
from msharefs.vma import Arming, FileId, FileSource, Vma

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 4 * PMD_SIZE)
READONLY = PteFlag.PRESENT | PteFlag.UFFD_WP
WRITABLE = PteFlag.PRESENT | PteFlag.WRITE


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def good_mm() -> HostMm:
    """A little of everything: 2 MiB leaves, small pages, three protections, a shared file, a private one, a hole."""
    mm = HostMm(REGION)
    for first, end, prot in ((0, 1024, PROT_RW), (1024, 1100, Prot.READ), (1100, 1200, Prot.NONE)):
        mm.mmap(pages(first, end), (end - first) * PAGE_SIZE, prot, fixed=True)
    for number, shared in ((1, True), (2, False)):
        source = FileSource(FileId(number), 0, shared, writable=True)
        mm.mmap(pages(1300 + 100 * number, 1350 + 100 * number), 50 * PAGE_SIZE, fixed=True, source=source)
    mm.sync([pages(0, 512), pages(600, 1050), pages(1400, 1410), pages(1500, 1510)], huge=True)
    mm.stored_to(pages(1402, 1403))
    return mm


def put_vma(mm: HostMm, vma: Vma) -> None:
    """Enter a VMA as it is, past every check."""
    starts = mm.vmas._starts
    at = bisect_left(starts, vma.ar.start)
    mm.vmas._replace(slice(at, at + (starts[at : at + 1] == [vma.ar.start])), [vma])


def vma_within_a_page(mm: HostMm) -> None:
    put_vma(mm, Vma(AddrRange.sized(BASE + 1300 * PAGE_SIZE, 100)))


def vma_outside(mm: HostMm) -> None:
    put_vma(mm, Vma(pages(2048, 2049)))


def vmas_over_each_other(mm: HostMm) -> None:
    put_vma(mm, Vma(pages(1199, 1300)))


def vmas_not_merged(mm: HostMm) -> None:
    put_vma(mm, Vma(pages(1200, 1300), Prot.NONE))


def vma_filed_elsewhere(mm: HostMm) -> None:
    mm.vmas._starts[1] = Address(mm.vmas._starts[1] - PAGE_SIZE)


def tables_miscounted(mm: HostMm) -> None:
    mm.table.tables[1] += 1


def pages_miscounted(mm: HostMm) -> None:
    mm.table.pages -= 1


def leaves_miscounted(mm: HostMm) -> None:
    mm.table.huge_pages += 1


def leaf_table_of(mm: HostMm) -> Leaf:
    return mm.table._leaf(pages(600, 601).start)


def entries_miscounted(mm: HostMm) -> None:
    leaf_table_of(mm).used += 1


def entry_cleared_behind_the_counts(mm: HostMm) -> None:
    leaf_table_of(mm).words[600 - 512] = 0


def empty_leaf_table(mm: HostMm) -> None:
    mm.table._leaf(pages(1600, 1601).start)


def empty_directory(mm: HostMm) -> None:
    mm.table.top.entries[511] = Directory(2)
    mm.table.tables[2] += 1


def page_in_a_hole(mm: HostMm) -> None:
    mm.table.set(pages(1300, 1301).start, Pte(FrameNo(1300), READONLY))


def page_below_the_region(mm: HostMm) -> None:
    mm.table.set(Address(BASE - PAGE_SIZE), Pte(FrameNo(0), READONLY))


def page_far_above_the_region(mm: HostMm) -> None:
    mm.table.set(Address(BASE + PGDIR_SIZE), Pte(FrameNo(0), READONLY))


def page_with_a_foreign_frame(mm: HostMm) -> None:
    mm.table.set(pages(700, 701).start, Pte(FrameNo(701), WRITABLE))


def page_that_nobody_may_touch(mm: HostMm) -> None:
    mm.table.set(pages(1150, 1151).start, Pte(FrameNo(1150), READONLY))


def writable_page_in_a_read_only_mapping(mm: HostMm) -> None:
    mm.table.set(pages(1030, 1031).start, Pte(FrameNo(1030), WRITABLE))


def vmas_of_a_file_not_merged(mm: HostMm) -> None:
    put_vma(mm, Vma(pages(1450, 1460), source=FileSource(FileId(1), 50 * PAGE_SIZE, shared=True, writable=True)))


def page_of_a_shared_file_that_stores_reach_unseen(mm: HostMm) -> None:
    mm.table.set(pages(1401, 1402).start, Pte(FrameNo(1401), WRITABLE))


def dirty_page_that_is_protected(mm: HostMm) -> None:
    mm.table.set(pages(1401, 1402).start, Pte(FrameNo(1401), READONLY | PteFlag.DIRTY))


def dirty_page_of_a_private_file(mm: HostMm) -> None:
    mm.table.set(pages(1501, 1502).start, Pte(FrameNo(1501), WRITABLE | PteFlag.DIRTY))


def dirty_page_of_no_file(mm: HostMm) -> None:
    mm.table.set(pages(700, 701).start, Pte(FrameNo(700), WRITABLE | PteFlag.DIRTY))


VIOLATIONS: dict[Callable[[HostMm], None], str] = {
    vma_within_a_page: "is not made of pages of",
    vma_outside: "is not made of pages of",
    vmas_over_each_other: "overlap",
    vmas_not_merged: "are not merged",
    vma_filed_elsewhere: "is not found where it is",
    tables_miscounted: "page tables count",
    pages_miscounted: "page tables count",
    leaves_miscounted: "page tables count",
    entries_miscounted: "leaf table counts",
    entry_cleared_behind_the_counts: "leaf table counts",
    empty_leaf_table: "empty table on level 0",
    empty_directory: "empty table on level 2",
    page_in_a_hole: "lie in a hole",
    page_below_the_region: "outside",
    page_far_above_the_region: "outside",
    page_with_a_foreign_frame: "has frame 701",
    page_that_nobody_may_touch: "which nobody may touch",
    writable_page_in_a_read_only_mapping: "writable in the read-only",
    vmas_of_a_file_not_merged: "are not merged",
    page_of_a_shared_file_that_stores_reach_unseen: "dirty or writable, and not both",
    dirty_page_that_is_protected: "dirty or writable, and not both",
    dirty_page_of_a_private_file: "which reaches no file",
    dirty_page_of_no_file: "which reaches no file",
}


def test_a_good_mm_passes() -> None:
    mm = good_mm()
    check_mm(mm)
    assert (mm.table.huge_pages, mm.table.pages) == (1, 470)


def test_an_empty_mm_passes() -> None:
    check_mm(HostMm(REGION))


@pytest.mark.parametrize(("violate", "text"), VIOLATIONS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_each_violation_is_reported(violate: Callable[[HostMm], None], text: str) -> None:
    mm = good_mm()
    violate(mm)
    with pytest.raises(InternalError, match=text):
        check_mm(mm)


def test_a_leaf_with_a_frame_between_borders_is_reported() -> None:
    """Such a region begins between borders: the frame is the right one for its address, and yet can be no leaf's."""
    mm = HostMm(REGION.moved(PAGE_SIZE))
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    mm.table._pmd(Address(BASE + PMD_SIZE)).entries[1] = Pte(FrameNo(511), WRITABLE | PteFlag.HUGE).pack()
    mm.table.huge_pages += 1
    with pytest.raises(InternalError, match="at no border"):
        check_mm(mm)


def good_family() -> HostMm:
    """An origin and two twins: pages that all three share, pages copied, pages brought, 2 MiB leaves, a shared file."""
    mm = good_mm()
    mm.write_back(mm.ar)
    for _ in range(2):
        for member in mm.lineage.members.values():
            forking.shield(member)
        forking.fork(mm)
    for page, source, target in ((601, 0, 1), (1030, 0, 2), (3, 0, 1)):
        asking = mm.lineage.members[StoreNo(0 if page != 1030 else 2)]
        forking.copied(asking, Copy(pages(page, page + 1), StoreNo(source), StoreNo(target)))
    return mm


def twin_of(mm: HostMm) -> HostMm:
    return mm.lineage.members[StoreNo(1)]


def reference_uncounted(mm: HostMm) -> None:
    next(twin_of(mm).table.leaves()).refs += 1


def member_under_a_wrong_number(mm: HostMm) -> None:
    twin_of(mm).store = StoreNo(7)


def member_of_another_lineage(mm: HostMm) -> None:
    twin_of(mm).lineage = Lineage()


def reference_to_a_store_that_is_not_among_the_borrowed(mm: HostMm) -> None:
    twin_of(mm).borrowed.remove(mm.store)


def origin_not_shielded(mm: HostMm) -> None:
    mm.rule = attrs.evolve(mm.rule, forked=Arming.NATIVE)


def page_that_a_twin_refers_to_is_gone(mm: HostMm) -> None:
    mm.table.clear_range(pages(610, 611))


def page_that_a_twin_refers_to_is_writable(mm: HostMm) -> None:
    mm.enter(pages(610, 611), WRITABLE)


def page_of_the_origin_is_writable_in_a_twin(mm: HostMm) -> None:
    twin_of(mm).table.set(pages(610, 611).start, Pte(FrameNo(610), WRITABLE))


def leaf_of_the_origin_is_writable_in_a_twin(mm: HostMm) -> None:
    third = mm.lineage.members[StoreNo(2)]
    third.table.set(pages(0, 512).start, Pte(FrameNo(0), WRITABLE | PteFlag.HUGE))


def page_of_one_who_is_gone_is_writable(mm: HostMm) -> None:
    mm.lineage.leave(mm)
    page_of_the_origin_is_writable_in_a_twin(mm.lineage.members[StoreNo(1)])


BETWEEN_MEMBERS: dict[Callable[[HostMm], None], str] = {
    reference_uncounted: "references and hangs in",
    member_under_a_wrong_number: "is that of store 7",
    member_of_another_lineage: "is that of store 1",
    reference_to_a_store_that_is_not_among_the_borrowed: "of store 0, and does not know it",
    origin_not_shielded: "which is not shielded",
    page_that_a_twin_refers_to_is_gone: "of store 0, which is gone",
    page_that_a_twin_refers_to_is_writable: "are writable in store 0",
    page_of_the_origin_is_writable_in_a_twin: "are writable in store 1",
    leaf_of_the_origin_is_writable_in_a_twin: "are writable in store 2",
    page_of_one_who_is_gone_is_writable: "are writable in store 1",
}


def test_a_good_family_passes() -> None:
    mm = good_family()
    check_lineage(mm.lineage)
    for member in mm.lineage.members.values():
        check_mm(member)
    assert [each.table.shared_tables() for each in mm.lineage.members.values()] == [0, 1, 1]


@pytest.mark.parametrize(
    ("violate", "text"), BETWEEN_MEMBERS.items(), ids=lambda violate: getattr(violate, "__name__", "")
)
def test_each_violation_between_members_is_reported(violate: Callable[[HostMm], None], text: str) -> None:
    mm = good_family()
    violate(mm)
    with pytest.raises(InternalError, match=text):
        check_lineage(mm.lineage)


@pytest.mark.parametrize("wrong", [lambda found: found[1:], lambda found: [attrs.evolve(found[0], target=StoreNo(2))]])
def test_looking_for_who_refers_to_a_page_that_finds_others_is_reported(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[list[Copy]], list[Copy]]
) -> None:
    mm = good_family()
    found = {member.store: list(mm.lineage.claims(member, member.ar)) for member in mm.lineage.members.values()}
    monkeypatch.setattr(mm.lineage, "claims", lambda member, _: wrong(found[member.store]))
    with pytest.raises(InternalError, match="pages of store 0 are referred to, and"):
        check_lineage(mm.lineage)


def test_a_page_of_another_store_without_first_touches_reported_is_reported() -> None:
    mm = good_mm()
    mm.table.set(pages(700, 701).start, Pte(frame_in(StoreNo(3), 700), READONLY))
    with pytest.raises(InternalError, match="lie in store 3, and first touches are not reported"):
        check_mm(mm)


def test_a_page_of_a_shared_file_in_another_store_is_reported() -> None:
    twin = twin_of(good_family())
    twin.table.set(pages(1401, 1402).start, Pte(FrameNo(1401), READONLY))
    with pytest.raises(InternalError, match="of a shared file lie in store 0"):
        check_mm(twin)
