"""A region and an attachment together with what the kernel holds for them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import attrs
import trio

from mshared.backing import Backing, punch
from mshared.filler import Filler
from mshared.uffd import Uffd
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.effects import Arm
from msharefs.region import Attachment, Region
from msharefs.vma import FileId


@attrs.define(eq=False)
class LiveAttachment:
    """An attachment and its userfaultfd. ``anchor``: see ``protocol.Mapped``.

    ``poisoned`` are the pages of its window that were marked such that system calls fail there; ``refused`` those that
    the userfaultfd ``sigbus`` has for the moment, to the same end. ``refusals`` counts touches that were not allowed.
    """

    model: Attachment
    region: LiveRegion
    uffd: Uffd
    anchor: Address
    parent_pid: int | None = None
    poisoned: set[Address] = attrs.Factory(set)
    sigbus: Uffd | None = None
    refused: set[Address] = attrs.Factory(set)
    refusals: int = 0

    def close(self) -> None:
        """Close its descriptors."""
        self.uffd.close()
        if self.sigbus is not None:
            self.sigbus.close()

    def __str__(self) -> str:
        """How log lines start."""
        return f"region {self.region.model.name or self.region.model.id} pid {self.model.pid}"


@attrs.define
class Reading:
    """What is being read of mapped files, as host ranges.

    ``end`` is where the last read ended, to tell whether pages are touched in order; ``size`` what was read at once.
    A file whose filesystem does not answer holds the threads that ``limiter`` allows this region, and no other's.
    """

    under_way: list[AddrRange] = attrs.Factory(list)
    end: int = 0
    size: int = 0
    limiter: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(4))


@attrs.define(eq=False)
class LiveRegion:
    """A region and its files: those of its memory, and in ``files`` those that are mapped into it.

    ``settled`` is set once its creator is attached, or has failed. ``closed`` when it is gone. ``lock`` is held by a
    change from its first await to its end.
    ``moves`` counts how often memory was moved or went. ``changing`` while a change is carried out: faults wait,
    since the model is ahead of the memory; ``arming_now`` is what it has armed so far. ``created_ns`` is the wall
    clock's time, for people.
    """

    model: Region
    backing: Backing
    uffd_device: int | None
    attachments: list[LiveAttachment] = attrs.Factory(list)
    settled: trio.Event = attrs.Factory(trio.Event)
    created_ns: int = attrs.Factory(time.time_ns)
    files: dict[FileId, int] = attrs.Factory(dict)
    closed: bool = False
    lock: trio.Lock = attrs.Factory(trio.Lock)
    moves: int = 0
    changing: bool = False
    arming_now: list[Arm] = attrs.Factory(list)
    reading: Reading = attrs.Factory(Reading)
    _stash: int | None = None
    _filler: Filler | None = None
    _file_ids: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    def filler(self) -> Filler:
        """What puts single pages into the backing; made when first needed."""
        if self._filler is None:
            self._filler = Filler(self.backing.fd, self.model.ar.size, self.uffd_device)
        return self._filler

    def punch(self, ar: AddrRange) -> None:
        """Give the memory of a range of offsets back, stashed or not."""
        self.backing.punch(ar)
        if self._stash is not None:
            punch(self._stash, ar)

    def put(self, data: bytes, offset: int) -> None:
        """Put whole pages into the backing, and no neighbour of theirs; what is there is written over."""
        for at in range(0, len(data), PAGE_SIZE):
            page = data[at : at + PAGE_SIZE]
            if not self.filler().copy(offset + at, page):
                os.pwrite(self.backing.fd, page, offset + at)

    def put_new(self, data: bytes, offset: int) -> None:
        """Put whole pages into the backing, and no neighbour of theirs; what is there stays."""
        if not self.filler().copy(offset, data):
            for at in range(0, len(data), PAGE_SIZE):
                self.filler().copy(offset + at, data[at : at + PAGE_SIZE])

    def add_file(self, fd: int) -> FileId:
        """Keep an opened file that is to be mapped."""
        number = FileId(next(self._file_ids))
        self.files[number] = fd
        return number

    def drop_unused_files(self) -> None:
        """Close the files that no mapping shows any more."""
        for number in self.files.keys() - self.model.mm.files():
            os.close(self.files.pop(number))

    def stash(self) -> int:
        """The file where contents wait that no process may touch; made when first needed."""
        if self._stash is None:
            self._stash = os.memfd_create(f"msharefs-stash-{self.model.id}", os.MFD_CLOEXEC)
            os.ftruncate(self._stash, self.model.ar.size)
        return self._stash

    def close(self) -> None:
        """Close the files. Preconditions: nobody is attached."""
        self.closed = True
        for fd in self.files.values():
            os.close(fd)
        self.files.clear()
        if self._filler is not None:
            self._filler.close()
            self._filler = None
        self.backing.close()
        if self._stash is not None:
            os.close(self._stash)
            self._stash = None
