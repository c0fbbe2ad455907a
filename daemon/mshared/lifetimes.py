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
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import attrs
import trio

from mshared import apply, observed, processes, refusals
from mshared.backing import Backing
from mshared.family import Family
from mshared.filling import Filling, Waiting
from mshared.forks import Forks
from mshared.live import LiveAttachment, LiveRegion, Staged
from mshared.pager import Pager
from mshared.sponsors import Sponsors
from mshared.uffd import Outcome, Uffd, is_userfaultfd
from mshared.writeback import Settling
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.effects import Allow, Bring, Deliver, Fill, FillPattern, Preserve, Signal, ZeroFill
from msharefs.errors import BadDescriptorError, InvalidArgumentError, NotFoundError
from msharefs.fault import Fault, Resolution, handle_fault
from msharefs.namespace import Namespace
from msharefs.perms import Access
from msharefs.region import AttachmentId, Region, RegionId

log = logging.getLogger(__name__)

_SIGBUS_FEATURES: Final = (
    abi.Feature.SIGBUS | abi.Feature.PAGEFAULT_FLAG_WP | abi.Feature.MISSING_SHMEM | abi.Feature.WP_HUGETLBFS_SHMEM
)
_ANSWERED_AT_ONCE: Final = (ZeroFill, Allow, FillPattern)
_STORE: Final = abi.FLAG_WRITE | abi.FLAG_WP
SWEEP_INTERVAL: Final = 1.0
"""Seconds between two looks for address spaces that went without a word."""


