"""Carrying out effects: the model's decisions become ioctls on every attachment and calls on the backing.

An attachment that cannot follow harms itself only: its process may be gone, or may have unmapped its window behind our
back. The change goes on for the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from signal import SIGKILL
from typing import Final

from mshared import backing, processes
from mshared.live import LiveAttachment, LiveRegion, Unwritten
from mshared.uffd import Outcome, Uffd, classify
from msharefs.addr import Address, AddrRange
from msharefs.effects import (
    Allow,
    Answer,
    Arm,
    Bring,
    Change,
    Deliver,
    Fill,
    Preserve,
    Protect,
    Punch,
    Signal,
    Stash,
    Unstash,
    WriteBack,
    ZeroFill,
)
from msharefs.errors import InternalError, NoMemoryError
from msharefs.perms import PROT_RW
from msharefs.region import BackingKind
from msharefs.vma import Arming

log = logging.getLogger(__name__)

_MOST_TRIES: Final = 10_000
_MOST_LOGGED: Final = 20
"""Lines a window may have in the log: a process that catches its signals can go on for ever."""


def arm_new(attachment: LiveAttachment) -> None:
    """Arm a window that nobody has touched yet as its region is armed. Raises OSError when it is not mapped."""
    region = attachment.region
    if attachment.armed(Arming.NATIVE):
        _arm(attachment, region.model.ar, Arming.NATIVE)
    for ar, arming in region.model.mm.armings():
        _arm(attachment, ar, arming)
    for effect in region.arming_now:
        _arm(attachment, effect.ar, effect.arming)


def carry_out(region: LiveRegion, effects: Iterable[Change], read_events: Callable[[], None]) -> None:
    """Make the kernel follow a change of the region, in the order given. Raises OSError where memory is short.

    ``read_events`` is called while the kernel wants a fork to be seen to first, and when all attachments are armed,
    before memory moves: children that appear then are armed as they are added, with what this change has armed so
    far.
    """
    for attachment in region.attachments:
        take_back(attachment)
        _unpoison(attachment)
    region.changing = True
    try:
        for effect in effects:
            if isinstance(effect, Arm):
                region.arming_now.append(effect)
                region.note_arming(effect)
            if isinstance(effect, Arm | Protect):
                for attachment in list(region.attachments):
                    _insist(attachment, effect, read_events)
            else:
                read_events()
                _move_memory(region, effect)
    finally:
        region.changing = False
        region.arming_now.clear()


def _move_memory(region: LiveRegion, effect: Change) -> None:
    region.moves += not isinstance(effect, WriteBack)
    match effect:
        case Punch(ar):
            region.punch(_offsets(region, ar))
            _keep_reserved(region, ar)
        case Stash(ar):
            inside = _offsets(region, ar)
            backing.move(region.backing.fd, region.held(inside), backing.write_to(region.stash()))
            _keep_reserved(region, ar)
        case Unstash(ar):
            stashed = backing.held(region.stash(), _offsets(region, ar), BackingKind.SMALL, None)
            backing.move(region.stash(), stashed, region.put)
        case WriteBack(ar, file, offset):
            data = os.pread(region.backing.fd, ar.size, _offsets(region, ar).start)
            region.unwritten.append(Unwritten(os.dup(region.files[file].fd), offset, data))
        case _:
            raise InternalError(f"{effect} moves no memory")


def _keep_reserved(region: LiveRegion, ar: AddrRange) -> None:
    """Have memory promised again for what went and is mapped still: another user of the pool may have been faster."""
    try:
        region.reserve(ar)
    except NoMemoryError as error:
        log.error("region %s: touches of %s may end in a SIGBUS: %s", region.model.name, ar, error)  # noqa: TRY400


def _insist(attachment: LiveAttachment, effect: Arm | Protect, read_events: Callable[[], None]) -> None:
    """Arm or protect one attachment; while it is being forked the kernel wants that to be read first."""
    work = partial(_protect, attachment, effect.ar)
    if isinstance(effect, Arm):
        work = partial(_arm, attachment, effect.ar, effect.arming)
    for _ in range(_MOST_TRIES):
        if _try(attachment, work) is not Outcome.RETRY:
            return
        read_events()
    raise InternalError(f"{attachment} cannot be armed: the kernel asks to wait for ever")


def answer_fault(attachment: LiveAttachment, addr: Address, tid: int, effect: Answer) -> Outcome:
    """Do what the model decided about the thread ``tid`` that waits at ``addr`` (its own address)."""
    match effect:
        case ZeroFill():
            return _zero_fill(attachment, effect)
        case Allow():
            return _try(attachment, partial(attachment.uffd.write_protect, attachment.guest(effect.ar), protect=False))
        case Fill() | Bring() | Preserve():
            raise InternalError(f"{effect} is more than an answer: see mshared.filling and mshared.family")
        case Deliver(signal):
            return _deliver(attachment, addr, tid, signal)


def wake(attachment: LiveAttachment, ar: AddrRange) -> Outcome:
    """Let whoever waits in ``ar`` (its own addresses) try again."""
    return _try(attachment, lambda: attachment.uffd.wake(ar))


def _protect(attachment: LiveAttachment, ar: AddrRange) -> None:
    if not attachment.model.readonly:
        for place in attachment.places(ar):
            attachment.uffd.write_protect(place)


def _arm(attachment: LiveAttachment, ar: AddrRange, arming: Arming) -> None:
    for place in attachment.places(ar):
        attachment.uffd.arm(place, attachment.armed(arming))


def _unpoison(attachment: LiveAttachment) -> None:
    """Make poisoned pages good that may be touched from now on. Preconditions: they are armed as they were."""
    model = attachment.region.model
    for page in list(attachment.poisoned):
        vma = model.mm.vmas.find(model.to_host(attachment.model, page))
        if vma is not None and vma.prot & PROT_RW:
            _try(attachment, partial(attachment.uffd.unpoison, attachment.page_at(page)))
            attachment.poisoned.discard(page)


def fill(attachment: LiveAttachment, ar: AddrRange, source: int, *, protected: bool) -> Outcome:
    """Put pages where the host range ``ar`` has none, by a window that can be written, and wake who waits there.

    ``source`` is where the daemon has their contents.
    """
    if attachment.model.readonly:
        return Outcome.UNMAPPED  # A private mapping: what is put there is not the region's.
    return _try(attachment, partial(attachment.uffd.copy_from, attachment.guest(ar), source, protected=protected))


def _zero_fill(attachment: LiveAttachment, effect: ZeroFill) -> Outcome:
    """Install a zero page in the file.

    A read-only window is a private mapping: UFFDIO_ZEROPAGE would give it a page of its own that the region never
    sees. There the page is made in the file, and the thread finds it when it tries again.
    """
    page = attachment.guest(effect.ar)
    if attachment.model.readonly:
        attachment.region.filler().zero(attachment.region.model.offset_of(effect.ar))
        return wake(attachment, page)
    try:
        attachment.uffd.zero(page, protected=effect.protected)
    except OSError as error:
        outcome = _outcome(attachment, error)
        if outcome is Outcome.EXISTS:
            wake(attachment, page)
        return outcome
    return Outcome.SERVED


def _deliver(attachment: LiveAttachment, addr: Address, tid: int, signal: Signal) -> Outcome:
    """Signal the thread, or fail the system call in which it touched the page.

    In a system call a signal would not even end the fault: the kernel tries again and again. A poisoned page makes the
    call fail with EFAULT, as it should. A page that is there, and protected, cannot be poisoned: the userfaultfd that
    answers by itself has it for a moment. A forked child has none, and ends. A thread that blocks or ignores the signal
    is poisoned too: as in a kernel, it cannot look away.
    """
    pid = attachment.model.pid or processes.process_of_thread(tid)
    if pid is None:
        return Outcome.GONE
    tid = processes.thread_seen_from_here(pid, tid)
    attachment.refusals += 1
    level = logging.INFO if attachment.refusals <= _MOST_LOGGED else logging.DEBUG
    # A thread that comes back with its signal still pending has not been in user mode since.
    pending = processes.is_pending(pid, tid, signal)
    if pending or processes.in_system_call(pid, tid):
        outcome = _poison(attachment, addr)
        if outcome is not Outcome.EXISTS:
            log.log(level, "%s: EFAULT for thread %d at %#x", attachment, tid, addr)
            return outcome
        if attachment.sigbus is not None:
            log.log(level, "%s: EFAULT for thread %d, which stores at %#x", attachment, tid, addr)
            return _try(attachment, partial(_refuse, attachment, attachment.sigbus, attachment.page_at(addr)))
    if pending:
        log.warning("%s: killed, a system call stores to the protected page at %#x", attachment, addr)
        return _kill(pid)
    if processes.would_miss(pid, tid, signal):
        log.log(level, "%s: thread %d blocks or ignores %s, poisoned at %#x", attachment, tid, signal.name, addr)
        return _poison(attachment, addr)
    log.log(level, "%s: %s to thread %d at %#x", attachment, signal.name, tid, addr)
    return _send(pid, tid, signal, addr)


def _poison(attachment: LiveAttachment, addr: Address) -> Outcome:
    page = attachment.page_at(addr)
    outcome = _try(attachment, lambda: attachment.uffd.poison(page))
    if outcome is Outcome.SERVED:
        attachment.poisoned.add(page.start)
    return outcome


def _refuse(attachment: LiveAttachment, sigbus: Uffd, page: AddrRange) -> None:
    """Give a protected page to the userfaultfd that answers by itself. Ending the first's care wakes nobody yet."""
    attachment.uffd.unmark(page)
    sigbus.arm(page, Arming.WP)
    attachment.refused.add(page.start)
    attachment.uffd.wake(page)


