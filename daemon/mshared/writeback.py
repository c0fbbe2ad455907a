"""Bringing stores to the shared files that are mapped into a region, off the loop.

A file's filesystem may take its time; and a client that stands in a system call on the file, holding it locked, may be
waiting for a fault that only the loop can answer. So threads write, and the loop goes on.

Pages are protected and clean in the model before they are copied: a store that comes meanwhile is reported and makes
its page dirty again. What is not copied in the end, for whatever reason, is dirty again too. What is still dirty when
a mapping goes is set aside in memory, and written before the call returns.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import trio

from mshared import apply
from mshared import records as rec
from mshared.book import dirty
from mshared.comparing import write_changed, write_changed_now
from mshared.files import let_go, write_within
from mshared.lasting import lasting
from mshared.live import LiveRegion
from msharefs.addr import AddrRange
from msharefs.effects import Protect, WriteBack
from msharefs.errors import NoSpaceError
from msharefs.vma import FileId

log = logging.getLogger(__name__)

_WRITE_SIZE: Final = 1 << 20
_LEISURE: Final = 20
"""Times as long as writing took the daemon rests before the next time: no more than a twentieth of a processor."""


async def flush(region: LiveRegion, ar: AddrRange, read_events: Callable[[], None]) -> None:
    """Have the files in ``ar`` hold every store made before the call. Raises NoSpaceError.

    Preconditions: the region's lock is held, so that no mapping changes before the end.
    """
    if not region.files:
        return
    inside = ar.intersect(region.model.ar)
    effects = region.model.mm.write_back(inside) if inside is not None else []
    apply.carry_out(region, (e for e in effects if isinstance(e, Protect)), read_events)
    runs = [effect for effect in effects if isinstance(effect, WriteBack)]
    if not runs:
        return
    region.writing += [run.ar for run in runs]
    with _duplicates(region, {run.file for run in runs}) as (memory, files):
        try:
            while runs:
                where = runs[0].ar.moved(-region.model.ar.start)
                file, offset = files[runs[0].file], runs[0].offset
                await trio.to_thread.run_sync(_copy, memory, file, where, offset, limiter=region.reading.limiter)
                del runs[0]
        except OSError as error:
            raise NoSpaceError(f"cannot write to the mapped file: {error.strerror}") from error
        finally:
            for run in runs:
                region.model.mm.stored_to(run.ar)
            region.writing.clear()
            if inside is not None:
                region.note(dirty(region, inside))


async def write_out(region: LiveRegion) -> None:
    """Write what a change has set aside. Preconditions: the region's lock is held."""
    while region.unwritten:
        await trio.to_thread.run_sync(_write_one, region, limiter=region.reading.limiter)
        _forget_one(region)


