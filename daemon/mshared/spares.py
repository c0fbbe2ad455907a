"""Files of no size that wait for a region: to open one as it must be takes a thread, and most of the time of a fork."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mshared import landlock
from msharefs.region import BackingKind

if TYPE_CHECKING:
    from mshared.backing import Backing

_FEW: Final = 3
_MANY: Final = 8
"""Files that are ready at least, while there is time to make some, and at most."""
Opener = Callable[[str, int], int]


class Spares:
    """Files of each kind that was asked for. ``make`` makes one; ``landlocked`` says whether that takes a thread."""

    def __init__(self, make: Callable[[BackingKind, Opener], Backing], *, landlocked: bool) -> None:
        self._make = make
        self._landlocked = landlocked
        self._ready: dict[BackingKind, list[Backing]] = {}

    def prepare(self, kind: BackingKind) -> None:
        """Have some of a kind ready. For a worker thread, beside which others may be taken. Raises OSError."""
        ready = self._ready.setdefault(kind, [])
        if len(ready) < _FEW:
            with landlock.opener() if self._landlocked else contextlib.nullcontext(os.open) as opener:
                while len(ready) < _MANY:
                    ready.append(self._make(kind, opener))

    def take(self, kind: BackingKind) -> Backing | None:
        """One of a kind, if there is one."""
        ready = self._ready.get(kind)
        return ready.pop() if ready else None

    def close(self) -> None:
        """Take them away."""
        for ready in self._ready.values():
            while ready:
                ready.pop().close()
