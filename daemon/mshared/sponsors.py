"""Sponsors: processes that keep regions, which end by themselves once their sponsor has and nobody is attached."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mshared.live import LiveRegion
from mshared.pager import Pager
from msharefs.errors import BadDescriptorError


class Sponsors:
    """Watches them by pidfd, which says whose end is meant in whatever pid namespace, and never another's."""

    def __init__(self, pager: Pager, gone: Callable[[LiveRegion], None]) -> None:
        self._pager = pager
        self._gone = gone
        self._pidfds: dict[LiveRegion, int] = {}

    def keep(self, region: LiveRegion, pidfd: list[int]) -> None:
        """Call ``gone`` when the process ends. The descriptor is taken out of the list when it is the daemon's.

        Raises BadDescriptorError.
        """
        if len(pidfd) != 1 or not is_pidfd(pidfd[0]):
            raise BadDescriptorError("the process that keeps a region is told by its pidfd; see pidfd_open(2)")
        fd = self._pidfds[region] = region.sponsor = pidfd.pop()
        self._pager.add(fd, lambda: self._on_end(region))

    def discard(self, region: LiveRegion) -> None:
        """Watch no longer."""
        fd, region.sponsor = self._pidfds.pop(region, None), None
        if fd is not None:
            self._pager.remove(fd)
            os.close(fd)

    def _on_end(self, region: LiveRegion) -> None:
        self.discard(region)
        self._gone(region)


def is_pidfd(fd: int) -> bool:
    """Whether a descriptor that somebody sent is one."""
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("Pid:") for line in lines)
