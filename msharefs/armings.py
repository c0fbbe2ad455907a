"""How a host mm is armed: which faults of which ranges the kernel reports."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import attrs

from msharefs.addr import Address, AddrRange, round_down, round_up, united
from msharefs.effects import Arm, Change
from msharefs.vma import Arming, Vma
from msharefs.vma_set import VmaSet

Armed = list[tuple[AddrRange, Arming]]
"""Ranges in order, each armed in one way."""
Part = tuple[Address, Address, Arming]
"""From where to where, and how armed: many are compared for each range that is made in the end."""


@attrs.frozen
class ArmingRule:
    """From what is mapped in ``bounds`` to what is armed; ``granule`` and ``paging_all`` as in ``HostMm``.

    ``forked`` is what has to be seen because of forks, of all memory that does not lie in a shared file: stores on the
    older side, touches on the younger one.
    """

    bounds: AddrRange
    granule: int
    paging_all: bool
    forked: Arming = Arming.NATIVE

    def of(self, vma: Vma | None) -> Arming:
        """Holes report every touch; with ``paging_all`` so does the rest, once a page."""
        if vma is None:
            return Arming.MISSING
        arming = vma.arming()
        if self.forked is not Arming.NATIVE and not vma.reaches_file and vma.prot.accessible:
            arming |= self.forked
        return arming | Arming.MISSING if self.paging_all else arming

    @property
    def shielded(self) -> bool:
        """Whether every store is to be seen because of forks."""
        return int.__and__(self.forked, Arming.WP) != 0

    def with_forks(self, forked: Arming) -> ArmingRule:
        """The same with something else to be seen because of forks."""
        return ArmingRule(self.bounds, self.granule, self.paging_all, forked)

    def granules(self, ar: AddrRange) -> AddrRange:
        """The granules that ``ar`` has a part in, as far as they lie in the region."""
        if not (ar.start | ar.end) & (self.granule - 1) and self.bounds.covers(ar):
            return ar
        start, end = round_down(ar.start, self.granule), round_up(ar.end, self.granule)
        return AddrRange(max(Address(start), self.bounds.start), min(Address(end), self.bounds.end))

    def over(self, vmas: VmaSet, ar: AddrRange) -> Armed:
        """How ``ar`` is armed, in order and without gaps, equal neighbours as one."""
        area = self.granules(ar)
        mapped = vmas.overlapping(area)
        if not mapped or mapped[0].ar.covers(area):
            return [(ar, self.of(mapped[0] if mapped else None))]
        parts = self._parts(mapped, area)
        if not all(arming & Arming.MISSING for _, _, arming in parts):
            parts = self._paged(parts)
        merged: Armed = []
        first, until = ar.start, ar.end
        for start, end, arming in parts:
            if end <= first or start >= until:
                continue
            start, end = max(start, first), min(end, until)
            if merged and merged[-1][1] == arming:
                start = merged.pop()[0].start
            merged.append((AddrRange(start, end), arming))
        return merged

    def _parts(self, mapped: list[Vma], area: AddrRange) -> list[Part]:
        """What is mapped in ``area``, and the holes between, each as it would be armed alone."""
        found = []
        at, hole = area.start, self.of(None)
        for vma in mapped:
            start, end = vma.ar.start, min(vma.ar.end, area.end)
            if start > at:
                found.append((at, start, hole))
                at = start
            found.append((at, end, self.of(vma)))
            at = end
        if at < area.end:
            found.append((at, area.end, hole))
        return found

    def _paged(self, parts: list[Part]) -> list[Part]:
        """The same with MISSING added throughout each granule that has it in any part."""
        size = self.granule
        borders: list[int] = []
        for start, end, arming in parts:
            if arming & Arming.MISSING:
                first, last = round_down(start, size), round_up(end, size)
                if borders and first <= borders[-1]:
                    borders[-1] = last
                else:
                    borders += first, last
        found = []
        for start, end, arming in parts:
            inside = bisect_right(borders, start)
            while inside < len(borders) and borders[inside] < end:
                between = Address(borders[inside])
                found.append((start, between, arming | Arming.MISSING if inside % 2 else arming))
                start, inside = between, inside + 1
            found.append((start, end, arming | Arming.MISSING if inside % 2 else arming))
        return found

    def around(self, vmas: VmaSet, ar: AddrRange) -> Armed:
        """How the granules of ``ar`` are armed."""
        return self.over(vmas, self.granules(ar))

    def rearm(
        self, vmas: VmaSet, ar: AddrRange, before: Armed, moves: list[Change], *, also: Arming = Arming.NATIVE
    ) -> list[Change]:
        """Arm the granules of ``ar`` as they are mapped now, around ``moves`` of the contents of ``ar``.

        While contents move, what was reported before and what is from now on are reported both (and in ``ar`` what
        ``also`` says): nobody slips in with a rule that neither the old mapping nor the new one has.
        """
        first: list[Part] = []
        last: list[Part] = []
        for start, end, old, new in changes(before, self.around(vmas, ar), [ar.start, ar.end]):
            between = new
            if moves:
                between |= old | also if ar.start <= start and end <= ar.end else old
            if between != old:
                _join(first, (start, end, between))
            if new != between:
                _join(last, (start, end, new))
        return [*_arms(first), *moves, *_arms(last)]

    def holes_beside_memory(self, vmas: VmaSet) -> list[AddrRange]:
        """The parts of holes that share a granule with memory, in order."""
        edges = united(sorted(AddrRange.page_at(a, self.granule) for v in vmas for a in (v.ar.start, v.ar.end - 1)))
        inside = (edge.intersect(self.bounds) for edge in edges)
        return [hole for edge in inside if edge is not None for hole in vmas.holes(edge)]


def _join(parts: list[Part], part: Part) -> None:
    """Add a part behind others, as one with the last if that goes on alike.

    Each border that is armed splits every process's window, and hugetlb memory that was split inside its GiB never
    shares that table again (compare hugetlb_split).
    """
    start, end, arming = part
    if parts and parts[-1][1:] == (start, arming):
        start = parts.pop()[0]
    parts.append((start, end, arming))


def _arms(parts: list[Part]) -> list[Arm]:
    return [Arm(AddrRange(start, end), arming) for start, end, arming in parts]


def cut(ar: AddrRange, borders: list[Address]) -> Iterator[AddrRange]:
    """``ar`` cut at each of ``borders``, which are in order."""
    inner = borders[bisect_right(borders, ar.start) : bisect_left(borders, ar.end)]
    return (AddrRange(start, end) for start, end in itertools.pairwise([ar.start, *inner, ar.end]))


def changes(before: Armed, after: Armed, borders: list[Address]) -> Iterator[tuple[Address, Address, Arming, Arming]]:
    """Pieces (from, to) armed in one way before and in one way after, in order, cut at ``borders`` too.

    Preconditions: both cover the same range.
    """
    olds, news = iter(before), iter(after)
    (old_ar, old), (new_ar, new) = next(olds), next(news)
    at, until = old_ar.start, before[-1][0].end
    cuts = {border for border in borders if at < border < until}
    cuts.update(ar.end for ar, _ in (*before, *after))
    for end in sorted(cuts):
        yield at, end, old, new
        at = end
        if end == old_ar.end != until:
            old_ar, old = next(olds)
        if end == new_ar.end != until:
            new_ar, new = next(news)
