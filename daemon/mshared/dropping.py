"""Giving back pages of reference pages that hold nothing but what these say.

Those that were only read the tables tell. Of those that were there when the daemon before ended they do not: these are
looked at, once. They are protected first, so that what they are then they stay until they are gone, or somebody who
stores to them is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import trio

from mshared import apply
from mshared.live import LiveAttachment, LiveRegion
from msharefs import clean_pages
from msharefs.addr import PMD_SIZE, AddrRange, united
from msharefs.effects import Protect
from msharefs.refpage import RefPage

_RUNS_AT_ONCE: Final = 64
"""Ranges that are given back before others have their turn."""


async def drop_clean(region: LiveRegion, ar: AddrRange, read_events: Callable[[], None]) -> None:
    """Give back what shows a reference page in ``ar`` and was not stored to."""
    mm = region.model.mm
    for part in clean_pages.unsure(mm, ar):
        for piece in part.pieces(PMD_SIZE):
            if clean_pages.unsure(mm, piece) and not region.closed:
                _find_clean(region, piece, read_events)
                await trio.lowlevel.checkpoint()
    runs = clean_pages.clean(mm, ar)
    for first in range(0, len(runs), _RUNS_AT_ONCE):
        some = runs[first : first + _RUNS_AT_ONCE]
        dropped = [effect for run in some for effect in clean_pages.drop(mm, run)]
        apply.carry_out(region, dropped, read_events)
        await trio.lowlevel.checkpoint()


def _find_clean(region: LiveRegion, ar: AddrRange, read_events: Callable[[], None]) -> None:
    """Look at what counts as written in ``ar``."""
    mm = region.model.mm
    found = clean_pages.look(mm, ar)
    known: list[LiveAttachment] = []
    while any(each not in known for each in region.attachments):  # Children that appear meanwhile may be unprotected.
        known = list(region.attachments)
        apply.carry_out(region, [Protect(run) for run, _ in found], read_events)
    for run, refpage in found:
        data = region.backing.read(run.size, region.model.offset_of(run))
        for part in united(_equal(data, refpage, mm.page)):
            clean_pages.found_clean(mm, part.moved(run.start))


def _equal(data: bytes, refpage: RefPage, page: int) -> Iterator[AddrRange]:
    """Which pages hold what their reference page says, as offsets in ``data``."""
    pattern = refpage.repeated(page)
    for at in range(0, len(data), page):
        if data[at : at + page] == pattern:
            yield AddrRange.sized(at, page)
