"""A hash table of pointers that several processes fill together and follow: its addresses are the same for all.

    python examples/pointers.py

Needs a running daemon (``mshared``). Each worker is a process of its own that finds the region by name, counts the
words of its text in the one table, and chains its nodes to those of the others.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import mshare

TEXTS = (
    "the sea is the sea and the land is the land",
    "a wave of the sea comes to the land and goes",
    "and the wave that goes is a wave that comes",
)
BUCKETS = 8


class Node(ctypes.Structure):
    """A word: how often it was seen, and which process has seen it first."""


Node._fields_ = [
    ("next", ctypes.POINTER(Node)),
    ("word", ctypes.c_char * 16),
    ("count", ctypes.c_uint64),
    ("pid", ctypes.c_uint64),
]
Table = ctypes.POINTER(Node) * BUCKETS


def chain(first: Any) -> Iterator[Node]:  # noqa: ANN401 - a pointer to Node
    """The nodes from a pointer on."""
    while first:
        yield first.contents
        first = first.contents.next


def count(table: ctypes.Array[Any], arena: mshare.Arena, word: bytes) -> None:
    """Count one word; a new one goes in front of its bucket's chain."""
    bucket = zlib.crc32(word) % BUCKETS
    for node in chain(table[bucket]):
        if node.word == word:
            node.count += 1
            return
    node = arena.new(Node, word=word, count=1, pid=os.getpid(), next=table[bucket])
    table[bucket] = ctypes.pointer(node)


def work(name: str, text: str, lock: AbstractContextManager[Any]) -> None:
    """In a process of its own: count the words of a text."""
    region = mshare.mshare(name, None, 0, os.O_RDWR)
    arena = mshare.Arena(region)  # Whoever uses it holds the lock.
    table = Table.from_address(arena.root)
    for word in text.encode().split():
        with lock:
            count(table, arena, word)


def main() -> None:
    """Make the table, let workers fill it, and follow what they have made."""
    region = mshare.mshare("words", None, 2 << 20, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    try:
        processes = multiprocessing.get_context("spawn")
        lock = processes.Lock()
        arena = mshare.Arena(region)
        table = arena.new(Table)
        arena.root = ctypes.addressof(table)
        workers = [processes.Process(target=work, args=(region.name, text, lock)) for text in TEXTS]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        nodes = [node for bucket in table for node in chain(bucket)]
        found = {node.word.decode(): node.count for node in nodes}
        links = sum(node.pid != node.next.contents.pid for node in nodes if node.next)
        print(
            f"{len(nodes)} nodes by {len({node.pid for node in nodes})} processes, 'the' was seen {found['the']} times"
        )
        print(f"as often as it is there: {found == Counter(' '.join(TEXTS).split())}")
        print(f"links from one process's node to another's: {links}")
    finally:
        mshare.remove("words")


if __name__ == "__main__":
    main()