class Lifetimes:
    """All live regions and attachments. ``features`` are those every userfaultfd is opened with.

    ``uffd_device`` is None where userfaultfds are made by system call.
    """

    def __init__(self, namespace: Namespace, pager: Pager, features: abi.Feature, uffd_device: int | None) -> None:
        self.namespace = namespace
        self._pager = pager
        self._features = features
        self.uffd_device = uffd_device
        self._regions: dict[RegionId, LiveRegion] = {}
        self._attachments: dict[AttachmentId, LiveAttachment] = {}
        self._pidfds: dict[int, int] = {}
        self.forks = Forks(self._on_child_found)
        self.filling = Filling(self._again)
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
        live = LiveRegion(model, backing, self.uffd_device, family or Family(), journal=self.journal)
        self._regions[model.id] = live
        return live

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
    ) -> LiveAttachment:
        """Arm a new window and count it. Takes the descriptors when it succeeds.

        A region of which parts are ``staged`` is not ready: the window is to be completed, and the region settled.

        Raises BadDescriptorError when ``fd`` is no fresh userfaultfd, InvalidArgumentError when window or anchor are
        not mapped in its address space.
        """
        uffd = self._open(fd, self._features)
        denier = None if sigbus is None else self._open(sigbus, _SIGBUS_FEATURES)
        was_ready = region.model.ready
        model = self.namespace.attach(region.model, window, pid, readonly=readonly)
        live = LiveAttachment(model, region, uffd, Address(anchor), sigbus=denier, staged=list(staged), unarmed=unarmed)
        try:
            if self.fork_events:
                uffd.mark(AddrRange.sized(anchor, PAGE_SIZE))
            apply.arm_new(live)
            self._watch_process(pid)
        except OSError as error:
            region.model.ready = was_ready
            if self.namespace.detach(region.model, model):
                self.forget(region)
            raise InvalidArgumentError(f"the window at {window:#x} cannot be armed: {error.strerror}") from error
        self._add(live)
        if live.staged:
            region.model.ready = False
        else:
            region.settled.set()
        return live

    def drop(self, live: LiveAttachment) -> None:
        """End a reference. The region goes too when it has no name any more and this was the last.

        Not while a change of the region is carried out, which may be what has come upon it: then right after.
        """
        if live.region.changing:
            self._pager.later(lambda: self.drop(live))
            return
        if self._attachments.pop(live.model.id, None) is None:
            return
        live.region.attachments.remove(live)
        self.forks.discard(live)
        self._pager.remove(live.uffd.fd)
        live.close()
        gone = self.namespace.detach(live.region.model, live.model)
        self._unwatch_process(live.model.pid)
        if not live.region.attachments and not live.region.lock.locked():
            self.settling.request(live.region)  # Else whoever holds the lock sees to it in the end.
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
        )
        live.model.forked_from = model.id
        return live

    def _open(self, fd: int, features: abi.Feature) -> Uffd:
        if not is_userfaultfd(fd):
            raise BadDescriptorError("the descriptor is no userfaultfd; make one with the device that was offered")
        os.set_blocking(fd, False)
        uffd = Uffd(fd)
        try:
            uffd.open_api(features)
        except OSError as error:
            raise BadDescriptorError(f"the userfaultfd cannot be opened ({error.strerror}); send a new one") from error
        return uffd

    def _add(self, live: LiveAttachment) -> None:
        self._attachments[live.model.id] = live
        live.region.attachments.append(live)
        self._pager.add(live.uffd.fd, partial(self._on_messages, live))

    def _watch_process(self, pid: int) -> None:
        if pid in self._pidfds:
            return
        pidfd = processes.pidfd_open(pid)
        if pidfd is None:
            raise ProcessLookupError(3, "the process is gone")
        self._pidfds[pid] = pidfd
        self._pager.add(pidfd, lambda: self._on_death(pid))

    def _unwatch_process(self, pid: int | None) -> None:
        if pid in self._pidfds and all(a.model.pid != pid for a in self._attachments.values()):
            pidfd = self._pidfds.pop(pid)
            self._pager.remove(pidfd)
            os.close(pidfd)

    def _on_death(self, pid: int) -> None:
        for live in [a for a in self._attachments.values() if a.model.pid == pid]:
            self.drop(live)
        self._unwatch_process(pid)

    def _on_sponsor_gone(self, region: LiveRegion) -> None:
        if self.namespace.release(region.model):
            self.forget(region)

    def _on_messages(self, live: LiveAttachment) -> None:
        data = live.uffd.read()
        since = time.monotonic_ns()
        for at in range(0, len(data), abi.MESSAGE_SIZE):
            event = data[at]
            if event == abi.Event.PAGEFAULT:
                _, flags, addr, tid = abi.PAGEFAULT_STRUCT.unpack_from(data, at)
                self._on_fault(live, flags, addr, tid, since)
            elif event == abi.Event.FORK:
                self._on_fork(live, abi.FORK_STRUCT.unpack_from(data, at)[1])
            elif event == abi.Event.REMAP:
                self._on_moved(live, *abi.REMAP_STRUCT.unpack_from(data, at)[1:])

    def _on_fault(self, live: LiveAttachment, flags: int, addr: int, tid: int, since: int) -> None:
        """Decide and answer one fault; what the kernel cannot take yet is decided again later, never replayed."""
        region = live.region.model
        if live.model.id not in self._attachments or addr not in live.model.window:
            self._on_stray(Waiting(live, flags, addr, tid, since))
            return
        if live.region.changing:
            self._pager.later(lambda: self._on_fault(live, flags, addr, tid, since))
            return
        host = Address(addr - live.distance)
        access = Access.WRITE if flags & _STORE else Access.READ
        resolution = handle_fault(region.mm, Fault(host, access, bool(flags & abi.FLAG_WP)))
        if not isinstance(resolution.effect, _ANSWERED_AT_ONCE):
            self._see_to(Waiting(live, flags, addr, tid, since), resolution)
            return
        outcome = apply.answer_fault(live, Address(addr), tid, resolution.effect, access)
        if outcome is Outcome.SERVED:
            region.count_served(resolution.vma)
            observed.served(live, flags, addr, tid, since, type(resolution.effect))
        elif outcome is Outcome.RETRY:
            self._pager.later(lambda: self._on_fault(live, flags, addr, tid, since))

    def _again(self, fault: Waiting) -> None:
        self._on_fault(fault.attachment, fault.flags, fault.addr, fault.tid, fault.since)

    def _see_to(self, fault: Waiting, resolution: Resolution) -> None:
        """What takes more than an answer."""
        effect, vma = resolution.effect, resolution.vma
        if isinstance(effect, Fill) and vma is not None:
            fault.attachment.region.model.count_served(vma)
            self.filling.request(effect, vma, fault)
        elif isinstance(effect, Deliver):
            self._refuse(fault, resolution)
        else:
            self._copy_first(fault, resolution)

    def _on_moved(self, live: LiveAttachment, start: int, to: int, length: int) -> None:
        """A process has moved memory, as armed as it was: to its place in the window, if it was staged."""
        moved = (start, to, length)
        live.staged = [each for each in live.staged if (each.addr, live.guest(each.ar).start, each.ar.size) != moved]

    def _on_stray(self, fault: Waiting) -> None:
        """A touch of what a process has moved out of its window: that is no memory of the region any more."""
        if fault.attachment.model.id not in self._attachments:
            return
        self._refuse(fault, Resolution(Deliver(Signal.SIGBUS, Address(fault.addr))))

    def _refuse(self, fault: Waiting, resolution: Resolution) -> None:
        """Refuse a fault; a page that is missing and may be loaded can be had."""
        readable = resolution.vma is not None and Access.READ.allowed_by(resolution.vma.prot)
        inside = fault.addr in fault.attachment.model.window
        protected = bool(fault.flags & abi.FLAG_WP) and (readable or not inside)
        as_load = attrs.evolve(fault, flags=0)
        bring = partial(self._again, as_load) if readable and not protected else None
        self._refuse_now(fault, resolution, protected=protected, bring=bring)

    def _refuse_now(
        self, fault: Waiting, resolution: Resolution, *, protected: bool, bring: Callable[[], None] | None = None
    ) -> None:
        live, signal, access = fault.attachment, resolution.signal, observed.access_of(fault.flags)
        assert signal is not None
        waiting = bool(live.refused)
        outcome = refusals.refuse(
            live, Address(fault.addr), fault.tid, signal, access=access, protected=protected, bring=bring
        )
        if live.refused and not waiting:
            self._take_back_later(live)
        if outcome is Outcome.SERVED and fault.addr in live.model.window:
            live.region.model.count_served(resolution.vma)
            observed.served(live, fault.flags, fault.addr, fault.tid, fault.since, type(resolution.effect))
        elif outcome is Outcome.RETRY:
            self._pager.later(lambda: self._again(fault))

    def _copy_first(self, fault: Waiting, resolution: Resolution) -> None:
        """See to a page that relatives have in common; without memory for that, it is SIGBUS to who touched it."""
        live, region, effect = fault.attachment, fault.attachment.region, resolution.effect
        copies = effect.copies if isinstance(effect, Preserve) else (effect.copy,) if isinstance(effect, Bring) else ()
        try:
            region.family.make_or_reclaim(region.model.mm, copies)
        except OSError as error:
            log.warning("%s: no memory for a copy of %#x: %s", live, fault.addr, error.strerror)
            refusal = Resolution(Deliver(Signal.SIGBUS, Address(fault.addr)), resolution.vma)
            protected = isinstance(effect, Preserve)
            self._refuse_now(fault, refusal, protected=protected)
            return
        region.model.breaks += 1
        if isinstance(effect, Preserve):
            self._again(fault)
        else:
            region.model.count_served(resolution.vma)
            observed.served(live, fault.flags, fault.addr, fault.tid, fault.since, type(effect))
            apply.wake(live, live.page_at(fault.addr))

    def _take_back_later(self, live: LiveAttachment) -> None:
        """Take pages back once the system calls have seen to fail."""
        if live.model.id not in self._attachments:
            return
        refusals.take_back(live, time.monotonic())
        if live.refused:
            self._pager.later(lambda: self._take_back_later(live))

    def _on_fork(self, parent: LiveAttachment, fd: int) -> None:
        """A child exists and waits in fork(): it has its parent's windows, armed as they are."""
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
        self._add(child)
        self.forks.add(child)
        with contextlib.suppress(OSError):
            apply.arm_new(child)  # What changed while it was being forked is not in its copy.

    def _on_child_found(self, child: LiveAttachment, pid: int) -> None:
        """A forked child's process is known now."""
        child.model.pid = pid
        try:
            self._watch_process(pid)
        except ProcessLookupError:
            self.drop(child)
