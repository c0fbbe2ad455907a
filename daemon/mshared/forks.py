"""Telling forked children apart.

The kernel reports a fork by the child's userfaultfd, before the child has a pid, and never says whose address space
that is. So each such address space is marked, and /proc is searched for the marks. Every window has an anchor: pages
that nobody touches, of which the first is registered with the window's userfaultfd. Registering some of the following
ones too, for a moment, makes a mapping of them in that address space only; its length is the mark, a different one for
each child of a round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Final

import trio

from mshared import processes
from mshared.live import LiveAttachment
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.protocol import ANCHOR_PAGES

MOST_MARKS: Final = ANCHOR_PAGES - 2
"""Pages of an anchor that are marked to ask for one process, more than in any round. One less than there are after the
first: all of them are what an anchor without marks shows."""
_FIRST_LOOK: Final = 0.005
_WIDE_LOOK: Final = 0.5
_LAST_LOOK: Final = 8.0
"""Seconds until children are looked for: after a fork, among all processes, and at most."""


class Forks:
    """Children whose pid is not known yet.

    ``found`` is called with each that is found, and its pid; ``ended`` with each that had ended before.
    """

    def __init__(self, found: Callable[[LiveAttachment, int], None], ended: Callable[[LiveAttachment], None]) -> None:
        self._found = found
        self._ended = ended
        self._children: list[LiveAttachment] = []
        self._news = trio.Event()

    def add(self, child: LiveAttachment) -> None:
        """Look for this one soon."""
        with contextlib.suppress(OSError):
            child.uffd.unmark(_marks(child, ANCHOR_PAGES - 1))  # Its parent may have been marked when it forked.
        self._children.append(child)
        self._news.set()

    def discard(self, child: LiveAttachment) -> None:
        """Look for it no longer."""
        if child in self._children:
            self._children.remove(child)

    async def run(self) -> None:
        """Look for children soon after their fork, and ever more seldom for those not found."""
        while True:
            await self._news.wait()
            delay = _FIRST_LOOK
            while self._children:
                self._news = trio.Event()
                await trio.sleep(delay)
                self.look(everywhere=delay >= _WIDE_LOOK)
                delay = _FIRST_LOOK if self._news.is_set() else min(2 * delay, _LAST_LOOK)
            self._news = trio.Event()

    def look(self, *, everywhere: bool = False) -> None:
        """Look once, among the children of their parents; ``everywhere``: also among those with another parent now."""
        for child in [child for child in self._children if not child.uffd.is_alive()]:
            self.discard(child)
            self._ended(child)
        parents = {child.parent_pid for child in self._children}
        if everywhere or None in parents:
            self.look_among(processes.all_pids())
        else:
            self.look_among(pid for parent in parents if parent for pid in processes.children_of(parent))

    def look_among(self, pids: Iterable[int]) -> None:
        """Look once among certain processes."""
        children = list(self._children)
        marked: dict[tuple[Address, int], LiveAttachment] = {}  # By anchor, and pages marked.
        try:
            for child in children:
                _mark(child, marked)
            known = {(a.model.pid, a.anchor) for child in children for a in child.region.attachments}
            for pid in pids:
                if all((pid, child.anchor) in known for child in children):
                    continue
                for key in marks_of(pid, {anchor for anchor, _ in marked}).items():
                    if key in marked:
                        self._identified(marked.pop(key), pid)
        finally:
            for child in children:
                with contextlib.suppress(OSError):
                    child.uffd.unmark(_marks(child, ANCHOR_PAGES - 1))

    def _identified(self, child: LiveAttachment, pid: int) -> None:
        self.discard(child)
        self._found(child, pid)


def process_of(child: LiveAttachment, tid: int) -> int | None:
    """The process of a child that was not found yet, and whose thread is ``tid``, or None.

    The id alone proves nothing: it is that of the thread's own pid namespace, where another process may be meant by it
    than here. So whoever it may be has to show the mark.
    """
    candidates = [processes.process_of_thread(tid)]
    try:
        child.uffd.mark(_marks(child, MOST_MARKS))
        for pids in (candidates, processes.children_of(child.parent_pid or 0), processes.all_pids()):
            for pid in pids:
                if pid and marks_of(pid, {child.anchor}).get(child.anchor) == MOST_MARKS:
                    return pid
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            child.uffd.unmark(_marks(child, ANCHOR_PAGES - 1))
    return None


def marks_of(pid: int, anchors: set[Address]) -> dict[Address, int]:
    """How many pages of each anchor are marked in a process, after the first one; none are where it is not there.

    What is marked is one mapping with the first page, or one of its own where the kernel does not join them: a page
    that came by userfaultfd in an anchor, before its process forked, keeps the mappings of the child apart.
    """
    sizes = processes.mapping_sizes(pid, anchors | {Address(anchor + PAGE_SIZE) for anchor in anchors})
    found: dict[Address, int] = {}
    for anchor, first in ((anchor, sizes.get(anchor, 0)) for anchor in anchors):
        apart = sizes.get(Address(anchor + PAGE_SIZE), 0) if first else 0
        found[anchor] = (first - PAGE_SIZE if first > PAGE_SIZE else apart) // PAGE_SIZE
    return found


def _marks(child: LiveAttachment, count: int) -> AddrRange:
    """The first ``count`` pages of the anchor after the one that is always registered."""
    return AddrRange.sized(child.anchor + PAGE_SIZE, count * PAGE_SIZE)


def _mark(child: LiveAttachment, marked: dict[tuple[Address, int], LiveAttachment]) -> None:
    """Mark a child by a length that no other with an anchor at the same address has; note it in ``marked``."""
    count = 1 + sum(anchor == child.anchor for anchor, _ in marked)
    if count < MOST_MARKS:
        with contextlib.suppress(OSError):  # Gone, which the sweeper sees.
            child.uffd.mark(_marks(child, count))
            marked[child.anchor, count] = child
