"""Ends of names, and changes of who may: unlink, remove, chmod, chown."""

from __future__ import annotations

from collections.abc import Callable

from mshared import records as rec
from mshared.answers import Answer, Caller
from mshared.book import nameless, region_is
from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from mshared.tickets import Ticket
from msharefs import protocol
from msharefs.errors import NotFoundError
from msharefs.namespace import Namespace
from msharefs.region import AttachmentId, Region


class Names:
    """What becomes of names. ``by_ticket`` finds the region whose file was opened."""

    def __init__(self, namespace: Namespace, lifetimes: Lifetimes, by_ticket: Callable[[Ticket], LiveRegion]) -> None:
        self._namespace = namespace
        self._lifetimes = lifetimes
        self._by_ticket = by_ticket

    def unlink(self, caller: Caller, request: protocol.Unlink, ticket: Ticket | None) -> Answer:
        """End the caller's access; the last one ends the region."""
        region = self._find_ready(request.name)
        may_write = ticket is not None and ticket.writable and self._by_ticket(ticket).model is region
        self._lifetimes.sweep(self._lifetimes.region(region).attachments)
        self._lifetimes.forks.look()
        self._namespace.check_unlink(region, caller.pid, may_write=may_write)
        live = self._lifetimes.region(region)
        own = self._lifetimes.of_process(region, caller.pid)
        self._write_unlink(live, [each.model.id for each in own], may_write=may_write)
        for attachment in own:
            self._lifetimes.drop(attachment)
        if self._namespace.unlink(region, may_write=may_write):
            self._lifetimes.forget(live)
        return Answer(protocol.Done(), after=live.written)

    def _write_unlink(self, live: LiveRegion, own: list[AttachmentId], *, may_write: bool) -> None:
        """What an unlink is about to do, in one entry: references go, and with the last one the name."""
        records: list[rec.Record] = [rec.AttachmentGone(number) for number in own]
        if may_write and len(own) == len(live.attachments):
            records.append(nameless(live))
        live.note(*records, reply=protocol.Done())

    def remove(self, caller: Caller, request: protocol.Remove) -> Answer:
        """Take a name away at once; the memory goes with its last attachment."""
        region = self._find_ready(request.name)
        live = self._lifetimes.region(region)
        self._lifetimes.sweep(live.attachments)
        gone = self._namespace.remove(region, caller.who)
        live.note(region_is(live), reply=protocol.Done())
        if gone:
            self._lifetimes.forget(live)
        return Answer(protocol.Done())

    def change_owner(
        self, region: Region, *, mode: int | None = None, uid: int | None = None, gid: int | None = None
    ) -> None:
        """Carry out chmod and chown; whether the caller may is checked by the kernel before it asks."""
        self._namespace.change_owner(region, mode=mode, uid=uid, gid=gid)
        live = self._lifetimes.region(region)
        live.note(region_is(live))

    def _find_ready(self, name: str) -> Region:
        region = self._namespace.find(name)
        if not region.ready:
            raise NotFoundError(f"region {name!r} is still being made")
        return region
