"""A region as a picture: equal pieces of it by address, and how much of each is mapped, installed, dirty, shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from msharefs import forking
from msharefs.addr import AddrRange, round_up
from msharefs.region import Region
from msharefs.reports import Heat

MOST_CELLS: Final = 2048
FULL: Final = 255


def heat(region: Region, cells: int) -> Heat:
    """The region in at most ``cells`` pieces, of whole pages. Preconditions: the tables were brought up to date."""
    mm, ar = region.mm, region.ar
    size = round_up(-(-ar.size // min(max(cells, 1), MOST_CELLS)), mm.page)
    alone = mm.lineage.alone and not mm.rule.forked
    copies = () if alone else (*forking.to_preserve(mm, ar), *forking.to_bring(mm, ar))
    return Heat(
        cell=size,
        mapped=_parts(ar, size, (vma.ar for vma in mm.vmas)),
        present=_parts(ar, size, mm.table.present(ar)),
        dirty=_parts(ar, size, mm.dirty(ar)),
        shared=_parts(ar, size, (copy.ar for copy in copies)),
    )


def _parts(whole: AddrRange, size: int, ranges: Iterable[AddrRange]) -> tuple[int, ...]:
    """How much of each piece the ranges, which do not overlap, take; what takes anything is not 0."""
    found = [0] * -(-whole.size // size)
    for ar in ranges:
        for index, count in _pieces(ar.moved(-whole.start), size):
            found[index] += count
    ends = (min(size, whole.size - index * size) for index in range(len(found)))
    return tuple(-(-FULL * count // end) for count, end in zip(found, ends, strict=True))


def _pieces(ar: AddrRange, size: int) -> Iterator[tuple[int, int]]:
    """Which pieces a range of offsets takes, and how many bytes of each."""
    at = int(ar.start)
    while at < ar.end:
        end = min(int(ar.end), at // size * size + size)
        yield at // size, end - at
        at = end
