"""Points at which a test may have the daemon killed: between deciding and writing down, and between two effects.

With ``MSHARED_KILL_AT=n`` in its environment the daemon kills itself with SIGKILL at the n-th point it comes to. For
tests alone: without the variable a point is one call of an empty function.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

VARIABLE: Final = "MSHARED_KILL_AT"


def _nothing() -> None:
    """Go on."""


def _countdown(left: int) -> Callable[[], None]:
    """What counts down and kills this process in the end."""

    def point() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return point


point: Callable[[], None] = _nothing if VARIABLE not in os.environ else _countdown(int(os.environ[VARIABLE]))
"""To be called where a death makes a difference."""
