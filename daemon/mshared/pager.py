"""The loop that sees everything the kernel reports of clients: one epoll set that trio watches.

Mechanism only: whoever adds a descriptor says what to do when it turns readable. All userfaultfds and pidfds are in
here; one set drained at once serves more faults a second than a task for each descriptor.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import select
import time
from collections.abc import Callable
from typing import Final

import trio

log = logging.getLogger(__name__)

RETRY_DELAY: Final = 0.0005
"""Seconds until what the kernel could not take yet (EAGAIN) is tried again."""
ATTENTION: Final = 0.002
"""Seconds for which the pager stays with what comes in, before other tasks have their turn."""
_LINGER: Final = 0.00005
"""Seconds it looks for the next fault meanwhile, awake: who was served is often back sooner than a sleeper wakes."""
AFTER_CHANGE: Final = 0.0002
"""Seconds until who was answered has woken up, and touches what was changed."""
_BATCH: Final = 256


class Pager:
    """Calls a handler for each readable descriptor, and once more what handlers asked to do later."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[int, Callable[[], None]]] = {}
        """With the number of polls before it was added."""
        self._polls = 0
        self._callers = select.epoll()
        self._later: list[Callable[[], None]] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        """A heap of what is to be done at a time of its own; what was asked for first is first of the same time."""
        self._order = itertools.count()
        self._waiting: trio.CancelScope | None = None
        """Around the wait for whatever comes next, while there is nothing to do later."""

    def add(self, fd: int, handler: Callable[[], None]) -> None:
        """Watch ``fd``; ``handler`` reads what is there and must not wait."""
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = self._polls, handler

    def remove(self, fd: int) -> None:
        """Watch ``fd`` no longer. To be called before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def add_caller(self, fd: int) -> None:
        """Somebody may ask for something by ``fd``, which a task of its own sees to: no lingering while that waits."""
        self._callers.register(fd, select.EPOLLIN)

    def remove_caller(self, fd: int) -> None:
        """No longer. To be called before it is closed."""
        self._callers.unregister(fd)

    def later(self, work: Callable[[], None], delay: float = 0.0) -> None:
        """Do ``work`` after the events that are there now, or seconds later; it may ask for another time."""
        if delay > RETRY_DELAY:
            heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), work))
        else:
            self._later.append(work)
        if self._waiting is not None:
            self._waiting.cancel()

    async def run(self) -> None:
        """Serve for ever."""
        while True:
            if self._later:
                with trio.move_on_after(RETRY_DELAY):
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
            else:
                due = self._due[0][0] - time.monotonic() if self._due else math.inf
                with trio.move_on_after(max(0.0, due)) as self._waiting:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                self._waiting = None
            self.linger()

    def linger(self, patience: float = _LINGER) -> None:
        """Serve as long as something comes in, for a moment; what is put aside meanwhile waits for the loop.

        So do callers, once no fault does. ``patience``: seconds until the first comes.
        """
        now = time.monotonic()
        until = now + ATTENTION
        idle = now + patience
        while True:
            served = self.drain()
            now = time.monotonic()
            if self._later or now > until or (now > idle and not served):
                return
            if served:
                idle = now + _LINGER
            elif self._callers.poll(0, 1):
                return
            else:
                os.sched_yield()  # Whoever is served may be waiting for this processor.

    def drain(self) -> bool:
        """Handle what is readable now, then what was put aside; whether anything was. Does not wait.

        What an earlier handler of the round removed is not handled. If the number stands for something else since, the
        event was not that one's: it comes again, should it be readable. Handlers may drain, too.
        """
        ready = self._epoll.poll(0, _BATCH)
        self._polls = now = self._polls + 1
        for fd, _ in ready:
            watched = self._handlers.get(fd)
            if watched is not None and watched[0] < now:
                try:
                    watched[1]()
                except Exception:
                    _log_failure()
        work, self._later = self._later, []
        while self._due and self._due[0][0] <= time.monotonic():
            work.append(heapq.heappop(self._due)[2])
        for step in work:
            try:
                step()
            except Exception:
                _log_failure()
        return bool(ready)

    def close(self) -> None:
        """Close the sets; the descriptors in them stay open."""
        self._epoll.close()
        self._callers.close()


def _log_failure() -> None:
    """A handler that fails concerns one process, not the loop."""
    log.exception("pager: a handler failed (pid %d)", os.getpid())
