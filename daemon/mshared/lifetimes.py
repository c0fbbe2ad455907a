"""Who is attached, from first message to death: attachments made, inherited by fork, and lost however it happens.

Death is seen three ways, because none sees all: a pidfd turns readable when a process ends; a userfaultfd answers ESRCH
when its address space is gone, which is how an exec shows; and a connection closes. Forked children announce themselves
by their userfaultfd, which does not say whose it is: see ``mshared.forks``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from functools import partial
from typing import Final
from weakref import WeakValueDictionary

import trio

from mshared import apply, observed, processes
from mshared import records as rec
from mshared.backing import Backing
from mshared.book import Book, attachment_is, newly_attached, unsponsored
from mshared.deaths import Deaths
from mshared.family import Family
from mshared.faults import Faults
from mshared.forks import Forks
from mshared.killpoints import point
from mshared.live import LiveAttachment, LiveRegion
from mshared.pager import Pager
from mshared.sponsors import Sponsors
from mshared.uffd import Uffd, opened
from mshared.under_way import Staged
from mshared.writeback import Settling
from msharefs import protocol
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.errors import InvalidArgumentError, NotFoundError
from msharefs.namespace import Namespace
from msharefs.region import AttachmentId, Region, RegionId

log = logging.getLogger(__name__)

_SIGBUS_FEATURES: Final = (
    abi.Feature.SIGBUS | abi.Feature.PAGEFAULT_FLAG_WP | abi.Feature.MISSING_SHMEM | abi.Feature.WP_HUGETLBFS_SHMEM
)
_PAGEFAULT: Final = int(abi.Event.PAGEFAULT)
SWEEP_INTERVAL: Final = 1.0
"""Seconds between two looks for address spaces that went without a word."""


class Lifetimes:
    """All live regions and attachments. ``features`` are those every userfaultfd is opened with.

    ``uffd_device`` is None where userfaultfds are made by system call.
    """

    def __init__(
        self,
        namespace: Namespace,
        pager: Pager,
        features: abi.Feature,
        uffd_device: int | None,
        book: Book | None = None,
    ) -> None:
        self.namespace = namespace
        self.book = book or Book()
        self._pager = pager
        self._features = features
        self.uffd_device = uffd_device
        self._regions: dict[RegionId, LiveRegion] = {}
        self._attachments: dict[AttachmentId, LiveAttachment] = {}
        self.gone: WeakValueDictionary[int, LiveRegion] = WeakValueDictionary()
        """Whose attachments had ended when this daemon followed another, by their numbers."""
        self._deaths = Deaths(pager, self._on_death)
        self.forks = Forks(self._on_child_found, self.drop)
        self.faults = Faults(pager, self._attachments)
        self.settling = Settling(self.read_events)
        self.journal = observed.Journal()
        self.sponsors = Sponsors(pager, self._on_sponsor_gone)

    @property
    def fork_events(self) -> bool:
        """Whether the kernel reports forks to this daemon."""
        return bool(self._features & abi.Feature.EVENT_FORK)

    @property
    def attachment_count(self) -> int:
        """How many references there are, over all regions."""
        return len(self._attachments)

    def read_events(self) -> None:
        """See to what the kernel reports now; forked children are attachments then."""
        self._pager.drain()

    def add_region(self, model: Region, backing: Backing, family: Family | None = None) -> LiveRegion:
        """Take over a new region and its files."""
        live = LiveRegion(model, backing, self.uffd_device, family or Family(), journal=self.journal, book=self.book)
        self._regions[model.id] = live
        return live

    def restore(self, live: LiveRegion, attachments: Iterable[LiveAttachment]) -> None:
        """Have a region that an earlier daemon had. What has ended meanwhile is dropped by the pager."""
        self._regions[live.model.id] = live
        live.settled.set()
        for each in attachments:
            self._add(each)
            if each.model.pid is None:
                self.forks.add(each)
            else:
                self._on_child_found(each, each.model.pid)

    def gone_records(self) -> list[rec.WasAttached]:
        """What the next daemon is to know of attachments that were gone: should it be the one to complete files."""
        return [rec.WasAttached(each, live.model.id) for each, live in self.gone.items() if not live.attachments]

    def region(self, model: Region) -> LiveRegion:
        """The files of a region of the namespace."""
        return self._regions[model.id]

    def regions(self) -> list[LiveRegion]:
        """All that exist."""
        return list(self._regions.values())

    def attachment(self, number: int) -> LiveAttachment:
        """The attachment with that number. Raises NotFoundError."""
        found = self._attachments.get(AttachmentId(number))
        if found is None:
            raise NotFoundError(f"there is no attachment {number}; attach again")
        return found

    def of_process(self, region: Region, pid: int) -> list[LiveAttachment]:
        """The windows of one process on one region."""
        return [a for a in self._regions[region.id].attachments if a.model.pid == pid]

    def forget(self, region: LiveRegion) -> None:
        """Close the files of a region that the namespace has let go."""
        del self._regions[region.model.id]
        self.sponsors.discard(region)
        region.settled.set()
        region.ended = True
        self.settling.request(region)

    def attach(
        self,
        region: LiveRegion,
        window: int,
        pid: int,
        fd: int,
        anchor: int,
        *,
        readonly: bool,
        sigbus: int | None = None,
        staged: Iterable[Staged] = (),
        unarmed: bool = False,
        unsettled: bool = False,
        token: str | None = None,
        uid: int = 0,
    ) -> LiveAttachment:
        """Write a new window down, count it, and arm it. Takes the descriptors when it succeeds.

        ``unsettled``: more is to come before the region is ready. ``token``: it takes that twin.

        A region of which parts are ``staged`` is not ready: the window is to be completed, and the region settled.

        Raises BadDescriptorError when ``fd`` is no fresh userfaultfd, InvalidArgumentError when window or anchor are
        not mapped in its address space.
        """
        uffd = opened(fd, self._features)
        denier = None if sigbus is None else opened(sigbus, _SIGBUS_FEATURES)
        was_ready = region.model.ready
        model = self.namespace.attach(region.model, window, pid, readonly=readonly)
        live = LiveAttachment(model, region, uffd, Address(anchor), sigbus=denier, staged=list(staged), unarmed=unarmed)
        region.model.ready = not (live.staged or unsettled)
        live.started, live.uid = self._deaths.started(pid), uid
        reply = protocol.Attached(model.id) if region.model.ready else None
        self.book.commit(*newly_attached(live, token), reply=reply)
        self.book.regions[region.model.id] = region
        try:
            if self.fork_events:
                uffd.mark(AddrRange.sized(anchor, PAGE_SIZE))
            apply.arm_new(live)
            self._deaths.watch(pid)
        except OSError as error:
            region.model.ready = was_ready
            gone = self.namespace.detach(region.model, model)
            region.note(rec.AttachmentGone(model.id))
            if gone:
                self.forget(region)
            raise InvalidArgumentError(f"the window at {window:#x} cannot be armed: {error.strerror}") from error
        self._add(live)
        if region.model.ready:
            region.settled.set()
        return live

    def drop(self, live: LiveAttachment, reply: protocol.Reply | None = None) -> None:
        """End a reference. The region goes too when it has no name any more and this was the last.

        Not while a change of the region is carried out, which may be what has come upon it: then right after.
        """
        if live.region.changing:
            self._pager.later(lambda: self.drop(live))
            return
        if self._attachments.pop(live.model.id, None) is None:
            return
        live.region.note(rec.AttachmentGone(live.model.id), reply=reply)
        live.region.attachments.remove(live)
        self.forks.discard(live)
        self._pager.remove(live.uffd.fd)
        live.close()
        gone = self.namespace.detach(live.region.model, live.model)
        self._unwatch_process(live.model.pid)
        if not live.region.attachments:
            settle = self.settling.expect if live.region.lock.locked() else self.settling.request
            settle(live.region)
        if gone:
            self.forget(live.region)

    def sweep(self, attachments: Iterable[LiveAttachment] | None = None) -> None:
        """Drop references whose address space is gone."""
        for live in list(self._attachments.values() if attachments is None else attachments):
            if not live.uffd.is_alive():
                log.debug("%s: address space gone", live)
                self.drop(live)

    async def sweep_forever(self) -> None:
        """Look from time to time for what no event tells."""
        while True:
            await trio.sleep(SWEEP_INTERVAL)
            self.sweep()

    def adopt(self, parent: int, pid: int) -> LiveAttachment:
        """The attachment that the forked process ``pid`` inherited from its parent's. Raises NotFoundError."""
        self.forks.look_among([pid])
        for live in self._attachments.values():
            if live.model.forked_from == parent and live.model.pid == pid:
                return live
        raise NotFoundError(f"process {pid} has inherited no window; attach again")

    def adopt_without_events(self, parent: int, pid: int, fd: int) -> LiveAttachment:
        """Attach a forked child whose parent is still attached, where the kernel reports no forks."""
        origin = self.attachment(parent)
        if processes.parent_of(pid) != origin.model.pid:
            raise NotFoundError(f"process {pid} is no child of one that has this window; attach again")
        model = origin.model
        live = self.attach(
            origin.region,
            model.window.start,
            pid,
            fd,
            origin.anchor,
            readonly=model.readonly,
            unarmed=origin.unarmed,
            uid=origin.uid,
        )
        live.model.forked_from = model.id
        live.region.note(attachment_is(live))
        return live

    def _add(self, live: LiveAttachment) -> None:
        self._attachments[live.model.id] = live
        live.region.attachments.append(live)
        self._pager.add(live.uffd.fd, partial(self._on_messages, live))

    def _unwatch_process(self, pid: int | None) -> None:
        if pid is not None and all(a.model.pid != pid for a in self._attachments.values()):
            self._deaths.unwatch(pid)

    def _on_death(self, pid: int) -> None:
        for live in [a for a in self._attachments.values() if a.model.pid == pid]:
            self.drop(live)
        self._unwatch_process(pid)

    def _on_sponsor_gone(self, region: LiveRegion) -> None:
        region.note(unsponsored(region))
        if self.namespace.release(region.model):
            self.forget(region)

    def _on_messages(self, live: LiveAttachment) -> None:
        data = live.uffd.read()
        since = time.monotonic_ns()
        for at in range(0, len(data), abi.MESSAGE_SIZE):
            event, flags, addr, tid = abi.PAGEFAULT_STRUCT.unpack_from(data, at)
            if event == _PAGEFAULT:
                self.faults.decide(live, flags, addr, tid, since)
            elif event == abi.Event.FORK:
                self.inherit(live, abi.FORK_STRUCT.unpack_from(data, at)[1])
            elif event == abi.Event.REMAP:
                self._on_moved(live, *abi.REMAP_STRUCT.unpack_from(data, at)[1:])

    def _on_moved(self, live: LiveAttachment, start: int, to: int, length: int) -> None:
        """A process has moved memory, as armed as it was: to its place in the window, if it was staged."""
        moved = (start, to, length)
        live.staged = [each for each in live.staged if (each.addr, live.guest(each.ar).start, each.ar.size) != moved]
        live.region.note(attachment_is(live))

    def inherit(self, parent: LiveAttachment, fd: int) -> None:
        """A child exists and waits in fork(): it has its parent's windows, armed as they are."""
        point()
        os.set_blocking(fd, False)
        region = parent.region
        was_ready = region.model.ready
        model = self.namespace.attach(
            region.model,
            parent.model.window.start,
            None,
            readonly=parent.model.readonly,
            forked_from=parent.model.id,
        )
        region.model.ready = was_ready
        child = LiveAttachment(model, region, Uffd(fd), parent.anchor, parent.model.pid, set(parent.poisoned))
        child.staged, child.uid, child.unarmed = list(parent.staged), parent.uid, parent.unarmed
        region.note(attachment_is(child))
        self._add(child)
        self.forks.add(child)
        with contextlib.suppress(OSError):
            apply.arm_new(child)  # What changed while it was being forked is not in its copy.

    def _on_child_found(self, child: LiveAttachment, pid: int) -> None:
        """A forked child's process is known now."""
        child.model.pid = pid
        try:
            self._deaths.watch(pid)
        except ProcessLookupError:
            self.drop(child)
            return
        child.started = self._deaths.started(pid)
        child.region.note(attachment_is(child))
