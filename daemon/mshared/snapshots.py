"""Forking regions: the moment at which everything stands still, and what the new ones are made of.

From the first page that is protected until all are, in every process of every region that is forked, no protected store
is let through: so no store that came after another is in the snapshot without it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs
import trio

from mshared import apply, processes
from mshared import records as rec
from mshared.answers import Tell
from mshared.backing import BackingStore
from mshared.book import region_is
from mshared.killpoints import point
from mshared.lifetimes import Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.twin_parts import Parts, Taker, Wish
from mshared.writeback import flush, write_out
from msharefs import forking, protocol
from msharefs.errors import NotFoundError
from msharefs.namespace import Namespace
from msharefs.perms import Credentials

log = logging.getLogger(__name__)

_UNTIL_PREPARED: Final = 0.002
"""Seconds after a fork until the next one is prepared: whoever forked goes on first, and so does who stores then."""


@attrs.frozen
class Untaken:
    """A private twin that waits for the child it was made for."""

    twin: LiveRegion
    taker: Taker


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

    async def for_child(
        self, windows: Sequence[LiveAttachment], who: Credentials, tell: Tell | None = None
    ) -> list[str]:
        """Private twins of the regions behind some windows, of one instant; a token for each.

        ``tell``: see ``fork``.
        """
        wishes = []
        for window in windows:
            model = window.model
            taker = Taker(secrets.token_hex(16), model.readonly, who, model.pid or 0, window.started)
            wishes.append(Wish(window.region, None, 0, taker))
        tokens = [wish.taker.token for wish in wishes if wish.taker]
        await self.fork(wishes, who, protocol.Snapshots(tuple(tokens)), tell)
        return tokens

    def restore(self, untaken: Untaken) -> None:
        """Have a twin again that an earlier daemon has made."""
        self._untaken[untaken.taker.token] = untaken

    def records(self) -> list[rec.Record]:
        """All that wait for their child."""
        return [each.taker.record(each.twin.model.id) for each in self._untaken.values()]

    def made_by(self, pid: int) -> set[str]:
        """Tokens of twins that a process has asked for and that nobody has taken."""
        return {token for token, untaken in self._untaken.items() if untaken.taker.maker == pid}

    def take(self, token: str, who: Credentials) -> Untaken:
        """Hand a twin over, once. Raises NotFoundError."""
        found = self._untaken.get(token)
        if found is None or found.taker.who != who:
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
            if processes.start_time(untaken.taker.maker) != untaken.taker.started:
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
        tell: Tell | None = None,
    ) -> list[LiveRegion]:
        """The twins, of one instant for all. Raises MshareError with none made.

        ``reply`` is what the client is to be told: ``tell`` is called with it when that holds, whatever happens. The
        twins are made then, before anybody else has a turn. Not where files are mapped, which may lack stores until
        this returns.
        """
        origins = sorted({wish.origin for wish in wishes}, key=lambda each: each.model.id)
        try:
            with contextlib.ExitStack() as stack:
                for origin in origins:
                    await _acquire(origin.lock)
                    stack.callback(origin.lock.release)
                self._check(wishes, who)
                if any(origin.files for origin in origins):
                    for origin in origins:
                        await flush(origin, origin.model.ar, self._lifetimes.read_events)
                    self._check(wishes, who)  # Meanwhile names were taken.
                twins = self._fork_now(wishes, who, reply, tell)
                for origin in origins:
                    if origin.unwritten:
                        with trio.CancelScope(shield=True):
                            await write_out(origin)
                return twins
        finally:
            for origin in origins:
                if not origin.attachments and not origin.closed:  # Who went meanwhile left that to us.
                    self._lifetimes.settling.request(origin)

    def _check(self, wishes: Sequence[Wish], who: Credentials) -> None:
        if any(wish.origin.closed for wish in wishes):
            raise NotFoundError("the region is gone")
        self._namespace.check_forks([(wish.origin.model, wish.name, wish.mode) for wish in wishes], who)

    def _fork_now(
        self,
        wishes: Sequence[Wish],
        who: Credentials,
        reply: protocol.Reply | None,
        tell: Tell | None,
    ) -> list[LiveRegion]:
        """Everything between two awaits."""
        gathered: list[Parts] = []
        with _still([region for wish in wishes for region in wish.origin.family.regions.values()]):
            try:
                for origin in dict.fromkeys(wish.origin for wish in wishes):
                    self._shield(origin)
                    origin.refresh_tables()
                for wish in wishes:
                    number = self._namespace.next_region()
                    gathered.append(Parts.gather(wish, who, number, self._store))
                point()
                self._write_down(wishes, [record for parts in gathered for record in parts.records()], reply)
            except BaseException:
                for parts in gathered:
                    parts.close()
                raise
            if reply is not None and tell is not None and not any(wish.origin.files for wish in wishes):
                tell(reply)
            point()
            return [self._make(parts) for parts in gathered]

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

    def _make(self, parts: Parts) -> LiveRegion:
        """The twin that these are the parts of. It is written down."""
        wish = parts.wish
        mm = forking.fork(wish.origin.model.mm, parts.store)
        model = self._namespace.fork(parts.number, wish.origin.model, mm, wish.name, parts.owner)
        twin = self._lifetimes.add_region(model, parts.backing, wish.origin.family)
        twin.created_ns = parts.created_ns
        twin.take_files(parts.files)
        twin.restore_stash(parts.stash)
        twin.settled.set()
        self._lifetimes.book.regions[model.id] = twin
        if wish.taker is not None:
            self._untaken[wish.taker.token] = Untaken(twin, wish.taker)
        self._forked.send_nowait(twin)
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
