"""What a fork of a region is to be made of, besides what it has in common with its origin.

All that may be lacking is in here: once it is there the fork can be promised, and made when that has been said.
"""

from __future__ import annotations

import os
import time

import attrs

from mshared import records as rec
from mshared import sparse
from mshared.backing import Backing, BackingStore
from mshared.book import file_is, memory_of
from mshared.files import MappedFile
from mshared.live import LiveRegion
from msharefs.errors import NoMemoryError
from msharefs.frames import StoreNo
from msharefs.perms import PROT_RW, Credentials, Ownership
from msharefs.region import BackingKind, RegionId
from msharefs.vma import FileId


@attrs.frozen
class Taker:
    """The child that a private twin waits for, by a token of its own; its window is as its parent's, the maker's."""

    token: str
    readonly: bool
    who: Credentials
    maker: int
    started: int | None

    def record(self, number: RegionId) -> rec.UntakenIs:
        """The twin with that number waits."""
        who = self.who
        groups = tuple(sorted(who.groups))
        return rec.UntakenIs(self.token, number, self.readonly, who.uid, who.gid, groups, self.maker, self.started)


@attrs.frozen
class Wish:
    """A region to be forked, and what its twin shall be called; without a name it ends with its last attachment."""

    origin: LiveRegion
    name: str | None
    mode: int
    taker: Taker | None = None


@attrs.define
class Parts:
    """Numbers of the twin and of its store, and the files that are its own."""

    wish: Wish
    number: RegionId
    store: StoreNo
    owner: Ownership
    backing: Backing
    created_ns: int = attrs.Factory(time.time_ns)
    files: dict[FileId, MappedFile] = attrs.Factory(dict)
    stash: int | None = None

    @classmethod
    def gather(cls, wish: Wish, who: Credentials, number: RegionId, store: BackingStore) -> Parts:
        """All of them. Raises what ``BackingStore.create`` does, OSError, NoMemoryError, NoSpaceError."""
        origin = wish.origin.model
        owner = Ownership(who.uid, who.gid, wish.mode)
        backing = store.create(number, origin.backing, origin.ar.size, fork=True)
        try:
            found = cls(wish, number, origin.mm.lineage.next_store(), owner, backing)
        except BaseException:
            backing.close()
            raise
        try:
            for file, held in wish.origin.files.items():
                found.files[file] = held.copy_of(held.fd)
            found._copy_hidden()
        except BaseException:
            found.close()
            raise
        return found

    def _copy_hidden(self) -> None:
        """What nobody may touch waits in a file that no process has: each twin needs one of its own."""
        origin = self.wish.origin
        for vma in origin.model.mm.vmas:
            if vma.prot & PROT_RW or vma.reaches_file:
                continue
            try:
                if self.stash is None:
                    self.stash = sparse.new_file(f"msharefs-stash-{self.number}", origin.model.ar.size)
                inside = vma.ar.moved(-origin.model.ar.start)
                for part in sparse.held(origin.stash(), inside, BackingKind.SMALL, None):
                    sparse.copy(origin.stash(), part, sparse.write_to(self.stash))
            except OSError as error:
                raise NoMemoryError(
                    f"no memory for what is hidden by PROT_NONE: {error.strerror}; free some"
                ) from error

    def records(self) -> list[rec.Record]:
        """The twin, and whose pages it has. Preconditions: it is written down how its origin is."""
        origin = self.wish.origin
        pages = origin.fork_notes.own_pages(origin.model.mm)
        memory = memory_of(self.backing, stash=self.stash)
        forked = rec.Forked(
            self.number,
            origin.model.id,
            pages,
            self.store,
            memory,
            self.created_ns,
            self.owner,
            self.wish.name,
            origin.model.name or "",
        )
        noted: list[rec.Record] = [forked]
        if self.files:
            noted += (file_is(self.number, file, held) for file, held in self.files.items())
            noted.append(rec.Dirty(self.number, origin.model.ar, ()))
        if self.wish.taker is not None:
            noted.append(self.wish.taker.record(self.number))
        return noted

    def close(self) -> None:
        """Let them go: there will be no twin."""
        self.backing.close()
        for file in self.files.values():
            file.close()
        if self.stash is not None:
            os.close(self.stash)
