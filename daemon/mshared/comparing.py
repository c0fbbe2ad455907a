"""Finding what was stored to memory that reports no stores, and bringing it to the file.

Where the kernel shares page tables, write-protection would end that. So each page is remembered by what it was when it
came from the file, or was written to it last: by digests of its pieces of 4 KiB. Writing back looks through all pages,
and writes the pieces that are others now. As long as nobody may write, nothing is remembered.

Digests lie in a file in memory, which outlives the daemon. It may die when a page is there, or written, and not
remembered yet: such a page is other than its digest, or has none, and is written once more by the next daemon.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from mshared import files, sparse
from mshared.files import Buffer, write_within
from mshared.filler import Filler
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange, round_up, united
from msharefs.errors import NoMemoryError, NoSpaceError

if TYPE_CHECKING:
    from mshared.live import LiveRegion

_DIGEST: Final = 16
_MARKS: Final = PMD_SIZE // PAGE_SIZE * _DIGEST
"""Bytes of digests that a page has."""
_UNKNOWN: Final = b"\xff" * _MARKS
"""Of a page of which nobody knows what it was: it is written. No page has such digests, nor zeros."""
_AT_ONCE: Final = 16
"""Pages that one visit to a worker thread sees to."""


@attrs.define(eq=False)
class Digests:
    """Of the pages of a region, by offset in it, each as many bytes as it has pieces times 16.

    They lie in ``fd``, which it owns. ``writers``: whether anybody could write since all was compared last.
    """

    fd: int = attrs.field(factory=lambda: os.memfd_create("msharefs-digests", os.MFD_CLOEXEC))
    writers: bool = False

    @property
    def wanted(self) -> bool:
        """Whether anybody may write, or could once."""
        return bool(os.fstat(self.fd).st_size)

    def want(self) -> None:
        """Somebody may write from now on."""
        os.ftruncate(self.fd, max(_MARKS, os.fstat(self.fd).st_size))

    def __getitem__(self, offset: int) -> bytes:
        """Of a page; zeros if it is not remembered."""
        return os.pread(self.fd, _MARKS, offset // PMD_SIZE * _MARKS).ljust(_MARKS, b"\0")

    def __setitem__(self, offset: int, marks: bytes) -> None:
        """Raises OSError without memory."""
        os.pwrite(self.fd, marks, offset // PMD_SIZE * _MARKS)

    def __iter__(self) -> Iterator[int]:
        """The pages that are remembered, by offset, in order."""
        for part in sparse.extents(self.fd):
            offsets = (at // _MARKS * PMD_SIZE for at in range(part.start, part.end, _MARKS))
            yield from (offset for offset in offsets if any(self[offset]))

    def close(self) -> None:
        """Forget all."""
        os.close(self.fd)

    def note(self, ar: AddrRange, marks: bytes, start: int) -> None:
        """Remember the pages of a range of offsets, by the digests of what was read from ``start`` on, if wanted."""
        for page in ar.pieces(PMD_SIZE) if self.wanted else ():
            at = (page.start - start) // PMD_SIZE * _MARKS
            self[page.start] = marks[at : at + _MARKS]


def restored(fd: int | None, held: Iterable[AddrRange]) -> Digests:
    """Those that an earlier daemon has left, for the pages that are there, in ranges of offsets.

    If they were wanted, what is there and not remembered is written. ``fd`` None: nobody has kept any.
    """
    found = Digests() if fd is None else Digests(fd)
    if fd is None:
        found.want()
    found.writers = found.wanted
    known = set(found)
    for page in (page.start for part in held for page in part.pieces(PMD_SIZE)):
        if found.wanted and page not in known:
            found[page] = _UNKNOWN
    return found


def digest(data: bytes | memoryview) -> bytes:
    """What a page is remembered by: of 16 bytes for each piece no two are alike by accident."""
    view = memoryview(data)
    pieces = (view[at : at + PAGE_SIZE] for at in range(0, len(view), PAGE_SIZE))
    return b"".join(hashlib.sha256(piece).digest()[:_DIGEST] for piece in pieces)


def changed(old: bytes, new: bytes) -> list[AddrRange]:
    """Which parts of a page are others, as offsets in it, by its digests then and now."""
    pieces = (at for at in range(0, len(new), _DIGEST) if old[at : at + _DIGEST] != new[at : at + _DIGEST])
    return united(AddrRange.sized(at // _DIGEST * PAGE_SIZE, PAGE_SIZE) for at in pieces)


def read(fd: int, length: int, offset: int) -> tuple[bytes, int, bytes]:
    """As ``files.read``, with the digests of whole pages."""
    data, size, _ = files.read(fd, length, offset)
    return data, size, digest(data.ljust(round_up(len(data), PMD_SIZE), b"\0"))


async def let_write(region: LiveRegion) -> None:
    """Remember all pages, before the first descriptor is handed out that can write. Preconditions: the lock is held."""
    digests = region.digests
    if digests is None or digests.wanted:
        return
    digests.want()
    with region.backing.duplicate() as memory:
        for some in _batches(_pages(region)):
            await trio.to_thread.run_sync(_remember, memory, some, digests, limiter=region.reading.limiter)


async def write_changed(region: LiveRegion) -> None:
    """Have the file hold every store made before the call. Preconditions: the lock is held. Raises NoSpaceError."""
    digests = region.digests
    if digests is None or not digests.writers:
        return
    digests.writers = any(not attachment.model.readonly for attachment in region.attachments)
    try:
        with region.backing.duplicate() as memory, _file(region) as (file, start):
            for some in _batches(list(digests)):
                await trio.to_thread.run_sync(
                    _write_some, memory, file, start, some, digests, limiter=region.reading.limiter
                )
    except OSError as error:
        digests.writers = True
        raise NoSpaceError(f"cannot write to the mapped file: {error.strerror}") from error


def write_changed_now(region: LiveRegion) -> None:
    """The same when nobody is served any more. Raises OSError."""
    digests = region.digests
    if digests is not None and digests.writers:
        digests.writers = False
        with _file(region) as (file, start):
            _write_some(region.backing.fd, file, start, list(digests), digests)


async def read_in(region: LiveRegion) -> None:
    """Have all pages that the file has, so that nobody misses one. Preconditions: the lock is held.

    Raises NoMemoryError when the file cannot be read, or there is no memory for it.
    """
    table, filler = region.model.mm.table, region.filler()
    whole = AddrRange.sized(region.model.ar.start, os.fstat(region.backing.fd).st_size)
    missing = [region.model.offset_of(page) for hole in table.holes(whole) for page in hole.pieces(PMD_SIZE)]
    try:
        with _file(region) as (file, start):
            for some in _batches(missing):
                await trio.to_thread.run_sync(
                    partial(_read_some, file, start, some, filler, region.digests),
                    abandon_on_cancel=True,
                    limiter=region.reading.limiter,
                )
                for offset in some:
                    for run in table.holes(region.model.range_at(offset, PMD_SIZE)):
                        region.model.mm.filled(run)
    except OSError as error:
        raise NoMemoryError(f"the file cannot be read in: {error.strerror}") from error


def _pages(region: LiveRegion) -> list[int]:
    """Offsets of the pages that are there."""
    runs = region.model.mm.table.runs(region.model.ar)
    return [region.model.offset_of(page) for run, _ in runs for page in run.pieces(PMD_SIZE)]


def _batches(offsets: Sequence[int]) -> Iterator[Sequence[int]]:
    return (offsets[first : first + _AT_ONCE] for first in range(0, len(offsets), _AT_ONCE))


@contextlib.contextmanager
def _file(region: LiveRegion) -> Iterator[tuple[int, int]]:
    """A duplicate of the descriptor of the file that a region shows, and what of the file lies at its start."""
    (number,), (vma,) = region.files, region.model.mm.vmas
    copy = region.files[number].copy_of(region.files[number].fd)
    try:
        yield copy.fd, vma.file.offset if vma.file is not None else 0
    finally:
        copy.close()


def _remember(memory: int, offsets: Sequence[int], digests: Digests) -> None:
    for offset in offsets:
        digests[offset] = digest(os.pread(memory, PMD_SIZE, offset))


def _write_some(memory: int, file: int, start: int, offsets: Sequence[int], digests: Digests) -> None:
    """Compare pages, and write what is other. What is not written is other the next time, too. Raises OSError."""
    for offset in offsets:
        data = memoryview(os.pread(memory, PMD_SIZE, offset))
        now = digest(data)
        for part in changed(digests[offset], now):
            write_within(file, data[part.start : part.end], start + offset + part.start)
        digests[offset] = now


def _read_some(file: int, start: int, offsets: Sequence[int], filler: Filler, digests: Digests | None) -> None:
    """Read pages, and put them where there are none yet. Raises OSError."""
    buffer = Buffer(PMD_SIZE)
    for offset in offsets:
        end = 0
        while end < PMD_SIZE and (got := os.preadv(file, [buffer.view[end:]], start + offset + end)):
            end += got
        buffer.view[end:] = bytes(PMD_SIZE - end)
        was = digest(buffer.view) if digests is not None and digests.wanted else None
        if filler.copy_from(offset, buffer.address, PMD_SIZE) and digests is not None and was is not None:
            digests[offset] = was
