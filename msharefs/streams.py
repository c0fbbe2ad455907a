"""How many pages a touch of a reference page brings (compare mm/readahead.c, and do_fault_around)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import attrs

from msharefs.addr import PAGE_SIZE, Address, AddrRange, round_down
from msharefs.perms import Advice

MOST: Final = 2 << 20
"""Bytes that come at once at most, and then up to a border of as many: so whole ones can be huge pages."""
_WHILE_SHORT: Final = MOST // 2
"""Bytes at most while a stream has not had ``MOST`` yet: few of them are for nothing if it ends."""
_GROWTH: Final = 3
"""How much more comes than has come so far."""
_TRUST: Final = 8
"""One in so many streams has to go on to show that what is expected is used, even if all of it could come at once."""
_REMEMBERED: Final = 128
_MOST_STEPS: Final = 64


@attrs.define(eq=False)
class _Stream:
    """What somebody touches in order: how much has come, how much is expected, and whether more than a first piece.

    ``trusted`` is how many more streams may have all that is expected at once, without going on to show it.
    ``untouched``: its page came ahead, and nobody has started there yet.
    """

    had: int = 0
    expected: int = 0
    went_on: bool = False
    trusted: int = 0
    untouched: bool = False

    @property
    def shown(self) -> int:
        """How much the next one may be expected to take: of a first piece nobody knows how much was touched."""
        return self.had if self.went_on or self.had >= self.expected >= MOST else 0

    def size(self) -> int:
        """How much comes next: at first nothing but the page, or the greater part of what is expected.

        Where that is a huge page or more, all of it: the rest would be 4 KiB at a time.
        """
        if self.expected and not self.went_on:
            whole = self.trusted and self.expected >= MOST
            return MOST if whole else min(round_down(self.expected * 3 // 4, PAGE_SIZE), MOST)
        if self.had < self.expected:
            return min(self.expected - self.had, MOST)
        return MOST if self.had >= MOST else min(_GROWTH * self.had, _WHILE_SHORT)

    def goes_on(self) -> None:
        """Somebody has come to the end of what there was."""
        self.went_on, self.trusted = True, _TRUST


@attrs.define
class Streams:
    """Where pages are loaded, or stored to, in order: where each such stream ended, and how much it has had so far.

    A page that is touched on its own brings no other; who goes on where a piece ended brings ever more at once. When
    two in a row have come to something, the third is expected to come to as much as the lesser of them: one mapping
    after the other is filled like that. If it does not go on where it should, the next two start from one page again.
    """

    _ends: OrderedDict[Address, _Stream] = attrs.Factory(OrderedDict)
    _newest: tuple[_Stream, _Stream] = attrs.Factory(lambda: (_Stream(), _Stream()))
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
        self._ends[page.end] = _Stream(page.size, untouched=True)

    def piece(self, page: AddrRange, free: AddrRange, advice: Advice) -> AddrRange:
        """What a touch of ``page`` brings of ``free``, from it on. Preconditions: ``free`` covers ``page``."""
        stream = self._ends.pop(page.start, None)
        if advice is Advice.RANDOM:
            return page
        if stream is None or stream.untouched:
            stream = self._started(0 if stream is None else stream.had)
        else:
            stream.goes_on()
        size = MOST if advice is Advice.SEQUENTIAL else stream.size()
        end = Address(min(page.start + size, free.end))
        if size == MOST:
            end = min(end, Address(round_down(page.start, MOST) + MOST))
        end = max(end, page.end)
        stream.had += end - page.start
        self._ends[end] = stream
        while len(self._ends) > _REMEMBERED:
            self._ends.popitem(last=False)
        return AddrRange(page.start, end)

    def _started(self, had: int) -> _Stream:
        """A stream that starts, behind so much that has come ahead."""
        before, last = self._newest
        trusted = max(0, min(before.trusted, last.trusted) - 1)
        stream = _Stream(had, min(before.shown, last.shown), trusted=trusted)
        self._newest = last, stream
        return stream
