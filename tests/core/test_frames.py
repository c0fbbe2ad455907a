"""Frames: a store and a page of it in one number, which a page table's word has room for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from msharefs.addr import PAGE_SIZE, USER_MAX, FrameNo
from msharefs.frames import MAX_STORES, StoreNo, frame_in, index_of, store_of
from msharefs.pte import FRAMES_IN_PMD, Pte, PteFlag

LAST = USER_MAX // PAGE_SIZE - 1
STORES = st.sampled_from([0, 1, MAX_STORES - 1]) | st.integers(0, MAX_STORES - 1)
INDEXES = st.sampled_from([0, 1, LAST]) | st.integers(0, LAST)


@given(STORES, INDEXES)
def test_a_frame_tells_store_and_page(store: int, index: int) -> None:
    frame = frame_in(StoreNo(store), index)
    assert (store_of(frame), index_of(frame)) == (store, index)


@given(STORES, INDEXES)
def test_every_frame_fits_into_a_word_with_its_flags(store: int, index: int) -> None:
    pte = Pte(frame_in(StoreNo(store), index), PteFlag.PRESENT | PteFlag.WRITE | PteFlag.UFFD_WP)
    assert pte.pack() < 1 << 64
    assert Pte.unpack(pte.pack()) == pte


@given(STORES, st.integers(0, LAST - 1))
def test_the_next_frame_is_the_next_page_of_the_same_store(store: int, index: int) -> None:
    assert frame_in(StoreNo(store), index) + 1 == frame_in(StoreNo(store), index + 1)


@given(STORES, st.integers(0, LAST // FRAMES_IN_PMD))
def test_frames_at_borders_of_2_mib_are_so_in_every_store(store: int, number: int) -> None:
    assert frame_in(StoreNo(store), number * FRAMES_IN_PMD) % FRAMES_IN_PMD == 0


def test_frames_of_the_first_store_are_its_pages() -> None:
    assert frame_in(StoreNo(0), 17) == FrameNo(17)
