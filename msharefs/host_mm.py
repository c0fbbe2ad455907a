"""The host mm of a region: its VMAs and page tables, and the calls that change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import attrs

from msharefs import clean_pages
from msharefs.addr import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    Address,
    AddrRange,
    FrameNo,
    united,
)
from msharefs.armings import ArmingRule, cut
from msharefs.effects import Change, Protect, Punch, Signal, WriteBack
from msharefs.errors import (
    AccessDeniedError,
    ExistsError,
    InvalidArgumentError,
    NoMemoryError,
    NotSupportedError,
)
from msharefs.fault import Fault, Resolution, handle_fault
from msharefs.frames import StoreNo, frame_in, store_of
from msharefs.lineage import Lineage
from msharefs.page_table import PageTable
from msharefs.perms import PROT_RW, Access, Advice, Prot
from msharefs.pte import DIRTY, READ_ONLY, Pte, PteFlag, pte_flags
from msharefs.rules import check_end, check_prot, check_store, moves_of_contents
from msharefs.storable import Storable
from msharefs.streams import Streams
from msharefs.vma import Arming, FileId, Source, Vma
from msharefs.vma_set import VmaSet

MAX_VMAS = 16_000
"""Mappings in a region at most: each may split every process's window several times, 65530 being the kernel's limit."""


class HostMm:
    """What is mapped in one region (``vmas``) and what is installed (``table``).

    Every call decides and changes the model at once, between two awaits of its caller, and returns the effects that
    make the kernel follow. A call that raises has changed nothing. Addresses are the region's own; frame n of ``store``
    is page n of the backing file. A host mm with relatives (``lineage``) must not lose or change pages that they refer
    to: see ``msharefs.forking`` for what is to be done before.

    ``granule`` is what the kernel may install at one fault of native memory: 2 MiB where the backing has huge pages. A
    granule that holds anything the daemon must see is paged as a whole: else a native fault beside a hole would fill
    the hole too. ``page`` is the size of all pages: 4 KiB, or the 2 MiB of hugetlb memory, whose granule is the GiB
    that one shared table maps (a range armed for itself would split it, and the kernel shares whole tables only).
    """

    def __init__(
        self,
        ar: AddrRange,
        *,
        levels: int = 4,
        page: int = PAGE_SIZE,
        granule: int = PAGE_SIZE,
        paging_all: bool = False,
        hole_signal: Signal = Signal.SIGBUS,
        lineage: Lineage | None = None,
        store: StoreNo | None = None,
    ) -> None:
        if not ar.is_aligned(page):
            raise InvalidArgumentError(f"{ar} is not made of whole pages")
        self.ar = ar
        self.page = page
        self.vmas = VmaSet()
        self.table = PageTable(levels)
        self.rule = ArmingRule(ar, granule, paging_all=paging_all)
        self.hole_signal = hole_signal
        self.lineage = lineage or Lineage()
        self.store = self.lineage.add(self, store)
        self._first_frame = frame_in(self.store, 0)
        self.streams = {Access.READ: Streams(), Access.WRITE: Streams()}
        self.borrowed: set[StoreNo] = set()
        """Stores of relatives that its tables may refer to."""
        self.storable = Storable(ar.size // page)
        self.reached: dict[Address, int] = {}
        """Where ended what was copied at once of what relatives have, too, and how many touches had led there."""
        self.unsure: list[AddrRange] = []
        """Where pages were restored of which nobody knows whether they are clean."""

    @property
    def granule(self) -> int:
        """What the kernel may install at one fault of native memory, in bytes."""
        return self.rule.granule

    @property
    def paging_all(self) -> bool:
        """Whether each first touch is reported, whatever is mapped."""
        return self.rule.paging_all

    def mmap(
        self,
        ar: AddrRange | None,
        size: int,
        prot: Prot = PROT_RW,
        *,
        fixed: bool = False,
        replace: bool = False,
        align: int = PAGE_SIZE,
        source: Source | None = None,
        reserve: Callable[[AddrRange], None] | None = None,
    ) -> tuple[AddrRange, list[Change]]:
        """Map anonymous memory, a file, or a reference page; the range and the effects (compare mm/mmap.c:do_mmap).

        ``ar`` None, or taken and not ``fixed``: the lowest gap. ``fixed`` without ``replace`` is MAP_FIXED_NOREPLACE,
        with it MAP_FIXED. ``reserve`` is asked for the memory before anything changes. Raises InvalidArgumentError,
        ExistsError, NoMemoryError (no gap), AccessDeniedError for PROT_EXEC and for stores that cannot reach the file,
        OffsetTooLargeError for a part that no file can have.
        """
        check_prot(prot)
        check_store(source, prot)
        check_end(source, size)
        self._check_count()
        place = self._place(ar, size, fixed=fixed, replace=replace, align=align)
        if reserve is not None:
            reserve(place)
        before = self.rule.around(self.vmas, place)
        moves = self.write_back(place)
        new = Vma(place, prot, source)
        if new.reports_stores:
            moves += self._protect(place)
        if self.vmas.remove(place):
            self.table.clear_range(place)
            moves.append(Punch(place))
            self.storable.note(place)
        self.vmas.insert(new)
        return place, self.rule.rearm(self.vmas, place, before, moves)

    def munmap(self, ar: AddrRange) -> list[Change]:
        """Unmap ``ar``; holes in it are none of an error (compare mm/mmap.c:do_munmap)."""
        self.check_range(ar)
        self._check_count()
        before = self.rule.around(self.vmas, ar)
        moves = [*self.write_back(ar), Punch(ar)]
        self.storable.note(ar)
        self.vmas.remove(ar)
        self.table.clear_range(ar)
        return self.rule.rearm(self.vmas, ar, before, moves)

    def mprotect(self, ar: AddrRange, prot: Prot) -> list[Change]:
        """Change the protection of ``ar`` (compare mm/mprotect.c:do_mprotect_pkey).

        Raises NoMemoryError when a part of it is not mapped, AccessDeniedError for PROT_EXEC.
        """
        check_prot(prot)
        self.check_mapped(ar)
        self._check_count()
        for vma in self.vmas.overlapping(ar):
            check_store(vma.source, prot)
        before = self.rule.around(self.vmas, ar)
        moves = [] if prot.writable else [*self.write_back(ar), *self._protect(ar)]
        if not prot.accessible:
            moves += clean_pages.drop(self, ar)
        for vma in self.vmas.remove(ar):
            moves += moves_of_contents(vma, prot)
            self.vmas.insert(vma.protected(prot))
        self._follow_prot(ar, prot)
        # A store after the contents were copied and before their pages are gone would be lost.
        return self.rule.rearm(self.vmas, ar, before, moves, also=Arming.NATIVE if prot.accessible else Arming.WP)

    def madvise_remove(self, ar: AddrRange) -> list[Change]:
        """Have zeros in ``ar``, or what reference pages say, and its memory back (compare mm/madvise.c:madvise_remove).

        Raises what ``check_removable`` does.
        """
        self.check_removable(ar)
        self.table.clear_range(ar)
        self.storable.note(ar)
        return [Punch(ar)]

    def check_removable(self, ar: AddrRange) -> None:
        """Whether contents may go, or NoMemoryError (not mapped), AccessDeniedError, NotSupportedError (a file's)."""
        self.check_mapped(ar)
        vmas = self.vmas.overlapping(ar)
        if not all(vma.prot & Prot.WRITE for vma in vmas):
            raise AccessDeniedError(f"{ar} may not be written throughout; mprotect it first")
        if any(vma.file for vma in vmas):
            raise NotSupportedError("MADV_REMOVE of a file's mapping: punch the file instead")

    def madvise_reading(self, ar: AddrRange, advice: Advice) -> None:
        """How much of a file a fault of ``ar`` reads from now on (compare mm/madvise.c:madvise_vma_behavior).

        RANDOM, SEQUENTIAL, or NORMAL for what past faults suggest. Raises NoMemoryError when a part is not mapped.
        """
        self.check_mapped(ar)
        self._check_count()
        for vma in self.vmas.remove(ar):
            self.vmas.insert(attrs.evolve(vma, advice=advice))

    def fault(self, fault: Fault) -> Resolution:
        """Decide a fault the kernel reported; see ``msharefs.fault``."""
        return handle_fault(self, fault)

    def write_back(self, ar: AddrRange) -> list[Change]:
        """What was stored to shared files in ``ar`` goes to them (compare write_cache_pages); it is clean then.

        They are protected first, so that a store during the copy is reported, and counts.
        """
        effects: list[Change] = []
        for vma in filter(lambda vma: vma.tracks_stores, self.vmas.overlapping(ar)):
            for run in self.dirty(vma.clipped(ar).ar):
                source = vma.file_at(run.start)
                assert source is not None
                effects += [Protect(run), WriteBack(run, source.file, source.offset)]
                self.table.change_flags(run, add=PteFlag.UFFD_WP, drop=PteFlag.DIRTY | PteFlag.WRITE)
        return effects

    def dirty(self, ar: AddrRange) -> list[AddrRange]:
        """Pages of shared files that were stored to and not written back, in order."""
        files = [vma.clipped(ar).ar for vma in self.vmas.overlapping(ar) if vma.tracks_stores]
        return united(run for part in files for run, pte in self.table.runs(part) if pte.flags & PteFlag.DIRTY)

    def filled(self, ar: AddrRange) -> None:
        """Enter pages that were filled from their file.

        Preconditions: they lie in one VMA, and the tables hold nothing there.
        """
        vma = self.vmas.find(ar.start)
        assert vma is not None
        self.enter(ar, _clean_flags(vma))
        self.storable.note(ar)

    def missed(self, page: AddrRange) -> bool:
        """Forget a clean page that the kernel misses: the tables may have been told of it when it was gone already.

        False of a dirty one, and of one that relatives refer to: this is old news, it came since the thread stopped.
        """
        word = self.table.entry(page.start)
        if not word:
            return True
        if word & DIRTY or any(self.lineage.claims(self, page)):
            return False
        self.table.clear_range(page)
        return True

    def stored_to(self, page: AddrRange) -> None:
        """Note a store to a page that was protected: of a shared file it is dirty from now on."""
        vma = self.vmas.find(page.start)
        self.storable.note(page)
        if vma is not None and vma.tracks_stores:
            self.enter(page, pte_flags(vma.prot) | PteFlag.DIRTY)
        elif vma is not None and self.rule.forked and self.table.frame_at(page.start) == self.frame_at(page.start):
            self.enter(page, pte_flags(vma.prot))

    def enter(self, ar: AddrRange, flags: PteFlag) -> None:
        """Install pages over ``ar``, in place of what is there. Preconditions: it is made of whole pages."""
        if self.page == PAGE_SIZE:
            self.table.set_range(ar, self.frame_at(ar.start), flags)
            return
        for page in ar.pieces(PMD_SIZE):
            self.table.set(page.start, Pte(self.frame_at(page.start), flags | PteFlag.HUGE))

    def files(self) -> set[FileId]:
        """The files that are mapped somewhere."""
        return {vma.file.file for vma in self.vmas if vma.file is not None}

    def armings(self) -> Iterator[tuple[AddrRange, Arming]]:
        """What a new attachment must be armed with, in order: ranges that are not native."""
        return ((ar, arming) for ar, arming in self.rule.over(self.vmas, self.ar) if arming)

    def arming_at(self, page: AddrRange) -> Arming:
        """How one page is armed."""
        return self.rule.over(self.vmas, page)[0][1]

    def sync(self, present: Iterable[AddrRange], *, huge: bool) -> None:
        """Bring the tables up to date with the backing's allocation map: native memory fills without a word.

        ``present`` are the ranges that hold data, in order, as SEEK_DATA and SEEK_HOLE tell; with ``huge``, whole
        2 MiB of them are installed as leaves. What lies outside the VMAs that may be touched is left out. Where there
        are relatives pages are only added: what is installed is theirs, too.
        """
        there = united(inside for data in present if (inside := data.intersect(self.ar)) is not None)
        if there == self.table.present(self.ar):
            return
        dirty, clean = self.dirty(self.ar), [] if self.rule.forked else clean_pages.clean(self, self.ar)
        if not self.rule.forked:
            self.table.clear_range(self.ar)
        for data in there:
            for part in self.table.holes(data):
                self._install(part, huge=huge)
        for run in dirty:
            self.enter(run, pte_flags(PROT_RW) | PteFlag.DIRTY)
        for run in clean:
            self.enter(run, clean_pages.FLAGS)

    def shared_granule_holes(self) -> list[AddrRange]:
        """The parts of holes that share a granule with memory, in order.

        Whoever writes to that memory through the file, past the page tables, has a whole granule filled, these parts
        included: they are to be punched afterwards.
        """
        return self.rule.holes_beside_memory(self.vmas)

    def frame_at(self, addr: Address) -> FrameNo:
        """The frame of its own that belongs to ``addr``: frame n is page n of the backing file."""
        return FrameNo(self._first_frame + (addr - self.ar.start >> PAGE_SHIFT))

    def _install(self, ar: AddrRange, *, huge: bool) -> None:
        """Enter pages that are there, in what may be touched of ``ar``."""
        for vma in self.vmas.overlapping(ar):
            if not vma.prot & PROT_RW:
                continue
            shielded = self.rule.shielded and not vma.reaches_file
            flags = pte_flags(Prot.READ) if shielded else _clean_flags(vma)
            part = vma.clipped(ar).ar
            whole = part.inner(PMD_SIZE) if huge and self.ar.start % PMD_SIZE == 0 else None
            for piece in cut(part, [whole.start, whole.end] if whole else []):
                put = self.table.set_huge if piece == whole else self.table.set_range
                put(piece, self.frame_at(piece.start), flags)

    def _protect(self, ar: AddrRange) -> list[Change]:
        """Where forks have stores reported, and some were allowed since: have them reported again.

        To arm with WP what is armed with it already does not. Shared files have their dirty pages written back instead.
        """
        if not self.rule.shielded:
            return []
        return [
            Protect(vma.clipped(ar).ar)
            for vma in self.vmas.overlapping(ar)
            if vma.prot & Prot.WRITE and not vma.reaches_file
        ]

    def _follow_prot(self, ar: AddrRange, prot: Prot) -> None:
        """Make installed pages agree with a new protection; a page nobody may touch is not installed.

        One that reaches a file stays protected until it is stored to, and so does one that relatives may refer to.
        """
        if prot.writable:
            for vma in self.vmas.overlapping(ar):
                for run in () if vma.tracks_stores else self._native_stores(vma.clipped(ar)):
                    self.table.change_flags(run, add=PteFlag.WRITE, drop=PteFlag.UFFD_WP)
        elif prot.accessible:
            self.table.change_flags(ar, add=PteFlag.UFFD_WP, drop=PteFlag.WRITE)
        else:
            self.table.clear_range(ar)

    def _native_stores(self, vma: Vma) -> list[AddrRange]:
        """Where in a mapping that may be written stores go unseen, as far as forks are concerned."""
        if self.rule.shielded:
            return []
        if not self.borrowed and vma.refpage is None:
            return [vma.ar]
        runs = self.table.runs(vma.ar)
        return [run for run, pte in runs if store_of(pte.frame) == self.store and not pte.flags & PteFlag.CLEAN]

    def _place(self, ar: AddrRange | None, size: int, *, fixed: bool, replace: bool, align: int) -> AddrRange:
        """Where a mapping goes (compare mm/mmap.c:get_unmapped_area)."""
        if size <= 0 or size % self.page:
            raise InvalidArgumentError(f"length {size} is not a positive multiple of {self.page}")
        if ar is not None:
            self.check_range(ar)
            taken = bool(self.vmas.overlapping(ar))
            if not taken or replace:
                return ar
            if fixed:
                raise ExistsError(f"{ar} is mapped already")
        gap = self.vmas.find_gap(self.ar, size, align)
        if gap is None:
            raise NoMemoryError(f"no gap of {size} bytes in the region {self.ar}; unmap something first")
        return gap

    def _check_count(self) -> None:
        """Whether two more VMAs may be made (compare vm.max_map_count, which binds every attached process)."""
        if len(self.vmas) + 2 > MAX_VMAS:
            raise NoMemoryError(f"the region has {len(self.vmas)} mappings, at most {MAX_VMAS} are possible")

    def check_mapped(self, ar: AddrRange) -> None:
        """Only whole pages of the region, all of them mapped: else InvalidArgumentError or NoMemoryError."""
        self.check_range(ar)
        if self.vmas.holes(ar):
            raise NoMemoryError(f"{ar} is not mapped throughout; map it first")

    def check_range(self, ar: AddrRange) -> None:
        """Only whole pages of the region."""
        if not ar.is_aligned(self.page):
            raise InvalidArgumentError(f"{ar} is not made of whole pages of {self.page} bytes")
        if not self.ar.covers(ar):
            raise InvalidArgumentError(f"{ar} is not inside the region {self.ar}")


def _clean_flags(vma: Vma) -> PteFlag:
    """The flags of a page that nobody stored to: the first store to what reaches a file must be seen."""
    return READ_ONLY if vma.tracks_stores else pte_flags(vma.prot)
