"""The set of VMAs: found by address, merged on insert, split on remove."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.errors import InternalError
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import Vma
from msharefs.vma_set import VmaSet


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def at(page: int) -> Address:
    return Address(page * PAGE_SIZE)


def rw(first: int, end: int) -> Vma:
    return Vma(pages(first, end), PROT_RW)


def ro(first: int, end: int) -> Vma:
    return Vma(pages(first, end), Prot.READ)


def set_of(*vmas: Vma) -> VmaSet:
    found = VmaSet()
    for vma in vmas:
        found.insert(vma)
    return found


def test_find_gives_the_vma_around_an_address_or_none_in_a_hole() -> None:
    vmas = set_of(rw(2, 4), ro(6, 8))
    assert vmas.find(at(2)) == vmas.find(Address(at(4) - 1)) == rw(2, 4)
    assert vmas.find(at(6)) == ro(6, 8)
    assert [vmas.find(at(page)) for page in (0, 1, 4, 5, 8, 99)] == [None] * 6


def test_nothing_is_found_in_an_empty_set() -> None:
    vmas = VmaSet()
    assert vmas.find(at(0)) is None
    assert vmas.overlapping(pages(0, 9)) == []
    assert vmas.holes(pages(0, 9)) == [pages(0, 9)]
    assert len(vmas) == 0


def test_overlapping_gives_whole_vmas_in_order_and_leaves_those_that_only_touch() -> None:
    vmas = set_of(rw(6, 8), ro(2, 4), rw(0, 2), rw(9, 10))
    assert vmas.overlapping(pages(3, 7)) == [ro(2, 4), rw(6, 8)]
    assert vmas.overlapping(pages(4, 6)) == []
    assert vmas.overlapping(pages(2, 4)) == [ro(2, 4)]


def test_holes_are_what_no_vma_covers() -> None:
    vmas = set_of(rw(2, 4), ro(4, 5), rw(7, 8))
    assert vmas.holes(pages(0, 10)) == [pages(0, 2), pages(5, 7), pages(8, 10)]
    assert vmas.holes(pages(3, 6)) == [pages(5, 6)]
    assert vmas.holes(pages(2, 5)) == []


def test_find_gap_takes_the_lowest_that_fits() -> None:
    vmas = set_of(rw(1, 2), rw(4, 5), rw(8, 9))
    within = pages(0, 12)
    assert vmas.find_gap(within, PAGE_SIZE, PAGE_SIZE) == pages(0, 1)
    assert vmas.find_gap(within, 2 * PAGE_SIZE, PAGE_SIZE) == pages(2, 4)
    assert vmas.find_gap(within, 3 * PAGE_SIZE, PAGE_SIZE) == pages(5, 8)
    assert vmas.find_gap(within, 4 * PAGE_SIZE, PAGE_SIZE) is None


def test_find_gap_keeps_to_the_alignment_and_to_the_range() -> None:
    vmas = set_of(rw(1, 2), rw(4, 5))
    assert vmas.find_gap(pages(0, 12), 2 * PAGE_SIZE, 4 * PAGE_SIZE) == pages(8, 10)
    assert vmas.find_gap(pages(0, 9), 2 * PAGE_SIZE, 4 * PAGE_SIZE) is None
    assert vmas.find_gap(pages(2, 4), 2 * PAGE_SIZE, PAGE_SIZE) == pages(2, 4)


def test_insert_merges_with_both_neighbours() -> None:
    assert list(set_of(rw(0, 2), rw(4, 6), rw(2, 4))) == [rw(0, 6)]


def test_insert_merges_with_one_neighbour_only_where_the_other_differs() -> None:
    assert list(set_of(ro(0, 2), rw(4, 6), rw(2, 4))) == [ro(0, 2), rw(2, 6)]
    assert list(set_of(rw(0, 2), ro(4, 6), rw(2, 4))) == [rw(0, 4), ro(4, 6)]


def test_insert_leaves_neighbours_across_a_hole_alone() -> None:
    vmas = set_of(rw(0, 2), rw(3, 4))
    assert list(vmas) == [rw(0, 2), rw(3, 4)]
    assert len(vmas) == 2


def test_insert_over_another_is_a_bug_and_changes_nothing() -> None:
    vmas = set_of(rw(2, 4))
    with pytest.raises(InternalError, match="inserted over"):
        vmas.insert(ro(3, 5))
    assert list(vmas) == [rw(2, 4)]


def test_remove_splits_what_sticks_out_on_both_sides() -> None:
    vmas = set_of(rw(0, 10))
    assert vmas.remove(pages(3, 5)) == [rw(3, 5)]
    assert list(vmas) == [rw(0, 3), rw(5, 10)]


def test_remove_over_several_gives_the_pieces_in_order() -> None:
    vmas = set_of(rw(0, 3), ro(3, 5), rw(7, 9))
    assert vmas.remove(pages(2, 8)) == [rw(2, 3), ro(3, 5), rw(7, 8)]
    assert list(vmas) == [rw(0, 2), rw(8, 9)]


def test_remove_in_a_hole_takes_nothing() -> None:
    vmas = set_of(rw(0, 2))
    assert vmas.remove(pages(2, 9)) == []
    assert list(vmas) == [rw(0, 2)]


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 19), st.integers(1, 8), st.sampled_from([Prot.NONE, Prot.READ, PROT_RW])
        ),
        max_size=20,
    )
)
def test_any_sequence_agrees_with_a_list_of_pages(steps: list[tuple[bool, int, int, Prot]]) -> None:
    """Insert after remove, or remove alone, against one protection a page; neighbours are always merged."""
    vmas, naive = VmaSet(), dict[int, Prot]()
    for inserts, first, count, prot in steps:
        taken = vmas.remove(pages(first, first + count))
        assert sum(vma.ar.size for vma in taken) == PAGE_SIZE * sum(p in naive for p in range(first, first + count))
        for page in range(first, first + count):
            naive.pop(page, None)
        if inserts:
            vmas.insert(Vma(pages(first, first + count), prot))
            naive.update(dict.fromkeys(range(first, first + count), prot))
    held = {page: vma.prot for page in range(30) if (vma := vmas.find(at(page))) is not None}
    assert held == naive
    assert not any(below.merges_with(above) for below, above in itertools.pairwise(vmas))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["map", "unmap", "place"]),
            st.integers(0, 30),
            st.integers(1, 6),
            st.sampled_from([1, 2, 4]),
        ),
        max_size=60,
    )
)
def test_the_lowest_gap_is_found_whatever_was_looked_for_before(steps: list[tuple[str, int, int, int]]) -> None:
    """A set that remembers where nothing fits finds what one finds that never looked."""
    vmas, within = VmaSet(), pages(0, 32)
    for step, first, size, align in steps:
        ar = pages(first, min(first + size, 32))
        if step == "unmap":
            vmas.remove(ar)
        elif step == "place":
            vmas.remove(ar)
            vmas.insert(Vma(ar, PROT_RW if align == 1 else Prot.READ))
        else:
            found = vmas.find_gap(within, size * PAGE_SIZE, align * PAGE_SIZE)
            assert found == set_of(*vmas).find_gap(within, size * PAGE_SIZE, align * PAGE_SIZE)
            if found is not None:
                vmas.insert(Vma(found, PROT_RW))
