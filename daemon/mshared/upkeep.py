"""What keeps the journal short and the keeper alive, and forgets for whom nobody will ask any more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import trio

from mshared import keeper, processes
from mshared import records as rec
from mshared.service import Service

log = logging.getLogger(__name__)

_INTERVAL: Final = 5.0
"""Seconds between two looks for processes that have ended."""


class Upkeep:
    """The journal's and the keeper's caretaker; ``keeper`` is the one of the moment."""

    def __init__(self, service: Service, directory: Path, lock: int) -> None:
        self._service = service
        self._directory = directory
        self._lock = lock
        self._grown = trio.Event()
        self.keeper = keeper.start(directory, lock)
        book = service.book
        book.grown = self._on_grown
        assert book.journal is not None
        book.journal.keeper = self.keeper.name

    def write_all(self) -> None:
        """Have the journal say how everything is now, and nothing else. Raises NoSpaceError."""
        counters = rec.Counters(*self._service.namespace.counters)
        gone = self._service.lifetimes.gone_records()
        self._service.book.rewrite(counters, *gone, *self._service.snapshots.records())

    def end(self) -> None:
        """There is nothing to keep for anybody: end the keeper, and take the journal away."""
        self.keeper.end()
        journal = self._service.book.journal
        assert journal is not None
        journal.close()
        journal.path.unlink(missing_ok=True)

    def _on_grown(self) -> None:
        self._grown.set()

    async def watch_journal(self) -> None:
        """Write it anew when that is worth it."""
        while True:
            await self._grown.wait()
            self._grown = trio.Event()
            self.write_all()

    async def watch_keeper(self) -> None:
        """Have a new one when it ends."""
        while True:
            await trio.lowlevel.wait_readable(self.keeper.watch)
            log.warning("the keeper (pid %d) has ended; starting another", self.keeper.pid)
            self.keeper.end()
            self.keeper = keeper.start(self._directory, self._lock)
            journal = self._service.book.journal
            assert journal is not None
            journal.keeper = self.keeper.name
            self.write_all()

    async def watch_the_dead(self) -> None:
        """Forget what an earlier daemon has promised to processes that have ended since."""
        book = self._service.book
        while True:
            await trio.sleep(_INTERVAL)
            self._service.snapshots.forget_orphans()
            for session, answer in list(book.answers.items()):
                if processes.start_time(answer.pid) != answer.started:
                    book.end_session(session)
