"""Page tables of x86-64: 4 or 5 levels of 512 entries, with 4 KiB pages and 2 MiB leaves.

This is what is *installed* for a region, as a VMA is what was asked. Level 0 holds PTEs, level 1 is the
PMD, and so on up; a table that holds nothing is freed at once (compare mm/memory.c:free_pgd_range, which does
so only at munmap). A leaf table is one array of 512 words, encoded as the processor's own: flags in the low
12 bits, the frame number above.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterator
from typing import Final

import attrs

from msharefs.addr import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    TABLE_ENTRIES,
    TABLE_SHIFT,
    Address,
    AddrRange,
    FrameNo,
)
from msharefs.errors import InternalError, InvalidArgumentError
from msharefs.perms import Prot

LEVEL_NAMES = {4: ("pte", "pmd", "pud", "pgd"), 5: ("pte", "pmd", "pud", "p4d", "pgd")}
"""Names of the levels, lowest first, for tables of 4 and of 5 levels."""
FRAMES_IN_PMD = PMD_SIZE // PAGE_SIZE


class PteFlag(enum.IntFlag):
    """Bits of an entry, where x86-64 has them."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    DIRTY = 1 << 6
    HUGE = 1 << 7
    UFFD_WP = 1 << 10


NO_FLAGS = PteFlag(0)


_PRESENT: Final = int(PteFlag.PRESENT)
_HUGE: Final = int(PteFlag.HUGE)
"""As plain integers: arithmetic on enum flags takes longer than all else in a fault."""
_FLAGS_OF_PROT: Final = {
    Prot(bits): PteFlag.PRESENT | (PteFlag.WRITE if bits & Prot.WRITE else PteFlag.UFFD_WP) for bits in range(8)
}


def pte_flags(prot: Prot) -> PteFlag:
    """The flags of a page in a mapping of ``prot`` (compare vm_get_page_prot): read-only is write-protected."""
    return _FLAGS_OF_PROT[prot]


@attrs.frozen
class Pte:
    """One installed page: its first frame and its flags. With HUGE it maps 2 MiB, else 4 KiB."""

    frame: FrameNo
    flags: PteFlag = PteFlag.PRESENT | PteFlag.WRITE

    @property
    def is_huge(self) -> bool:
        """Whether it maps 2 MiB."""
        return bool(int(self.flags) & _HUGE)

    @property
    def size(self) -> int:
        """Bytes it maps."""
        return PMD_SIZE if self.is_huge else PAGE_SIZE

    def pack(self) -> int:
        """The entry's word."""
        return self.frame << PAGE_SHIFT | int(self.flags) | _PRESENT

    @classmethod
    def unpack(cls, word: int) -> Pte:
        """The page that ``word`` stands for."""
        return cls(FrameNo(word >> PAGE_SHIFT), PteFlag(word & (PAGE_SIZE - 1)))


class _Leaf:
    """A table of PTEs."""

    __slots__ = ("used", "words")
    level = 0

    def __init__(self) -> None:
        self.words = array("Q", bytes(8 * TABLE_ENTRIES))
        self.used = 0

    def put_one(self, index: int, word: int) -> int:
        """Store one word, which is not 0; how many more are in use now."""
        more = 0 if self.words[index] else 1
        self.used += more
        self.words[index] = word
        return more

    def put(self, first: int, words: array[int]) -> None:
        """Store ``words`` from entry ``first``, recounting what is in use."""
        part = slice(first, first + len(words))
        self.used += self.words[part].count(0) - words.count(0)
        self.words[part] = words


class _Directory:
    """A table of tables; on level 1 its entries may be 2 MiB leaves (ints) instead."""

    __slots__ = ("entries", "level")

    def __init__(self, level: int) -> None:
        self.level = level
        self.entries: dict[int, _Directory | _Leaf | int] = {}


def _span(level: int) -> int:
    """Bytes that one entry of a table of ``level`` maps."""
    return 1 << (PAGE_SHIFT + TABLE_SHIFT * level)


def _index(addr: int, level: int) -> int:
    """Which entry of its table of ``level`` maps ``addr``."""
    return (addr >> (PAGE_SHIFT + TABLE_SHIFT * level)) & (TABLE_ENTRIES - 1)


