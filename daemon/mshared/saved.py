"""What a row of records comes to: how everything stood when the daemon ended. Pure, as the records are."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from mshared import encoding
from mshared import records as rec
from msharefs.addr import AddrRange, united
from msharefs.armings import cut
from msharefs.errors import InternalError
from msharefs.frames import StoreNo
from msharefs.perms import PROT_RW
from msharefs.vma import Arming, FileId, Vma
from msharefs.vma_set import VmaSet

Pages = list[tuple[AddrRange, StoreNo]]
"""Ranges in whose store they lie: apart, in order."""


@attrs.define
class SavedRegion:
    """A region: its last ``RegionIs``, and what other records say of it.

    ``foreign`` are pages that lie in relatives' stores, unless its own store has them: a page that was brought is no
    news. ``change`` is one that memory was still to be moved for, of which ``steps`` were taken.
    """

    last: rec.RegionIs
    vmas: VmaSet = attrs.Factory(VmaSet)
    files: dict[FileId, rec.FileIs] = attrs.Factory(dict)
    dirty: list[AddrRange] = attrs.Factory(list)
    foreign: Pages = attrs.Factory(list)
    change: rec.Begun | None = None
    steps: int = 0
    aside: dict[int, rec.SetAside] = attrs.Factory(dict)
    poisoned: set[AddrRange] = attrs.Factory(set)


@attrs.define
class Saved:
    """Everything, by number. ``gone`` are attachments from before, and their regions."""

    regions: dict[int, SavedRegion] = attrs.Factory(dict)
    attachments: dict[int, rec.AttachmentIs] = attrs.Factory(dict)
    gone: dict[int, int] = attrs.Factory(dict)
    untaken: dict[str, rec.UntakenIs] = attrs.Factory(dict)
    answers: dict[str, rec.Answered] = attrs.Factory(dict)
    next_region: int = 1
    next_attachment: int = 1

    @classmethod
    def of(cls, entries: Iterable[bytes]) -> Saved:
        """What the entries of a journal come to. Raises InternalError when they contradict each other."""
        saved = cls()
        for entry in entries:
            for record in encoding.decode(entry):
                saved.add(record)
        return saved

    def add(self, record: rec.Record) -> None:
        """Have one more record hold. Raises InternalError for one about what is not there."""
        try:
            _apply(record, self)
        except KeyError as error:
            raise InternalError(f"{record} is about {error}, which is not there") from error


def outside(pages: Pages, ar: AddrRange) -> Iterator[tuple[AddrRange, StoreNo]]:
    """What of some pages lies outside a range."""
    for run, store in pages:
        yield from ((part, store) for part in cut(run, [ar.start, ar.end]) if not ar.covers(part))


def _without(ranges: Iterable[AddrRange], ar: AddrRange) -> list[AddrRange]:
    return [part for run in ranges for part in cut(run, [ar.start, ar.end]) if not ar.covers(part)]


@functools.singledispatch
def _apply(record: Any, _saved: Saved) -> None:  # noqa: ANN401 - whatever has no function below
    raise InternalError(f"{record} is no record")


@_apply.register
def _(record: rec.RegionIs, saved: Saved) -> None:
    found = saved.regions.get(record.id)
    if found is None:
        saved.regions[record.id] = SavedRegion(record)
        saved.next_region = max(saved.next_region, record.id + 1)
    else:
        found.last = record


@_apply.register
def _(record: rec.RegionGone, saved: Saved) -> None:
    saved.regions.pop(record.region, None)


@_apply.register
def _(record: rec.Mapped, saved: Saved) -> None:
    region = saved.regions[record.region]
    region.vmas.remove(record.ar)
    for vma in record.vmas:
        region.vmas.insert(vma)
    if record.cleared:
        region.foreign = list(outside(region.foreign, record.ar))
        region.dirty = _without(region.dirty, record.ar)


@_apply.register
def _(record: rec.FileIs, saved: Saved) -> None:
    saved.regions[record.region].files[record.file] = record


@_apply.register
def _(record: rec.FileGone, saved: Saved) -> None:
    saved.regions[record.region].files.pop(record.file, None)


@_apply.register
def _(record: rec.Begun, saved: Saved) -> None:
    region = saved.regions[record.region]
    region.change, region.steps = record, 0


@_apply.register
def _(record: rec.Moved, saved: Saved) -> None:
    saved.regions[record.region].steps = record.steps


@_apply.register
def _(record: rec.Ended, saved: Saved) -> None:
    region = saved.regions[record.region]
    region.change, region.steps = None, 0


@_apply.register
def _(record: rec.Dirty, saved: Saved) -> None:
    region = saved.regions[record.region]
    region.dirty = united(sorted([*_without(region.dirty, record.ar), *record.pages]))


@_apply.register
def _(record: rec.SetAside, saved: Saved) -> None:
    saved.regions[record.region].aside[record.number] = record


@_apply.register
def _(record: rec.Written, saved: Saved) -> None:
    saved.regions[record.region].aside.pop(record.number, None)


@_apply.register
def _(record: rec.Forked, saved: Saved) -> None:
    """What lies in shared files both have from there, and what nobody may touch, each has for itself."""
    origin = saved.regions[record.origin]
    saved.add(_fork_of(origin.last, record))
    twin = saved.regions[record.region]
    twin.vmas = origin.vmas.fork()
    own = [(ar, origin.last.layout.store) for ar in record.present]
    older = origin.foreign
    for ar in record.present:
        older = list(outside(older, ar))
    twin.foreign = sorted(part for pages in (own, older) for part in _touchable(twin.vmas, pages))


@_apply.register
def _(record: rec.Refers, saved: Saved) -> None:
    saved.regions[record.region].foreign = list(record.pages)


@_apply.register
def _(record: rec.Inherited, saved: Saved) -> None:
    for region in saved.regions.values():
        layout = region.last.layout
        if layout.family != record.family or not any(store == record.source for _, store in region.foreign):
            continue
        kept = list(outside(region.foreign, record.ar))
        inside = [(part, store) for run, store in region.foreign if (part := run.intersect(record.ar)) is not None]
        for part, store in inside:
            if store != record.source:
                kept.append((part, store))
            elif layout.store != record.target:
                kept.append((part, record.target))
        region.foreign = sorted(kept)


@_apply.register
def _(record: rec.AttachmentIs, saved: Saved) -> None:
    saved.attachments[record.model.id] = record
    saved.next_attachment = max(saved.next_attachment, record.model.id + 1)


@_apply.register
def _(record: rec.AttachmentGone, saved: Saved) -> None:
    saved.attachments.pop(record.attachment, None)


@_apply.register
def _(record: rec.WasAttached, saved: Saved) -> None:
    saved.gone[record.attachment] = record.region


@_apply.register
def _(record: rec.Poisoned, saved: Saved) -> None:
    found = saved.attachments[record.attachment]
    saved.attachments[record.attachment] = attrs.evolve(found, poisoned=_changed(found.poisoned, record))


@_apply.register
def _(record: rec.Refused, saved: Saved) -> None:
    found = saved.attachments[record.attachment]
    saved.attachments[record.attachment] = attrs.evolve(found, refused=_changed(found.refused, record))


@_apply.register
def _(record: rec.PoisonedForAll, saved: Saved) -> None:
    region = saved.regions[record.region]
    (region.poisoned.add if record.on else region.poisoned.discard)(record.page)


@_apply.register
def _(record: rec.UntakenIs, saved: Saved) -> None:
    saved.untaken[record.token] = record


@_apply.register
def _(record: rec.UntakenGone, saved: Saved) -> None:
    saved.untaken.pop(record.token, None)


@_apply.register
def _(record: rec.Answered, saved: Saved) -> None:
    saved.answers[record.session] = record


@_apply.register
def _(record: rec.SessionGone, saved: Saved) -> None:
    saved.answers.pop(record.session, None)


@_apply.register
def _(record: rec.Counters, saved: Saved) -> None:
    saved.next_region = max(saved.next_region, record.region)
    saved.next_attachment = max(saved.next_attachment, record.attachment)


def _changed(pages: tuple[int, ...], record: rec.Poisoned | rec.Refused) -> tuple[int, ...]:
    kept = tuple(addr for addr in pages if addr != record.addr)
    return (*kept, record.addr) if record.on else kept


def _touchable(vmas: VmaSet, pages: Pages) -> Iterator[tuple[AddrRange, StoreNo]]:
    """What of some pages lies where memory may be touched that is not a shared file's."""
    for run, store in pages:
        for vma in filter(_holds_pages, vmas.overlapping(run)):
            yield vma.clipped(run).ar, store


def _holds_pages(vma: Vma) -> bool:
    return bool(vma.prot & PROT_RW) and not vma.reaches_file


def _fork_of(origin: rec.RegionIs, how: rec.Forked) -> rec.RegionIs:
    """How a fork is when it is made (compare ``Namespace.fork``, ``forking.fork``)."""
    model = {
        "id": how.region,
        "name": how.name,
        "owner": attrs.asdict(how.owner),
        "backing": origin.model["backing"],
        "ready": True,
        "origin": how.of,
        "used": origin.model.get("used"),
    }
    layout = attrs.evolve(origin.layout, forked=Arming.MISSING, store=how.store)
    return rec.RegionIs(model, layout, how.memory, how.created_ns)
