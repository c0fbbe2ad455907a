"""Writing down what is to outlive the daemon, before anybody is told of it.

What a request has changed, and its answer, stand in one entry of the journal. A client whose answer was lost asks for
it again: it is carried out once, or never was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from mshared import encoding
from mshared import records as rec
from mshared.journal import Journal
from mshared.processes import start_time
from msharefs import protocol
from msharefs.addr import AddrRange
from msharefs.errors import NoSpaceError
from msharefs.frames import StoreNo, store_of
from msharefs.host_mm import HostMm
from msharefs.region import RegionId
from msharefs.vma import FileId

if TYPE_CHECKING:
    from mshared.backing import Backing
    from mshared.files import MappedFile
    from mshared.live import LiveAttachment, LiveRegion
    from mshared.under_way import Unwritten

log = logging.getLogger(__name__)

_WORTH_IT: Final = 4 << 20
"""Bytes by which the journal has grown, at least, before it is written anew."""


@attrs.frozen
class Asked:
    """Whose request is being answered: the client's session and process, and how many requests came before it."""

    session: str
    pid: int
    started: int | None
    number: int

    def next(self) -> Asked:
        """The one that comes after it."""
        return Asked(self.session, self.pid, self.started, self.number + 1)


asked: Final[ContextVar[Asked | None]] = ContextVar("asked", default=None)
"""Set around each request of a connection."""


