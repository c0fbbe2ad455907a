"""How much of a file a fault brings in (compare mm/readahead.c and do_fault_around)."""

from __future__ import annotations

from typing import Final

import attrs

from msharefs.addr import AddrRange
from msharefs.perms import Advice
from msharefs.vma import Vma

PIECE: Final = 128 << 10
"""Bytes that are read at once around a page, as far as its mapping reaches."""
MOST: Final = 2 << 20
"""Bytes that are read at once when pages are touched in order, and as much again ahead."""


@attrs.define
class Readahead:
    """Whether pages of a region are touched in order: ``end`` is where the last read ended, ``size`` what it was."""

    end: int = 0
    size: int = 0

    def next(self, page: AddrRange, vma: Vma) -> tuple[AddrRange, AddrRange | None]:
        """What to read for a touch of ``page``, and what after that, unasked. Preconditions: ``vma`` covers ``page``.

        With RANDOM the page alone; with SEQUENTIAL as much as possible; else what lies around it, and ever more while
        pages are touched in order.
        """
        if vma.advice is Advice.RANDOM:
            return page, None
        in_order = vma.advice is Advice.SEQUENTIAL or page.start == self.end
        size = self._size(page.size, vma.advice, in_order=in_order)
        whole = AddrRange.sized(page.start, size) if in_order else AddrRange.page_at(page.start, size)
        piece = whole.intersect(vma.ar) or page
        ahead = AddrRange.sized(piece.end, size).intersect(vma.ar) if in_order else None
        # A fault that was on its way while its page came says nothing of the order.
        if not self.end - 2 * self.size <= page.start < self.end:
            self.end, self.size = (ahead or piece).end, size
        return piece, ahead

    def _size(self, page: int, advice: Advice, *, in_order: bool) -> int:
        if advice is Advice.SEQUENTIAL:
            return MOST
        return min(2 * self.size, MOST) if in_order else max(PIECE, page)
