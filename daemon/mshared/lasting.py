"""Tasks that outlast what goes wrong in them: a mistake, or a want of descriptors, is never the end of the daemon."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

log = logging.getLogger(__name__)

REST: Final = 0.1
"""Seconds until a task that has failed goes on: what it lacks may be there then, and nothing spins."""


async def lasting(task: Callable[[], Awaitable[object]]) -> None:
    """Run a task, again and again if it fails, until it ends on its own. What it cannot do without is said once."""
    said = ""
    while True:
        try:
            await task()
        except OSError as error:
            if str(error) != said:
                log.warning("going on, although something could not be done: %s", error)
                said = str(error)
        except Exception:
            log.exception("a task of the daemon has failed, and goes on")
        else:
            return
        await trio.sleep(REST)
