"""Having an address space follow although it is being forked: until fork(2) has come to its end the kernel refuses.

The end takes as long as the forking process waits for its events to be read, and for a processor: on a busy machine
that is thousands of tries, each of them a few microseconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from signal import SIGKILL
from typing import Final

from mshared.live import LiveAttachment
from mshared.uffd import Outcome, attempt

log = logging.getLogger(__name__)

PATIENCE: Final = 5.0
"""Seconds until a process is given up: it has userfaultfds of its own that nobody reads, or gets no processor."""


def insist(attachment: LiveAttachment, ioctl: Callable[[], None], read_events: Callable[[], None]) -> Outcome:
    """Run an ioctl on a client's address space; while that is being forked, read events and try again.

    Faults of others are served meanwhile, as far as ``read_events`` does that. Who does not come to an end is killed:
    it could go on to store to what the others see protected.
    """
    outcome = attempt(attachment, ioctl)
    until = time.monotonic() + PATIENCE
    while outcome is Outcome.RETRY:
        read_events()
        os.sched_yield()  # No sleep: of a process that forks again and again it would miss the moments in between.
        outcome = attempt(attachment, ioctl)
        if outcome is Outcome.RETRY and time.monotonic() > until:
            return _give_up(attachment)
    return outcome


def _give_up(attachment: LiveAttachment) -> Outcome:
    pid = attachment.model.pid
    done = "killed" if pid else "who it is, is not known"
    log.error("%s: its fork does not end, and a change cannot reach it; %s", attachment, done)
    if pid is None:
        return Outcome.RETRY
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, SIGKILL)
    return Outcome.GONE
