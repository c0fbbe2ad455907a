"""The tables that page tables are made of, and what can be done with one alone."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from msharefs.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TABLE_ENTRIES, TABLE_SHIFT, AddrRange, FrameNo
from msharefs.errors import InternalError
from msharefs.pte import PRESENT, WRITE, Pte

_EACH: Final = int.from_bytes(array("Q", [1] * TABLE_ENTRIES).tobytes(), sys.byteorder)
"""1 in every word of a table, read as one number."""
_FRAMES: Final = int.from_bytes(array("Q", range(0, PMD_SIZE, PAGE_SIZE)).tobytes(), sys.byteorder)
"""The frames of 2 MiB, one in every word of a table."""


_LOWEST: Final = 0 if sys.byteorder == "little" else 7
"""Which byte of a word has the lowest bits."""
_WRITABLE: Final = bytes(bool(byte & WRITE) for byte in range(256))


class Leaf:
    """A table of PTEs; ``refs`` is in how many tables, or page tables, it hangs (compare the refcount in COW PTE).

    What hangs in several, or below a table that does, is shared, and no page of it may be stored to. ``touched`` counts
    touches of what relatives have in common with its sole owner (``msharefs.breaking``).
    """

    __slots__ = ("refs", "touched", "used", "words")
    level = 0

    def __init__(self) -> None:
        self.words = array("Q", bytes(8 * TABLE_ENTRIES))
        self.used = 0
        self.refs = 1
        self.touched = 0

    @classmethod
    def split(cls, word: int) -> Leaf:
        """What a 2 MiB leaf maps, in small pages; ``word`` is the first one's entry."""
        leaf = cls()
        leaf.words = array("Q", _consecutive(word, TABLE_ENTRIES))
        leaf.used = TABLE_ENTRIES
        return leaf

    def broken(self) -> Leaf:
        """A duplicate for one of those that share it."""
        own = Leaf()
        own.words, own.used = self.words[:], self.used
        self.refs -= 1
        return own

    def reassign(self, first: int, count: int, frames: int) -> None:
        """Have words lie in consecutive frames, from one on, with the flags they have; ``frames``: the first one's."""
        if count == 1:
            self.words[first] = frames | self.words[first] & (PAGE_SIZE - 1)
            return
        part = slice(first, first + count)
        flags = int.from_bytes(self.words[part].tobytes(), sys.byteorder)
        flags &= (_EACH >> 64 * (TABLE_ENTRIES - count)) * (PAGE_SIZE - 1)
        words = int.from_bytes(_consecutive(frames, count), sys.byteorder) | flags
        self.words[part] = array("Q", words.to_bytes(8 * count, sys.byteorder))

    def goes_on(self, first: int, end: int) -> bool:
        """Whether each word from ``first`` to ``end`` is the one before plus a page."""
        return self.words[first:end].tobytes() == _consecutive(self.words[first], end - first)

    def writable(self) -> bytes:
        """Of each entry a byte: 1 where it may be stored to, else 0."""
        return self.words.tobytes()[_LOWEST::8].translate(_WRITABLE)

    def put(self, first: int, words: array[int]) -> None:
        """Store ``words`` from entry ``first``, recounting what is in use."""
        part = slice(first, first + len(words))
        self.used += self.words[part].count(0) - words.count(0)
        self.words[part] = words

    def change(self, first: int, count: int, add: int, less: int) -> None:
        """Set and clear bits of words that are in use, ``count`` of them from entry ``first``."""
        part = slice(first, first + count)
        words = int.from_bytes(self.words[part].tobytes(), sys.byteorder)
        each = _EACH >> 64 * (TABLE_ENTRIES - count)
        words = (words | (words & each * PRESENT) * add) & ~(each * less)
        self.words[part] = array("Q", words.to_bytes(8 * count, sys.byteorder))


def _consecutive(word: int, count: int) -> bytes:
    """Words of which each is the one before plus a page."""
    words = _EACH * word + _FRAMES & (1 << 64 * count) - 1
    return words.to_bytes(8 * count, sys.byteorder)


class Directory:
    """A table of tables; on level 1 its entries may be 2 MiB leaves (ints) instead. ``refs``: as of a leaf table."""

    __slots__ = ("entries", "level", "refs")

    def __init__(self, level: int) -> None:
        self.level = level
        self.entries: dict[int, Directory | Leaf | int] = {}
        self.refs = 1

    def broken(self) -> Directory:
        """A duplicate for one of those that share it; they share what is below instead."""
        own = Directory(self.level)
        own.entries = self.entries.copy()
        for below in own.tables():
            below.refs += 1
        self.refs -= 1
        return own

    def tables(self) -> list[Directory | Leaf]:
        """The tables among its entries."""
        return [below for below in self.entries.values() if below.__class__ is not int]  # type: ignore[misc]

    def owned(self, index: int) -> Directory | Leaf | int | None:
        """The entry, which is shared with nobody from now on. Preconditions: nor is this table."""
        below = self.entries.get(index)
        if isinstance(below, Directory | Leaf) and below.refs > 1:
            below = self.entries[index] = below.broken()
        return below


def drop(table: Directory | Leaf) -> None:
    """Let a table hang in one place less; one that hangs nowhere lets go of what is below."""
    table.refs -= 1
    if not table.refs and isinstance(table, Directory):
        for below in table.tables():
            drop(below)


