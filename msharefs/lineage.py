"""Host mms that are forks of each other, and whose store has which page (compare COW PTE, and on-demand fork).

A fork has the same page tables as its origin: leaf tables are shared, by reference count, and so are the pages they
lead to. Contents never move by themselves: the older side keeps its pages, protected in every process. Before one of
them changes, or goes, whoever refers to it gets it, once: the oldest of those, whose page it is from then on for all
of them. The younger side has a store of its own, and gets a page there when it is first touched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msharefs.addr import PMD_SIZE, Address, AddrRange, FrameNo, united
from msharefs.armings import cut
from msharefs.effects import Copy
from msharefs.errors import InternalError, NoSpaceError
from msharefs.frames import MAX_STORES, StoreNo, store_of

if TYPE_CHECKING:
    from msharefs.host_mm import HostMm


class Lineage:
    """The living members of a family, by the number of their store: the oldest first.

    Invariant: a frame of a member's own store that another refers to is written by nobody (``msharefs.invariants``).
    """

    def __init__(self) -> None:
        self.members: dict[StoreNo, HostMm] = {}
        self.copies = 0
        """How often pages came to be others' than before."""
        self._next = 0

    @property
    def alone(self) -> bool:
        """Whether there is nobody to share with."""
        return len(self.members) < 2

    def next_store(self) -> StoreNo:
        """The number of a store, for a member that is to be taken in. Raises NoSpaceError after the 65536th."""
        if self._next == MAX_STORES:
            raise NoSpaceError(f"{MAX_STORES} forks of one region have been made; copy its contents to a new one")
        self._next += 1
        return StoreNo(self._next - 1)

    def add(self, mm: HostMm, store: StoreNo | None = None) -> StoreNo:
        """Take a member in; the number of its store, which is known already if given. Raises what that does."""
        number = self.next_store() if store is None else store
        self._next = max(self._next, number + 1)
        self.members[number] = mm
        return number

    def leave(self, mm: HostMm) -> None:
        """Let a member go, with its references; what others refer to in its store stays needed."""
        del self.members[mm.store]
        mm.table.release()

    def refers(self, addr: Address, frame: FrameNo) -> bool:
        """Whether somebody has a frame installed at ``addr``."""
        return any(mm.table.frame_at(addr) == frame for mm in self.members.values())

    def needed(self, store: StoreNo) -> list[AddrRange]:
        """Where somebody refers to frames of a store, as addresses; in order, apart for each member."""
        runs = [each for mm in self.members.values() if store in mm.borrowed for each in mm.table.runs(mm.ar)]
        return [run for run, pte in runs if store_of(pte.frame) == store]

    def claims(self, mm: HostMm, ar: AddrRange) -> Iterator[Copy]:
        """What others refer to of the frames that ``mm`` has in ``ar``, each part with the oldest of them."""
        taken: list[AddrRange] = []
        for other in list(self.members.values()):
            runs = _shared(mm, other, ar)
            if not runs:
                continue
            borders = [border for run in taken for border in (run.start, run.end)]
            for part in (part for run in runs for part in cut(run, borders)):
                if not bisect_right(borders, part.start) % 2:
                    yield Copy(part, mm.store, other.store)
            taken = united(sorted([*taken, *runs]))
            if taken == [ar]:
                return

    def moved(self, copy: Copy) -> None:
        """Everybody but its owner refers to the copy from now on. Preconditions: the contents are there."""
        owner, heir = self.members[copy.source], self.members[copy.target]
        if heir.table.frame_at(copy.ar.start) != owner.frame_at(copy.ar.start):
            raise InternalError(f"{copy} is for somebody who does not refer to it")
        for piece in copy.ar.pieces(PMD_SIZE):
            owner.table.own(piece.start)
        for other in self.members.values():
            if other is not heir and owner.store in other.borrowed:
                other.borrowed.add(heir.store)
            for run in _shared(owner, other, copy.ar):
                other.table.reassign(run, heir.frame_at(run.start))


def _shared(owner: HostMm, other: HostMm, ar: AddrRange) -> list[AddrRange]:
    """Where in ``ar`` frames of ``owner`` are what ``other`` has; of one page that takes no search."""
    if owner.store not in other.borrowed:
        return []
    if ar.size == owner.page:
        return [ar] if other.table.frame_at(ar.start) == owner.frame_at(ar.start) else []
    return [run for run, pte in other.table.runs(ar) if pte.frame == owner.frame_at(run.start)]
