"""Bringing pages of files into regions: at once what is in memory, off the loop what must be read.

A fault that waits for a file is decided again when the file has been read, never replayed: the mapping may be another
by then. What is in memory already is never written over.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Final

import attrs
import trio

from mshared import apply, comparing, files, observed
from mshared.live import LiveAttachment, LiveRegion
from mshared.uffd import SERVED, Outcome
from mshared.under_way import Reading
from msharefs.addr import Address, AddrRange, round_up
from msharefs.effects import Answer, Deliver, Fill, Signal
from msharefs.perms import PROT_RW, Advice
from msharefs.readahead import MOST
from msharefs.vma import FileSource, Vma

log = logging.getLogger(__name__)

_RANDOM: Final = Advice.RANDOM


@attrs.define(eq=False)
class Waiting:
    """A fault as it was reported; ``since`` when, in nanoseconds of the monotonic clock. ``alone``: see ``Fault``."""

    attachment: LiveAttachment
    flags: int
    addr: int
    tid: int
    since: int
    alone: bool = False


class Filling:
    """Reads what faults wait for. ``decide`` decides a fault anew."""

    def __init__(self, decide: Callable[[Waiting], None]) -> None:
        self._decide = decide
        self._waiting: dict[tuple[int, int], list[Waiting]] = {}
        self._buffer = files.Buffer(MOST)
        self._send, self._receive = trio.open_memory_channel[tuple[LiveRegion, AddrRange]](math.inf)

    def at_once(self, attachment: LiveAttachment, fill: Fill, vma: Vma) -> bool:
        """Put a page that is wanted alone, and that the system has in memory, into the window of who waits for it.

        Of a mapping that is read at random nearly all faults end here, so that it takes no more steps than it must.
        False: nothing was done, and ``request`` is what remains. Preconditions: ``vma`` covers the page.
        """
        region, page = attachment.region, fill.ar
        if vma.advice is not _RANDOM or fill.there or attachment.model.readonly:
            return False
        if region.reading.under_way or region.digests is not None:
            return False
        mm, buffer = region.model.mm, self._buffer
        if not region.files[fill.file].read_now(buffer, mm.page, fill.offset):
            return False
        if apply.fill(attachment, page, buffer.address, protected=vma.reports_stores) is not SERVED:
            return False
        mm.filled(page)
        return True

    def request(self, fill: Fill, vma: Vma, fault: Waiting) -> None:
        """Have a page of a file in a region, and the fault answered, or decided again.

        What the system has in memory is put in place at once. Preconditions: ``vma`` covers the page.
        """
        page, region = fill.ar, fault.attachment.region
        reading = region.reading
        under_way = _piece_with(reading, page.start) if reading.under_way else None
        if under_way is not None:
            self._waiting[region.model.id, under_way.start].append(fault)
            return
        piece, ahead = reading.readahead.next(page, vma)
        if ahead is None and self._fill_now(fault, fill, vma, piece):
            return
        self._enqueue(region, piece).append(fault)
        if ahead is not None and _piece_with(reading, ahead.start) is None:
            self._enqueue(region, ahead)

    def _enqueue(self, region: LiveRegion, piece: AddrRange) -> list[Waiting]:
        """Have a piece read; the faults that wait for it."""
        region.reading.under_way.append(piece)
        self._send.send_nowait((region, piece))
        return self._waiting.setdefault((region.model.id, piece.start), [])

    def _fill_now(self, fault: Waiting, fill: Fill, vma: Vma, piece: AddrRange) -> bool:
        """Answer a fault with what of its file is in memory; False when reading it would have to wait.

        It goes straight into the window of who asks, where that can be: that maps the pages, too. Whoever else asks
        for them finds them in the backing.
        """
        attachment, region, buffer = fault.attachment, fault.attachment.region, self._buffer
        page, offset = fill.ar, fill.offset + piece.start - fill.ar.start
        if region.digests is not None or not region.files[fill.file].read_now(buffer, piece.size, offset):
            return False
        awake = False
        try:
            for run in region.model.mm.table.holes(piece):
                part = buffer.address + run.start - piece.start
                if apply.fill(attachment, run, part, protected=vma.reports_stores) is Outcome.SERVED:
                    awake = awake or run.covers(page)
                else:
                    region.put_new(_part(buffer.view, piece, run), region.model.offset_of(run))
                region.model.mm.filled(run)
            if not awake:  # Whatever the tables say, the kernel has missed it.
                region.put_new(_part(buffer.view, piece, page), region.model.offset_of(page))
        except OSError as error:
            _log_short(region, error)
            if not awake:
                _refuse(fault)
            return True
        if not awake:
            apply.wake(attachment, fault.attachment.page_at(fault.addr))
        _served(fault, Fill)
        return True

    async def run(self) -> None:
        """Serve for ever."""
        async with trio.open_nursery() as nursery:
            async for region, piece in self._receive:
                nursery.start_soon(self._serve, region, piece)

    async def _serve(self, region: LiveRegion, piece: AddrRange) -> None:
        beyond = 0
        try:
            beyond = await self._fill(region, piece)
        except _Gone:
            pass
        except OSError as error:
            _log_short(region, error)
            beyond = piece.start
        region.reading.under_way.remove(piece)
        for fault in self._waiting.pop((region.model.id, piece.start), []):
            self._go_on(fault, beyond)

    async def _fill(self, region: LiveRegion, piece: AddrRange) -> int:
        """Read a piece and install what is missing of it; the host address from which on there is nothing to be had."""
        source = _source_of(region, piece)
        moves = region.moves
        data, size, marks = await _read(region, piece, source)
        if _source_of(region, piece) != source or region.moves != moves:
            raise _Gone  # What was read may be older than what was stored, and moved, meanwhile.
        end = min(piece.end, Address(piece.start + max(0, round_up(size - source.offset, region.model.mm.page))))
        data = data.ljust(end - piece.start, b"\0")
        missing = region.model.mm.table.holes(AddrRange(piece.start, end)) if end > piece.start else []
        # Whatever the tables say, the kernel has missed what somebody waits for.
        waited_for = {page for page in self._pages_waited_for(region, piece) if page.end <= end}
        try:
            for run in missing:
                region.put_new(_part(data, piece, run), region.model.offset_of(run))
                region.model.mm.filled(run)
            for page in waited_for:
                region.put_new(_part(data, piece, page), region.model.offset_of(page))
            for run in {*missing, *waited_for} if marks else ():
                region.remember(run, marks, piece.start)
        except OSError as error:
            _log_short(region, error)
            return piece.start
        return end

    def _pages_waited_for(self, region: LiveRegion, piece: AddrRange) -> set[AddrRange]:
        faults = self._waiting.get((region.model.id, piece.start), [])
        return {fault.attachment.host(fault.attachment.page_at(fault.addr)) for fault in faults}

    def _go_on(self, fault: Waiting, beyond: int) -> None:
        """Let the thread try again, or give it SIGBUS where the file has nothing, or memory is short."""
        model = fault.attachment.model
        region = fault.attachment.region
        host = region.model.to_host(model, Address(fault.addr))
        if region.closed or model.id not in region.model.attachments:
            return
        if not beyond:
            self._decide(fault)
        elif host >= beyond:
            _refuse(fault)
        else:
            apply.wake(fault.attachment, fault.attachment.page_at(fault.addr))
            _served(fault, Fill)


async def _read(region: LiveRegion, piece: AddrRange, source: FileSource) -> tuple[bytes, int, bytes]:
    """What a file has for a piece, its size, and what its pages are remembered by, if they are."""
    file = region.files[source.file]
    fd = os.dup(file.fd)
    digests = region.digests
    read = files.read if digests is None or not digests.wanted else comparing.read
    try:
        return await trio.to_thread.run_sync(
            read, fd, piece.size, source.offset, abandon_on_cancel=True, limiter=region.reading.limiter
        )
    except OSError as error:
        log.warning("region %s: reading a mapped file: %s", region.model.title, error.strerror)
        return b"", 0, b""
    finally:
        files.let_go(fd, file.magic)


class _Gone(Exception):
    """The mapping is another by now."""


def _refuse(fault: Waiting) -> None:
    """Give who waits a SIGBUS, as the kernel does past a file's end, or without memory."""
    addr, access = Address(fault.addr), observed.access_of(fault.flags)
    apply.answer_fault(fault.attachment, addr, fault.tid, Deliver(Signal.SIGBUS, addr), access)
    _served(fault, Deliver)


def _served(fault: Waiting, how: type[Answer]) -> None:
    observed.served(fault.attachment, fault.flags, fault.addr, fault.tid, fault.since, how)


def _log_short(region: LiveRegion, error: OSError) -> None:
    log.warning("region %s: no memory for a mapped file: %s", region.model.title, error.strerror)


def _piece_with(reading: Reading, addr: Address) -> AddrRange | None:
    """The piece that is being read and holds ``addr``."""
    return next((piece for piece in reading.under_way if addr in piece), None)


def _source_of(region: LiveRegion, piece: AddrRange) -> FileSource:
    """The file behind a piece, which one VMA covers. Raises _Gone."""
    vma = None if region.closed else region.model.mm.vmas.find(piece.start)
    shows = vma is not None and vma.ar.covers(piece) and vma.prot & PROT_RW
    source = vma.file_at(piece.start) if vma is not None and shows else None
    if source is None or source.file not in region.files:
        raise _Gone
    return source


def _part(data: bytes | memoryview, piece: AddrRange, run: AddrRange) -> bytes:
    """What ``data``, read for ``piece``, has for a part of it."""
    at = run.start - piece.start
    return bytes(data[at : at + run.size])
