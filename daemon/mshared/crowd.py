"""Doing the same to many address spaces at once, on all processors: the kernel's part of it is the larger one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Each = TypeVar("Each")

CROWD: Final = 32
"""From how many on it is worth to wake other threads."""
_SHARE: Final = 16
"""How many a thread takes at a time."""
_OTHERS: Final = max(1, (os.cpu_count() or 1) - 1)
_threads: Final = ThreadPoolExecutor(_OTHERS, thread_name_prefix="crowd")


def do_for_all(crowd: Sequence[Each], work: Callable[[Each], None]) -> None:
    """Call ``work`` once for each, in any order, by several threads if they are many; returns when all is done.

    What ``work`` raises ends its thread's part only; the first such exception is raised in the end.
    """
    if len(crowd) < CROWD:
        for each in crowd:
            work(each)
        return
    starts = itertools.count(0, _SHARE)  # A step of it is atomic: who takes a share has it alone.

    def take_shares() -> None:
        while (start := next(starts)) < len(crowd):
            for each in crowd[start : start + _SHARE]:
                work(each)

    others = [_threads.submit(take_shares) for _ in range(_OTHERS)]
    try:
        take_shares()
    finally:
        failures = [failure for other in others if (failure := other.exception()) is not None]
    if failures:
        raise failures[0]