class PageTable:
    """The page tables of one host mm.

    Invariants (recounted by ``msharefs.invariants``): no table but the top is empty, ``tables`` and ``pages`` agree
    with the tree, 2 MiB leaves are aligned in address and frame.
    """

    def __init__(self, levels: int = 4) -> None:
        if levels not in LEVEL_NAMES:
            raise InvalidArgumentError(f"page tables have 4 or 5 levels, not {levels}")
        self.levels = levels
        self._top = _Directory(levels - 1)
        self.tables = [0] * (levels - 1) + [1]
        """How many tables exist a level, lowest first."""
        self.pages = 0
        """4 KiB pages installed as such."""
        self._last_start = -1
        self._last_leaf = _Leaf()
        """The leaf table that was looked up last, and where it starts: faults come in crowds."""
        self.huge_pages = 0
        """2 MiB leaves installed."""

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
        table: _Directory | _Leaf = self._last_leaf if addr & -PMD_SIZE == self._last_start else self._top
        while isinstance(table, _Directory):
            below = table.entries.get(_index(addr, table.level))
            if below is None:
                return None
            if isinstance(below, int):
                return Pte.unpack(below)
            table = below
        word = table.words[_index(addr, 0)]
        return Pte.unpack(word) if word else None

    def set(self, addr: Address, pte: Pte) -> None:
        """Install ``pte`` at ``addr``, in place of what is there.

        Preconditions: ``addr`` is a multiple of the page's size, and so is a 2 MiB leaf's frame.
        """
        word = pte.pack()
        huge = word & _HUGE
        if addr % (PMD_SIZE if huge else PAGE_SIZE) or (huge and pte.frame % FRAMES_IN_PMD):
            raise InternalError(f"page of {pte.size} bytes installed at {addr:#x}")
        if huge:
            self.clear_range(AddrRange.sized(addr, PMD_SIZE))
            self._pmd(addr).entries[_index(addr, 1)] = word
            self.huge_pages += 1
        else:
            leaf = self._leaf(addr)
            self.pages += leaf.put_one(_index(addr, 0), word)

    def set_range(self, ar: AddrRange, frame: FrameNo, flags: PteFlag) -> None:
        """Install consecutive frames over ``ar`` in 4 KiB pages (2 MiB leaves come by ``set``)."""
        low = (int(flags) | _PRESENT) & ~_HUGE
        if ar.size == PAGE_SIZE:
            leaf = self._leaf(ar.start)
            self.pages += leaf.put_one(_index(ar.start, 0), frame << PAGE_SHIFT | low)
            return
        for piece in ar.pieces(PMD_SIZE):
            first = frame + (piece.start - ar.start) // PAGE_SIZE
            last = first + piece.size // PAGE_SIZE
            self._put(piece.start, array("Q", range(first << PAGE_SHIFT | low, last << PAGE_SHIFT | low, PAGE_SIZE)))

    def clear_range(self, ar: AddrRange) -> None:
        """Take every page in ``ar`` out (compare mm/memory.c:unmap_page_range).

        A 2 MiB leaf that sticks out is split into 4 KiB pages first; tables left empty are freed.
        """
        self._clear(self._top, ar)

    def change_flags(self, ar: AddrRange, *, add: PteFlag = NO_FLAGS, drop: PteFlag = NO_FLAGS) -> None:
        """Change the flags of every page in ``ar`` (compare mm/mprotect.c:change_protection).

        A 2 MiB leaf that sticks out is split first. Preconditions: PRESENT and HUGE are not among them.
        """
        self._change(self._top, ar, int(add), ~int(drop))

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
        for run, _ in self.runs(ar):
            if start < run.start:
                found.append(AddrRange(start, run.start))
            start = run.end
        if start < ar.end:
            found.append(AddrRange(start, ar.end))
        return found

    def tables_by_name(self) -> dict[str, int]:
        """How many tables exist, by the name of their level, top first."""
        return dict(reversed(list(zip(LEVEL_NAMES[self.levels], self.tables, strict=True))))

    def recount(self) -> tuple[list[int], int, int]:
        """Tables a level, pages and 2 MiB leaves, counted anew; InternalError for an empty table."""
        tables, pages, huge = [0] * self.levels, 0, 0
        todo: list[_Directory | _Leaf] = [self._top]
        while todo:
            table = todo.pop()
            tables[table.level] += 1
            if isinstance(table, _Leaf):
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

    def _pmd(self, addr: Address) -> _Directory:
        """The level-1 table for ``addr``, made when it is not there (compare pmd_alloc)."""
        table = self._top
        while table.level > 1:
            below = table.entries.get(_index(addr, table.level))
            if below is None:
                below = _Directory(table.level - 1)
                table.entries[_index(addr, table.level)] = below
                self.tables[below.level] += 1
            if not isinstance(below, _Directory):
                raise InternalError(f"no directory on level {table.level - 1} at {addr:#x}")
            table = below
        return table

    def _leaf(self, addr: Address) -> _Leaf:
        """The leaf table for ``addr``, made when it is not there; a 2 MiB leaf is split (compare __split_huge_pmd)."""
        start = addr & -PMD_SIZE
        if start == self._last_start:
            return self._last_leaf
        pmd = self._pmd(addr)
        below = pmd.entries.get(_index(addr, 1))
        if isinstance(below, _Leaf):
            self._last_start, self._last_leaf = start, below
            return below
        leaf = _Leaf()
        pmd.entries[_index(addr, 1)] = leaf
        self.tables[0] += 1
        if isinstance(below, int):
            first = below & ~int(PteFlag.HUGE)
            leaf.put(0, array("Q", range(first, first + PMD_SIZE, PAGE_SIZE)))
            self.huge_pages -= 1
            self.pages += TABLE_ENTRIES
        return leaf

    def _put(self, addr: Address, words: array[int]) -> None:
        """Store PTE words from ``addr`` on. Preconditions: they fit into one leaf table."""
        leaf = self._leaf(addr)
        before = leaf.used
        leaf.put(_index(addr, 0), words)
        self.pages += leaf.used - before

    def _clear(self, table: _Directory, ar: AddrRange) -> None:
        """Take the pages in ``ar`` out of the tables below ``table``."""
        for piece in self._pieces(table, ar):
            index = _index(piece.start, table.level)
            below = table.entries[index]
            if isinstance(below, int):
                if piece.size == PMD_SIZE:
                    del table.entries[index]
                    self.huge_pages -= 1
                    continue
                below = self._leaf(piece.start)
            if isinstance(below, _Directory):
                self._clear(below, piece)
                empty = not below.entries
            else:
                self._put(piece.start, array("Q", bytes(8 * (piece.size // PAGE_SIZE))))
                empty = not below.used
            if empty:
                self._last_start = -1
                del table.entries[index]
                self.tables[below.level] -= 1

    def _change(self, table: _Directory, ar: AddrRange, add: int, keep: int) -> None:
        """Set and clear bits of the pages in ``ar`` below ``table``."""
        for piece in self._pieces(table, ar):
            index = _index(piece.start, table.level)
            below = table.entries[index]
            if isinstance(below, int):
                if piece.size == PMD_SIZE:
                    table.entries[index] = (below | add) & keep
                    continue
                below = self._leaf(piece.start)
            if isinstance(below, _Directory):
                self._change(below, piece, add, keep)
            else:
                first = _index(piece.start, 0)
                part = slice(first, first + piece.size // PAGE_SIZE)
                below.words[part] = array("Q", [(word | add) & keep if word else 0 for word in below.words[part]])

    def _pieces(self, table: _Directory, ar: AddrRange) -> Iterator[AddrRange]:
        """``ar`` cut to the entries that ``table`` has, in order; cost follows the entries, not the range."""
        span = _span(table.level)
        base = ar.start & ~(span * TABLE_ENTRIES - 1)
        wanted = range((ar.start - base) // span, (ar.end - 1 - base) // span + 1)
        held = table.entries
        for index in [i for i in wanted if i in held] if len(wanted) < len(held) else sorted(held):
            piece = AddrRange.sized(base + index * span, span).intersect(ar)
            if piece is not None:
                yield piece

    def _runs(self, table: _Directory, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
        """The runs of ``ar`` below ``table``."""
        for piece in self._pieces(table, ar):
            below = table.entries[_index(piece.start, table.level)]
            if isinstance(below, _Directory):
                yield from self._runs(below, piece)
            elif isinstance(below, _Leaf):
                yield from _leaf_runs(below, piece)
            else:
                pte = Pte.unpack(below)
                skipped = (piece.start % PMD_SIZE) // PAGE_SIZE
                yield piece, attrs.evolve(pte, frame=FrameNo(pte.frame + skipped))


def _leaf_runs(leaf: _Leaf, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
    """Runs of consecutive words: each is the one before plus a page."""
    first = _index(ar.start, 0)
    last = first + ar.size // PAGE_SIZE
    while first < last:
        word, end = leaf.words[first], first + 1
        if word:
            while end < last and leaf.words[end] == word + (end - first) * PAGE_SIZE:
                end += 1
            start = ar.start & ~(PMD_SIZE - 1) | first * PAGE_SIZE
            yield AddrRange.sized(start, (end - first) * PAGE_SIZE), Pte.unpack(word)
        first = end
