"""Refusing what a thread may not do: a signal where code of its own touched memory, a failure where a system call did.

In a system call a signal would not end the fault: the kernel tries again and again. There the kernel has to refuse by
itself, and is brought to that in one of two ways:

- A page that nobody may touch, and that is not there, is *poisoned*. That is a mark in the tables of one process (of
  all, where they share them), which answers every touch until it is taken away.
- A page that may be loaded, and is there, is *handed* to a second userfaultfd, which reports nothing and has the kernel
  refuse every store; it is taken back when the call has seen to fail. For the instant of each change of hands nobody
  has the page: it is compared before and after, and a store that slipped in is undone, and its process killed.

A message may be old news: the thread was woken since, or never slept. Who does not wait gets neither signal nor mark,
and reports anew if the memory is still in its way.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from signal import SIGKILL
from typing import Final

import trio

from mshared import comparing, files, forks, processes
from mshared import records as rec
from mshared.insisting import insist
from mshared.live import LiveAttachment, LiveRegion
from mshared.uffd import Outcome, Uffd, attempt
from msharefs import clean_pages
from msharefs.addr import Address, AddrRange
from msharefs.effects import Bring, FillPattern, Signal, ZeroFill
from msharefs.fault import Fault
from msharefs.perms import PROT_RW, Access
from msharefs.region import BackingKind
from msharefs.vma import Arming, Vma

log = logging.getLogger(__name__)

REFUSAL_TIME: Final = 0.01
"""Seconds for which a page is refused by the kernel alone, so that the system call that met it comes to its end."""
_MOST_LOGGED: Final = 20
"""Lines a window may have in the log: a process that catches its signals can go on for ever."""


def refuse(
    attachment: LiveAttachment,
    addr: Address,
    tid: int,
    signal: Signal,
    *,
    access: Access | None = None,
    protected: bool = False,
    bring: Callable[[], None] | None = None,
) -> Outcome:
    """Refuse what the thread ``tid`` wanted at ``addr``; ``protected``: it was a store to a page that is there.

    ``bring`` has a page that is missing, and may be loaded, come as for a load. When a system call is to fail for a
    store, that comes first: the store is then reported anew, and loads of others go on meanwhile. A thread that blocks
    or ignores the signal fares as one in a system call: as in a kernel, it cannot look away.
    """
    page = attachment.page_at(addr)
    pid = attachment.model.pid or forks.process_of(attachment, tid)
    if pid is None:
        return Outcome.GONE
    tid = processes.thread_seen_from_here(pid, tid)
    must_fail = _must_fail(pid, tid, signal)
    if must_fail is None or page.start in attachment.refused:
        return _wake_only(attachment, page)
    if must_fail and bring is not None:
        bring()
        return Outcome.EXISTS
    attachment.refusals += 1
    level = logging.INFO if attachment.refusals <= _MOST_LOGGED else logging.DEBUG
    if not must_fail and page.start not in attachment.poisoned:
        log.log(level, "%s: %s to thread %d at %#x", attachment, signal.name, tid, addr)
        attachment.region.journal.refused(attachment, addr, pid, tid, signal.name, access)
        return _send(pid, tid, signal, addr)
    log.log(level, "%s: EFAULT for thread %d at %#x", attachment, tid, addr)
    sent = "SIGKILL" if protected and attachment.sigbus is None else "EFAULT"
    attachment.region.journal.refused(attachment, addr, pid, tid, sent, access)
    return _refuse_store(attachment, pid, page) if protected else _poison(attachment, page)


def take_back(attachment: LiveAttachment, now: float = math.inf) -> None:
    """Take back the pages that were handed over and whose time has come.

    They are armed as the region is, and protected: where it is to be otherwise by now, that follows.
    """
    for start, until in list(attachment.refused.items()):
        if until > now:
            continue
        page = attachment.page_at(start)
        arming = Arming.MISSING
        if start in attachment.model.window:
            arming = attachment.region.model.mm.arming_at(attachment.host(page))
        if attachment.sigbus is not None:
            _hand_over(attachment, page, attachment.sigbus, attachment.uffd, arming | Arming.WP)
        del attachment.refused[start]
        attachment.region.note(rec.Refused(attachment.model.id, start, on=False))


def unpoison(attachment: LiveAttachment, read_events: Callable[[], None]) -> None:
    """Show the pages behind marks that are in the way by now; where a file has the contents, ``refill`` does so.

    Preconditions: the attachment is armed, and memory stands, as the model says.
    """
    for start in list(attachment.poisoned):
        page = attachment.page_at(start)
        host = attachment.host(page)
        if _touchable(attachment.region, host) is not None and _have(attachment.region, host):
            _show(attachment, page, read_events)
            attachment.poisoned.discard(start)
            attachment.region.model.mm.storable.note(host)
            attachment.region.note(rec.Poisoned(attachment.model.id, start, on=False))


def unpoison_shared(region: LiveRegion) -> None:
    """Take poison out of tables that processes share, whoever put it there, where it would be in the way from now on.

    Punching does that with hugetlb memory; there is no page under poison.
    """
    for page in list(region.poisoned):
        if _touchable(region, page) is not None:
            region.backing.punch(page.moved(-region.model.ar.start))
            region.poisoned.discard(page)
            region.model.mm.storable.note(page)
            region.note(rec.PoisonedForAll(region.model.id, page, on=False))


async def refill(region: LiveRegion, ar: AddrRange, read_events: Callable[[], None]) -> None:
    """Bring what files have to pages of ``ar`` where system calls had failed; past a file's end they go on to fail.

    Preconditions: the region's lock is held, so that no mapping changes before the end.
    """
    for attachment in list(region.attachments):
        for start in list(attachment.poisoned):
            page = attachment.host(attachment.page_at(start))
            vma = _touchable(region, page) if ar.covers(page) else None
            if vma is not None and await _read_page(region, page, vma) and attachment in region.attachments:
                unpoison(attachment, read_events)


async def _read_page(region: LiveRegion, page: AddrRange, vma: Vma) -> bool:
    """Put a page of a file where the region has none; whether there is one then."""
    source, moves = vma.file_at(page.start), region.moves
    if source is None:
        return False
    file = region.files[source.file]
    fd = os.dup(file.fd)
    try:
        read = files.read if region.digests is None else comparing.read
        data, size, marks = await trio.to_thread.run_sync(
            read, fd, page.size, source.offset, limiter=region.reading.limiter
        )
    except OSError as error:
        log.warning("region %s: reading a mapped file: %s", region.model.title, error.strerror)
        return False
    finally:
        files.let_go(fd, file.magic)
    if region.closed or region.moves != moves or source.offset >= size:
        return False
    region.put_new(data.ljust(page.size, b"\0"), region.model.offset_of(page))
    for run in region.model.mm.table.holes(page):
        region.model.mm.filled(run)
    region.remember(page, marks, page.start)
    return True


def _touchable(region: LiveRegion, page: AddrRange) -> Vma | None:
    """What is mapped over a host page, if it may be touched."""
    vma = region.model.mm.vmas.find(page.start)
    return vma if vma is not None and vma.prot & PROT_RW else None


def _show(attachment: LiveAttachment, page: AddrRange, read_events: Callable[[], None]) -> None:
    """Map what the region has at a page in the place of a mark, armed as it is: only what is armed takes pages."""
    arming = attachment.armed(attachment.region.model.mm.arming_at(attachment.host(page)))
    show = partial(attachment.uffd.show, page, protected=bool(arming & Arming.WP))
    if arming:
        insist(attachment, show, read_events)
        return
    attempt(attachment, partial(attachment.uffd.mark, page))
    insist(attachment, show, read_events)
    attempt(attachment, partial(attachment.uffd.arm, page, arming))


def _have(region: LiveRegion, page: AddrRange) -> bool:
    """Have a page in the region as a load would; whether there is one. What a file has is not read."""
    if _is_there(region, page):
        return True
    match region.model.mm.fault(Fault(page.start, Access.READ, alone=True)).effect:
        case ZeroFill():
            region.filler().zero(region.model.offset_of(page))
            return True
        case FillPattern(_, refpage):
            region.filler().copy(region.model.offset_of(page), refpage.repeated(page.size))
            clean_pages.came(region.model.mm, page, clean=False)
            return True
        case Bring(copies):
            try:
                region.family.make_or_reclaim(region.model.mm, copies)
            except OSError as error:
                log.warning("region %s: no memory for a copy of %s: %s", region.model.name, page, error.strerror)
                return False
            return True
        case _:
            return False


def _is_there(region: LiveRegion, page: AddrRange) -> bool:
    """Whether the region has a host page."""
    offset = region.model.offset_of(page)
    if region.backing.kind is BackingKind.HUGETLB:
        return bool(region.held(AddrRange.sized(offset, page.size)))
    return region.backing.holds(offset)


def _came(attachment: LiveAttachment, page: AddrRange) -> bool:
    """Whether the region has a page of the window; what is outside is none of it."""
    return attachment.model.window.covers(page) and _is_there(attachment.region, attachment.host(page))


def _must_fail(pid: int, tid: int, signal: Signal) -> bool | None:
    """Whether a signal would not do for a thread; None if it does not wait."""
    in_call = processes.in_system_call(pid, tid)
    return processes.would_miss(pid, tid, signal) if in_call is False else in_call


def _poison(attachment: LiveAttachment, page: AddrRange) -> Outcome:
    """Mark a page. A thread that finds it marked already was woken when that was done, or comes too late to see it."""
    poison = partial(attachment.uffd.poison, page)
    outcome = attempt(attachment, poison)
    if outcome is Outcome.EXISTS and page.start not in attachment.poisoned and not _came(attachment, page):
        attempt(attachment, partial(attachment.uffd.unprotect_empty, page))
        outcome = attempt(attachment, poison)
    if outcome is Outcome.EXISTS:
        return _wake_only(attachment, page)
    if outcome is Outcome.SERVED and attachment.region.model.backing is BackingKind.HUGETLB:
        attachment.region.poisoned.add(attachment.host(page))
        attachment.region.note(rec.PoisonedForAll(attachment.region.model.id, attachment.host(page), on=True))
    elif outcome is Outcome.SERVED:
        attachment.poisoned.add(page.start)
        attachment.region.note(rec.Poisoned(attachment.model.id, page.start, on=True))
    return outcome


def _refuse_store(attachment: LiveAttachment, pid: int, page: AddrRange) -> Outcome:
    """Have the kernel refuse stores to a page for a while. Without a second userfaultfd only death ends them."""
    if attachment.sigbus is None:
        log.warning("%s: killed, a system call stores to the protected page at %#x", attachment, page.start)
        return _kill(pid)
    if attachment.model.window.covers(page) and not _came(attachment, page):
        return _wake_only(attachment, page)  # A load would have the kernel make the page.
    attachment.refused[page.start] = time.monotonic() + REFUSAL_TIME
    attachment.region.note(rec.Refused(attachment.model.id, page.start, on=True))
    _hand_over(attachment, page, attachment.uffd, attachment.sigbus, Arming.WP)
    return attempt(attachment, partial(attachment.uffd.wake, page))


def _hand_over(attachment: LiveAttachment, page: AddrRange, giver: Uffd, taker: Uffd, arming: Arming) -> None:
    """Have another userfaultfd report the faults of a protected page, and see that nobody stores to it meanwhile."""
    backing, offset = attachment.region.backing, attachment.host(page).start - attachment.region.model.ar.start
    inside = attachment.model.window.covers(page)
    before = backing.read(page.size, offset) if inside else b""
    attempt(attachment, partial(giver.hand_over, page, taker, arming))
    if inside and backing.read(page.size, offset) != before:
        backing.write(before, offset)
        log.warning("%s: killed, it stored to the protected page at %#x; undone", attachment, page.start)
        if attachment.model.pid is not None:
            _kill(attachment.model.pid)


def _wake_only(attachment: LiveAttachment, page: AddrRange) -> Outcome:
    """See that nobody goes on to wait at a page over old news."""
    attempt(attachment, partial(attachment.uffd.wake, page))
    return Outcome.EXISTS


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
