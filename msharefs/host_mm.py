"""The host mm of a region: its VMAs and page tables, and the calls that change them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from msharefs.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, USER_MAX, USER_MIN, Address, AddrRange, FrameNo
from msharefs.effects import Arm, Effect, Punch, Signal, Stash, Unstash
from msharefs.errors import AccessDeniedError, ExistsError, InvalidArgumentError, NoMemoryError
from msharefs.fault import Fault, Resolution, handle_fault
from msharefs.page_table import FRAMES_IN_PMD, PageTable, Pte, PteFlag, pte_flags
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import Arming, Vma
from msharefs.vma_set import VmaSet


class HostMm:
    """What is mapped in one region (``vmas``) and what is installed (``table``).

    Every call decides and changes the model at once, between two awaits of its caller, and returns the effects that
    make the kernel follow. A call that raises has changed nothing. Addresses are the region's own; frame n is page n of
    the backing file.
    """

    def __init__(
        self,
        ar: AddrRange,
        *,
        levels: int = 4,
        paging_all: bool = False,
        hole_signal: Signal = Signal.SIGBUS,
    ) -> None:
        if not ar.is_aligned(PAGE_SIZE):
            raise InvalidArgumentError(f"{ar} is not made of whole pages")
        self.ar = ar
        self.vmas = VmaSet()
        self.table = PageTable(levels)
        self.paging_all = paging_all
        self.hole_signal = hole_signal

    def mmap(
        self,
        ar: AddrRange | None,
        size: int,
        prot: Prot = PROT_RW,
        *,
        fixed: bool = False,
        replace: bool = False,
        align: int = PAGE_SIZE,
    ) -> tuple[AddrRange, list[Effect]]:
        """Map anonymous memory; the range and the effects (compare mm/mmap.c:do_mmap).

        ``ar`` None, or taken and not ``fixed``: the lowest gap. ``fixed`` without ``replace`` is MAP_FIXED_NOREPLACE,
        with it MAP_FIXED. Raises InvalidArgumentError, ExistsError, NoMemoryError (no gap), AccessDeniedError for
        PROT_EXEC.
        """
        _check_prot(prot)
        place = self._place(ar, size, fixed=fixed, replace=replace, align=align)
        before = self._armings(place)
        effects: list[Effect] = []
        if self.vmas.remove(place):
            self.table.clear_range(place)
            effects.append(Punch(place))
        self.vmas.insert(Vma(place, prot))
        return place, self._rearm(place, before) + effects

    def munmap(self, ar: AddrRange) -> list[Effect]:
        """Unmap ``ar``; holes in it are none of an error (compare mm/mmap.c:do_munmap)."""
        self._check_range(ar)
        before = self._armings(ar)
        self.vmas.remove(ar)
        self.table.clear_range(ar)
        return [*self._rearm(ar, before), Punch(ar)]

    def mprotect(self, ar: AddrRange, prot: Prot) -> list[Effect]:
        """Change the protection of ``ar`` (compare mm/mprotect.c:do_mprotect_pkey).

        Raises NoMemoryError when a part of it is not mapped, AccessDeniedError for PROT_EXEC.
        """
        _check_prot(prot)
        self._check_range(ar)
        if self.vmas.holes(ar):
            raise NoMemoryError(f"{ar} is not mapped throughout; map it first")
        before = self._armings(ar)
        effects: list[Effect] = []
        for vma in self.vmas.remove(ar):
            readable = bool(prot & (Prot.READ | Prot.WRITE))
            if vma.prot & PROT_RW and not readable:
                effects.append(Stash(vma.ar))
            elif readable and not vma.prot & PROT_RW:
                effects.append(Unstash(vma.ar))
            self.vmas.insert(attrs.evolve(vma, prot=prot))
        self._follow_prot(ar, prot)
        arms = self._rearm(ar, before)
        # Contents leave after every process is armed, and are back before any is let in again.
        return arms + effects if not prot & PROT_RW else effects + arms

    def fault(self, fault: Fault) -> Resolution:
        """Decide a fault the kernel reported; see ``msharefs.fault``."""
        return handle_fault(self, fault)

    def armings(self) -> Iterator[tuple[AddrRange, Arming]]:
        """What a new attachment must be armed with, in order: ranges that are not native."""
        return ((ar, arming) for ar, arming in self._armings(self.ar) if arming)

    def sync_native(self, present: Iterable[AddrRange], *, huge: bool) -> None:
        """Bring the tables of native memory up to date with the backing's allocation map.

        ``present`` are the ranges that hold data, in order, as SEEK_DATA and SEEK_HOLE tell; with ``huge``, whole
        2 MiB of them are installed as leaves. Pages of paged ranges are left: those are exact.
        """
        native = [ar for ar, arming in self._armings(self.ar) if not arming & Arming.MISSING]
        present = list(present)
        for ar in native:
            self.table.clear_range(ar)
        for data in present:
            for ar in native:
                piece = ar.intersect(data)
                if piece is not None:
                    self._install(piece, huge=huge)

    def frame_at(self, addr: Address) -> FrameNo:
        """The frame that belongs to ``addr``: frame n is page n of the backing file."""
        return FrameNo((addr - self.ar.start) >> PAGE_SHIFT)

    def _install(self, ar: AddrRange, *, huge: bool) -> None:
        """Enter pages that the kernel installed itself. Preconditions: ``ar`` is mapped throughout."""
        for vma in self.vmas.overlapping(ar):
            flags = pte_flags(vma.prot)
            for piece in vma.clipped(ar).ar.pieces(PMD_SIZE):
                frame = self.frame_at(piece.start)
                if huge and piece.size == PMD_SIZE and frame % FRAMES_IN_PMD == 0:
                    self.table.set(piece.start, Pte(frame, flags | PteFlag.HUGE))
                else:
                    self.table.set_range(piece, frame, flags)

    def _follow_prot(self, ar: AddrRange, prot: Prot) -> None:
        """Make installed pages agree with a new protection; a page nobody may touch is not installed."""
        if prot & Prot.WRITE:
            self.table.change_flags(ar, add=PteFlag.WRITE, drop=PteFlag.UFFD_WP)
        elif prot & Prot.READ:
            self.table.change_flags(ar, add=PteFlag.UFFD_WP, drop=PteFlag.WRITE)
        else:
            self.table.clear_range(ar)

    def _arming(self, vma: Vma | None) -> Arming:
        """Holes report every touch; with ``paging_all`` so does the rest, once a page."""
        if vma is None:
            return Arming.MISSING
        return vma.arming() | Arming.MISSING if self.paging_all else vma.arming()

    def _armings(self, ar: AddrRange) -> list[tuple[AddrRange, Arming]]:
        """How ``ar`` is armed, in order and without gaps, equal neighbours as one."""
        parts = [(hole, self._arming(None)) for hole in self.vmas.holes(ar)]
        parts += [(vma.clipped(ar).ar, self._arming(vma)) for vma in self.vmas.overlapping(ar)]
        merged: list[tuple[AddrRange, Arming]] = []
        for part, arming in sorted(parts):
            if merged and merged[-1][1] == arming:
                part = AddrRange(merged.pop()[0].start, part.end)
            merged.append((part, arming))
        return merged

    def _rearm(self, ar: AddrRange, before: list[tuple[AddrRange, Arming]]) -> list[Effect]:
        """What is armed differently from ``before``."""
        return [
            Arm(changed, arming)
            for now, arming in self._armings(ar)
            for was, old in before
            if old != arming and (changed := now.intersect(was)) is not None
        ]

    def _place(self, ar: AddrRange | None, size: int, *, fixed: bool, replace: bool, align: int) -> AddrRange:
        """Where a mapping goes (compare mm/mmap.c:get_unmapped_area)."""
        if size <= 0 or size % PAGE_SIZE:
            raise InvalidArgumentError(f"length {size} is not a positive multiple of {PAGE_SIZE}")
        if ar is not None:
            self._check_range(ar)
            taken = bool(self.vmas.overlapping(ar))
            if not taken or replace:
                return ar
            if fixed:
                raise ExistsError(f"{ar} is mapped already")
        gap = self.vmas.find_gap(self.ar, size, align)
        if gap is None:
            raise NoMemoryError(f"no gap of {size} bytes in the region {self.ar}; unmap something first")
        return gap

    def _check_range(self, ar: AddrRange) -> None:
        """Only whole pages of the region."""
        if not ar.is_aligned(PAGE_SIZE):
            raise InvalidArgumentError(f"{ar} is not made of whole pages of {PAGE_SIZE} bytes")
        if not self.ar.covers(ar):
            raise InvalidArgumentError(f"{ar} is not inside the region {self.ar}")


def _check_prot(prot: Prot) -> None:
    """Regions are data."""
    if prot & Prot.EXEC:
        raise AccessDeniedError("PROT_EXEC: memory of a region cannot be executed; leave the flag out")


def check_user_range(start: int, size: int, align: int) -> AddrRange:
    """The range a region asks for, or InvalidArgumentError saying which rule it breaks."""
    if size <= 0:
        raise InvalidArgumentError(f"length {size}: a region has at least {align} bytes")
    if start % align or size % align:
        raise InvalidArgumentError(
            f"address {start:#x} and length {size:#x} must be multiples of {align:#x} (mshared --align)"
        )
    if not USER_MIN <= start < start + size <= USER_MAX:
        raise InvalidArgumentError(f"{start:#x}+{size:#x} is not within user addresses {USER_MIN:#x}..{USER_MAX:#x}")
    return AddrRange.sized(start, size)
