"""Frames: where the contents of pages lie.

Each region has a store, its backing file. A frame is a page of a store, and always the page at the same distance from
the start as the address it is installed at: what changes hands when regions are forked is whose store it is.
"""

from __future__ import annotations

from typing import Final, NewType

from msharefs.addr import FrameNo

StoreNo = NewType("StoreNo", int)
"""Number of a region's store among those of its relatives; the first one's is 0."""

_INDEX_BITS: Final = 36
"""Enough for all of a process's addresses; what is left of a word beside the flags numbers the stores."""
MAX_STORES: Final = 1 << (64 - 12 - _INDEX_BITS)


def frame_in(store: StoreNo, index: int) -> FrameNo:
    """The frame that is page ``index`` of a store."""
    return FrameNo(store << _INDEX_BITS | index)


def store_of(frame: FrameNo) -> StoreNo:
    """Whose store a frame lies in."""
    return StoreNo(frame >> _INDEX_BITS)


def index_of(frame: FrameNo) -> int:
    """Which page of its store a frame is."""
    return frame & (1 << _INDEX_BITS) - 1
