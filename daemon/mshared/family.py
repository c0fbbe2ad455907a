"""Regions that are forks of each other, and the copying of pages between them before these change or go.

A page is copied while it is protected in every process of its owner, and the owner's store is let through only after
that: no byte of it is newer than what the relatives are to see.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import attrs
import trio

from mshared import records as rec
from mshared.backing import Backing
from mshared.killpoints import point
from mshared.sparse import resident
from msharefs import forking
from msharefs.addr import PMD_SIZE, AddrRange
from msharefs.effects import Copy
from msharefs.errors import NoMemoryError
from msharefs.frames import StoreNo, frame_in, index_of
from msharefs.host_mm import HostMm

if TYPE_CHECKING:
    from mshared.live import LiveRegion

log = logging.getLogger(__name__)

_LARGE: Final = 16
"""Regions of a family in which stores of ended ones are looked through now and then, not each time one ends."""
_AT_ONCE: Final = 4 * PMD_SIZE
"""Bytes that are copied before others have their turn."""


@attrs.define(eq=False)
class Family:
    """The living regions of a lineage, and all stores that somebody needs, those of ended regions included.

    ``number`` is the first region's; ``ended`` are those of which the store alone is left. ``copied`` counts bytes.
    """

    number: int = 0
    regions: dict[StoreNo, LiveRegion] = attrs.Factory(dict)
    ended: dict[StoreNo, LiveRegion] = attrs.Factory(dict)
    backings: dict[StoreNo, Backing] = attrs.Factory(dict)
    copied: int = 0
    _most: int = 0
    """How many regions there were since stores of ended ones were looked through."""

    def join(self, region: LiveRegion) -> None:
        """Take a region in."""
        store = region.model.mm.store
        self.number = self.number or region.model.id
        self.regions[store], self.backings[store] = region, region.backing
        self._most = max(self._most, len(self.regions))

    def leave(self, region: LiveRegion) -> None:
        """Let a region go. Its backing is closed when nobody needs it; until then it keeps what somebody does."""
        mm = region.model.mm
        mm.lineage.leave(mm)
        self.ended[mm.store] = self.regions.pop(mm.store)
        self._release(mm, mm.store)
        if len(self.regions) < _LARGE or 2 * len(self.regions) <= self._most:
            self._release_ended(mm)
            self._most = len(self.regions)

    def restore_ended(self, region: LiveRegion) -> None:
        """Of a region that was taken in, the store alone is left."""
        mm = region.model.mm
        region.closed = True
        mm.lineage.leave(mm)
        self.ended[mm.store] = self.regions.pop(mm.store)

    def release_ended(self) -> None:
        """Give back what nobody needs any more of the stores of ended regions."""
        for region in [*self.regions.values(), *self.ended.values()][:1]:
            self._release_ended(region.model.mm)

    def make(self, mm: HostMm, copies: list[Copy]) -> None:
        """Make copies that ``mm`` asks for, and take them off the list. Raises OSError where memory is short."""
        while copies:
            copy = copies[0]
            self._put(copy, mm)
            point()
            forking.copied(mm, copy)
            if copy.source == mm.store:
                self._note_heir(copy)
            self.copied += copy.ar.size
            if copy.source not in self.regions:
                self._punch_unneeded(mm, copy)
                if not resident(self.backings[copy.source].fd):
                    self._release(mm, copy.source)
            del copies[0]

    def _note_heir(self, copy: Copy) -> None:
        """Before the page changes, it must be known whose it is now; that of one who fetched it is in its store."""
        self.regions[copy.target].note(rec.Inherited(self.number, copy.ar, copy.source, copy.target))

    def make_or_reclaim(self, mm: HostMm, copies: Iterable[Copy]) -> None:
        """As ``make``; where memory is short, once more after what nobody needs was given back."""
        left = list(copies)
        try:
            self.make(mm, left)
        except OSError:
            self._release_ended(mm)
            self.make(mm, left)

    async def make_way(self, mm: HostMm, ar: AddrRange, *, bring: bool = False) -> None:
        """Have relatives hold what they refer to in ``ar``, which may go then, and with ``bring`` get what they hold.

        When it returns that is so; after the caller's next await it may not be any more, since a store of a relative
        may have left something here for others. Preconditions: the region's lock is held, so that nobody forks it
        meanwhile. Raises NoMemoryError.
        """
        inside = ar.intersect(mm.ar)
        if inside is None or not mm.rule.forked:
            return
        try:
            for piece in inside.pieces(_AT_ONCE):
                self._make_way_now(mm, piece, bring=bring)
                await trio.lowlevel.checkpoint()
            self._make_way_now(mm, inside, bring=bring)
        except OSError as error:
            raise NoMemoryError(f"no memory for what forks refer to: {error.strerror}; free some") from error

    def _make_way_now(self, mm: HostMm, ar: AddrRange, *, bring: bool) -> None:
        self.make_or_reclaim(mm, forking.to_preserve(mm, ar))
        self.make_or_reclaim(mm, forking.to_bring(mm, ar) if bring else [])

    def _put(self, copy: Copy, mm: HostMm) -> None:
        """Copy pages. Raises OSError with none there: whoever touched one unseen would change what others refer to."""
        source, target = self.backings[copy.source], self.regions[copy.target]
        inside = copy.ar.moved(-mm.ar.start)
        try:
            for piece in inside.pieces(PMD_SIZE):
                target.put_new_of(source, piece)
        except OSError:
            for part in target.held(inside):
                target.backing.empty(part)
            raise

    def _punch_unneeded(self, mm: HostMm, copy: Copy) -> None:
        """Give a page of an ended region back that was the last one's."""
        for page in copy.ar.pieces(mm.page):
            frame = frame_in(copy.source, index_of(mm.frame_at(page.start)))
            if not mm.lineage.refers(page.start, frame):
                self.backings[copy.source].punch(page.moved(-mm.ar.start))

    def _release_ended(self, mm: HostMm) -> None:
        """Give back what nobody needs any more of the stores of ended regions."""
        for store in self.backings.keys() - self.regions.keys():
            self._release(mm, store)

    def _release(self, mm: HostMm, store: StoreNo) -> None:
        """Keep of an ended region's store what somebody needs."""
        needed = sorted(mm.lineage.needed(store))
        at = mm.ar.start
        for run in needed:
            if at < run.start:
                self.backings[store].punch(AddrRange.sized(at - mm.ar.start, run.start - at))
            at = max(at, run.end)
        if not needed:
            over = self.ended.pop(store)
            over.book.forget(over)
            self.backings.pop(store).close()
        elif at < mm.ar.end:
            self.backings[store].punch(AddrRange.sized(at - mm.ar.start, mm.ar.end - at))