class Settling:
    """Sees to it that files have every store once nobody is attached, and closes regions that have ended then."""

    def __init__(self, read_events: Callable[[], None]) -> None:
        self._read_events = read_events
        self._send, self._receive = trio.open_memory_channel[tuple[LiveRegion, trio.Event]](math.inf)
        self._expected: dict[LiveRegion, trio.Event] = {}

    def expect(self, region: LiveRegion) -> None:
        """The last one has gone from a region whose lock somebody holds, who is to ask for this in the end."""
        region.written = self._expected.setdefault(region, trio.Event())

    def request(self, region: LiveRegion) -> None:
        """Do so for a region, at once if there is nothing to write. Who holds its lock is to ask again in the end."""
        expected = self._expected.pop(region, None)
        if region.has_stores or expected is not None:
            region.written = trio.Event() if expected is None else expected
            self._send.send_nowait((region, region.written))
        elif region.ended and region.written.is_set() and not region.lock.locked():
            region.close()

    async def run(self) -> None:
        """Serve for ever."""
        async with trio.open_nursery() as nursery:
            async for region, written in self._receive:
                nursery.start_soon(self._settle, region, written)

    async def from_time_to_time(self, regions: Callable[[], Iterable[LiveRegion]], interval: float) -> None:
        """Have the files of all regions hold every store, for ever; seconds apart, or more where that takes long."""
        pause = interval
        while True:
            await trio.sleep(pause)
            start = trio.current_time()
            for region in regions():
                if region.has_stores and region.attachments:  # Else that is under way.
                    async with region.lock:
                        await self._flush(region, final=False)
                    if not region.attachments and not region.closed:
                        self.request(region)
            pause = max(interval, _LEISURE * (trio.current_time() - start))

    async def flush_all(self, regions: Iterable[LiveRegion]) -> None:
        """Have the files of all of them hold every store."""
        for region in regions:
            if region.has_stores:  # Else whoever holds its lock, for ever perhaps, is none of our business.
                async with region.lock:
                    await self._flush(region)

    def finish(self) -> None:
        """Settle what is left when nobody serves any more: what blocks now, blocks nobody."""
        with contextlib.suppress(trio.WouldBlock):
            while True:
                region, written = self._receive.receive_nowait()
                if not region.closed:
                    apply.carry_out(region, region.model.mm.write_back(region.model.ar), self._read_events)
                    while region.unwritten:
                        _write_one(region)
                        _forget_one(region)
                    try:
                        write_changed_now(region)
                    except OSError as error:
                        _log_lost(region, str(error.strerror))
                self._done(region, written)

    async def _settle(self, region: LiveRegion, written: trio.Event) -> None:
        async def once() -> None:
            async with region.lock:
                await self._flush(region)

        await lasting(once)
        self._done(region, written)
        if region in self._expected and not region.closed:  # Somebody has come, and gone, meanwhile.
            self.request(region)

    def _done(self, region: LiveRegion, written: trio.Event) -> None:
        written.set()
        if region.ended and not region.closed and region.written.is_set():
            region.close()

    async def _flush(self, region: LiveRegion, *, final: bool = True) -> None:
        if region.closed:
            return
        try:
            await flush(region, region.model.ar, self._read_events)
            await write_changed(region)
        except NoSpaceError as error:
            if final:
                _log_lost(region, str(error))
            else:
                log.warning("region %s: %s; it is tried again", region.model.title, error)
        await write_out(region)


async def sync_files(region: LiveRegion) -> None:
    """Have the disks of the files that a region shows hold what was written to them. Raises NoSpaceError."""
    with _duplicates(region, region.files) as (_, files):
        try:
            for fd in files.values():
                await trio.to_thread.run_sync(os.fdatasync, fd, limiter=region.reading.limiter)
        except OSError as error:
            raise NoSpaceError(f"the disk of the mapped file does not take it: {error.strerror}") from error


def _write_one(region: LiveRegion) -> None:
    """Write one piece that was set aside; in a worker thread."""
    piece = region.unwritten[0]
    try:
        write_within(piece.fd, piece.data, piece.offset)
    except OSError as error:
        _log_lost(region, str(error.strerror))


def _forget_one(region: LiveRegion) -> None:
    """That piece has reached its file, or never will."""
    piece = region.unwritten.pop(0)
    region.note(rec.Written(region.model.id, piece.number))
    let_go(piece.fd, piece.magic)


def _log_lost(region: LiveRegion, why: str) -> None:
    log.error("region %s: stores to a mapped file are lost: %s", region.model.title, why)


def _copy(memory: int, file: int, ar: AddrRange, offset: int) -> None:
    """Write what memory holds of a range of offsets to a file. Raises OSError."""
    for piece in ar.pieces(_WRITE_SIZE):
        write_within(file, os.pread(memory, piece.size, piece.start), offset + piece.start - ar.start)


@contextlib.contextmanager
def _duplicates(region: LiveRegion, files: Iterable[FileId]) -> Iterator[tuple[int, dict[FileId, int]]]:
    """Descriptors of the memory and of files that outlive the region, should it go."""
    memory = os.dup(region.backing.fd)
    copies = {file: region.files[file].copy_of(region.files[file].fd) for file in files}
    try:
        yield memory, {file: copy.fd for file, copy in copies.items()}
    finally:
        os.close(memory)
        for copy in copies.values():
            copy.close()
