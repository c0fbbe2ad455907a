"""Carrying out effects: the model's decisions become ioctls on every attachment and calls on the backing.

An attachment that cannot follow harms itself only: its process may be gone, or may have unmapped its window behind our
back. The change goes on for the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial

from mshared import backing, refpages, refusals
from mshared.crowd import do_for_all
from mshared.live import LiveAttachment, LiveRegion, Unwritten
from mshared.uffd import Outcome, attempt, insist, outcome_of
from msharefs import clean_pages
from msharefs.addr import Address, AddrRange
from msharefs.effects import (
    Allow,
    Answer,
    Arm,
    Bring,
    Change,
    Deliver,
    Fill,
    FillPattern,
    Preserve,
    Protect,
    Punch,
    Signal,
    Stash,
    Unstash,
    WriteBack,
    ZeroFill,
)
from msharefs.errors import InternalError
from msharefs.perms import Access
from msharefs.region import BackingKind
from msharefs.vma import Arming

log = logging.getLogger(__name__)


def arm_new(attachment: LiveAttachment) -> None:
    """Arm a window that nobody has touched yet as its region is armed. Raises OSError when it is not mapped."""
    region = attachment.region
    if attachment.armed(Arming.NATIVE):
        _arm(attachment, region.model.ar, Arming.NATIVE)
    for ar, arming in region.model.mm.armings():
        _arm(attachment, ar, arming)
    for run in clean_pages.clean(region.model.mm, region.model.ar):
        _protect(attachment, run)
    for effect in region.arming_now:
        _arm(attachment, effect.ar, effect.arming)
    attachment.model.own_tables |= region.model.unshared is not None and not attachment.model.readonly


def carry_out(region: LiveRegion, effects: Iterable[Change], read_events: Callable[[], None]) -> None:
    """Make the kernel follow a change of the region, in the order given. Raises OSError where memory is short.

    ``read_events`` is called while the kernel wants a fork to be seen to first, and when all attachments are armed,
    before memory moves: children that appear then are armed as they are added, with what this change has armed so
    far.
    """
    for attachment in region.attachments:
        refusals.take_back(attachment)
    refusals.unpoison_shared(region)
    changing_already, region.changing = region.changing, True
    try:
        for effect in effects:
            if isinstance(effect, Arm):
                region.arming_now.append(effect)
                region.note_arming(effect)
            if isinstance(effect, Arm | Protect):
                _change_all(region, effect, read_events)
            else:
                read_events()
                _move_memory(region, effect)
        for attachment in list(region.attachments):
            refusals.unpoison(attachment, read_events)
    finally:
        region.changing = changing_already
        region.arming_now.clear()
        region.note_sharing()


def _move_memory(region: LiveRegion, effect: Change) -> None:
    region.moves += not isinstance(effect, WriteBack)
    match effect:
        case Punch(ar):
            region.punch(_offsets(region, ar))
        case Stash(ar):
            inside = _offsets(region, ar)
            stash = backing.write_to(region.stash())
            backing.move(region.backing.fd, region.held(inside), stash, region.empty)
        case Unstash(ar):
            stashed = backing.held(region.stash(), _offsets(region, ar), BackingKind.SMALL, None)
            backing.move(region.stash(), stashed, region.put)
        case WriteBack(ar, file, offset):
            data = os.pread(region.backing.fd, ar.size, _offsets(region, ar).start)
            region.unwritten.append(Unwritten(os.dup(region.files[file].fd), offset, data))
        case _:
            raise InternalError(f"{effect} moves no memory")


def _change_all(region: LiveRegion, effect: Arm | Protect, read_events: Callable[[], None]) -> None:
    """Arm or protect all attachments; while one is being forked the kernel wants that to be read first."""
    forking: list[LiveAttachment] = []

    def change(attachment: LiveAttachment) -> None:
        if attempt(attachment, lambda: _change(attachment, effect)) is Outcome.RETRY:
            forking.append(attachment)

    do_for_all(list(region.attachments), change)
    for attachment in forking:
        read_events()
        insist(attachment, partial(_change, attachment, effect), read_events)


def _change(attachment: LiveAttachment, effect: Arm | Protect) -> None:
    try:
        if isinstance(effect, Arm):
            _arm(attachment, effect.ar, effect.arming)
        else:
            _protect(attachment, effect.ar)
    except PermissionError:
        if attachment.region.model.file is None:
            raise
        log.warning("%s: a window that the kernel does not let anybody arm; left alone", attachment)


def answer_fault(
    attachment: LiveAttachment, addr: Address, tid: int, effect: Answer, access: Access | None = None
) -> Outcome:
    """Do what the model decided about the thread ``tid`` that waits at ``addr`` (its own address)."""
    match effect:
        case ZeroFill():
            outcome = _zero_fill(attachment, effect)
            if outcome in (Outcome.EXISTS, Outcome.UNMAPPED):
                if _no_memory(attachment.region, effect.ar):
                    log.warning("%s: no memory for a page at %#x", attachment, addr)
                    return refusals.refuse(attachment, addr, tid, Signal.SIGBUS, access=access)
                wake(attachment, attachment.guest(effect.ar))
            return outcome
        case Allow():
            page = attachment.guest(effect.ar)
            return attempt(attachment, partial(attachment.uffd.write_protect, page, protect=False))
        case FillPattern():
            return refpages.answer(attachment, addr, tid, effect)
        case Fill() | Bring() | Preserve():
            raise InternalError(f"{effect} is more than an answer: see mshared.filling and mshared.family")
        case Deliver(signal):
            return refusals.refuse(attachment, addr, tid, signal, access=access)


def wake(attachment: LiveAttachment, ar: AddrRange) -> Outcome:
    """Let whoever waits in ``ar`` (its own addresses) try again."""
    return attempt(attachment, lambda: attachment.uffd.wake(ar))


def _protect(attachment: LiveAttachment, ar: AddrRange) -> None:
    if not attachment.model.readonly:
        for place in attachment.places(ar):
            attachment.uffd.write_protect(place)


def _arm(attachment: LiveAttachment, ar: AddrRange, arming: Arming) -> None:
    for place in attachment.places(ar):
        attachment.uffd.arm(place, attachment.armed(arming))


def fill(attachment: LiveAttachment, ar: AddrRange, source: int, *, protected: bool) -> Outcome:
    """Put pages where the host range ``ar`` has none, by a window that can be written, and wake who waits there.

    ``source`` is where the daemon has their contents.
    """
    if attachment.model.readonly:
        return Outcome.UNMAPPED  # A private mapping: what is put there is not the region's.
    try:
        attachment.uffd.copy_from(attachment.guest(ar), source, protected=protected)
    except OSError as error:
        return outcome_of(attachment, error)
    return Outcome.SERVED


def _zero_fill(attachment: LiveAttachment, effect: ZeroFill) -> Outcome:
    """Install a zero page in the file.

    A read-only window is a private mapping: UFFDIO_ZEROPAGE would give it a page of its own that the region never
    sees. There the page is made in the file, and the thread finds it when it tries again.
    """
    page = attachment.guest(effect.ar)
    if attachment.model.readonly:
        try:
            attachment.region.filler().zero(attachment.region.model.offset_of(effect.ar))
        except OSError:
            return Outcome.UNMAPPED
        return wake(attachment, page)
    try:
        attachment.uffd.zero(page, protected=effect.protected)
    except OSError as error:
        return outcome_of(attachment, error)
    return Outcome.SERVED


def _no_memory(region: LiveRegion, page: AddrRange) -> bool:
    """Whether a page that could not be made can be had in no other way, as long as memory is short."""
    try:
        region.filler().zero(region.model.offset_of(page))
    except OSError:
        return True
    return False


def _offsets(region: LiveRegion, ar: AddrRange) -> AddrRange:
    """The same range as offsets in the backing file."""
    return ar.moved(-region.model.ar.start)
