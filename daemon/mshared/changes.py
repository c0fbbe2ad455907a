"""Changing what is mapped inside a region: one call, done in every process when it returns."""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Final
from weakref import WeakValueDictionary

import attrs
import trio

from mshared import apply, book
from mshared import records as rec
from mshared.comparing import write_changed
from mshared.dropping import drop_clean
from mshared.files import filesystem, let_go
from mshared.killpoints import point
from mshared.live import LiveAttachment, LiveRegion
from mshared.refusals import refill
from mshared.writeback import flush, sync_files
from msharefs import protocol
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import Change
from msharefs.errors import (
    AccessDeniedError,
    BadDescriptorError,
    InvalidArgumentError,
    NoDeviceError,
    NoMemoryError,
    NotSupportedError,
)
from msharefs.perms import MAP_REFPAGE, Advice, MapFlag, Prot
from msharefs.refpage import RefPage
from msharefs.region import BackingKind
from msharefs.vma import FileSource, Source

log = logging.getLogger(__name__)

_KNOWN_FLAGS = MapFlag(sum(MapFlag))
_KNOWN_PROT: Final = sum(Prot)
_AT_ONCE: Final = 8 * PMD_SIZE
"""Bytes of huge pages that are zeroed before others have their turn: some milliseconds."""
_PRIVATE = MapFlag.PRIVATE | MapFlag.ANONYMOUS


