"""Page tables of x86-64: 4 or 5 levels of 512 entries, with 4 KiB pages and 2 MiB leaves.

This is what is *installed* for a region, as a VMA is what was asked. Level 0 holds PTEs, level 1 is the
PMD, and so on up; a table that holds nothing is freed at once (compare mm/memory.c:free_pgd_range, which does
so only at munmap). A leaf table is one array of 512 words, encoded as the processor's own: flags in the low
12 bits, the frame number above.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Final

from msharefs.addr import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    PUD_SIZE,
    TABLE_ENTRIES,
    Address,
    AddrRange,
    FrameNo,
    united,
)
from msharefs.errors import InternalError, InvalidArgumentError
from msharefs.pte import FRAMES_IN_PMD, HUGE, NO_FLAGS, PRESENT, Pte, PteFlag
from msharefs.tables import (
    Directory,
    Leaf,
    change_leaves,
    counted,
    drop,
    entry_index,
    entry_span,
    leaves,
    pieces,
    present,
    runs,
)

LEVEL_NAMES = {4: ("pte", "pmd", "pud", "pgd"), 5: ("pte", "pmd", "pud", "p4d", "pgd")}
"""Names of the levels, lowest first, for tables of 4 and of 5 levels."""

_MOST_RECENT: Final = 4096
"""Leaf tables that one looks up without a walk; 8 GiB."""


def _protects(add: PteFlag, less: PteFlag) -> bool:
    """Whether flags change as they have done already where tables are shared."""
    return less == PteFlag.WRITE and add == PteFlag.UFFD_WP


class PageTable:
    """The page tables of one host mm.

    Invariants (recounted by ``msharefs.invariants``): no table but the top is empty, ``tables`` and ``pages`` agree
    with the tree, 2 MiB leaves are aligned in address and frame.
    """

    def __init__(self, levels: int = 4) -> None:
        if levels not in LEVEL_NAMES:
            raise InvalidArgumentError(f"page tables have 4 or 5 levels, not {levels}")
        self.levels = levels
        self.top = Directory(levels - 1)
        self.tables = [0] * (levels - 1) + [1]
        """How many tables exist a level, lowest first."""
        self.pages = 0
        """4 KiB pages installed as such."""
        self._recent: dict[int, Leaf] = {}
        """Leaf tables that were looked up and are ours alone, by address // 2 MiB (compare a page-walk cache)."""
        self.huge_pages = 0
        """2 MiB leaves installed."""
        self.changes = 0
        """How often pages have come or gone; entries that changed and stayed do not count."""

    @property
    def resident(self) -> int:
        """Bytes installed."""
        return self.pages * PAGE_SIZE + self.huge_pages * PMD_SIZE

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables, a page each."""
        return sum(self.tables) * PAGE_SIZE

    def walk(self, addr: Address) -> Pte | None:
        """The page that holds ``addr``, or None (compare mm/pagewalk.c). For a 2 MiB leaf, the leaf."""
        word = self.entry(addr)
        return Pte.unpack(word) if word else None

    def entry(self, addr: Address) -> int:
        """The word that maps ``addr``, as the processor reads it, or 0."""
        known = self._recent.get(addr // PMD_SIZE)
        if known is not None:
            return known.words[addr // PAGE_SIZE % TABLE_ENTRIES]
        table: Directory | Leaf = self.top
        while isinstance(table, Directory):
            below = table.entries.get(entry_index(addr, table.level), 0)
            if isinstance(below, int):
                return below
            table = below
        return table.words[entry_index(addr, 0)]

    def own_leaf(self, addr: Address) -> Leaf | None:
        """The leaf table that maps ``addr``, if there is one and it is shared with nobody."""
        known = self._recent.get(addr // PMD_SIZE)
        if known is not None:
            return known
        table: Directory | Leaf | int | None = self.top
        while isinstance(table, Directory) and table.refs == 1:
            table = table.entries.get(entry_index(addr, table.level))
        return table if isinstance(table, Leaf) and table.refs == 1 else None

    def set(self, addr: Address, pte: Pte) -> None:
        """Install ``pte`` at ``addr``, in place of what is there.

        Preconditions: ``addr`` is a multiple of the page's size, and so is a 2 MiB leaf's frame.
        """
        word = pte.pack()
        huge = word & HUGE
        if addr % (PMD_SIZE if huge else PAGE_SIZE) or (huge and pte.frame % FRAMES_IN_PMD):
            raise InternalError(f"page of {pte.size} bytes installed at {addr:#x}")
        if huge:
            if not isinstance(self._pmd(addr).entries.get(entry_index(addr, 1)), int):
                self.clear_range(AddrRange.sized(addr, PMD_SIZE))
                self.huge_pages += 1
                self.changes += 1
            self._pmd(addr).entries[entry_index(addr, 1)] = word
        else:
            self._put_one(addr, word)

    def set_range(self, ar: AddrRange, frame: FrameNo, flags: PteFlag) -> None:
        """Install consecutive frames over ``ar`` in 4 KiB pages (2 MiB leaves come by ``set``)."""
        low = (int(flags) | PRESENT) & ~HUGE
        if ar.end - ar.start == PAGE_SIZE:
            self._put_one(ar.start, frame << PAGE_SHIFT | low)
            return
        for piece in ar.pieces(PMD_SIZE):
            first = frame + (piece.start - ar.start) // PAGE_SIZE
            last = first + piece.size // PAGE_SIZE
            self._put(piece.start, array("Q", range(first << PAGE_SHIFT | low, last << PAGE_SHIFT | low, PAGE_SIZE)))

    def set_huge(self, ar: AddrRange, frame: FrameNo, flags: PteFlag) -> None:
        """Install consecutive frames over ``ar`` in 2 MiB leaves. Preconditions: as for ``set``; nothing is there."""
        for piece in ar.pieces(PUD_SIZE):
            first, count = entry_index(piece.start, 1), piece.size // PMD_SIZE
            word = Pte(FrameNo(frame + (piece.start - ar.start) // PAGE_SIZE), flags | PteFlag.HUGE).pack()
            words = range(word, word + piece.size, PMD_SIZE)
            self._pmd(piece.start).entries.update(zip(range(first, first + count), words, strict=True))
            self.huge_pages += count
            self.changes += 1

    def clear_range(self, ar: AddrRange) -> None:
        """Take every page in ``ar`` out (compare mm/memory.c:unmap_page_range).

        A 2 MiB leaf that sticks out is split into 4 KiB pages first; tables left empty are freed.
        """
        before = self.resident
        self._clear(self._own_top(), ar)
        self.changes += self.resident != before

    def change_flags(self, ar: AddrRange, *, add: PteFlag = NO_FLAGS, drop: PteFlag = NO_FLAGS) -> None:
        """Change the flags of every page in ``ar`` (compare mm/mprotect.c:change_protection).

        A 2 MiB leaf that sticks out is split first. Preconditions: PRESENT and HUGE are not among them.
        """
        if not (self.top.refs > 1 and _protects(add, drop)):
            self._change(self._own_top(), ar, add, drop)

    def fork(self, written: Iterable[AddrRange] | None = None) -> PageTable:
        """The same entries in tables of another mm (compare dup_mmap and COW PTE's copy_cow_pte_range).

        All tables are shared, from the top, until one of the two changes what is below. ``written`` is where entries
        may be writable, by default everywhere: these are protected first, since what is shared is written by nobody.
        """
        for ar in [AddrRange.sized(0, entry_span(self.levels))] if written is None else written:
            self.change_flags(ar, add=PteFlag.UFFD_WP, drop=PteFlag.WRITE)
        self._recent.clear()
        twin = PageTable(self.levels)
        twin.top = self.top
        self.top.refs += 1
        twin.tables, twin.pages, twin.huge_pages = list(self.tables), self.pages, self.huge_pages
        return twin

    def release(self) -> None:
        """Drop all entries; tables that others share stay theirs (compare free_pgtables)."""
        drop(self.top)
        self.top = Directory(self.levels - 1)
        self._recent.clear()
        self.tables = [0] * (self.levels - 1) + [1]
        self.pages = self.huge_pages = 0

    def own(self, addr: Address) -> None:
        """Share the tables on the way to ``addr``, as far as there are any, with nobody (compare break_cow_pte).

        The sole owner keeps them as they are.
        """
        if self.shared_at(addr):
            table: Directory | Leaf | int | None = self._own_top()
            while isinstance(table, Directory):
                table = table.owned(entry_index(addr, table.level))

    def shared_at(self, addr: Address) -> bool:
        """Whether others share a table on the way to ``addr``."""
        table: Directory | Leaf | int | None = self.top
        while isinstance(table, Directory) and table.refs == 1:
            table = table.entries.get(entry_index(addr, table.level))
        return isinstance(table, Directory | Leaf) and table.refs > 1

    def frame_at(self, addr: Address) -> FrameNo | None:
        """The frame of the 4 KiB at ``addr``, or None."""
        word = self.entry(addr)
        if not word:
            return None
        return FrameNo((word >> PAGE_SHIFT) + (addr % PMD_SIZE >> PAGE_SHIFT if word & HUGE else 0))

    def reassign(self, ar: AddrRange, frame: FrameNo) -> None:
        """Have the pages of ``ar`` lie in consecutive other frames, in all page tables that share the entries.

        Preconditions: all are installed, in one leaf table or 2 MiB leaf; one that sticks out is split first, in this
        page table alone.
        """
        pmd = self.top
        while pmd.level > 1:
            below = pmd.entries[entry_index(ar.start, pmd.level)]
            assert isinstance(below, Directory)
            pmd = below
        entry = pmd.entries[entry_index(ar.start, 1)]
        if isinstance(entry, int) and ar.size == PMD_SIZE:
            pmd.entries[entry_index(ar.start, 1)] = frame << PAGE_SHIFT | entry & (PAGE_SIZE - 1)
            return
        leaf = entry if isinstance(entry, Leaf) else self._leaf(ar.start)
        leaf.reassign(entry_index(ar.start, 0), ar.size // PAGE_SIZE, frame << PAGE_SHIFT)

    def shared_tables(self) -> int:
        """How many leaf tables others share."""
        return sum(shared for _, shared in leaves(self.top, shared=self.top.refs > 1))

    def leaves(self) -> Iterator[Leaf]:
        """All leaf tables."""
        return (leaf for leaf, _ in leaves(self.top))

    def runs(self, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
        """What is installed in ``ar``, in order: ranges of consecutive frames with equal flags, and their first page.

        A 2 MiB leaf is a run of its own, cut to ``ar``.
        """
        return runs(self.top, ar)

    def holes(self, ar: AddrRange) -> list[AddrRange]:
        """The parts of ``ar`` in which nothing is installed, in order."""
        if ar.size == PAGE_SIZE:
            return [] if self.entry(ar.start) else [ar]
        found, start = [], ar.start
        for run in self.present(ar):
            if start < run.start:
                found.append(AddrRange(start, run.start))
            start = run.end
        if start < ar.end:
            found.append(AddrRange(start, ar.end))
        return found

    def present(self, ar: AddrRange) -> list[AddrRange]:
        """The parts of ``ar`` in which something is installed, in order; neighbours as one."""
        return united(present(self.top, ar))

    def tables_by_name(self) -> dict[str, int]:
        """How many tables exist, by the name of their level, top first."""
        return dict(reversed(list(zip(LEVEL_NAMES[self.levels], self.tables, strict=True))))

    def recount(self) -> tuple[list[int], int, int]:
        """Tables a level, pages and 2 MiB leaves, counted anew; InternalError for an empty table."""
        return counted(self.top, self.levels)

    def _own_top(self) -> Directory:
        """The top table, shared with nobody."""
        if self.top.refs > 1:
            self.top = self.top.broken()
        return self.top

    def _pmd(self, addr: Address) -> Directory:
        """The level-1 table for ``addr``, made when it is not there, shared with nobody (compare pmd_alloc)."""
        table = self._own_top()
        while table.level > 1:
            index = entry_index(addr, table.level)
            below = table.owned(index)
            if below is None:
                below = table.entries[index] = Directory(table.level - 1)
                self.tables[below.level] += 1
            if not isinstance(below, Directory):
                raise InternalError(f"no directory on level {table.level - 1} at {addr:#x}")
            table = below
        return table

    def _leaf(self, addr: Address) -> Leaf:
        """The leaf table for ``addr``, made when it is not there; a 2 MiB leaf is split (compare __split_huge_pmd)."""
        known = self._recent.get(addr // PMD_SIZE)
        if known is not None:
            return known
        pmd = self._pmd(addr)
        below = pmd.owned(entry_index(addr, 1))
        if isinstance(below, Leaf):
            return self._remember(addr, below)
        leaf = Leaf.split(below & ~HUGE) if isinstance(below, int) else Leaf()
        pmd.entries[entry_index(addr, 1)] = leaf
        self.tables[0] += 1
        if below is not None:
            self.huge_pages -= 1
            self.pages += TABLE_ENTRIES
        return self._remember(addr, leaf)

    def _remember(self, addr: Address, leaf: Leaf) -> Leaf:
        if len(self._recent) >= _MOST_RECENT:
            self._recent.clear()
        self._recent[addr // PMD_SIZE] = leaf
        return leaf

    def _put(self, addr: Address, words: array[int]) -> None:
        """Store PTE words from ``addr`` on. Preconditions: they fit into one leaf table."""
        leaf = self._leaf(addr)
        before = leaf.used
        leaf.put(entry_index(addr, 0), words)
        self.pages += leaf.used - before
        self.changes += leaf.used != before

    def _put_one(self, addr: Address, word: int) -> None:
        """Store one PTE word, which is not 0."""
        leaf, index = self._recent.get(addr // PMD_SIZE), addr // PAGE_SIZE % TABLE_ENTRIES
        if leaf is None:
            leaf = self._leaf(addr)
        if not leaf.words[index]:
            leaf.used += 1
            self.pages += 1
            self.changes += 1
        leaf.words[index] = word

    def _clear(self, table: Directory, ar: AddrRange) -> None:
        """Take the pages in ``ar`` out of the tables below ``table``. Preconditions: that is shared with nobody."""
        for piece in pieces(table, ar):
            index = entry_index(piece.start, table.level)
            if piece.size == entry_span(table.level):
                self._take_out(table, index)
                continue
            below = self._leaf(piece.start) if table.level == 1 else table.owned(index)
            if isinstance(below, Directory):
                self._clear(below, piece)
                empty = not below.entries
            else:
                self._put(piece.start, array("Q", bytes(8 * (piece.size // PAGE_SIZE))))
                empty = isinstance(below, Leaf) and not below.used
            if empty:
                self._take_out(table, index)

    def _take_out(self, table: Directory, index: int) -> None:
        """Remove an entry, with all that is below."""
        below = table.entries.pop(index)
        self._recent.clear()
        if isinstance(below, int):
            self.huge_pages -= 1
            return
        tables, pages, huge = counted(below, self.levels)
        self.tables = [have - less for have, less in zip(self.tables, tables, strict=True)]
        self.pages -= pages
        self.huge_pages -= huge
        drop(below)

    def _change(self, table: Directory, ar: AddrRange, add: PteFlag, less: PteFlag) -> None:
        """Set and clear flags of the pages in ``ar`` below ``table``, which is shared with nobody."""
        whole = ar.inner(PMD_SIZE) if table.level == 1 else None
        if whole is not None:
            first = entry_index(whole.start, 1)
            leaf_tables = change_leaves(table, first, first + whole.size // PMD_SIZE, int(add), int(less))
            if not leaf_tables and whole == ar:
                return
        for piece in pieces(table, ar):
            index = entry_index(piece.start, table.level)
            below = table.entries[index]
            if isinstance(below, int) and piece.size == PMD_SIZE:  # A whole leaf: changed above.
                continue
            if not isinstance(below, int) and below.refs > 1 and _protects(add, less):
                continue
            inside = self._leaf(piece.start) if table.level == 1 else table.owned(index)
            if isinstance(inside, Directory):
                self._change(inside, piece, add, less)
            elif isinstance(inside, Leaf):
                inside.change(entry_index(piece.start, 0), piece.size // PAGE_SIZE, int(add), int(less))
