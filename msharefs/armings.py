"""How a host mm is armed: which faults of which ranges the kernel reports."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import attrs

from msharefs.addr import Address, AddrRange, round_down, round_up, united
from msharefs.effects import Arm, Change
from msharefs.vma import Arming, Vma
from msharefs.vma_set import VmaSet

Armed = list[tuple[AddrRange, Arming]]
"""Ranges in order, each armed in one way."""


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
        parts = [(hole, self.of(None)) for hole in vmas.holes(area)]
        parts += [(inside, self.of(vma)) for vma in mapped if (inside := vma.ar.intersect(area)) is not None]
        parts.sort(key=lambda part: part[0].start)
        paged = united(self.granules(part) for part, arming in parts if arming & Arming.MISSING)
        merged: Armed = []
        for piece, arming in page_within(parts, paged):
            inside = piece.intersect(ar)
            if inside is None:
                continue
            if merged and merged[-1][1] == arming:
                inside = AddrRange(merged.pop()[0].start, inside.end)
            merged.append((inside, arming))
        return merged

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
        first: list[Arm] = []
        last: list[Arm] = []
        for piece, old, new in changes(before, self.around(vmas, ar), [ar.start, ar.end]):
            between = old | new | (also if ar.covers(piece) else Arming.NATIVE) if moves else new
            if between != old:
                first.append(Arm(piece, between))
            if new != between:
                last.append(Arm(piece, new))
        return [*joined(first), *moves, *joined(last)]

    def holes_beside_memory(self, vmas: VmaSet) -> list[AddrRange]:
        """The parts of holes that share a granule with memory, in order."""
        edges = united(sorted(AddrRange.page_at(a, self.granule) for v in vmas for a in (v.ar.start, v.ar.end - 1)))
        inside = (edge.intersect(self.bounds) for edge in edges)
        return [hole for edge in inside if edge is not None for hole in vmas.holes(edge)]


def joined(arms: Iterable[Arm]) -> list[Arm]:
    """The same with neighbours that are armed alike as one. Preconditions: they are in order.

    Each border that is armed splits every process's window, and hugetlb memory that was split inside its GiB never
    shares that table again (compare hugetlb_split).
    """
    found: list[Arm] = []
    for arm in arms:
        if found and found[-1].arming == arm.arming and found[-1].ar.end == arm.ar.start:
            found[-1] = Arm(AddrRange(found[-1].ar.start, arm.ar.end), arm.arming)
        else:
            found.append(arm)
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