class Changes:
    """Carries out mmap, munmap, mprotect and madvise for whoever is attached and may write.

    ``read_events`` sees to what the kernel reports at that moment.
    """

    def __init__(self, read_events: Callable[[], None]) -> None:
        self._read_events = read_events
        self._refpages: WeakValueDictionary[bytes, RefPage] = WeakValueDictionary()
        """Those that are mapped somewhere, each once."""

    async def mmap(self, live: LiveAttachment, request: protocol.Mmap, file: int | None) -> protocol.Placed:
        """Map anonymous memory, a file or a reference page, at an offset or in a gap (compare mmap(2))."""
        wanted = _checked_flags(request.flags, file=file is not None)
        refpage = self._refpage(request.refpage, wanted=wanted.refpage)
        if request.file_offset < 0 or request.file_offset % PAGE_SIZE:
            raise InvalidArgumentError(f"file offset {request.file_offset} is not a multiple of {PAGE_SIZE}")
        opened = None if file is None else await open_file(file)
        try:
            if request.offset is not None:
                ar = live.region.model.range_at(request.offset, request.length)
                await self._flush(live, ar)
                if wanted.replace:
                    await live.region.family.make_way(live.region.model.mm, ar)
        except BaseException:
            if opened is not None:
                let_go(opened.fd, opened.magic)
            raise
        try:
            placed = self._mmap(live, request, wanted, opened or refpage)
            model = live.region.model
            await refill(live.region, model.range_at(placed.offset, request.length), self._read_events)
        finally:
            live.region.drop_unused_files()
        return placed

    def _mmap(
        self, live: LiveAttachment, request: protocol.Mmap, wanted: _Wanted, shows: Opened | RefPage | None
    ) -> protocol.Placed:
        source: Source | None = None
        added: list[rec.Record] = []
        if isinstance(shows, Opened):
            number = live.region.add_file(shows.fd, shows.magic)
            added.append(book.file_is(live.region.model.id, number, live.region.files[number]))
            source = FileSource(number, request.file_offset, wanted.shared, shows.writable)
        else:
            source = shows
        model = live.region.model
        ar = None if request.offset is None else model.range_at(request.offset, request.length)
        if wanted.fixed and ar is None:
            raise InvalidArgumentError("MAP_FIXED needs an offset")
        place: list[AddrRange] = []

        def decide() -> list[Change]:
            at, effects = model.mm.mmap(
                ar,
                request.length,
                checked_prot(request.prot),
                fixed=wanted.fixed,
                replace=wanted.replace,
                align=min(model.mm.granule, PMD_SIZE),
                source=source,
                reserve=lambda ar: live.region.backing.reserve(ar.moved(-model.ar.start)),
            )
            place.append(at)
            return effects

        if ar is not None and wanted.replace and source is not None:
            _check_replaceable(live.region, ar)

        def outcome() -> tuple[AddrRange, protocol.Placed]:
            return place[0], protocol.Placed(model.offset_of(place[0]))

        self._change(live, ar, decide, outcome, *added, cleared=True)
        return outcome()[1]

    def _refpage(self, content: str | None, *, wanted: bool) -> RefPage | None:
        """A reference page from the wire. Raises InvalidArgumentError, also where it does not fit the flags."""
        if (content is not None) != wanted:
            raise InvalidArgumentError("MAP_REFPAGE and a reference page go together: give both, or neither")
        if content is None:
            return None
        try:
            found = RefPage.of(bytes.fromhex(content))
        except ValueError:
            raise InvalidArgumentError("a reference page comes in hexadecimal") from None
        return self._refpages.setdefault(found.pattern, found)

    async def munmap(self, live: LiveAttachment, request: protocol.Munmap) -> None:
        """Unmap a range (compare munmap(2))."""
        region = live.region
        ar = region.model.range_at(request.offset, request.length)
        region.model.mm.check_range(ar)
        _check_writer(live)
        await self._flush(live, ar)
        await region.prepare_to_punch(ar)
        await region.family.make_way(region.model.mm, ar)
        out_of_sight = region.out_of_sight(ar)
        self._change(live, ar, lambda: region.model.mm.munmap(ar), lambda: (ar, protocol.Done()), cleared=True)
        for part in out_of_sight:
            region.give_back(part)
        live.region.drop_unused_files()

    async def msync(self, live: LiveAttachment, request: protocol.Msync) -> None:
        """Have the files in a range hold every store (compare msync(2)). Readers may ask for it too."""
        model = live.region.model
        if request.length is None:
            ar = model.range_at(request.offset, model.ar.size - request.offset)
        else:
            ar = model.range_at(request.offset, request.length)
            model.mm.check_mapped(ar)
        await self._flush(live, ar)
        if model.file is not None:
            await write_changed(live.region)
            await sync_files(live.region)

    async def mprotect(self, live: LiveAttachment, request: protocol.Mprotect) -> None:
        """Change the protection of a range (compare mprotect(2))."""
        ar = live.region.model.range_at(request.offset, request.length)
        await self._flush(live, ar)
        prot = checked_prot(request.prot)
        _check_writer(live)
        live.region.model.mm.check_mapped(ar)
        if prot.accessible:
            live.region.reserve(ar, hidden=True)
        else:
            await live.region.family.make_way(live.region.model.mm, ar, bring=True)
        self._change(
            live,
            ar,
            lambda: live.region.model.mm.mprotect(ar, prot),
            lambda: (ar, protocol.Done()),
            cleared=not prot.accessible,
        )
        await refill(live.region, ar, self._read_events)

    async def madvise(self, live: LiveAttachment, request: protocol.Madvise) -> None:
        """Take advice about a range (compare madvise(2)). What has no effect on others the client does by itself."""
        try:
            advice = Advice(request.advice)
        except ValueError:
            raise InvalidArgumentError(f"advice {request.advice} is unknown, or makes no sense for a region") from None
        mm = live.region.model.mm
        ar = live.region.model.range_at(request.offset, request.length)
        mm.check_mapped(ar)
        if advice is Advice.REMOVE:
            await self._remove(live, ar)
        elif advice in (Advice.COLD, Advice.PAGEOUT):
            await drop_clean(live.region, ar, self._read_events)
        elif advice in (Advice.NORMAL, Advice.RANDOM, Advice.SEQUENTIAL):
            mm.madvise_reading(ar, advice)
            live.region.note(book.mapped(live.region, ar))
        elif advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
            need = Prot.WRITE if advice is Advice.POPULATE_WRITE else Prot.READ | Prot.WRITE
            if not all(vma.prot & need for vma in mm.vmas.overlapping(ar)):
                raise InvalidArgumentError(f"{ar} may not be touched like that throughout; mprotect it first")

    async def _remove(self, live: LiveAttachment, ar: AddrRange) -> None:
        """Have zeros in a range, for everybody. Huge pages are written over, while others have their turn."""
        region, mm = live.region, live.region.model.mm
        _check_writer(live)
        mm.check_removable(ar)
        await region.family.make_way(mm, ar)
        if region.backing.kind is not BackingKind.HUGETLB:
            self._change(live, ar, lambda: mm.madvise_remove(ar), lambda: (ar, protocol.Done()), cleared=True)
            return
        for piece in ar.pieces(_AT_ONCE):
            await trio.lowlevel.checkpoint()
            await region.family.make_way(mm, piece)
            reply = protocol.Done() if piece.end == ar.end else None
            self._change(live, piece, partial(mm.madvise_remove, piece), partial(_tuple, piece, reply), cleared=True)

    async def _flush(self, live: LiveAttachment, ar: AddrRange) -> None:
        """Write back beforehand: what a change writes back by itself, on the loop, is then little."""
        await flush(live.region, ar, self._read_events)

    def _change(
        self,
        live: LiveAttachment,
        where: AddrRange | None,
        decide: Callable[[], list[Change]],
        outcome: Callable[[], tuple[AddrRange, protocol.Reply | None]],
        *noted: rec.Record,
        cleared: bool,
    ) -> None:
        """Decide and carry out, in every process; when memory is short, all is as before.

        ``where`` covers what is mapped already of what changes. ``outcome`` says then where that is, and what the
        client is told. ``cleared``: what was installed there is not any more.

        Forks that were under way meanwhile have announced themselves by the time all is armed, or have copied what is
        armed: they are let go on only after they are seen to.
        """
        region = live.region
        _check_writer(live)
        before = [] if where is None else [(vma.ar, vma.prot) for vma in region.model.mm.vmas.overlapping(where)]
        effects = decide()
        point()
        ar, reply = outcome()
        new = (*noted, book.mapped(region, ar, cleared=cleared), *book.dirty_if_any(region, ar))
        try:
            apply.carry_out(region, effects, self._read_events, *new, reply=reply)
        except OSError as error:
            region.book.take_back_answer()
            log.warning("%s: no memory for a change, undone: %s", live, error.strerror)
            self._undo(live, before)
            raise NoMemoryError(f"no memory for the change: {error.strerror}; free some and try again") from error

    def _undo(self, live: LiveAttachment, before: list[tuple[AddrRange, Prot]]) -> None:
        """Give every VMA its protection back: contents only ever fail to move when one is protected."""
        mm = live.region.model.mm
        for ar, prot in before:
            if mm.vmas.holes(ar):
                continue
            try:
                live.region.reserve(ar, hidden=True)
            except NoMemoryError as error:
                log.error("%s: %s stays inaccessible: %s", live, ar, error)  # noqa: TRY400
            else:
                effects = mm.mprotect(ar, prot)
                apply.carry_out(live.region, effects, self._read_events, book.mapped(live.region, ar))