def take_back(attachment: LiveAttachment) -> None:
    """Arm refused pages again as the region is armed; one that the kernel cannot take yet stays among them."""
    model = attachment.region.model
    for start in list(attachment.refused):
        page = attachment.page_at(start)
        host = page.moved(model.ar.start - attachment.model.window.start)
        if attachment.sigbus is not None:
            _try(attachment, partial(attachment.sigbus.unmark, page))
        arming = model.mm.arming_at(host) if start in attachment.model.window else Arming.MISSING | Arming.WP
        if _try(attachment, partial(attachment.uffd.arm, page, arming)) is not Outcome.RETRY:
            attachment.refused.discard(start)


def _send(pid: int, tid: int, signal: Signal, addr: Address) -> Outcome:
    try:
        processes.send_fault_signal(pid, tid, signal, addr)
    except ProcessLookupError:
        return Outcome.GONE
    return Outcome.SERVED


def _kill(pid: int) -> Outcome:
    try:
        os.kill(pid, SIGKILL)
    except ProcessLookupError:
        return Outcome.GONE
    return Outcome.SERVED


def _offsets(region: LiveRegion, ar: AddrRange) -> AddrRange:
    """The same range as offsets in the backing file."""
    return ar.moved(-region.model.ar.start)


def _try(attachment: LiveAttachment, ioctl: Callable[[], None]) -> Outcome:
    """Run an ioctl on a client's address space; what it came to."""
    try:
        ioctl()
    except OSError as error:
        return _outcome(attachment, error)
    return Outcome.SERVED


def _outcome(attachment: LiveAttachment, error: OSError) -> Outcome:
    outcome = classify(error)
    if outcome in (Outcome.GONE, Outcome.UNMAPPED):
        log.debug("%s: %s (%s)", attachment, outcome.value, error.strerror)
    return outcome
