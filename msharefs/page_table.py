"""Page tables of x86-64: 4 or 5 levels of 512 entries, with 4 KiB pages and 2 MiB leaves.

This is what is *installed* for a region, as a VMA is what was asked. Level 0 holds PTEs, level 1 is the
PMD, and so on up; a table that holds nothing is freed at once (compare mm/memory.c:free_pgd_range, which does
so only at munmap). A leaf table is one array of 512 words, encoded as the processor's own: flags in the low
12 bits, the frame number above.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

import attrs

from msharefs.addr import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    TABLE_ENTRIES,
    Address,
    AddrRange,
    FrameNo,
    united,
)
from msharefs.errors import InternalError, InvalidArgumentError
from msharefs.pte import FRAMES_IN_PMD, HUGE, NO_FLAGS, PRESENT, Pte, PteFlag
from msharefs.tables import Directory, Leaf, entry_index, entry_span, forked, is_full_of_leaves, leaf_runs, leaves

LEVEL_NAMES = {4: ("pte", "pmd", "pud", "pgd"), 5: ("pte", "pmd", "pud", "p4d", "pgd")}
"""Names of the levels, lowest first, for tables of 4 and of 5 levels."""

_MOST_RECENT: Final = 4096
"""Leaf tables that one looks up without a walk; 8 GiB."""


class PageTable:
    """The page tables of one host mm.

    Invariants (recounted by ``msharefs.invariants``): no table but the top is empty, ``tables`` and ``pages`` agree
    with the tree, 2 MiB leaves are aligned in address and frame.
    """

    def __init__(self, levels: int = 4) -> None:
        if levels not in LEVEL_NAMES:
            raise InvalidArgumentError(f"page tables have 4 or 5 levels, not {levels}")
        self.levels = levels
        self._top = Directory(levels - 1)
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
        table: Directory | Leaf = self._recent.get(addr // PMD_SIZE, self._top)
        while isinstance(table, Directory):
            below = table.entries.get(entry_index(addr, table.level))
            if below is None:
                return None
            if isinstance(below, int):
                return Pte.unpack(below)
            table = below
        word = table.words[entry_index(addr, 0)]
        return Pte.unpack(word) if word else None

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
        if ar.size == PAGE_SIZE:
            self._put_one(ar.start, frame << PAGE_SHIFT | low)
            return
        for piece in ar.pieces(PMD_SIZE):
            first = frame + (piece.start - ar.start) // PAGE_SIZE
            last = first + piece.size // PAGE_SIZE
            self._put(piece.start, array("Q", range(first << PAGE_SHIFT | low, last << PAGE_SHIFT | low, PAGE_SIZE)))

    def clear_range(self, ar: AddrRange) -> None:
        """Take every page in ``ar`` out (compare mm/memory.c:unmap_page_range).

        A 2 MiB leaf that sticks out is split into 4 KiB pages first; tables left empty are freed.
        """
        before = self.resident
        self._clear(self._top, ar)
        self.changes += self.resident != before

    def change_flags(self, ar: AddrRange, *, add: PteFlag = NO_FLAGS, drop: PteFlag = NO_FLAGS) -> None:
        """Change the flags of every page in ``ar`` (compare mm/mprotect.c:change_protection).

        A 2 MiB leaf that sticks out is split first. Preconditions: PRESENT and HUGE are not among them.
        """
        self._change(self._top, ar, int(add), ~int(drop))

    def fork(self) -> PageTable:
        """The same entries in tables of another mm (compare dup_mmap and COW PTE's copy_cow_pte_range).

        Leaf tables are shared, at the cost of a reference each; a 2 MiB leaf is an entry of both, protected.
        """
        self._recent.clear()
        twin = PageTable(self.levels)
        twin._top = forked(self._top)
        twin.tables, twin.pages, twin.huge_pages = list(self.tables), self.pages, self.huge_pages
        return twin

    def release(self) -> None:
        """Drop all entries; leaf tables that others share stay theirs (compare free_pgtables)."""
        for leaf in leaves(self._top):
            leaf.dropped()
        self._top.entries.clear()
        self._recent.clear()
        self.tables = [0] * (self.levels - 1) + [1]
        self.pages = self.huge_pages = 0

    def own(self, addr: Address) -> None:
        """Share the leaf table of ``addr``, if there is one, with nobody (compare break_cow_pte).

        The sole owner keeps it as it is.
        """
        if self.shared_at(addr):
            self._leaf(addr)

    def shared_at(self, addr: Address) -> bool:
        """Whether others share the leaf table of ``addr``, if there is one."""
        table: Directory | Leaf | int | None = self._top
        while isinstance(table, Directory):
            table = table.entries.get(entry_index(addr, table.level))
        return isinstance(table, Leaf) and table.refs > 1

    def frame_at(self, addr: Address) -> FrameNo | None:
        """The frame of the 4 KiB at ``addr``, or None."""
        pte = self.walk(addr)
        if pte is None:
            return None
        return FrameNo(pte.frame + (addr % PMD_SIZE >> PAGE_SHIFT)) if pte.is_huge else pte.frame

    def reassign(self, ar: AddrRange, frame: FrameNo) -> None:
        """Have the pages of ``ar`` lie in consecutive other frames, in all page tables that share the leaf table.

        Preconditions: all are installed, in one leaf table or 2 MiB leaf; one that sticks out is split first.
        """
        entry = self._pmd(ar.start).entries[entry_index(ar.start, 1)]
        if isinstance(entry, int) and ar.size == PMD_SIZE:
            self._pmd(ar.start).entries[entry_index(ar.start, 1)] = frame << PAGE_SHIFT | entry & (PAGE_SIZE - 1)
            return
        leaf = entry if isinstance(entry, Leaf) else self._leaf(ar.start)
        first = entry_index(ar.start, 0)
        for number in range(ar.size // PAGE_SIZE):
            word = leaf.words[first + number]
            leaf.words[first + number] = (frame + number) << PAGE_SHIFT | word & (PAGE_SIZE - 1)

    def shared_tables(self) -> int:
        """How many leaf tables others share."""
        return sum(leaf.refs > 1 for leaf in self.leaves())

    def leaves(self) -> Iterator[Leaf]:
        """All leaf tables."""
        return leaves(self._top)

    def runs(self, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
        """What is installed in ``ar``, in order: ranges of consecutive frames with equal flags, and their first page.

        A 2 MiB leaf is a run of its own, cut to ``ar``.
        """
        return self._runs(self._top, ar)

    def holes(self, ar: AddrRange) -> list[AddrRange]:
        """The parts of ``ar`` in which nothing is installed, in order."""
        if ar.size == PAGE_SIZE:
            return [] if self.walk(ar.start) else [ar]
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
        return united(self._present(self._top, ar))

    def tables_by_name(self) -> dict[str, int]:
        """How many tables exist, by the name of their level, top first."""
        return dict(reversed(list(zip(LEVEL_NAMES[self.levels], self.tables, strict=True))))

    def recount(self) -> tuple[list[int], int, int]:
        """Tables a level, pages and 2 MiB leaves, counted anew; InternalError for an empty table."""
        tables, pages, huge = [0] * self.levels, 0, 0
        todo: list[Directory | Leaf] = [self._top]
        while todo:
            table = todo.pop()
            tables[table.level] += 1
            if isinstance(table, Leaf):
                used = TABLE_ENTRIES - table.words.count(0)
                if used != table.used or not used:
                    raise InternalError(f"leaf table counts {table.used} entries and holds {used}")
                pages += used
                continue
            if not table.entries and table is not self._top:
                raise InternalError(f"empty table on level {table.level}")
            huge += sum(isinstance(entry, int) for entry in table.entries.values())
            todo += [entry for entry in table.entries.values() if not isinstance(entry, int)]
        return tables, pages, huge

    def _pmd(self, addr: Address) -> Directory:
        """The level-1 table for ``addr``, made when it is not there (compare pmd_alloc)."""
        table = self._top
        while table.level > 1:
            below = table.entries.get(entry_index(addr, table.level))
            if below is None:
                below = Directory(table.level - 1)
                table.entries[entry_index(addr, table.level)] = below
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
        below = pmd.entries.get(entry_index(addr, 1))
        if isinstance(below, Leaf):
            if below.refs > 1:
                below = pmd.entries[entry_index(addr, 1)] = below.broken()
            return self._remember(addr, below)
        leaf = Leaf()
        pmd.entries[entry_index(addr, 1)] = leaf
        self.tables[0] += 1
        if isinstance(below, int):
            first = below & ~int(PteFlag.HUGE)
            leaf.put(0, array("Q", range(first, first + PMD_SIZE, PAGE_SIZE)))
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
        more = self._leaf(addr).put_one(entry_index(addr, 0), word)
        self.pages += more
        self.changes += more

    def _clear(self, table: Directory, ar: AddrRange) -> None:
        """Take the pages in ``ar`` out of the tables below ``table``."""
        for piece in self._pieces(table, ar):
            index = entry_index(piece.start, table.level)
            below = table.entries[index]
            if isinstance(below, int):
                if piece.size == PMD_SIZE:
                    del table.entries[index]
                    self.huge_pages -= 1
                    continue
                below = self._leaf(piece.start)
            if isinstance(below, Directory):
                self._clear(below, piece)
                empty = not below.entries
            elif piece.size == PMD_SIZE:
                self.pages -= below.used
                below.dropped()
                empty = True
            else:
                below = self._leaf(piece.start)
                self._put(piece.start, array("Q", bytes(8 * (piece.size // PAGE_SIZE))))
                empty = not below.used
            if empty:
                self._recent.clear()
                del table.entries[index]
                self.tables[below.level] -= 1

    def _change(self, table: Directory, ar: AddrRange, add: int, keep: int) -> None:
        """Set and clear bits of the pages in ``ar`` below ``table``."""
        for piece in self._pieces(table, ar):
            index = entry_index(piece.start, table.level)
            below = table.entries[index]
            if isinstance(below, int):
                if piece.size == PMD_SIZE:
                    table.entries[index] = (below | add) & keep
                    continue
                below = self._leaf(piece.start)
            if isinstance(below, Directory):
                self._change(below, piece, add, keep)
            else:
                below = self._leaf(piece.start)
                first = entry_index(piece.start, 0)
                part = slice(first, first + piece.size // PAGE_SIZE)
                below.words[part] = array("Q", [(word | add) & keep if word else 0 for word in below.words[part]])

    def _pieces(self, table: Directory, ar: AddrRange) -> Iterator[AddrRange]:
        """``ar`` cut to the entries that ``table`` has, in order; cost follows the entries, not the range."""
        span = entry_span(table.level)
        base = ar.start & ~(span * TABLE_ENTRIES - 1)
        wanted = range((ar.start - base) // span, (ar.end - 1 - base) // span + 1)
        held = table.entries
        for index in [i for i in wanted if i in held] if len(wanted) < len(held) else sorted(held):
            piece = AddrRange.sized(base + index * span, span).intersect(ar)
            if piece is not None:
                yield piece

    def _present(self, table: Directory, ar: AddrRange) -> Iterator[AddrRange]:
        """Where something is installed in ``ar`` below ``table``, in order; full tables are not looked into."""
        if is_full_of_leaves(table):
            yield ar
            return
        for piece in self._pieces(table, ar):
            below = table.entries[entry_index(piece.start, table.level)]
            if isinstance(below, Directory):
                yield from self._present(below, piece)
            elif isinstance(below, Leaf) and below.used < TABLE_ENTRIES:
                yield from (run for run, _ in leaf_runs(below, piece))
            else:
                yield piece

    def _runs(self, table: Directory, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
        """The runs of ``ar`` below ``table``."""
        for piece in self._pieces(table, ar):
            below = table.entries[entry_index(piece.start, table.level)]
            if isinstance(below, Directory):
                yield from self._runs(below, piece)
            elif isinstance(below, Leaf):
                yield from leaf_runs(below, piece)
            else:
                pte = Pte.unpack(below)
                skipped = (piece.start % PMD_SIZE) // PAGE_SIZE
                yield piece, attrs.evolve(pte, frame=FrameNo(pte.frame + skipped))