def _check_writer(live: LiveAttachment) -> None:
    """Only who may store may change mappings."""
    if live.model.readonly:
        name = live.region.model.title
        raise AccessDeniedError(f"{name!r} was opened O_RDONLY; open it O_RDWR to change its mappings")


def _tuple(ar: AddrRange, reply: protocol.Reply | None) -> tuple[AddrRange, protocol.Reply | None]:
    return ar, reply


def _check_replaceable(region: LiveRegion, ar: AddrRange) -> None:
    """Whether pages can make way for those of a file, with others for these at hand. Raises NotSupportedError."""
    region.model.mm.check_range(ar)
    backing, inside = region.backing, ar.moved(-region.model.ar.start)
    if backing.kind is BackingKind.HUGETLB and backing.mount is None and region.held(inside):
        raise NotSupportedError(
            "in a fork, and with a daemon that is not root's, huge pages in use cannot make way for a file's: others"
            " might take those; munmap them first"
        )


def checked_prot(number: int) -> Prot:
    """A protection from the wire; the model refuses PROT_EXEC. Raises InvalidArgumentError for other bits."""
    if number & ~_KNOWN_PROT:
        raise InvalidArgumentError(f"protection {number:#x} has unknown bits")
    return Prot(number)


@attrs.frozen
class Opened:
    """A file that is to be mapped: the daemon's own descriptor of it, and the magic number of its filesystem."""

    fd: int
    writable: bool
    magic: int


