"""How many pages a touch of a reference page brings (compare mm/readahead.c, and do_fault_around)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import attrs

from msharefs.addr import Address, AddrRange, round_down
from msharefs.perms import Advice

MOST: Final = 2 << 20
"""Bytes at most that come at once, and no piece crosses a border of as many: so whole ones can be huge pages."""
_GROWTH: Final = 4
_REMEMBERED: Final = 32


@attrs.define
class Streams:
    """Where pages are loaded, or stored to, in order: where the last piece of each such stream ended, and its size.

    A page that is touched on its own brings no other; who goes on where a piece ended brings ever more at once.
    """

    _ends: OrderedDict[Address, int] = attrs.Factory(OrderedDict)

    def piece(self, page: AddrRange, free: AddrRange, advice: Advice) -> AddrRange:
        """What a touch of ``page`` brings of ``free``, from it on. Preconditions: ``free`` covers ``page``."""
        before = self._ends.pop(page.start, None)
        size = page.size if before is None else min(before * _GROWTH, MOST)
        if advice is Advice.RANDOM:
            return page
        if advice is Advice.SEQUENTIAL:
            size = MOST
        border = round_down(page.start, MOST) + MOST
        end = max(page.end, Address(min(page.start + size, border, free.end)))
        self._ends[end] = size
        if len(self._ends) > _REMEMBERED:
            self._ends.popitem(last=False)
        return AddrRange(page.start, end)
