"""Each user's share of the daemon's descriptors, so that nobody can have it run out of them for everybody else."""

from __future__ import annotations

import os
import resource
from collections import Counter
from typing import Final

from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from mshared.tickets import MOST_WAITING
from msharefs import protocol
from msharefs.errors import QuotaError

CONNECTION: Final = 1 + protocol.MAX_DONATED_FILES + MOST_WAITING
"""A connection, what comes with one packet, and what waits to be closed."""
ATTACHMENT: Final = 3
"""Two userfaultfds, and its process."""
REGION: Final = 6
"""Three of its backing file, its stash, and what single pages are put into it by."""


class Shares:
    """Who has how many. Root, and the user the daemon runs as, may have all; every other user half at most."""

    def __init__(self, lifetimes: Lifetimes) -> None:
        self._lifetimes = lifetimes
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._unlimited = {0, os.geteuid()}
        self.connections: Counter[int] = Counter()

    def check(self, uid: int, message: protocol.Message | None, files: int) -> None:
        """Raise QuotaError if a user's request, with ``files`` descriptors beside it, takes more than its share.

        ``message`` None: a connection has been made.
        """
        more = _needs(message, files)
        if uid in self._unlimited or (message is not None and not more):
            return
        used = self._used(uid)
        if used + more > self._most:
            raise QuotaError(
                f"mshared would hold {used + more} descriptors for user {uid}, and may hold {self._most}: detach, end "
                "regions or processes, or raise its limit of open files (LimitNOFILE, ulimit -n)"
            )

    def are_too_many(self, uid: int) -> bool:
        """Whether a user has so many connections that they are not even told so."""
        return uid not in self._unlimited and self.connections[uid] * CONNECTION > 2 * self._most

    def _used(self, uid: int) -> int:
        regions = self._lifetimes.regions()
        return (
            self.connections[uid] * CONNECTION
            + sum(_of_region(region) for region in regions if region.model.owner.uid == uid)
            + sum(attachment.uid == uid for region in regions for attachment in region.attachments) * ATTACHMENT
        )


def _of_region(region: LiveRegion) -> int:
    """Those of its files, and the pidfd of its sponsor."""
    return REGION + len(region.files) + region.model.kept


def _needs(message: protocol.Message | None, files: int) -> int:
    """How many descriptors a request leaves with the daemon at most."""
    match message:
        case protocol.Create() | protocol.MapFile():
            return REGION + ATTACHMENT + files
        case protocol.Fork():
            return REGION
        case protocol.Snapshot(attachments):
            return REGION * len(attachments)
        case protocol.Mapped() | protocol.Adopt():
            return ATTACHMENT
        case protocol.Mmap():
            return files
        case _:
            return 0
