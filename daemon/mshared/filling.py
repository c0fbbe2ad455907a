"""Bringing pages of files into regions: read off the loop, in pieces around the page that was touched.

A fault that waits for a file is decided again when the file has been read, never replayed: the mapping may be another
by then. What is in memory already is never written over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable
from typing import Final

import attrs
import trio

from mshared import apply
from mshared.live import LiveAttachment, LiveRegion, Reading
from msharefs.addr import PAGE_SIZE, Address, AddrRange, round_up
from msharefs.effects import Deliver, Signal
from msharefs.perms import PROT_RW
from msharefs.vma import FileSource

log = logging.getLogger(__name__)

PIECE: Final = 128 << 10
"""Bytes that are read at once around a page, as far as its mapping reaches."""
MOST: Final = 2 << 20
"""Bytes that are read at once when pages are touched in order, and as much again ahead (compare mm/readahead.c)."""


@attrs.frozen
class Waiting:
    """A fault as it was reported."""

    attachment: LiveAttachment
    flags: int
    addr: int
    tid: int


class Filling:
    """Reads what faults wait for. ``decide`` decides a fault anew."""

    def __init__(self, decide: Callable[[LiveAttachment, int, int, int], None]) -> None:
        self._decide = decide
        self._waiting: dict[tuple[int, int], list[Waiting]] = {}
        self._send, self._receive = trio.open_memory_channel[tuple[LiveRegion, AddrRange]](math.inf)

    def request(self, page: AddrRange, fault: Waiting) -> None:
        """Have the file's page at the host range ``page`` read, and the fault decided again."""
        region = fault.attachment.region
        reading = region.reading
        under_way = _piece_with(reading, page.start)
        if under_way is not None:
            self._waiting[region.model.id, under_way.start].append(fault)
            return
        vma = region.model.mm.vmas.find(page.start)
        whole = vma.ar if vma is not None else page
        in_order = page.start == reading.end
        size = min(2 * reading.size, MOST) if in_order else PIECE
        piece = AddrRange.sized(page.start, size) if in_order else AddrRange.page_at(page.start, size)
        piece = piece.intersect(whole) or page
        self._enqueue(region, piece).append(fault)
        ahead = AddrRange.sized(piece.end, size).intersect(whole) if in_order else None
        if ahead is not None and _piece_with(reading, ahead.start) is None:
            self._enqueue(region, ahead)
        # A fault that was on its way while its page came says nothing of the order.
        if not reading.end - 2 * reading.size <= page.start < reading.end:
            reading.end, reading.size = (ahead or piece).end, size

    def _enqueue(self, region: LiveRegion, piece: AddrRange) -> list[Waiting]:
        """Have a piece read; the faults that wait for it."""
        region.reading.under_way.append(piece)
        self._send.send_nowait((region, piece))
        return self._waiting.setdefault((region.model.id, piece.start), [])

    async def run(self) -> None:
        """Serve for ever."""
        async with trio.open_nursery() as nursery:
            async for region, piece in self._receive:
                nursery.start_soon(self._serve, region, piece)

    async def _serve(self, region: LiveRegion, piece: AddrRange) -> None:
        beyond = 0
        with contextlib.suppress(_Gone):
            beyond = await self._fill(region, piece)
        region.reading.under_way.remove(piece)
        for fault in self._waiting.pop((region.model.id, piece.start), []):
            self._go_on(fault, beyond)

    async def _fill(self, region: LiveRegion, piece: AddrRange) -> int:
        """Read a piece and install what is missing of it; the host address from which on the file has nothing."""
        source = _source_of(region, piece)
        moves = region.moves
        fd = os.dup(region.files[source.file])
        try:
            data, size = await trio.to_thread.run_sync(
                _read, fd, piece.size, source.offset, abandon_on_cancel=True, limiter=region.reading.limiter
            )
        except OSError as error:
            log.warning("region %s: reading a mapped file: %s", region.model.name, error.strerror)
            data, size = b"", 0
        finally:
            os.close(fd)
        if _source_of(region, piece) != source or region.moves != moves:
            raise _Gone  # What was read may be older than what was stored, and moved, meanwhile.
        end = min(piece.end, Address(piece.start + max(0, round_up(size - source.offset, PAGE_SIZE))))
        data = data.ljust(end - piece.start, b"\0")
        for run in _missing(region, AddrRange(piece.start, end)) if end > piece.start else []:
            self._put(region, piece, data, run)
            region.model.mm.filled(run)
        for page in self._pages_waited_for(region, piece):  # Whatever the tables say, the kernel has missed them.
            if page.end <= end:
                self._put(region, piece, data, page)
        return end

    def _put(self, region: LiveRegion, piece: AddrRange, data: bytes, run: AddrRange) -> None:
        at = run.start - piece.start
        region.put_new(data[at : at + run.size], region.model.offset_of(run))

    def _pages_waited_for(self, region: LiveRegion, piece: AddrRange) -> set[AddrRange]:
        faults = self._waiting.get((region.model.id, piece.start), [])
        model = region.model
        return {AddrRange.page_at(model.to_host(fault.attachment.model, Address(fault.addr))) for fault in faults}

    def _go_on(self, fault: Waiting, beyond: int) -> None:
        """Let the thread try again, or give it SIGBUS where the file has nothing."""
        model = fault.attachment.model
        region = fault.attachment.region
        host = region.model.to_host(model, Address(fault.addr))
        if region.closed or model.id not in region.model.attachments:
            return
        if not beyond:
            self._decide(fault.attachment, fault.flags, fault.addr, fault.tid)
        elif host >= beyond:
            apply.answer_fault(fault.attachment, Address(fault.addr), fault.tid, Deliver(Signal.SIGBUS, host))
        else:
            apply.wake(fault.attachment, AddrRange.page_at(fault.addr))


class _Gone(Exception):
    """The mapping is another by now."""


def _piece_with(reading: Reading, addr: Address) -> AddrRange | None:
    """The piece that is being read and holds ``addr``."""
    return next((piece for piece in reading.under_way if addr in piece), None)


def _source_of(region: LiveRegion, piece: AddrRange) -> FileSource:
    """The file behind a piece, which one VMA covers. Raises _Gone."""
    vma = None if region.closed else region.model.mm.vmas.find(piece.start)
    shows = vma is not None and vma.ar.covers(piece) and vma.prot & PROT_RW
    source = vma.source_at(piece.start) if vma is not None and shows else None
    if source is None or source.file not in region.files:
        raise _Gone
    return source


def _missing(region: LiveRegion, ar: AddrRange) -> list[AddrRange]:
    """The parts of ``ar`` for which the tables have nothing, in order."""
    found, start = [], ar.start
    for run, _ in region.model.mm.table.runs(ar):
        if start < run.start:
            found.append(AddrRange(start, run.start))
        start = run.end
    if start < ar.end:
        found.append(AddrRange(start, ar.end))
    return found


def _read(fd: int, length: int, offset: int) -> tuple[bytes, int]:
    """What a file holds from ``offset`` on, and its size; in a worker thread."""
    return os.pread(fd, length, offset), os.fstat(fd).st_size
