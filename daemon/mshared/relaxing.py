"""Regions that are alone again, after forks: their memory becomes native, so that no store is reported any more.

Not at once: whoever forks a region again and again, for a snapshot each time, would have it armed anew each time.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from mshared import apply
from mshared import records as rec
from mshared.book import region_is
from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from msharefs import forking

log = logging.getLogger(__name__)

INTERVAL: Final = 1.0
"""Seconds between two looks; what is alone at two of them is relaxed."""


class Relaxing:
    """Looks for such regions from time to time."""

    def __init__(self, lifetimes: Lifetimes) -> None:
        self._lifetimes = lifetimes
        self._alone: set[LiveRegion] = set()

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await trio.sleep(INTERVAL)
            self.look()

    def look(self) -> None:
        """Relax what was alone at the last look and is so still. One that is being changed has to wait."""
        alone = {region for region in self._lifetimes.regions() if _is_alone(region)}
        for region in alone & self._alone:
            log.debug("region %s: alone again, its memory is native", region.model.name)
            try:
                region.fork_notes.shielded = False
                effects = forking.relax(region.model.mm)
                noted = region_is(region), rec.Refers(region.model.id, ())
                apply.carry_out(region, effects, self._lifetimes.read_events, *noted)
            except Exception:
                log.exception("region %s: cannot be made native", region.model.name)
        self._alone = alone


def _is_alone(region: LiveRegion) -> bool:
    """Whether it was forked, and nobody has anything of its memory, nor it of anybody's."""
    mm = region.model.mm
    apart = mm.lineage.alone and len(region.family.backings) == 1
    return bool(mm.rule.forked) and apart and not region.lock.locked() and not region.closed
