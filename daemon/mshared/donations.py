"""Memory that a region's creator had mapped before: what the region makes of it.

Anonymous memory arrives by the backing file: the creator copies, and puts the backing in its place before its window is
armed. A mapping of a file stays one, and the creator goes on using the old one until the region's is armed: that is
staged at another address for so long, and moved to its place then, about which the kernel tells. Nobody else may attach
before the creator says that all has been moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from mshared import apply, book
from mshared.changes import Opened, checked_prot, open_file
from mshared.files import let_go
from mshared.live import LiveRegion
from mshared.under_way import Staged
from msharefs.addr import PAGE_SIZE, Address
from msharefs.effects import Change, Punch
from msharefs.errors import (
    AccessDeniedError,
    BadDescriptorError,
    ExistsError,
    InvalidArgumentError,
    MshareError,
    NotSupportedError,
    ProtocolError,
)
from msharefs.perms import PROT_RW, Prot
from msharefs.protocol import DonatedFile, DonatedRange
from msharefs.region import BackingKind, Region
from msharefs.rules import check_user_range
from msharefs.vma import FileId, FileSource

log = logging.getLogger(__name__)


async def open_files(fds: Sequence[int]) -> list[Opened]:
    """The files that a client sent along, as the daemon's own. Raises what ``open_file`` does, with none open."""
    files: list[Opened] = []
    try:
        for fd in fds:
            files.append(await open_file(fd))  # noqa: PERF401 - what is open must be known when one fails
    except BaseException:
        close_files(files)
        raise
    return files


def close_files(files: Sequence[Opened]) -> None:
    """Close what nobody has taken."""
    for file in files:
        let_go(file.fd, file.magic)


def map_donated(live: LiveRegion, donated: Sequence[DonatedRange], files: list[Opened]) -> None:
    """Have the mappings of the donor in a new region, which takes all of ``files``. Raises MshareError."""
    taken, files[:] = list(files), []
    numbers = [live.add_file(file.fd, file.magic) for file in taken]
    for part in donated:
        source = None if part.file is None else _source(part.file, numbers, taken)
        _map_one(live.model, part, source)
    live.drop_unused_files()


def stage(model: Region, donated: Sequence[DonatedRange], addresses: Sequence[int]) -> list[Staged]:
    """What stands at which address for the time being. Raises InvalidArgumentError."""
    parts = [model.range_at(part.offset, part.length) for part in donated if part.file is not None]
    if len(parts) != len(addresses):
        raise InvalidArgumentError(f"{len(parts)} donated mappings of files, of which {len(addresses)} are staged")
    for ar, addr in zip(parts, addresses, strict=True):
        check_user_range(addr, ar.size, PAGE_SIZE)
    return [Staged(ar, Address(addr)) for ar, addr in zip(parts, addresses, strict=True)]


def settling(model: Region, donated: Sequence[DonatedRange]) -> Iterator[list[Change]]:
    """Changes that make holes and protections hold, now that the contents are in: they came by the file."""
    if donated:
        yield [Punch(hole) for hole in model.mm.shared_granule_holes()]
    for part in donated:
        if not Prot(part.prot) & Prot.WRITE and _first_prot(part) & Prot.WRITE:
            yield model.mm.mprotect(model.range_at(part.offset, part.length), Prot(part.prot))


def undo(live: LiveRegion, read_events: Callable[[], None]) -> None:
    """Before an unfinished region goes: files hold every store, and the memory what nobody may touch.

    Who stores to a file's pages from now on waits, until the window is no more.
    """
    mm = live.model.mm
    hidden = [vma.ar for vma in mm.vmas if not vma.prot & PROT_RW and not vma.reaches_file]
    try:
        apply.carry_out(live, mm.write_back(live.model.ar), read_events)
        for ar in hidden:
            effects = mm.mprotect(ar, PROT_RW)
            apply.carry_out(live, effects, read_events, book.mapped(live, ar))
    except (OSError, MshareError):
        log.exception("region %s: undoing a donation", live.model.name)


def _source(file: DonatedFile, numbers: list[FileId], files: Sequence[Opened]) -> FileSource:
    if not 0 <= file.descriptor < len(files):
        raise BadDescriptorError(f"a donated mapping names descriptor {file.descriptor}, of {len(files)} that came")
    if file.offset < 0 or file.offset % PAGE_SIZE:
        raise InvalidArgumentError(f"file offset {file.offset} is not a multiple of {PAGE_SIZE}")
    return FileSource(numbers[file.descriptor], file.offset, file.shared, files[file.descriptor].writable)


def _map_one(model: Region, part: DonatedRange, source: FileSource | None) -> None:
    if checked_prot(part.prot) & Prot.EXEC:
        raise AccessDeniedError("an executable mapping cannot be donated: regions are data; mprotect it first")
    if source is not None and model.backing is BackingKind.HUGETLB:
        raise NotSupportedError(
            "a file's mapping cannot be donated to a hugetlb region; map the file into it afterwards"
        )
    ar = model.range_at(part.offset, part.length)
    try:
        model.mm.mmap(ar, ar.size, _first_prot(part), fixed=True, source=source)
    except ExistsError:
        raise ProtocolError("two donated ranges overlap") from None


def _first_prot(part: DonatedRange) -> Prot:
    """Read-write until the contents are in; those of a shared file are where they belong."""
    return Prot(part.prot) if part.file is not None and part.file.shared else PROT_RW
