"""Faults: what the model decides about each is carried out, or comes to more than an answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from functools import partial
from typing import Final

import attrs

from mshared import apply, observed, refusals
from mshared import records as rec
from mshared.filling import Filling, Waiting
from mshared.live import LiveAttachment
from mshared.pager import Pager
from mshared.uffd import SERVED, Outcome
from msharefs import uffd_abi as abi
from msharefs.addr import Address
from msharefs.effects import Allow, Bring, Deliver, Fill, FillPattern, Preserve, Signal, ZeroFill
from msharefs.fault import Fault, Resolution, handle_fault
from msharefs.perms import Access
from msharefs.region import AttachmentId

log = logging.getLogger(__name__)

_PART: Final = 8
_LONGEST: Final = 1.0
"""A fault that the kernel cannot take is tried again after a part of the time it waits; seconds that takes at most."""
_ANSWERED_AT_ONCE: Final = (ZeroFill, Allow, FillPattern)
_STORE: Final = abi.FLAG_WRITE | abi.FLAG_WP
_READ: Final = Access.READ
_WRITE: Final = Access.WRITE


class Faults:
    """Decides and answers the faults of all that are ``attached``; others are none."""

    def __init__(self, pager: Pager, attached: Container[AttachmentId]) -> None:
        self._pager = pager
        self._attached = attached
        self.filling = Filling(self._again)

    def decide(self, live: LiveAttachment, flags: int, addr: int, tid: int, since: int, *, alone: bool = False) -> None:
        """Decide and answer one fault; what the kernel cannot take yet is decided again later, never replayed.

        ``alone``: see ``Fault``.
        """
        region = live.region.model
        window = live.model.window
        if live.model.id not in self._attached or not window.start <= addr < window.end:
            self._on_stray(Waiting(live, flags, addr, tid, since))
            return
        if live.region.changing:
            self._pager.later(lambda: self.decide(live, flags, addr, tid, since))
            return
        if not live.region.book.is_settled():
            self._retry(Waiting(live, flags, addr, tid, since))
            return
        host = Address(addr - live.distance)
        access = _WRITE if flags & _STORE else _READ
        resolution = handle_fault(region.mm, Fault(host, access, bool(flags & abi.FLAG_WP), alone))
        effect, vma = resolution.effect, resolution.vma
        if isinstance(effect, Fill) and vma is not None and self.filling.at_once(live, effect, vma):
            outcome = SERVED
        elif not isinstance(effect, _ANSWERED_AT_ONCE):
            self._see_to(Waiting(live, flags, addr, tid, since, alone), resolution)
            return
        elif isinstance(effect, Allow) and vma is not None and vma.reaches_file and not self._write_down(live, effect):
            outcome = Outcome.RETRY
        else:
            outcome = apply.answer_fault(live, Address(addr), tid, effect, access)
        if outcome is SERVED:
            region.count_served(vma)
            observed.served(live, flags, addr, tid, since, type(effect))
        elif outcome is Outcome.RETRY:
            self._retry(Waiting(live, flags, addr, tid, since))

    def _write_down(self, live: LiveAttachment, stored_to: Allow) -> bool:
        """Have the next daemon know of a store to a shared file, before it is allowed; whether it does."""
        page = stored_to.ar
        live.region.note(rec.Dirty(live.region.model.id, page, (page,)))
        return live.region.book.is_settled()

    def _retry(self, fault: Waiting) -> None:
        """Decide a fault anew, the later the longer it waits: what is in its way may be its own process's doing."""
        waited = (time.monotonic_ns() - fault.since) / 1e9
        self._pager.later(partial(self._again, fault), min(waited / _PART, _LONGEST))

    def _again(self, fault: Waiting) -> None:
        self.decide(fault.attachment, fault.flags, fault.addr, fault.tid, fault.since, alone=fault.alone)

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

    def _on_stray(self, fault: Waiting) -> None:
        """A touch of what a process has moved out of its window: that is no memory of the region any more."""
        if fault.attachment.model.id not in self._attached:
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
            self._retry(fault)

    def _copy_first(self, fault: Waiting, resolution: Resolution) -> None:
        """See to a page that relatives have in common; without memory for that, it is SIGBUS to who touched it."""
        live, region, effect = fault.attachment, fault.attachment.region, resolution.effect
        copies = effect.copies if isinstance(effect, Preserve | Bring) else ()
        try:
            region.family.make_or_reclaim(region.model.mm, copies)
        except OSError as error:
            if not fault.alone:
                self._again(attrs.evolve(fault, alone=True))
                return
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
        if live.model.id not in self._attached:
            return
        refusals.take_back(live, time.monotonic())
        if live.refused:
            self._pager.later(lambda: self._take_back_later(live))
