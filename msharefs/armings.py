"""Arithmetic on ranges and how they are armed."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from msharefs.addr import Address, AddrRange
from msharefs.vma import Arming

Armed = list[tuple[AddrRange, Arming]]
"""Ranges in order, each armed in one way."""


def united(ranges: Iterable[AddrRange]) -> list[AddrRange]:
    """The same addresses in ranges that neither overlap nor touch. Preconditions: ``ranges`` are in order."""
    found: list[AddrRange] = []
    for ar in ranges:
        if found and ar.start <= found[-1].end:
            last = found.pop()
            found.append(AddrRange(last.start, max(last.end, ar.end)))
        else:
            found.append(ar)
    return found


def cut(ar: AddrRange, borders: list[Address]) -> Iterator[AddrRange]:
    """``ar`` cut at each of ``borders``, which are in order."""
    inner = borders[bisect_right(borders, ar.start) : bisect_left(borders, ar.end)]
    return (AddrRange(start, end) for start, end in itertools.pairwise([ar.start, *inner, ar.end]))


def page_within(parts: list[tuple[AddrRange, Arming]], paged: list[AddrRange]) -> Iterator[tuple[AddrRange, Arming]]:
    """``parts`` cut at the borders of ``paged``, within which MISSING is added. Preconditions: both are in order."""
    borders = [border for ar in paged for border in (ar.start, ar.end)]
    for part, arming in parts:
        for piece in cut(part, borders):
            inside = bisect_right(borders, piece.start) % 2
            yield piece, arming | Arming.MISSING if inside else arming


def changes(before: Armed, after: Armed, borders: list[Address]) -> Iterator[tuple[AddrRange, Arming, Arming]]:
    """Pieces armed in one way before and in one way after, cut at ``borders`` too. Both lists cover the same range."""
    was, now = iter(before), iter(after)
    old_ar, old = next(was)
    new_ar, new = next(now)
    while True:
        common = old_ar.intersect(new_ar)
        assert common is not None
        yield from ((piece, old, new) for piece in cut(common, borders))
        if common.end == before[-1][0].end:
            return
        if old_ar.end == common.end:
            old_ar, old = next(was)
        if new_ar.end == common.end:
            new_ar, new = next(now)