def counted(table: Directory | Leaf, levels: int) -> tuple[list[int], int, int]:
    """A table and all below: tables a level, pages and 2 MiB leaves. Raises InternalError for an empty table."""
    tables, pages, huge = [0] * levels, 0, 0
    todo = [table]
    while todo:
        each = todo.pop()
        tables[each.level] += 1
        if isinstance(each, Leaf):
            used = TABLE_ENTRIES - each.words.count(0)
            if used != each.used:
                raise InternalError(f"leaf table counts {each.used} entries and holds {used}")
            pages += used
            continue
        below = each.tables()
        for entry in below:
            if not (entry.used if isinstance(entry, Leaf) else entry.entries):
                raise InternalError(f"empty table on level {entry.level}")
        huge += len(each.entries) - len(below)
        todo += below
    return tables, pages, huge


def hanging(tops: Iterable[Directory]) -> Counter[Directory | Leaf]:
    """In how many places each table hangs, of those that can be reached from some top tables."""
    found: Counter[Directory | Leaf] = Counter()
    todo: list[Directory | Leaf] = list(tops)
    while todo:
        table = todo.pop()
        found[table] += 1
        if isinstance(table, Directory) and found[table] == 1:
            todo += table.tables()
    return found


def entry_span(level: int) -> int:
    """Bytes that one entry of a table of ``level`` maps."""
    return 1 << (PAGE_SHIFT + TABLE_SHIFT * level)


def entry_index(addr: int, level: int) -> int:
    """Which entry of its table of ``level`` maps ``addr``."""
    return (addr >> (PAGE_SHIFT + TABLE_SHIFT * level)) & (TABLE_ENTRIES - 1)


def is_full_of_leaves(table: Directory) -> bool:
    """Whether each entry is a 2 MiB leaf."""
    return len(table.entries) == TABLE_ENTRIES and set(map(type, table.entries.values())) == {int}


def leaves(table: Directory, *, shared: bool = False) -> Iterator[tuple[Leaf, bool]]:
    """All leaf tables below a table, and whether each is shared; ``shared``: the table is."""
    for below in table.entries.values():
        if isinstance(below, Directory):
            yield from leaves(below, shared=shared or below.refs > 1)
        elif isinstance(below, Leaf):
            yield below, shared or below.refs > 1


def leaf_runs(leaf: Leaf, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
    """Runs of consecutive words: each is the one before plus a page."""
    first = entry_index(ar.start, 0)
    last = first + ar.size // PAGE_SIZE
    while first < last:
        word, end = leaf.words[first], first + 1
        if word:
            if end < last and leaf.words[end] == word + PAGE_SIZE and leaf.goes_on(first, last):
                end = last
            while end < last and leaf.words[end] == word + (end - first) * PAGE_SIZE:
                end += 1
            start = ar.start & ~(PMD_SIZE - 1) | first * PAGE_SIZE
            yield AddrRange.sized(start, (end - first) * PAGE_SIZE), Pte.unpack(word)
        first = end


def pieces(table: Directory, ar: AddrRange) -> Iterator[AddrRange]:
    """``ar`` cut to the entries that ``table`` has, in order; cost follows the entries, not the range."""
    span = entry_span(table.level)
    base = ar.start & ~(span * TABLE_ENTRIES - 1)
    wanted = range((ar.start - base) // span, (ar.end - 1 - base) // span + 1)
    held = table.entries
    for index in [i for i in wanted if i in held] if len(wanted) < len(held) else sorted(held):
        piece = AddrRange.sized(base + index * span, span).intersect(ar)
        if piece is not None:
            yield piece


def change_leaves(pmd: Directory, first: int, last: int, add: int, less: int) -> list[int]:
    """Set and clear bits of the 2 MiB leaves among some entries of a table of level 1; which entries are leaf tables.

    Preconditions: it is shared with nobody.
    """
    entries, found = pmd.entries, []
    for index in range(first, last):
        below = entries.get(index)
        if below.__class__ is int:
            entries[index] = (below | add) & ~less
        elif below is not None:
            found.append(index)
    return found


def present(table: Directory, ar: AddrRange) -> Iterator[AddrRange]:
    """Where something is installed in ``ar`` below ``table``, in order; full tables are not looked into."""
    if is_full_of_leaves(table):
        yield ar
        return
    for piece in pieces(table, ar):
        below = table.entries[entry_index(piece.start, table.level)]
        if isinstance(below, Directory):
            yield from present(below, piece)
        elif isinstance(below, Leaf) and below.used < TABLE_ENTRIES:
            yield from (run for run, _ in leaf_runs(below, piece))
        else:
            yield piece


def runs(table: Directory, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
    """The runs of ``ar`` below ``table``."""
    for piece in pieces(table, ar):
        below = table.entries[entry_index(piece.start, table.level)]
        if isinstance(below, Directory):
            yield from runs(below, piece)
        elif isinstance(below, Leaf):
            yield from leaf_runs(below, piece)
        else:
            pte = Pte.unpack(below)
            skipped = (piece.start % PMD_SIZE) // PAGE_SIZE
            yield piece, attrs.evolve(pte, frame=FrameNo(pte.frame + skipped))
