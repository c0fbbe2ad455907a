"""What the daemon remembers of faults for people: the last that it refused, and those of regions somebody traces.

Refusals are rare and always kept, so many for each owner of regions that none can push out another's. A region's faults
are recorded only while somebody asks for them again and again; whoever asks too seldom is told how many are lost.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

import attrs

from msharefs import uffd_abi as abi
from msharefs.addr import Address
from msharefs.effects import Allow, Bring, Deliver, Fill, FillPattern, Preserve, ZeroFill
from msharefs.effects import Answer as Effect
from msharefs.perms import PROT_RW, Access, Credentials, FileAccess, Ownership
from msharefs.region import Region
from msharefs.reports import Refusal, TraceEvent
from msharefs.vma import Vma

if TYPE_CHECKING:
    from mshared.live import LiveAttachment

MOST_REFUSALS: Final = 256
MOST_EVENTS: Final = 8192
TRACE_PATIENCE_NS: Final = 5_000_000_000
"""How long a region goes on being traced after it was last asked for."""
_AT_ONCE: Final = 1024
_STORE: Final = abi.FLAG_WRITE | abi.FLAG_WP
_HOW: Final = {
    ZeroFill: "zero",
    Allow: "allow",
    Fill: "file",
    FillPattern: "pattern",
    Bring: "copy",
    Preserve: "copy",
    Deliver: "refuse",
}


@attrs.define
class _Entry:
    """A refusal, and who may see it: whoever may read the region now, or might when it ended."""

    of: Region | Ownership
    refusal: Refusal

    @property
    def owner(self) -> Ownership:
        return self.of.owner if isinstance(self.of, Region) else self.of


class Journal:
    """The last refusals of each owner's regions."""

    def __init__(self) -> None:
        self._kept: dict[int, deque[_Entry]] = {}
        self._count = 0

    def refused(self, live: LiveAttachment, addr: int, pid: int, tid: int, sent: str, access: Access | None) -> None:
        """Remember what was sent to a thread for a touch of ``addr`` (its own address), and why."""
        region = live.region.model
        inside = addr in live.model.window
        host = region.to_host(live.model, Address(addr))
        vma = region.mm.vmas.find(host) if inside else None
        self._count += 1
        refusal = Refusal(
            number=self._count,
            time_ns=time.time_ns(),
            region=region.title,
            pid=pid,
            tid=tid,
            address=addr,
            offset=host - region.ar.start if inside else None,
            access=access.value if access else "touch",
            sent=sent,
            cause=_cause(vma, access) if inside else "moved",
            vma_offset=region.offset_of(vma.ar) if vma else None,
            vma_length=vma.ar.size if vma else None,
            prot=int(vma.prot) if vma else None,
            file=vma.file.file if vma and vma.file else None,
        )
        self._kept.setdefault(region.owner.uid, deque(maxlen=MOST_REFUSALS)).append(_Entry(region, refusal))

    def seen_by(self, who: Credentials, after: int) -> list[Refusal]:
        """Those with a higher number than ``after`` of regions whose statistics ``who`` may read, in order."""
        kept = (entry for entries in self._kept.values() for entry in entries if entry.refusal.number > after)
        may_see = [entry.refusal for entry in kept if entry.owner.allows(who, FileAccess.READ)]
        return sorted(may_see, key=lambda refusal: refusal.number)

    def ended(self, region: Region) -> None:
        """Hold on to a region no longer: its page tables may be large."""
        for entries in self._kept.values():
            for entry in entries:
                if entry.of is region:
                    entry.of = region.owner


class Trace:
    """The last faults of a region, as long as somebody asks. ``until``: on the monotonic clock, in nanoseconds."""

    def __init__(self) -> None:
        self._events: deque[TraceEvent] = deque(maxlen=MOST_EVENTS)
        self._count = 0
        self.until = monotonic_ns() + TRACE_PATIENCE_NS

    @property
    def count(self) -> int:
        """How many there have been; that is the number of the last."""
        return self._count

    def add(self, event: TraceEvent) -> None:
        """Remember a fault; the oldest goes where there are too many."""
        self._events.append(event)
        self._count += 1

    def after(self, number: int) -> tuple[list[TraceEvent], int]:
        """Some of the faults after that one, and how many were lost before. Has the region traced for another while."""
        self.until = monotonic_ns() + TRACE_PATIENCE_NS
        first = self._count - len(self._events)
        lost = max(0, first - number)
        skip = max(0, number - first)
        return list(islice(self._events, skip, skip + _AT_ONCE)), lost


def served(live: LiveAttachment, flags: int, addr: int, tid: int, since: int, how: type[Effect]) -> None:
    """Count how long a fault took, which is answered now and came in at ``since``, and tell those who trace."""
    region = live.region
    took = monotonic_ns() - since
    latency = region.model.latency
    latency.counts[took.bit_length()] += 1  # As LatencyHistogram.note does, without a call: for every fault.
    latency.total += took
    if region.trace is not None:
        trace(live, flags, addr, tid, since, took, how)


def trace(live: LiveAttachment, flags: int, addr: int, tid: int, since: int, took: int, how: type[Effect]) -> None:
    """Record a fault. Nobody traces any more who has not asked for a while."""
    region = live.region
    if region.trace is None or since > region.trace.until:
        region.trace = None
        return
    region.trace.add(
        TraceEvent(
            time_ns=since,
            duration_ns=took,
            pid=live.model.pid or 0,
            tid=tid,
            offset=addr - live.model.window.start,
            access=access_of(flags).value,
            how=_HOW[how],
        )
    )


def access_of(flags: int) -> Access:
    """What a fault with these flags wanted."""
    return Access.WRITE if flags & _STORE else Access.READ


def _cause(vma: Vma | None, access: Access | None) -> str:
    """Why a touch inside a region was refused, in a word."""
    if vma is None:
        return "hole"
    if not vma.prot & PROT_RW or (access is not None and not access.allowed_by(vma.prot)):
        return "protection"
    return "memory" if vma.file is None else "file"
