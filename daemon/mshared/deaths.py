"""Ends of processes, as pidfds tell them."""

from __future__ import annotations

import os
from collections.abc import Callable

from mshared import processes
from mshared.pager import Pager


class Deaths:
    """Watches processes; ``died`` is called with each that ends."""

    def __init__(self, pager: Pager, died: Callable[[int], None]) -> None:
        self._pager = pager
        self._died = died
        self._watched: dict[int, tuple[int, int | None]] = {}

    def watch(self, pid: int) -> None:
        """Watch a process too. Raises ProcessLookupError when it is gone."""
        if pid in self._watched:
            return
        pidfd = processes.pidfd_open(pid)
        if pidfd is None:
            raise ProcessLookupError(3, "the process is gone")
        self._watched[pid] = pidfd, processes.start_time(pid)
        self._pager.add(pidfd, lambda: self._died(pid))

    def unwatch(self, pid: int) -> None:
        """Watch it no longer, if it was."""
        if pid in self._watched:
            pidfd, _ = self._watched.pop(pid)
            self._pager.remove(pidfd)
            os.close(pidfd)

    def started(self, pid: int) -> int | None:
        """When a process was started; see ``processes.start_time``."""
        found = self._watched.get(pid)
        return found[1] if found else processes.start_time(pid)
