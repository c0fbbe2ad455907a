"""What is told about regions: lists, statistics, maps. Nothing changes but the tables, which are brought up to date."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

from mshared.answers import Answer, Caller
from mshared.facts import read_kernel
from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from mshared.observed import Trace
from msharefs import dump, heat, protocol
from msharefs.errors import NotFoundError
from msharefs.namespace import Namespace
from msharefs.region import BackingKind


class Views:
    """What anybody may know who may know of the region. ``notes``: what the machine lacks, in words.

    What waits raises NotFoundError when the region ends meanwhile.
    """

    def __init__(self, namespace: Namespace, lifetimes: Lifetimes, notes: tuple[str, ...] = ()) -> None:
        self._namespace = namespace
        self._lifetimes = lifetimes
        self._notes = notes

    def listing(self, request: protocol.GetList) -> Answer:
        """The regions of the mount, or the files that are shared without a name, as many as one packet takes."""
        self._lifetimes.sweep()
        after = request.after
        shown = sorted(self._namespace.files(), key=lambda r: r.title) if request.files else self._namespace
        names = [dump.region_name(r) for r in shown if after is None or r.title > after]
        count = protocol.fitting(names)
        return Answer(protocol.Listing(tuple(names[:count]), more=count < len(names)))

    async def heat(self, region: LiveRegion, request: protocol.GetHeat) -> Answer:
        """What a region holds where."""
        with _memory_of(region) as fd:
            await self.refresh(region, fd)
        return Answer(heat.heat(region.model, request.cells))

    def refusals(self, caller: Caller, request: protocol.GetRefusals) -> Answer:
        """The last touches that were refused, in regions that the caller may read; as many as one packet takes."""
        found = self._lifetimes.journal.seen_by(caller.who, request.after)
        count = protocol.fitting(found)
        return Answer(protocol.Refusals(tuple(found[:count]), more=count < len(found)))

    def trace(self, region: LiveRegion, request: protocol.GetTrace) -> Answer:
        """The faults of a region after one, as many as one packet takes; from the first time it is asked on."""
        if region.trace is None:
            region.trace = Trace()
        trace = region.trace
        start = trace.count if request.after is None else min(request.after, trace.count)
        events, lost = trace.after(start)
        count = protocol.fitting(events)
        last = start + lost + count
        return Answer(protocol.Traced(tuple(events[:count]), last, lost, more=last < trace.count))

    async def stat(self, region: LiveRegion) -> protocol.RegionStat:
        """Everything known about a region, brought up to date first."""
        self._lifetimes.sweep(region.attachments)
        self._lifetimes.forks.look()
        with _memory_of(region) as fd:
            facts = await trio.to_thread.run_sync(read_kernel, fd, region, self._notes)
            await self.refresh(region, fd)
        return dump.region_stat(region.model, facts)

    async def metrics(self) -> str:
        """What there is to measure, of all regions and shared files that are there to the end."""
        stats: list[tuple[LiveRegion, protocol.RegionStat]] = []
        for region in self._lifetimes.regions():
            if region.model.name or (region.model.file and region.model.ready):
                with contextlib.suppress(NotFoundError):
                    stats.append((region, await self.stat(region)))
        there = [(region.model, stat) for region, stat in stats if not region.ended]
        named = [stat for model, stat in there if model.name]
        return dump.metrics_text(named, [stat for model, stat in there if model.file])

    async def maps(self, region: LiveRegion, request: protocol.GetMaps) -> Answer:
        """The VMAs of a region, as many as one packet takes."""
        with _memory_of(region) as fd:
            await self.refresh(region, fd)
        vmas = [vma for vma in dump.vmas(region.model) if request.after is None or vma.offset > request.after]
        count = protocol.fitting(vmas)
        return Answer(protocol.Maps(tuple(vmas[:count]), more=count < len(vmas)))

    async def refresh(self, region: LiveRegion, fd: int) -> None:
        """Bring the tables of native memory up to date with what the kernel did on its own to the backing file."""
        model = region.model
        present = await trio.to_thread.run_sync(region.held_where_mapped, fd, region.mapped())
        _check_there(region)
        model.mm.sync((ar.moved(model.ar.start) for ar in present), huge=model.backing is not BackingKind.SMALL)


@contextlib.contextmanager
def _memory_of(region: LiveRegion) -> Iterator[int]:
    """A descriptor of a region's memory that outlives it. Raises NotFoundError."""
    _check_there(region)
    with region.backing.duplicate() as fd:
        yield fd


def _check_there(region: LiveRegion) -> None:
    """Not that the numbers of its descriptors stand for something else by now. Raises NotFoundError."""
    if region.closed:
        raise NotFoundError(f"region {region.model.title} is gone; it ended in the meantime")
