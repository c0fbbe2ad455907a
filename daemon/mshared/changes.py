"""Changing what is mapped inside a region: one call, done in every process when it returns."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mshared import apply
from mshared.live import LiveAttachment
from msharefs import protocol
from msharefs.addr import AddrRange
from msharefs.effects import Effect
from msharefs.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    NoMemoryError,
    NotSupportedError,
)
from msharefs.perms import Advice, MapFlag, Prot

log = logging.getLogger(__name__)

_KNOWN_FLAGS = MapFlag(sum(MapFlag))


class Changes:
    """Carries out mmap, munmap, mprotect and madvise for whoever is attached and may write.

    ``read_events`` sees to what the kernel reports at that moment.
    """

    def __init__(self, read_events: Callable[[], None]) -> None:
        self._read_events = read_events

    def mmap(self, live: LiveAttachment, request: protocol.Mmap) -> protocol.Placed:
        """Map anonymous memory at an offset or in a gap (compare mmap(2))."""
        flags = _checked_flags(request.flags)
        model = live.region.model
        ar = None if request.offset is None else model.range_at(request.offset, request.length)
        replace = bool(flags & MapFlag.FIXED) and not flags & MapFlag.FIXED_NOREPLACE
        fixed = replace or bool(flags & MapFlag.FIXED_NOREPLACE)
        if fixed and ar is None:
            raise InvalidArgumentError("MAP_FIXED needs an offset")
        place: list[AddrRange] = []

        def decide() -> list[Effect]:
            at, effects = model.mm.mmap(
                ar, request.length, checked_prot(request.prot), fixed=fixed, replace=replace, align=model.mm.granule
            )
            place.append(at)
            return effects

        self._change(live, decide)
        return protocol.Placed(model.offset_of(place[0]))

    def munmap(self, live: LiveAttachment, request: protocol.Munmap) -> None:
        """Unmap a range (compare munmap(2))."""
        ar = live.region.model.range_at(request.offset, request.length)
        self._change(live, lambda: live.region.model.mm.munmap(ar))

    def mprotect(self, live: LiveAttachment, request: protocol.Mprotect) -> None:
        """Change the protection of a range (compare mprotect(2))."""
        ar = live.region.model.range_at(request.offset, request.length)
        prot = checked_prot(request.prot)
        self._change(live, lambda: live.region.model.mm.mprotect(ar, prot))

    def madvise(self, live: LiveAttachment, request: protocol.Madvise) -> None:
        """Take advice about a range (compare madvise(2)). What has no effect on others the client does by itself."""
        try:
            advice = Advice(request.advice)
        except ValueError:
            raise InvalidArgumentError(f"advice {request.advice} is unknown, or makes no sense for a region") from None
        mm = live.region.model.mm
        ar = live.region.model.range_at(request.offset, request.length)
        mm.check_mapped(ar)
        if advice is Advice.REMOVE:
            self._change(live, lambda: mm.madvise_remove(ar))
        elif advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
            need = Prot.WRITE if advice is Advice.POPULATE_WRITE else Prot.READ | Prot.WRITE
            if not all(vma.prot & need for vma in mm.vmas.overlapping(ar)):
                raise AccessDeniedError(f"{ar} may not be touched like that throughout; mprotect it first")

    def _change(self, live: LiveAttachment, decide: Callable[[], list[Effect]]) -> None:
        """Decide and carry out, in every process; when memory is short, all is as before.

        Forks that were under way meanwhile have announced themselves by the time all is armed, or have copied what is
        armed: they are let go on only after they are seen to.
        """
        region = live.region
        if live.model.readonly:
            raise AccessDeniedError(f"{region.model.name!r} was opened O_RDONLY; open it O_RDWR to change its mappings")
        before = [(vma.ar, vma.prot) for vma in region.model.mm.vmas]
        effects = decide()
        try:
            apply.carry_out(region, effects, self._read_events)
        except OSError as error:
            log.warning("%s: no memory for a change, undone: %s", live, error.strerror)
            self._undo(live, before)
            raise NoMemoryError(f"no memory for the change: {error.strerror}; free some and try again") from error

    def _undo(self, live: LiveAttachment, before: list[tuple[AddrRange, Prot]]) -> None:
        """Give every VMA its protection back: contents only ever fail to move when one is protected."""
        mm = live.region.model.mm
        for ar, prot in before:
            if not mm.vmas.holes(ar):
                apply.carry_out(live.region, mm.mprotect(ar, prot), self._read_events)


def checked_prot(number: int) -> Prot:
    """A protection from the wire; the model refuses PROT_EXEC. Raises InvalidArgumentError for other bits."""
    if number & ~int(Prot.READ | Prot.WRITE | Prot.EXEC):
        raise InvalidArgumentError(f"protection {number:#x} has unknown bits")
    return Prot(number)


def _checked_flags(number: int) -> MapFlag:
    """Flags from the wire. All memory of a region is shared by its processes, whichever of the two is asked for."""
    if number & ~int(_KNOWN_FLAGS):
        raise InvalidArgumentError(f"mmap flags {number:#x} have bits that a region does not know")
    flags = MapFlag(number)
    if not flags & (MapFlag.SHARED | MapFlag.PRIVATE):
        raise InvalidArgumentError("mmap needs MAP_SHARED or MAP_PRIVATE")
    if not flags & MapFlag.ANONYMOUS:
        raise NotSupportedError("files cannot be mapped into a region yet; map anonymous memory and read them into it")
    return flags
