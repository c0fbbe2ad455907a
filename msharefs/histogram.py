"""How long things take, counted by powers of two: small, fixed, and cheap to add to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

_FIRST: Final = 10
_LAST: Final = 34
BOUNDS: Final = tuple(1 << power for power in range(_FIRST, _LAST + 1))
"""Where buckets end, in nanoseconds: the first holds what took less than 1024 ns; one more takes what is left over."""


@attrs.define
class LatencyHistogram:
    """Durations. ``counts[n]`` are those of ``n`` significant bits, in nanoseconds; ``total`` is their sum."""

    counts: list[int] = attrs.Factory(lambda: [0] * 65)
    total: int = 0

    def note(self, nanoseconds: int) -> None:
        """Add one; on the path of every fault."""
        self.counts[nanoseconds.bit_length()] += 1
        self.total += nanoseconds

    def buckets(self) -> tuple[int, ...]:
        """How many fell between two bounds each, up to the longest there was; see ``BOUNDS``."""
        counts = self.counts
        found = [sum(counts[: _FIRST + 1]), *counts[_FIRST + 1 : _LAST + 1], sum(counts[_LAST + 1 :])]
        while found and not found[-1]:
            found.pop()
        return tuple(found)


def quantile(buckets: Sequence[int], part: float) -> int:
    """Nanoseconds within which ``part`` (0..1) of what was counted was done; 0 when nothing was.

    Within a bucket times are taken to be spread evenly; what is in the last is not known to have taken longer than
    its lower bound.
    """
    left = part * sum(buckets)
    if not left:
        return 0
    for index, count in enumerate(buckets):
        if count and left <= count:
            low = BOUNDS[index - 1] if index else 0
            high = BOUNDS[index] if index < len(BOUNDS) else low
            return round(low + (high - low) * left / count)
        left -= count
    return BOUNDS[-1]
