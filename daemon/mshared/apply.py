"""Carrying out effects: the model's decisions become ioctls on every attachment and calls on the backing.

An attachment that cannot follow harms itself only: its process may be gone, or may have unmapped its window behind our
back. The change goes on for the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import attrs

from mshared import records as rec
from mshared import refpages, refusals, sparse, table_sharing
from mshared.crowd import do_for_all
from mshared.insisting import insist
from mshared.live import LiveAttachment, LiveRegion
from mshared.uffd import SERVED, Outcome, attempt, outcome_of
from msharefs import clean_pages, protocol
from msharefs.addr import Address, AddrRange, round_up
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

_MOST_TRIES: Final = 4096
"""System calls that protect one window around what its process has mapped over it: some milliseconds."""


def arm_anew(attachment: LiveAttachment, read_events: Callable[[], None]) -> None:
    """Arm a window as its region is armed, whatever it was before."""
    mm = attachment.region.model.mm
    for ar, arming in mm.rule.over(mm.vmas, mm.ar):
        insist(attachment, partial(_arm, attachment, ar, arming), read_events)


def wake_all(attachment: LiveAttachment) -> None:
    """Let whoever waits anywhere in a window try again."""
    for place in attachment.places(attachment.region.model.ar):
        wake(attachment, place)


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


def carry_out(
    region: LiveRegion,
    effects: Iterable[Change],
    read_events: Callable[[], None],
    *noted: rec.Record,
    reply: protocol.Reply | None = None,
    resume: bool = False,
) -> None:
    """Make the kernel follow a change of the region, in the order given. Raises OSError where memory is short.

    ``read_events`` is called while the kernel wants a fork to be seen to first, and when all attachments are armed,
    before memory moves: children that appear then are armed as they are added, with what this change has armed so
    far.

    ``noted`` is written down before, and with it what is to be done, so that the next daemon does it if this one does
    not come to the end; ``reply`` is what it comes to for the client. ``resume``: this is what the region's ``change``
    was to be, of which ``steps`` are taken.
    """
    changes = list(effects)
    work = _Work(region, sum(map(_steps_of, changes)), region.steps if resume else 0)
    if not resume:
        work.begin(changes, noted, reply)
    for attachment in [each for each in region.attachments if each.refused]:
        refusals.take_back(attachment)
    refusals.unpoison_shared(region)
    changing_already, region.changing = region.changing, True
    try:
        for effect in changes:
            if isinstance(effect, Arm):
                region.arming_now.append(effect)
                table_sharing.note_arming(region, effect)
            if isinstance(effect, Arm | Protect):
                _change_all(region, effect, read_events)
            else:
                read_events()
                _move_memory(region, effect, work)
        for attachment in [each for each in region.attachments if each.poisoned]:
            refusals.unpoison(attachment, read_events)
    except OSError:
        if not resume:
            work.end()
        raise
    finally:
        region.changing = changing_already
        region.arming_now.clear()
        table_sharing.note_sharing(region)


@attrs.define
class _Work:
    """What of a change moves memory: in steps of which each may be taken twice, as long as the next one was not.

    Nobody can touch that memory from the first step to the last. ``left`` are to be taken, the first ``skipped`` were.
    """

    region: LiveRegion
    left: int
    skipped: int
    done: int = 0

    def begin(self, effects: list[Change], noted: Sequence[rec.Record], reply: protocol.Reply | None) -> None:
        """Write down what is to be done."""
        region = self.region
        if self.left:
            region.change, region.steps = rec.Begun(region.model.id, tuple(effects)), 0
            noted = (*noted, region.change)
        region.note(*noted, reply=reply)

    def step(self, move: Callable[[], rec.Record | None]) -> None:
        """Take a step, and write down that it is taken, with what it returns."""
        self.done += 1
        self.left -= 1
        if self.done <= self.skipped:
            return
        made = move()
        region = self.region
        region.steps = self.done
        number = region.model.id
        if not self.left:
            region.change = None
        taken = rec.Moved(number, self.done) if self.left else rec.Ended(number)
        region.note(*((made,) if made else ()), taken)

    def end(self) -> None:
        """Give it up."""
        if self.region.change is not None:
            self.region.change = None
            self.region.note(rec.Ended(self.region.model.id))


def _steps_of(effect: Change) -> int:
    """In how many steps an effect moves memory: contents are copied in one, and taken from where they were in another.

    Of a huge page that was punched in part the kernel may leave a part, as zeros: it must not be copied once more.
    """
    match effect:
        case Arm() | Protect():
            return 0
        case Stash() | Unstash():
            return 2
        case _:
            return 1


def _move_memory(region: LiveRegion, effect: Change, work: _Work) -> None:
    region.moves += not isinstance(effect, WriteBack)
    match effect:
        case Punch(ar):
            work.step(lambda: region.punch(_offsets(region, ar)))
        case Stash(ar):
            parts = region.held(_offsets(region, ar))
            work.step(lambda: sparse.copy_all(region.backing.fd, parts, sparse.write_to(region.stash())))
            work.step(lambda: region.empty_all(parts))
        case Unstash(ar):
            parts = sparse.held(region.stash(), _offsets(region, ar), BackingKind.SMALL, None)
            work.step(lambda: sparse.copy_all(region.stash(), parts, region.put))
            work.step(lambda: sparse.punch_all(region.stash(), parts))
        case WriteBack(ar, file, offset):
            work.step(lambda: region.set_aside(file, offset, _contents(region, ar)))
        case _:
            raise InternalError(f"{effect} moves no memory")


def _contents(region: LiveRegion, ar: AddrRange) -> bytes:
    return os.pread(region.backing.fd, ar.size, _offsets(region, ar).start)


def _change_all(region: LiveRegion, effect: Arm | Protect, read_events: Callable[[], None]) -> None:
    """Arm or protect all attachments; while one is being forked the kernel wants that to be read first."""
    forking: list[LiveAttachment] = []

    def change(attachment: LiveAttachment) -> None:
        try:
            _change(attachment, effect)
        except OSError as error:
            if outcome_of(attachment, error) is Outcome.RETRY:
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
            outcome = _allow(attachment, attachment.guest(effect.ar))
            page = attachment.page_at(addr)
            if outcome is Outcome.UNMAPPED and effect.ar.size > page.size:  # Of the rest, some may be.
                outcome = _allow(attachment, page)
            return outcome
        case FillPattern():
            return refpages.answer(attachment, addr, tid, effect)
        case Fill() | Bring() | Preserve():
            raise InternalError(f"{effect} is more than an answer: see mshared.filling and mshared.family")
        case Deliver(signal):
            return refusals.refuse(attachment, addr, tid, signal, access=access)


def _allow(attachment: LiveAttachment, ar: AddrRange) -> Outcome:
    """Let a process store to ``ar`` (its own addresses), and who waits there go on."""
    return attempt(attachment, partial(attachment.uffd.write_protect, ar, protect=False))


def wake(attachment: LiveAttachment, ar: AddrRange) -> Outcome:
    """Let whoever waits in ``ar`` (its own addresses) try again."""
    return attempt(attachment, lambda: attachment.uffd.wake(ar))


def _protect(attachment: LiveAttachment, ar: AddrRange) -> None:
    if not attachment.model.readonly:
        for place in attachment.places(ar):
            _protect_around(attachment, place)


def _protect_around(attachment: LiveAttachment, place: AddrRange) -> None:
    """Have stores reported, also behind what the process has mapped over a part: the kernel goes no further than that.

    Of very many such parts those behind the last are left out.
    """
    page, todo = attachment.region.model.mm.page, [place]
    for _ in range(_MOST_TRIES):
        part = todo.pop()
        try:
            attachment.uffd.write_protect(part)
        except FileNotFoundError:
            if part.size > page:
                middle = Address(part.start + round_up(part.size // 2, page))
                todo += [AddrRange(middle, part.end), AddrRange(part.start, middle)]
        if not todo:
            return


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
    return SERVED


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
    return SERVED


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
