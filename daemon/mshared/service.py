"""What each request means: from a checked message to the model, to effects, to the answer.

No sockets and no FUSE in here: both are adapters to this. Only ``attach`` and what reads statistics wait; everything
else runs from decision to effect without an await.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import attrs
import trio

from mshared import apply, book, donations
from mshared.answers import Answer, Caller, Pending, Tell
from mshared.backing import BackingStore
from mshared.book import region_is
from mshared.changes import Changes, Opened
from mshared.file_mappings import FileMappings
from mshared.lifetimes import Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.names import Names
from mshared.snapshots import Snapshots, expect_stores
from mshared.tickets import Ticket, read_ticket
from mshared.twin_parts import Wish
from mshared.views import Views
from mshared.writeback import write_out
from msharefs import protocol
from msharefs.addr import AddrRange, round_up
from msharefs.effects import Change
from msharefs.errors import (
    AccessDeniedError,
    BadDescriptorError,
    InvalidArgumentError,
    MshareError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    TryAgainError,
)
from msharefs.namespace import Namespace, check_window
from msharefs.perms import Prot
from msharefs.region import BackingKind, Region, RegionId

INODES_A_REGION = 16
"""Inode numbers of a region: its file has number x region id, its info files follow. Never given twice."""
_CREATOR_PATIENCE = 0.05
"""Seconds an attach waits for the region's creator before the client is asked to come again.