async def open_file(file: int) -> Opened:
    """A client's descriptor, checked as mmap(2) does. Raises BadDescriptorError, NoDeviceError, AccessDeniedError.

    Its filesystem may be served by the client, which need not answer: that holds one thread, and the client.
    """
    own = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(_open_again, file, abandon_on_cancel=True, limiter=own)


def _open_again(file: int) -> Opened:
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise BadDescriptorError("a descriptor opened with O_PATH cannot be mapped")
    try:
        regular, magic = stat.S_ISREG(os.fstat(file).st_mode), filesystem(file)[0]
    except OSError as error:
        raise AccessDeniedError(
            f"mshared may not look at the file ({error.strerror}); mount its filesystem with allow_other"
        ) from error
    if not regular:
        raise NoDeviceError("only regular files can be mapped into a region")
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise AccessDeniedError("the file was opened for writing only; open it O_RDWR or O_RDONLY")
    access = flags & os.O_ACCMODE
    try:
        fd = os.open(f"/proc/self/fd/{file}", access | os.O_CLOEXEC)  # Without O_APPEND, which would move our writes.
    except OSError:
        if flags & os.O_APPEND:
            raise AccessDeniedError("the file was opened with O_APPEND; open it without") from None
        fd = os.dup(file)
    return Opened(fd, access == os.O_RDWR, magic)


@attrs.frozen
class _Wanted:
    """What flags of mmap ask for. ``replace`` is MAP_FIXED; ``fixed`` that, or MAP_FIXED_NOREPLACE."""

    shared: bool
    fixed: bool
    replace: bool
    refpage: bool


@functools.lru_cache(maxsize=64)
def _checked_flags(number: int, *, file: bool) -> _Wanted:
    """Flags from the wire. Anonymous memory is shared by the region's processes, whichever of the two is asked for."""
    if number & ~(int(_KNOWN_FLAGS) | MAP_REFPAGE):
        raise InvalidArgumentError(f"mmap flags {number:#x} have bits that a region does not know")
    flags = MapFlag(number)
    if not flags & (MapFlag.SHARED | MapFlag.PRIVATE):
        raise InvalidArgumentError("mmap needs MAP_SHARED or MAP_PRIVATE")
    if flags & MAP_REFPAGE and (file or flags & (_PRIVATE | MapFlag.SHARED) != _PRIVATE):
        raise InvalidArgumentError("a reference page is mapped MAP_PRIVATE|MAP_ANONYMOUS|MAP_REFPAGE, without a file")
    if bool(flags & MapFlag.ANONYMOUS) == file:
        raise BadDescriptorError("mmap takes either MAP_ANONYMOUS or a file")
    kept = bool(flags & MapFlag.FIXED_NOREPLACE)
    replace = bool(flags & MapFlag.FIXED) and not kept
    return _Wanted(bool(flags & MapFlag.SHARED), replace or kept, replace, bool(flags & MAP_REFPAGE))
