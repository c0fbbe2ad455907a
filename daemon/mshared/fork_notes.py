"""What the journal says of a region that is forked again and again: the same most of the time, and found once."""

from __future__ import annotations

import attrs

from msharefs import forking
from msharefs.addr import AddrRange
from msharefs.host_mm import HostMm


@attrs.define
class ForkNotes:
    """``shielded``: it is written down that stores are seen because of forks."""

    shielded: bool = False
    _pages: tuple[AddrRange, ...] = ()
    _until: tuple[int, int] | None = None
    """Changes of the tables, and of what relatives have of each other, until its own pages were found."""

    def own_pages(self, mm: HostMm) -> tuple[AddrRange, ...]:
        """Where pages of its own store are installed, in order; looked for only when that may have changed."""
        now = (mm.table.changes, mm.lineage.copies if mm.borrowed else -1)
        if self._until != now:
            self._pages, self._until = tuple(forking.own_pages(mm)), now
        return self._pages