Not longer: the creator may be another thread of that client, and speaks on the same connection.
"""


class Service:
    """The daemon's public behaviour."""

    def __init__(
        self,
        namespace: Namespace,
        lifetimes: Lifetimes,
        store: BackingStore,
        *,
        default_backing: BackingKind,
        changes: Changes,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.namespace = namespace
        self.lifetimes = lifetimes
        self.store = store
        self.default_backing = default_backing
        self._changes = changes
        self.snapshots = Snapshots(namespace, lifetimes, store)
        self.book = lifetimes.book
        self.views = Views(namespace, lifetimes, notes)
        self.names = Names(namespace, lifetimes, self._by_ticket)
        self.files = FileMappings(namespace, lifetimes, store, self._backing_kind, self.snapshots.end)

    def create(
        self, caller: Caller, request: protocol.Create, files: list[Opened], sponsor: list[int] | None = None
    ) -> tuple[Answer, Pending | None]:
        """Make a region and offer it to its creator, or say that it exists.

        The files of what is donated are taken out of ``files`` when they are the region's, and so is the pidfd in
        ``sponsor`` of the process that keeps it.
        """
        if request.readonly and request.donated:
            raise InvalidArgumentError("memory cannot be donated through a read-only window; use O_RDWR")
        existing = self._find_or_none(request.name)
        if existing is not None and not request.exclusive:
            return Answer(protocol.Exists()), None
        kind = self._backing_kind(request.backing)
        model = self.namespace.create(
            request.name,
            request.addr,
            request.size,
            request.mode,
            kind,
            caller.who,
            empty=request.empty or bool(request.donated),
            used=request.used,
            kept=request.kept,
        )
        try:
            backing = self.store.create(model.id, kind, model.ar.size)
        except BaseException:
            self.namespace.abandon(model)
            raise
        live = self.lifetimes.add_region(model, backing)
        try:
            donations.map_donated(live, request.donated, files)
            live.reserve(AddrRange.sized(model.ar.start, round_up(request.used or request.size, model.mm.page)))
            if request.kept:
                self.lifetimes.sponsors.keep(live, sponsor or [])
        except BaseException:
            self.namespace.abandon(model)
            self.lifetimes.forget(live)
            raise
        pending = Pending(live, readonly=request.readonly, creator=True, donated=request.donated)
        return self._offer(live, model.ar.start, readonly=request.readonly), pending

    async def attach(
        self, caller: Caller, request: protocol.Attach, ticket_fd: int, device: tuple[int, int]
    ) -> tuple[Answer, Pending]:
        """Offer an existing region to whoever could open its file. Waits a little while its creator is at work."""
        ticket = read_ticket(ticket_fd, device)
        live = await self._settled(self._by_ticket(ticket))
        size = live.model.ar.size
        if request.length not in (0, size):
            raise InvalidArgumentError(
                f"region {live.model.name!r} has {size:#x} bytes, not {request.length:#x}; ask for 0"
            )
        self.lifetimes.sweep(self.lifetimes.of_process(live.model, caller.pid))
        readonly = not ticket.writable
        addr = live.model.ar.start if request.addr is None else request.addr
        check_window(live.model, addr)
        return self._offer(live, addr, readonly=readonly), Pending(live, readonly, creator=False)

    async def map_file(self, caller: Caller, request: protocol.MapFile, fd: int) -> tuple[Answer, Pending | None]:
        """Offer a window on what processes share of a file, or say why it is to be mapped as any file is."""
        found = await self.files.map(caller, request, fd)
        if isinstance(found, str):
            return Answer(protocol.Ordinary(found)), None
        live, pending = found
        answer = self._offer(live, live.model.ar.start, readonly=pending.readonly)
        assert isinstance(answer.reply, protocol.Offer)
        own = live.model.file is not None and live.model.file.resident
        reply = attrs.evolve(answer.reply, own=own, shared=pending.unarmed)
        return Answer(reply, answer.fds[1:] if own else answer.fds), pending

    def mapped(self, caller: Caller, request: protocol.Mapped, pending: Pending, fds: list[int]) -> Answer:
        """Arm the window and count it. The userfaultfds are taken out of ``fds`` when they are the daemon's."""
        region = pending.region
        if self.namespace.get(region.model.id) is None:
            raise NotFoundError("the region is gone; it was removed in the meantime")
        if pending.creator and region.attachments:
            raise InvalidArgumentError("the window of this offer stands already")
        self.book.check_room()
        live = self.lifetimes.attach(
            region,
            request.addr,
            caller.pid,
            fds[0],
            request.anchor,
            readonly=pending.readonly,
            sigbus=fds[1] if len(fds) > 1 else None,
            staged=donations.stage(region.model, pending.donated, request.staged),
            unsettled=bool(pending.donated),
            token=pending.token,
            unarmed=pending.unarmed,
            uid=caller.who.uid,
        )
        self.files.attached(region, readonly=pending.readonly)
        fds.clear()
        reply = protocol.Attached(live.model.id)
        for effects in donations.settling(region.model, pending.donated):
            self._change(live, effects)
        if pending.donated and not live.staged:
            self._let_in(region, reply)
        return Answer(reply)

    def _let_in(self, region: LiveRegion, reply: protocol.Reply) -> None:
        """Nothing more is to come before others may attach."""
        region.model.ready = True
        region.note(region_is(region), reply=reply)
        region.settled.set()

    def settled(self, caller: Caller, pending: Pending) -> Answer:
        """Let others in: the creator has moved to its place what was staged."""
        region = pending.region
        if self.namespace.get(region.model.id) is None:
            raise NotFoundError("the region is gone; create it anew")
        windows = self.lifetimes.of_process(region.model, caller.pid) if pending.creator else []
        staged = sum(len(window.staged) for window in windows)
        if not windows or staged:
            raise InvalidArgumentError(f"{len(windows)} windows of this offer stand, and {staged} mappings are staged")
        self._let_in(region, protocol.Done())
        return Answer(protocol.Done())

    def give_up(self, pending: Pending) -> None:
        """Forget an offer; a region whose creator gives up never was."""
        live = pending.region
        if pending.creator and not live.model.ready and not live.closed:
            donations.undo(live, self.lifetimes.read_events)
            for attachment in list(live.attachments):
                self.lifetimes.drop(attachment)
            self.namespace.abandon(live.model)
            self.lifetimes.forget(live)
        else:
            self.snapshots.end(live)

    def adopt(self, caller: Caller, request: protocol.Adopt, uffd: int | None) -> Answer:
        """Tell a forked child which attachment is its own."""
        if self.lifetimes.fork_events:
            live = self.lifetimes.adopt(request.attachment, caller.pid)
        elif uffd is None:
            raise BadDescriptorError("without fork events a child must send a userfaultfd of its own")
        else:
            live = self.lifetimes.adopt_without_events(request.attachment, caller.pid, uffd)
            live.uid = caller.who.uid
        return Answer(protocol.Attached(live.model.id))

    def detach(self, caller: Caller, request: protocol.Detach) -> Answer:
        """End one reference of the caller's own. The last one has files hold every store first."""
        ended = self.lifetimes.gone.get(request.attachment)
        if ended is not None:  # Its window was gone before this daemon came, which is bringing the files up to date.
            return Answer(protocol.Done(), after=ended.written)
        live = self._own(caller, request.attachment)
        self.lifetimes.drop(live, protocol.Done())
        if live.region.has_stores:  # Others may have died just now, so that this was the last one.
            self.lifetimes.sweep(list(live.region.attachments))
        return Answer(protocol.Done(), after=live.region.written)

    async def change(self, caller: Caller, request: protocol.Changing, file: int | None) -> Answer:
        """Change what is mapped inside the region of one of the caller's attachments, for everybody."""
        live = self._own(caller, request.attachment)
        self.book.check_room()
        region = live.region
        if region.lock.locked():
            await region.lock.acquire()
        else:
            region.lock.acquire_nowait()
        try:
            live = self._own(caller, request.attachment)  # Still.
            return await self._change_locked(live, request, file)
        finally:
            try:
                if region.unwritten:
                    with trio.CancelScope(shield=True):
                        await write_out(region)
            finally:
                region.lock.release()
                if not region.attachments and not region.closed:
                    self.lifetimes.settling.request(region)

    async def _change_locked(self, live: LiveAttachment, request: protocol.Changing, file: int | None) -> Answer:
        if live.region.model.file is not None:
            self.files.check(live.region, request)
        match request:
            case protocol.Mmap():
                return Answer(await self._changes.mmap(live, request, file))
            case protocol.Munmap():
                await self._changes.munmap(live, request)
            case protocol.Mprotect():
                await self._changes.mprotect(live, request)
                if live.region.model.file is not None:
                    live.region.model.file.mode = Prot(request.prot)
                    live.region.note(region_is(live.region))
            case protocol.Madvise():
                await self._changes.madvise(live, request)
            case protocol.Msync():
                await self._changes.msync(live, request)
        return Answer(protocol.Done())

    async def snapshot(self, caller: Caller, request: protocol.Snapshot, tell: Tell) -> tuple[Answer, list[str]]:
        """Make private twins for a child of the caller's; their tokens."""
        windows = [self._forkable(caller, number) for number in request.attachments]
        self.book.check_room()
        tokens = await self.snapshots.for_child(windows, caller.who, tell)
        return Answer(protocol.Snapshots(tuple(tokens))), tokens

    def forget(self, tokens: Iterable[str]) -> None:
        """Nobody will take these twins."""
        self.snapshots.forget(tokens)

    def take(self, caller: Caller, request: protocol.Take) -> tuple[Answer, Pending]:
        """Offer a child the twin that was made for it."""
        untaken = self.snapshots.take(request.token, caller.who)
        try:
            check_window(untaken.twin.model, request.addr)
        except MshareError:
            self.snapshots.end(untaken.twin)
            raise
        readonly = untaken.taker.readonly
        pending = Pending(untaken.twin, readonly, creator=False, token=request.token)
        return self._offer(untaken.twin, request.addr, readonly=readonly), pending

    async def fork(self, caller: Caller, request: protocol.Fork, tell: Tell) -> Answer:
        """Make a copy-on-write twin of a region that the caller has a window on.

        Its owner may write it, and pages that it has in common with other forks of the region come to lie in it. So
        whoever makes one must be trusted with the region's contents already: may write it, or own it.
        """
        live = self._forkable(caller, request.attachment)
        self.book.check_room()
        origin = live.region
        if live.model.readonly and caller.who.uid not in (0, origin.model.owner.uid):
            raise AccessDeniedError(f"forking {origin.model.name!r} takes a window that may write; open it O_RDWR")
        wish = Wish(origin, request.name, request.mode)
        twins = await self.snapshots.fork([wish], caller.who, protocol.Done(), tell)
        return Answer(protocol.Done(), then=partial(expect_stores, twins))

    def own_region(self, caller: Caller, attachment: int) -> LiveRegion:
        """The region behind one of the caller's attachments."""
        return self._own(caller, attachment).region

    def traced_region(self, caller: Caller, ticket: Ticket) -> LiveRegion:
        """The same, for a caller who wants to see each fault, and so what other users' processes touch.

        Whoever may write the region could find that out anyhow, by taking pages away.
        """
        live = self._by_ticket(ticket)
        if not ticket.writable and caller.who.uid not in (0, live.model.owner.uid):
            raise AccessDeniedError(f"tracing {live.model.name!r} takes permission to write it, or to own it")
        return live

    def ticket_region(self, ticket: Ticket) -> LiveRegion:
        """The region whose file was opened."""
        return self._by_ticket(ticket)

    def _find_or_none(self, name: str) -> Region | None:
        try:
            return self.namespace.find(name)
        except NotFoundError:
            return None

    def _by_ticket(self, ticket: Ticket) -> LiveRegion:
        number, part = divmod(ticket.inode, INODES_A_REGION)
        region = self.namespace.get(RegionId(number)) if number and not part else None
        if region is None:
            raise NotFoundError("the opened file is no region's, or its region is gone")
        return self.lifetimes.region(region)

    async def _settled(self, live: LiveRegion) -> LiveRegion:
        with trio.move_on_after(_CREATOR_PATIENCE):
            await live.settled.wait()
        if not live.settled.is_set():
            raise TryAgainError(f"region {live.model.name!r} is still being made; try again")
        if self.namespace.get(live.model.id) is None:
            raise NotFoundError("the region is gone: its creator did not finish; create it anew")
        return live

    def _own(self, caller: Caller, number: int) -> LiveAttachment:
        live = self.lifetimes.attachment(number)
        if live.model.pid != caller.pid:
            raise NotPermittedError(f"attachment {number} belongs to another process")
        if not live.region.model.ready:
            raise TryAgainError("the region is still being made; try again")
        return live

    def _forkable(self, caller: Caller, number: int) -> LiveAttachment:
        live = self._own(caller, number)
        if live.region.model.file is not None:
            raise InvalidArgumentError("a shared mapping of a file has no forks: it is the file")
        return live

    def _offer(self, live: LiveRegion, addr: int, *, readonly: bool) -> Answer:
        fd = live.backing.readonly if readonly else live.backing.writable
        device = () if self.lifetimes.uffd_device is None else (self.lifetimes.uffd_device,)
        inode, size, page = live.model.id * INODES_A_REGION, live.model.ar.size, live.model.mm.page
        reply = protocol.Offer(0, inode, addr, size, readonly, bool(device), page, live.model.used)
        return Answer(reply, (fd, *device))

    def _backing_kind(self, wanted: str | None) -> BackingKind:
        if wanted is None:
            return self.default_backing
        try:
            return BackingKind(wanted)
        except ValueError:
            raise InvalidArgumentError(f"backing {wanted!r} is none of {', '.join(BackingKind)}") from None

    def _change(self, live: LiveAttachment, effects: list[Change]) -> None:
        """Carry out a change of the attached region; running out of memory ends the attachment, not the daemon."""
        try:
            apply.carry_out(live.region, effects, self.lifetimes.read_events, book.mapped(live.region))
        except OSError as error:
            self.lifetimes.drop(live)
            raise NoSpaceError(f"no memory for the change: {error.strerror}") from error
