"""The tables that page tables are made of, and what can be done with one alone."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final

from msharefs.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TABLE_ENTRIES, TABLE_SHIFT, AddrRange
from msharefs.pte import PRESENT, Pte, PteFlag

_WRITE: Final = int(PteFlag.WRITE)
_UFFD_WP: Final = int(PteFlag.UFFD_WP)
_EACH: Final = int.from_bytes(array("Q", [1] * TABLE_ENTRIES).tobytes(), sys.byteorder)
"""1 in every word of a table, read as one number."""


class Leaf:
    """A table of PTEs; ``refs`` is in how many page tables it hangs (compare the refcount of a COW PTE table).

    While it is shared, nobody may store to its pages, whatever the words say.
    """

    __slots__ = ("refs", "used", "words")
    level = 0

    def __init__(self) -> None:
        self.words = array("Q", bytes(8 * TABLE_ENTRIES))
        self.used = 0
        self.refs = 1

    def broken(self) -> Leaf:
        """A duplicate for one of those that share it; the pages of both are protected from now on."""
        own = Leaf()
        self.protect()
        own.words, own.used = self.words[:], self.used
        self.refs -= 1
        return own

    def dropped(self) -> None:
        """Hang in one page table less; the last one has its pages protected from now on."""
        self.refs -= 1
        if self.refs == 1:
            self.protect()

    def protect(self) -> None:
        """``protected`` for all words at once."""
        words = int.from_bytes(self.words.tobytes(), sys.byteorder)
        present = words & _EACH * PRESENT
        words = words & ~(_EACH * _WRITE) | present * _UFFD_WP
        self.words = array("Q", words.to_bytes(8 * TABLE_ENTRIES, sys.byteorder))

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


def protected(word: int) -> int:
    """An entry, such that the first store is seen."""
    return word & ~_WRITE | _UFFD_WP if word else 0


class Directory:
    """A table of tables; on level 1 its entries may be 2 MiB leaves (ints) instead."""

    __slots__ = ("entries", "level")

    def __init__(self, level: int) -> None:
        self.level = level
        self.entries: dict[int, Directory | Leaf | int] = {}


def entry_span(level: int) -> int:
    """Bytes that one entry of a table of ``level`` maps."""
    return 1 << (PAGE_SHIFT + TABLE_SHIFT * level)


def entry_index(addr: int, level: int) -> int:
    """Which entry of its table of ``level`` maps ``addr``."""
    return (addr >> (PAGE_SHIFT + TABLE_SHIFT * level)) & (TABLE_ENTRIES - 1)


def forked(table: Directory) -> Directory:
    """A copy of the tables down to the leaf tables, which it shares."""
    twin = Directory(table.level)
    for index, below in table.entries.items():
        if isinstance(below, Directory):
            twin.entries[index] = forked(below)
        elif isinstance(below, Leaf):
            below.refs += 1
            twin.entries[index] = below
        else:
            twin.entries[index] = table.entries[index] = protected(below)
    return twin


def is_full_of_leaves(table: Directory) -> bool:
    """Whether each entry is a 2 MiB leaf."""
    return len(table.entries) == TABLE_ENTRIES and all(isinstance(entry, int) for entry in table.entries.values())


def leaves(table: Directory) -> Iterator[Leaf]:
    """All leaf tables below a table."""
    for below in table.entries.values():
        if isinstance(below, Directory):
            yield from leaves(below)
        elif isinstance(below, Leaf):
            yield below


def leaf_runs(leaf: Leaf, ar: AddrRange) -> Iterator[tuple[AddrRange, Pte]]:
    """Runs of consecutive words: each is the one before plus a page."""
    first = entry_index(ar.start, 0)
    last = first + ar.size // PAGE_SIZE
    while first < last:
        word, end = leaf.words[first], first + 1
        if word:
            while end < last and leaf.words[end] == word + (end - first) * PAGE_SIZE:
                end += 1
            start = ar.start & ~(PMD_SIZE - 1) | first * PAGE_SIZE
            yield AddrRange.sized(start, (end - first) * PAGE_SIZE), Pte.unpack(word)
        first = end
