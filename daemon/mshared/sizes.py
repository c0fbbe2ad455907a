"""Keeping backing files as long as their regions.

Who may write a region holds a descriptor of its memory, and can write behind its end: nobody ever sees that, but it
takes memory that no limit counts. On a tmpfs no seal and no right keeps a file from growing, so it is cut off again.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import trio

from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion

log = logging.getLogger(__name__)

INTERVAL: Final = 0.25
"""Seconds between two looks."""


async def keep_sizes(lifetimes: Lifetimes) -> None:
    """Look from time to time whether a file has grown."""
    while True:
        await trio.sleep(INTERVAL)
        for region in lifetimes.regions():
            if region.closed or region.shows_own_file:
                continue
            if os.fstat(region.backing.fd).st_size > region.model.ar.size:
                await _cut(region)


async def _cut(region: LiveRegion) -> None:
    """Give back what lies behind the end; off the loop, since it may be much."""
    size = region.model.ar.size
    log.warning("region %s: somebody wrote behind its end; cut off", region.model.name)
    with region.backing.duplicate() as fd:
        await trio.to_thread.run_sync(os.ftruncate, fd, size)
