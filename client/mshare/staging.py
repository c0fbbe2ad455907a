"""Mappings of files, on their way into a region of which they stay mappings of files.

The region's memory for such a part is mapped at a scratch address first, where nobody touches it and the daemon arms
it. Then mremap(2) puts it over the old mapping, armed as it is: a thread stores to the file by the old mapping until
that moment, and waits for the daemon from it on. So nothing of a shared file is copied, and no store is lost. Of a
private file mapping the pages are copied first that only this process has. The interpreter lock is kept while parts
are moved: the kernel returns from mremap when the daemon has read of it, which needs no thread of this process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from mshare import syscalls as sc
from mshare.arming import (
    MAYMOVE_FIXED,
    collector_off,
    copy_steps,
    disarm_step,
    no_room,
    open_userfaultfd,
    protect_steps,
    wake_step,
)
from mshare.syscalls import Mapping, Step
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, round_up
from msharefs.protocol import DonatedFile

_PIECE: Final = 1 << 20


@attrs.define(eq=False)
class FilePart:
    """A donated mapping of the file ``fd``, which is sent along at ``place``; ``base`` is where the region starts.

    ``scratch`` is where its memory in the region is staged; ``moved`` once that stands in its place. ``copied`` are the
    runs of a private mapping that were copied; all up to the file's end where other threads might store, ``alone`` if
    there are none.
    """

    part: Mapping
    base: int
    fd: int
    place: int
    scratch: int = 0
    moved: bool = False
    alone: bool = True
    copied: list[tuple[int, int]] = attrs.Factory(list)

    @property
    def length(self) -> int:
        """Bytes."""
        return self.part.end - self.part.start

    @property
    def told(self) -> DonatedFile:
        """As the daemon is told."""
        return DonatedFile(self.place, self.part.offset, self.part.shared)

    def stage(self, backing: int, uffd: int) -> None:
        """Map the region's memory at a scratch address; with the contents of a private mapping. Raises OSError.

        What lies in the region's memory by now was brought there by neighbours: huge pages reach beyond their borders.
        """
        sc.punch(backing, self.part.start - self.base, self.length)
        if not self.part.shared:
            self.alone = sc.thread_count() == 1
            self.copied = self._to_copy()
            self._copy(backing, uffd)
        self.scratch = self._map(backing, self.part.prot)

    def again(self) -> bool:
        """Whether it must be copied once more, while nobody can store: its memory is there by then."""
        return not self.alone and bool(self.part.prot & sc.PROT_WRITE)

    def complete(self) -> None:
        """Have the region bring what it still takes from the file, before it ends."""
        if self.moved and not self.part.shared and self.part.prot & sc.PROT_READ:
            for page in range(self.part.start, self._up_to_end(), PAGE_SIZE):
                ctypes.string_at(page, 1)

    def give_back(self) -> None:
        """Have the memory here that was here before. What was private stays where it is, contents and all."""
        if self.moved and self.part.shared:
            flags = sc.MAP_SHARED | sc.MAP_FIXED
            sc.mmap(self.part.start, self.length, self.part.prot, flags, self.fd, self.part.offset)
        elif self.moved:
            sc.mprotect(self.part.start, self.length, self.part.prot)
        elif self.scratch:
            sc.munmap(self.scratch, self.length)
        self.scratch, self.moved = 0, False

    def _map(self, backing: int, prot: int) -> int:
        flags = sc.MAP_SHARED | sc.MAP_NORESERVE  # As the window has, so that it is one mapping again.
        return sc.mmap(None, self.length, prot, flags, backing, self.part.start - self.base)

    def _up_to_end(self) -> int:
        """The address where the file ends, in whole pages, or the mapping."""
        size = round_up(os.fstat(self.fd).st_size, PAGE_SIZE)
        return min(self.part.end, max(self.part.start, self.part.start + size - self.part.offset))

    def _to_copy(self) -> list[tuple[int, int]]:
        """With other threads every page might be stored to meanwhile; what nobody may read cannot come later."""
        start, end = self.part.start, self._up_to_end()
        if self.alone and self.part.prot & sc.PROT_READ:
            return list(sc.populated(start, end, own=True))
        return [(start, end)] if start < end else []

    def _copy(self, backing: int, uffd: int) -> None:
        """Put pages into the region's memory, and no neighbour of theirs, as a write would where pages are huge."""
        if not self.copied:
            return
        scratch = self._map(backing, sc.PROT_NONE)
        try:
            register = abi.REGISTER_STRUCT.pack(scratch, self.length, int(abi.Mode.MISSING), 0)
            fcntl.ioctl(uffd, abi.UFFDIO_REGISTER, register)
            with Path("/proc/self/mem").open("rb", buffering=0) as memory:  # Also what nobody may read.
                for start, end in self.copied:
                    for at in range(start, end, _PIECE):
                        size = min(_PIECE, end - at)
                        _put(uffd, scratch + at - self.part.start, _read(memory.fileno(), size, at))
        finally:
            sc.munmap(scratch, self.length)


def move_in(parts: Sequence[FilePart], backing: int, device: int | None) -> None:
    """Put what is staged, and armed by now, in its place. Raises OSError; some parts may be moved then."""
    again = [each for each in parts if each.again()]
    uffd = open_userfaultfd(device) if again else -1
    try:
        first = [step for each in again for step in protect_steps(each.part, uffd)]
        for each in again:
            first += copy_steps(backing, each.copied, source=0, target=-each.base)
        moves = [_move_step(each) for each in parts]
        steps = [*first, *moves, *(wake_step(each.part, uffd) for each in again)]
        undo = [(range(len(steps)), disarm_step(each.part, uffd)) for each in again]
        with collector_off():
            done = sc.run_unswitched(steps, undo)
        error = sc.errno_error("donating")
        for number, each in enumerate(parts):
            each.moved = done > len(first) + number
        if done < len(steps):
            raise error
    finally:
        if uffd >= 0:
            os.close(uffd)  # Wakes whoever still waits.


def _move_step(part: FilePart) -> Step:
    place = part.part.start
    return Step(place, sc.SYS_MREMAP, (part.scratch, part.length, part.length, MAYMOVE_FIXED, place))


def _read(memory: int, size: int, at: int) -> bytes:
    """This process's memory. Raises OSError where the file behind it has become shorter."""
    data = os.pread(memory, size, at)
    if len(data) < size:
        raise OSError(errno.EFAULT, f"memory at {at + len(data):#x} cannot be read any more; try again")
    return data


def _put(uffd: int, place: int, data: bytes) -> None:
    source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_COPY, abi.COPY_STRUCT.pack(place, source, len(data), 0, 0))
    except OSError as error:
        raise no_room(error, len(data)) from error
