"""Forking regions: the moment at which everything stands still, and what the new ones are made of.

From the first page that is protected until all are, in every process of every region that is forked, no protected store
is let through: so no store that came after another is in the snapshot without it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import attrs
import trio

from mshared import apply, processes, sparse
from mshared import records as rec
from mshared.backing import BackingStore
from mshared.book import newly_forked, region_is
from mshared.killpoints import point
from mshared.lifetimes import Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.writeback import flush, write_out
from msharefs import forking, protocol
from msharefs.errors import NoMemoryError, NotFoundError
from msharefs.namespace import Namespace
from msharefs.perms import PROT_RW, Credentials
from msharefs.region import BackingKind

log = logging.getLogger(__name__)

_UNTIL_PREPARED: Final = 0.002
"""Seconds after a fork until the next one is prepared: whoever forked goes on first, and so does who stores then."""


@attrs.frozen
class Wish:
    """A region to be forked, and what its twin shall be called; without a name it ends with its last attachment."""

    origin: LiveRegion
    name: str | None
    mode: int


@attrs.frozen
class Untaken:
    """A private twin that waits for the child it was made for, whose window is as its parent's."""

    twin: LiveRegion
    readonly: bool
    who: Credentials
    maker: int
    started: int | None


class Snapshots:
    """Makes forks of regions, and keeps those that were made for a child until it takes them."""

    def __init__(self, namespace: Namespace, lifetimes: Lifetimes, store: BackingStore) -> None:
        self._namespace = namespace
        self._lifetimes = lifetimes
        self._store = store
        self._untaken: dict[str, Untaken] = {}
        self._forked, self._to_prepare = trio.open_memory_channel[LiveRegion](math.inf)

    async def prepare(self) -> None:
        """After each fork, see to what it left undone, and have what the next one needs ready; for ever."""
        async for twin in self._to_prepare:
            await trio.sleep(_UNTIL_PREPARED)
            try:
                twin.page_tables_before = processes.all_page_table_bytes()
                await trio.to_thread.run_sync(self._store.prepare, twin.backing.kind)
            except (OSError, RuntimeError) as error:  # The second when no thread can be had.
                log.debug("no file is ready for the next fork: %s", error)

    async def for_child(self, windows: Sequence[LiveAttachment], who: Credentials) -> list[str]:
        """Private twins of the regions behind some windows, of one instant; a token for each."""
        tokens = [secrets.token_hex(16) for _ in windows]

        def untaken(twins: list[LiveRegion]) -> list[rec.Record]:
            for token, twin, window in zip(tokens, twins, windows, strict=True):
                pid = window.model.pid or 0
                self._untaken[token] = Untaken(twin, window.model.readonly, who, pid, window.started)
            return [self._record_of(token) for token in tokens]

        wishes = [Wish(window.region, None, 0) for window in windows]
        await self.fork(wishes, who, protocol.Snapshots(tuple(tokens)), untaken)
        return tokens

    def restore(self, token: str, untaken: Untaken) -> None:
        """Have a twin again that an earlier daemon has made."""
        self._untaken[token] = untaken

    def records(self) -> list[rec.Record]:
        """All that wait for their child."""
        return [self._record_of(token) for token in self._untaken]

    def _record_of(self, token: str) -> rec.UntakenIs:
        found = self._untaken[token]
        who = found.who
        return rec.UntakenIs(
            token,
            found.twin.model.id,
            found.readonly,
            who.uid,
            who.gid,
            tuple(sorted(who.groups)),
            found.maker,
            found.started,
        )

    def made_by(self, pid: int) -> set[str]:
        """Tokens of twins that a process has asked for and that nobody has taken."""
        return {token for token, untaken in self._untaken.items() if untaken.maker == pid}

    def take(self, token: str, who: Credentials) -> Untaken:
        """Hand a twin over, once. Raises NotFoundError."""
        found = self._untaken.get(token)
        if found is None or found.who != who:
            raise NotFoundError("there is no such snapshot; its maker has gone, or it was taken already")
        return self._untaken.pop(token)

    def forget(self, tokens: Iterable[str]) -> None:
        """Let twins go that nobody has taken."""
        for token in tokens:
            found = self._untaken.pop(token, None)
            if found is not None:
                found.twin.book.commit(rec.UntakenGone(token))
                self.end(found.twin)

    def forget_orphans(self) -> None:
        """Let twins go that an earlier daemon made for processes that have ended since."""
        for token, untaken in list(self._untaken.items()):
            if processes.start_time(untaken.maker) != untaken.started:
                self.forget([token])

    def end(self, twin: LiveRegion) -> None:
        """Let a twin go that has neither name nor window."""
        if twin.model.name is None and not twin.attachments and not twin.ended:
            self._namespace.abandon(twin.model)
            self._lifetimes.forget(twin)

    async def fork(
        self,
        wishes: Sequence[Wish],
        who: Credentials,
        reply: protocol.Reply | None = None,
        made: Callable[[list[LiveRegion]], list[rec.Record]] = lambda _: [],
    ) -> list[LiveRegion]:
        """The twins, of one instant for all. Raises MshareError with none made.

        ``reply`` is what the client is told, ``made`` is called with the twins for what is to be written down of them.
        """
        origins = sorted({wish.origin for wish in wishes}, key=lambda each: each.model.id)
        try:
            with contextlib.ExitStack() as stack:
                for origin in origins:
                    await _acquire(origin.lock)
                    stack.callback(origin.lock.release)
                for wish in wishes:
                    self._check(wish, who)
                    if wish.origin.files:
                        await flush(wish.origin, wish.origin.model.ar, self._lifetimes.read_events)
                twins = self._fork_now(wishes, who, reply, made)
                for origin in origins:
                    if origin.unwritten:
                        with trio.CancelScope(shield=True):
                            await write_out(origin)
                return twins
        finally:
            for origin in origins:
                if not origin.attachments and not origin.closed:  # Who went meanwhile left that to us.
                    self._lifetimes.settling.request(origin)

    def _check(self, wish: Wish, who: Credentials) -> None:
        if wish.origin.closed:
            raise NotFoundError("the region is gone")
        self._namespace.check_fork(wish.origin.model, wish.name, wish.mode, who)

    def _fork_now(
        self,
        wishes: Sequence[Wish],
        who: Credentials,
        reply: protocol.Reply | None,
        made: Callable[[list[LiveRegion]], list[rec.Record]],
    ) -> list[LiveRegion]:
        """Everything between two awaits."""
        twins: list[LiveRegion] = []
        noted: list[rec.Record] = []
        with _still([region for wish in wishes for region in wish.origin.family.regions.values()]):
            try:
                for origin in dict.fromkeys(wish.origin for wish in wishes):
                    self._shield(origin)
                for wish in wishes:
                    if len(wishes) > 1 or wish.origin.files:  # Meanwhile, or for the one before, names were taken.
                        self._check(wish, who)
                    twins.append(self._twin(wish, who))
                    noted += newly_forked(twins[-1], wish.origin)
                point()
                self._write_down(wishes, noted + made(twins), reply)
            except BaseException:
                for twin in twins:
                    self._namespace.abandon(twin.model)
                    self._lifetimes.forget(twin)
                raise
        for twin in twins:
            self._lifetimes.book.regions[twin.model.id] = twin
        return twins

    def _write_down(self, wishes: Sequence[Wish], noted: list[rec.Record], reply: protocol.Reply | None) -> None:
        """From now on the twins are there, and their relatives are as they must be for that."""
        families = {wish.origin.family.number: wish.origin.family for wish in wishes}
        relatives = [region for family in families.values() for region in family.regions.values()]
        shielded = [each for each in relatives if each.recorded and not each.fork_notes.shielded]
        self._lifetimes.book.commit(*map(region_is, shielded), *noted, reply=reply)
        for each in shielded:
            each.fork_notes.shielded = True

    def _shield(self, origin: LiveRegion) -> None:
        """Have every store to a region seen, and to its relatives, which may come to hold what others refer to."""
        for region in list(origin.family.regions.values()):
            mm = region.model.mm
            if region is origin or not mm.rule.shielded:
                written = mm.write_back(mm.ar) if region is origin and region.files else []
                effects = [*written, *forking.shield(mm)]
                if effects:
                    apply.carry_out(region, effects, self._lifetimes.read_events)

    def _twin(self, wish: Wish, who: Credentials) -> LiveRegion:
        origin = wish.origin
        origin.refresh_tables()
        mm = forking.fork(origin.model.mm)
        model = self._namespace.fork(origin.model, mm, wish.name, wish.mode, who)
        try:
            made = self._store.create(model.id, model.backing, mm.ar.size, fork=True)
        except BaseException:
            self._namespace.abandon(model)
            mm.lineage.leave(mm)
            raise
        twin = self._lifetimes.add_region(model, made, origin.family)
        twin.settled.set()
        twin.inherit_files(origin)
        self._forked.send_nowait(twin)
        try:
            _copy_hidden(origin, twin)
        except OSError as error:
            self._namespace.abandon(model)
            self._lifetimes.forget(twin)
            raise NoMemoryError(f"no memory for what is hidden by PROT_NONE: {error.strerror}; free some") from error
        return twin


def expect_stores(twins: Iterable[LiveRegion]) -> None:
    """Have ready what the first store to an origin needs: whoever waits for a fork stores right after it."""
    for twin in twins:
        if not twin.closed:
            with contextlib.suppress(OSError):  # It is made when it is needed, then.
                twin.filler()


async def _acquire(lock: trio.Lock) -> None:
    """Take a lock; one that is free without giving others their turn before."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


@contextlib.contextmanager
def _still(regions: Iterable[LiveRegion]) -> Iterator[None]:
    """Answer no fault of some regions, whatever is read meanwhile because the kernel wants that."""
    found = set(regions)
    for region in found:
        region.changing = True
    try:
        yield
    finally:
        for region in found:
            region.changing = False


def _copy_hidden(origin: LiveRegion, twin: LiveRegion) -> None:
    """What nobody may touch waits in a file that no process has: each twin needs one of its own."""
    for vma in origin.model.mm.vmas:
        if vma.prot & PROT_RW or vma.reaches_file:
            continue
        inside = vma.ar.moved(-origin.model.ar.start)
        for part in sparse.held(origin.stash(), inside, BackingKind.SMALL, None):
            sparse.copy(origin.stash(), part, sparse.write_to(twin.stash()))