class Book:
    """The journal, the ``answers`` in it, and the ``regions`` of which it tells, by number.

    Those that have ended are among them as long as anything of them is needed. Without a journal nothing is written
    down.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal
        self.answers: dict[str, rec.Answered] = {}
        self.regions: dict[int, LiveRegion] = {}
        self.grown: Callable[[], None] = lambda: None
        """Called when it would be worth writing everything anew."""
        self._least = _WORTH_IT
        self._owed: tuple[rec.Record, ...] = ()
        """What could not be written, and holds all the same: it comes first the next time."""

    def commit(self, *records: rec.Record, reply: protocol.Reply | None = None, region: int | None = None) -> None:
        """Have records hold from now on, and ``reply`` be the answer to the request that is under way about ``region``.

        What has changed already holds anyhow: without room it is owed, and written first the next time. So that this
        does not happen requests see to it before (``check_room``), and faults after (``is_settled``).
        """
        if self.journal is None or not self.journal.is_open:
            return
        now = asked.get()
        if reply is not None and now is not None and now.session:
            answer = rec.Answered(now.session, now.pid, now.started, now.number, protocol.encode(reply), region)
            records = (*records, answer)
            self.answers[now.session] = answer
        owed_before = bool(self._owed)
        self._owed += records
        try:
            if self._owed:
                self.journal.append(encoding.encode(self._owed))
                self._owed = ()
        except NoSpaceError as error:
            if not owed_before:
                log.warning("%s; until then some who wait for memory go on waiting", error)
        if self.journal.size > self._least:
            self.grown()

    def is_settled(self) -> bool:
        """Whether everything is written down that holds; what was owed is, if there is room by now."""
        if self._owed:
            self.commit()
        return not self._owed

    def forget(self, region: LiveRegion) -> None:
        """Nothing is left of a region."""
        if self.regions.pop(region.model.id, None) is not None:
            self.commit(rec.RegionGone(region.model.id))

    def take_back_answer(self) -> None:
        """The request that is under way has come to nothing after all."""
        now = asked.get()
        if now is not None:
            self.end_session(now.session)

    def resume(self, hello: protocol.Hello, pid: int) -> tuple[Asked, bytes | None, trio.Event | None]:
        """Where a client's session goes on, and the answer to the request that waits, if that was carried out.

        The event is set when the files have what that request has left to be written.
        """
        found = self.answers.get(hello.session) if hello.waiting else None
        known = found is not None and (found.pid, found.number) == (pid, hello.answered + 1)
        asked_last = Asked(hello.session, pid, start_time(pid), hello.answered + known)
        if found is None or not known:
            return asked_last, None, None
        region = None if found.region is None else self.regions.get(found.region)
        return asked_last, found.reply, None if region is None else region.written

    def end_session(self, session: str) -> None:
        """Nobody will ask for its answers again."""
        if self.answers.pop(session, None) is not None:
            self.commit(rec.SessionGone(session))

    def check_room(self) -> None:
        """Have room for what is to be written. Raises NoSpaceError while nothing has changed."""
        if self.journal is not None:
            self.journal.check_room()

    def rewrite(self, *others: rec.Record) -> None:
        """Have all that holds now, and ``others``, in the place of all that was written. Raises NoSpaceError."""
        if self.journal is not None:
            regions = list(self.regions.values())
            records = [record for region in regions for record in everything_of(region)]
            records += [attachment_is(each) for region in regions for each in region.attachments]
            self.journal.replace(encoding.encode([*others, *records, *self.answers.values()]))
            self._owed = ()
            self._least = 2 * self.journal.size + _WORTH_IT


def region_is(region: LiveRegion) -> rec.RegionIs:
    """How a region is."""
    mm = region.model.mm
    layout = rec.Layout(
        mm.ar,
        mm.table.levels,
        mm.page,
        mm.granule,
        mm.paging_all,
        mm.hole_signal,
        mm.rule.forked,
        region.family.number,
        mm.store,
    )
    fields = encoding.region_fields(region.model)
    digests = region.digests.fd if region.digests is not None else None
    memory = memory_of(region.backing, stash=region.stash_fd, digests=digests)
    return rec.RegionIs(fields, layout, memory, region.created_ns, region.closed, region.sponsor)


def memory_of(backing: Backing, *, stash: int | None, digests: int | None = None) -> rec.Memory:
    """The files of a region."""
    path, mount = (None if each is None else str(each) for each in (backing.path, backing.mount))
    return rec.Memory(backing.fd, backing.writable, backing.readonly, stash, backing.start, path, mount, digests)


def nameless(region: LiveRegion) -> rec.RegionIs:
    """How a region is that is about to lose its name."""
    now = region_is(region)
    return attrs.evolve(now, model={**now.model, "name": None})


def unsponsored(region: LiveRegion) -> rec.RegionIs:
    """How a region is that nobody keeps any more."""
    now = region_is(region)
    return attrs.evolve(now, model={**now.model, "kept": False}, sponsor=None)


def mapped(region: LiveRegion, ar: AddrRange | None = None, *, cleared: bool = False) -> rec.Mapped:
    """What is mapped in a range of a region, by default in all of it."""
    where = ar or region.model.ar
    vmas = tuple(vma.clipped(where) for vma in region.model.mm.vmas.overlapping(where))
    return rec.Mapped(region.model.id, where, vmas, cleared)


def file_is(region: RegionId, number: FileId, file: MappedFile) -> rec.FileIs:
    """A file that is mapped into a region."""
    path = str(Path(f"/proc/self/fd/{file.fd}").readlink())
    return rec.FileIs(region, number, file.fd, path, file.magic)


def dirty(region: LiveRegion, ar: AddrRange) -> rec.Dirty:
    """What in a range of a region its files do not have."""
    pages = region.model.mm.dirty(ar)
    pages += [part for run in region.writing if (part := run.intersect(ar)) is not None]
    return rec.Dirty(region.model.id, ar, tuple(sorted(pages)))


def newly_attached(attachment: LiveAttachment, token: str | None) -> list[rec.Record]:
    """A new attachment, which takes the twin with that token, and what it is to, if nobody was before."""
    region = attachment.region
    before = [] if region.recorded else list(everything_of(region))
    taken = [] if token is None else [rec.UntakenGone(token)]
    return [*before, *taken, attachment_is(attachment)]


def dirty_if_any(region: LiveRegion, ar: AddrRange) -> tuple[rec.Dirty, ...]:
    """The same, where files are mapped at all."""
    return (dirty(region, ar),) if region.files else ()


def attachment_is(attachment: LiveAttachment) -> rec.AttachmentIs:
    """How an attachment is."""
    return rec.AttachmentIs(
        attachment.region.model.id,
        attachment.model,
        attachment.anchor,
        attachment.uffd.fd,
        attachment.sigbus.fd if attachment.sigbus is not None else None,
        attachment.parent_pid,
        attachment.started,
        tuple((each.ar, each.addr) for each in attachment.staged),
        tuple(attachment.poisoned),
        tuple(attachment.refused),
        attachment.uid,
        attachment.unarmed,
    )


def everything_of(region: LiveRegion) -> Iterator[rec.Record]:
    """All there is to say of a region, without its attachments."""
    number = region.model.id
    yield region_is(region)
    if region.closed:
        return
    yield mapped(region)
    yield from (file_is(region.model.id, file, held) for file, held in region.files.items())
    yield from dirty_if_any(region, region.model.ar)
    if region.model.mm.borrowed:
        yield rec.Refers(number, tuple(_foreign(region.model.mm)))
    if region.change is not None:
        yield region.change
        yield rec.Moved(number, region.steps)
    yield from (set_aside(region, each) for each in region.unwritten)
    yield from (rec.PoisonedForAll(number, page, on=True) for page in region.poisoned)


def set_aside(region: LiveRegion, piece: Unwritten) -> rec.SetAside:
    """Bytes for a file that are in memory no more."""
    return rec.SetAside(region.model.id, piece.number, piece.fd, piece.offset, piece.data, piece.magic)


def _foreign(mm: HostMm) -> list[tuple[AddrRange, StoreNo]]:
    """Pages that lie in relatives' stores, neighbours as one."""
    found: list[tuple[AddrRange, StoreNo]] = []
    for run, pte in mm.table.runs(mm.ar):
        store = store_of(pte.frame)
        if store == mm.store:
            continue
        if found and found[-1][1] == store and found[-1][0].end == run.start:
            run = AddrRange(found.pop()[0].start, run.end)
        found.append((run, store))
    return found
