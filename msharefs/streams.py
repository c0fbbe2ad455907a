"""How many pages a touch of a reference page brings (compare mm/readahead.c, and do_fault_around)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import attrs

from msharefs.addr import Address, AddrRange, round_down
from msharefs.perms import Advice

MOST: Final = 2 << 20
"""Bytes that come at once at most, and then up to a border of as many: so whole ones can be huge pages."""
_WHILE_SHORT: Final = MOST // 2
"""Bytes at most while a stream has not had ``MOST`` yet: few of them are for nothing if it ends."""
_GROWTH: Final = 3
"""How much more comes than has come so far."""
_REMEMBERED: Final = 128
_MOST_STEPS: Final = 64


@attrs.define
class Streams:
    """Where pages are loaded, or stored to, in order: where each such stream ended, and how much it has had so far.

    A page that is touched on its own brings no other; who goes on where a piece ended brings ever more at once.
    """

    _ends: OrderedDict[Address, int] = attrs.Factory(OrderedDict)
    _last: int = 0
    _step: int = 0
    _ahead: int = 0

    def steps(self, page: AddrRange) -> list[AddrRange]:
        """What a touch of ``page`` on its own brings elsewhere: where it would go on in steps of one size.

        From the second step of that size on, and each time twice as many: no more are for nothing than were touched.
        """
        if page.start in self._ends:
            return []
        step = page.start - self._last
        self._ahead = min(2 * self._ahead or 1, _MOST_STEPS) if step == self._step else 0
        self._step, self._last = step, page.start + step * self._ahead
        starts = (page.start + step * number for number in range(1, self._ahead + 1))
        return [AddrRange.sized(start, page.size) for start in starts if start >= 0]

    def came(self, page: AddrRange) -> None:
        """A page came before it was touched: who goes on behind it goes on in order."""
        self._ends[page.end] = page.size

    def piece(self, page: AddrRange, free: AddrRange, advice: Advice) -> AddrRange:
        """What a touch of ``page`` brings of ``free``, from it on. Preconditions: ``free`` covers ``page``."""
        before = self._ends.pop(page.start, 0)
        if advice is Advice.RANDOM:
            return page
        end = Address(min(page.start + _size(before, advice), free.end))
        if advice is Advice.SEQUENTIAL or before >= MOST:
            end = min(end, Address(round_down(page.start, MOST) + MOST))
        end = max(end, page.end)
        self._ends[end] = before + end - page.start
        while len(self._ends) > _REMEMBERED:
            self._ends.popitem(last=False)
        return AddrRange(page.start, end)


def _size(before: int, advice: Advice) -> int:
    """How much comes after so much: with a stream that starts, nothing but the page."""
    if advice is Advice.SEQUENTIAL or before >= MOST:
        return MOST
    return min(_GROWTH * before, _WHILE_SHORT)
