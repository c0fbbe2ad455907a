"""Bringing stores to the shared files that are mapped into a region, off the loop.

Pages are protected and clean in the model before they are copied: a store that comes meanwhile is reported and makes
its page dirty again. What is not copied in the end, for whatever reason, is dirty again too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import trio

from mshared import apply
from mshared.live import LiveRegion
from msharefs.addr import AddrRange
from msharefs.effects import Protect, WriteBack
from msharefs.errors import NoSpaceError
from msharefs.vma import FileId


async def flush(region: LiveRegion, ar: AddrRange, read_events: Callable[[], None]) -> None:
    """Have the files in ``ar`` hold every store made before the call. Raises NoSpaceError.

    Preconditions: the region's lock is held, so that no mapping changes before the end.
    """
    inside = ar.intersect(region.model.ar)
    effects = region.model.mm.write_back(inside) if inside is not None else []
    apply.carry_out(region, (e for e in effects if isinstance(e, Protect)), read_events)
    runs = [effect for effect in effects if isinstance(effect, WriteBack)]
    if not runs:
        return
    with _duplicates(region, {run.file for run in runs}) as (memory, files):
        try:
            while runs:
                where = runs[0].ar.moved(-region.model.ar.start)
                file, offset = files[runs[0].file], runs[0].offset
                await trio.to_thread.run_sync(
                    apply.write_back, memory, file, where, offset, limiter=region.reading.limiter
                )
                del runs[0]
        except OSError as error:
            raise NoSpaceError(f"cannot write to the mapped file: {error.strerror}") from error
        finally:
            for run in runs:
                region.model.mm.stored_to(run.ar)


@contextlib.contextmanager
def _duplicates(region: LiveRegion, files: Iterable[FileId]) -> Iterator[tuple[int, dict[FileId, int]]]:
    """Descriptors of the memory and of files that outlive the region, should it go."""
    memory = os.dup(region.backing.fd)
    copies = {file: os.dup(region.files[file]) for file in files}
    try:
        yield memory, copies
    finally:
        for fd in (memory, *copies.values()):
            os.close(fd)
