"""Donating memory: what the caller has mapped inside the range becomes the region's, and no store is lost on the way.

For each mapping: arm it, so that whoever stores to it waits; copy its contents to the backing file; put the backing in
its place; wake who waits, who then finds the same contents in the region. Private anonymous memory is moved aside by
mremap(2) for the copy, anything else is write-protected where it is. Files of disk filesystems can do neither: other
Python threads are held off all the same, but a store that a native thread makes during the copy may be missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import itertools
import os
import struct
from collections.abc import Iterator
from typing import Final

import attrs

from mshare import syscalls as sc
from mshare.syscalls import Mapping, Step
from msharefs import uffd_abi as abi
from msharefs.protocol import DonatedRange

_MAYMOVE_FIXED: Final = 1 | 2
_MAYMOVE_FIXED_DONTUNMAP: Final = 1 | 2 | 4
_MREMAP_DONE: Final = 2
"""Steps after which private memory stands at its scratch address."""
_MOST_AT_ONCE: Final = 1 << 30
_SPECIAL: Final = ("[stack]", "[heap]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")


@attrs.frozen
class Donation:
    """The parts of a range that the caller has mapped, clipped to it, and the gaps between them."""

    start: int
    end: int
    parts: tuple[Mapping, ...]
    _filled: list[tuple[int, int]] = attrs.field(factory=list, init=False)

    @classmethod
    def of(cls, start: int, length: int) -> Donation:
        """What stands in the range now. Raises OSError EINVAL for what cannot be given away."""
        parts = []
        for mapping in sc.own_mappings(start, start + length):
            if _is_special(mapping):
                raise OSError(
                    errno.EINVAL, f"{mapping.path} at {mapping.start:#x} cannot be donated; use another range"
                )
            parts.append(attrs.evolve(mapping, start=max(mapping.start, start), end=min(mapping.end, start + length)))
        return cls(start, start + length, tuple(parts))

    @property
    def ranges(self) -> tuple[DonatedRange, ...]:
        """The parts as the daemon is told."""
        return tuple(DonatedRange(p.start - self.start, p.end - p.start, p.prot) for p in self.parts)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Start and end of what is not mapped, in order."""
        at = self.start
        for part in self.parts:
            if at < part.start:
                yield at, part.start
            at = part.end
        if at < self.end:
            yield at, self.end

    def hand_over(self, backing: int, device: int | None) -> None:
        """Put the region's backing in the place of everything donated, contents and all; gaps become its PROT_NONE.

        Raises OSError: EINVAL when another thread has mapped something into a gap, ENOSPC when there is no memory for
        a second copy. Memory then holds what it held.
        """
        runs = {part: _to_copy(part) for part in self.parts}
        for start, end in itertools.chain.from_iterable(runs.values()):
            _fallocate(backing, start - self.start, end - start)
        self._fill_gaps(backing)
        uffd = sc.userfaultfd(device)
        try:
            features = abi.Feature.PAGEFAULT_FLAG_WP | abi.Feature.WP_HUGETLBFS_SHMEM
            fcntl.ioctl(uffd, abi.UFFDIO_API, abi.API_STRUCT.pack(abi.API_VERSION, features, 0))
            for part in self.parts:
                self._move(part, runs[part], backing, uffd)
        finally:
            os.close(uffd)  # Wakes whoever still waits.

    def give_gaps_back(self) -> None:
        """Unmap what was put into the gaps, after a failure; what was donated stays where it is, contents and all."""
        for start, end in self._filled:
            sc.munmap(start, end - start)
        self._filled.clear()

    def _fill_gaps(self, backing: int) -> None:
        """Map the gaps, where nothing must have appeared since; nobody may touch them before they are armed."""
        flags = sc.MAP_SHARED | sc.MAP_FIXED_NOREPLACE
        for start, end in self.gaps():
            try:
                sc.mmap(start, end - start, sc.PROT_NONE, flags, backing, start - self.start)
            except FileExistsError as error:
                text = "another thread mapped memory into the range meanwhile; try again"
                raise OSError(errno.EINVAL, text) from error
            self._filled.append((start, end))

    def _move(self, part: Mapping, runs: list[tuple[int, int]], backing: int, uffd: int) -> None:
        """Hand one mapping over. From arming to waking, or undoing, not one bytecode is executed."""
        length = part.end - part.start
        scratch = sc.mmap(None, length, sc.PROT_NONE, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE)
        steps = self._steps(part, runs, backing, uffd, scratch)
        moved = range(_MREMAP_DONE, len(steps) - 1) if _is_moved_away(part) else range(0)
        undo = _undo_steps(part, steps, uffd, scratch, moved)
        with _collector_off():
            done = sc.run_unswitched(steps, undo)
        error = sc.errno_error("donating")
        if done not in moved:  # Else it is at its old place again, and nothing is left at scratch.
            sc.munmap(scratch, length)
        if done < len(steps):
            raise error

    def _steps(self, part: Mapping, runs: list[tuple[int, int]], backing: int, uffd: int, scratch: int) -> list[Step]:
        length = part.end - part.start
        source = scratch if _is_moved_away(part) else part.start
        if _is_moved_away(part):
            steps = [
                _uffd_step(
                    uffd, abi.UFFDIO_REGISTER, abi.REGISTER_STRUCT, part.start, length, int(abi.Mode.MISSING), 0
                ),
                Step(scratch, sc.SYS_MREMAP, (part.start, length, length, _MAYMOVE_FIXED_DONTUNMAP, scratch)),
            ]
        else:
            steps = _protect_steps(part, uffd)
        if not part.prot & sc.PROT_READ:
            steps.append(Step(0, sc.SYS_MPROTECT, (source, length, sc.PROT_READ)))
        for start, end in runs:
            for at in range(start, end, _MOST_AT_ONCE):
                size = min(_MOST_AT_ONCE, end - at)
                args = (backing, source + at - part.start, size, at - self.start)
                steps.append(Step(size, sc.SYS_PWRITE64, args))
        place = (part.start, length, part.prot, sc.MAP_SHARED | sc.MAP_FIXED, backing, part.start - self.start)
        steps.append(Step(part.start, sc.SYS_MMAP, place))
        steps.append(_uffd_step(uffd, abi.UFFDIO_WAKE, abi.RANGE_STRUCT, part.start, length))
        return steps


def _is_special(mapping: Mapping) -> bool:
    """Stacks, the heap, devices, huge pages. Shared anonymous memory has a name in /dev and is memory all the same."""
    if mapping.path.startswith(("/dev/shm/", "/dev/zero")):  # noqa: S108 - a name to compare with
        return False
    return mapping.path in _SPECIAL or mapping.path.startswith(("/dev/", "/anon_hugepage"))


def _is_moved_away(part: Mapping) -> bool:
    """Whether it is private anonymous memory, which mremap(2) can move and userfaultfd can report as missing."""
    return not part.inode and not part.shared


def _fallocate(backing: int, offset: int, length: int) -> None:
    """Have the memory for the copy before anything is changed."""
    try:
        os.posix_fallocate(backing, offset, length)
    except OSError as error:
        text = f"no memory for the region's copy of {length} donated bytes; free some, or raise mshared --max-bytes"
        raise OSError(error.errno, text) from error


def _to_copy(part: Mapping) -> list[tuple[int, int]]:
    """What must be copied: with one thread only what is there; with more, untouched pages may be touched meanwhile."""
    if part.inode or part.shared or sc.thread_count() > 1:
        return [(part.start, part.end)]
    return list(sc.populated(part.start, part.end))


def _protect_steps(part: Mapping, uffd: int) -> list[Step]:
    """Write-protect a mapping of a file in memory; nothing, where its filesystem cannot report stores."""
    length = part.end - part.start
    register = abi.REGISTER_STRUCT.pack(part.start, length, int(abi.Mode.WP), 0)
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_REGISTER, register)
    except OSError:
        return []
    mode = abi.WRITEPROTECT_MODE_WP
    return [_uffd_step(uffd, abi.UFFDIO_WRITEPROTECT, abi.WRITEPROTECT_STRUCT, part.start, length, mode)]


def _undo_steps(part: Mapping, steps: list[Step], uffd: int, scratch: int, moved: range) -> list[tuple[range, Step]]:
    """What to do when that many steps have succeeded and the next has not: memory is back, and armed no longer."""
    length, failed = part.end - part.start, range(len(steps))
    back = Step(part.start, sc.SYS_MREMAP, (scratch, length, length, _MAYMOVE_FIXED, part.start))
    disarm = _uffd_step(uffd, abi.UFFDIO_UNREGISTER, abi.RANGE_STRUCT, part.start, length)
    protect = Step(0, sc.SYS_MPROTECT, (part.start, length, part.prot))
    armed = steps[0].number == sc.SYS_IOCTL  # Files of disk filesystems are not.
    return [(moved, back), *([(failed, disarm)] if armed else []), (failed, protect)]


def _uffd_step(uffd: int, request: int, layout: struct.Struct, *values: int) -> Step:
    packed = layout.pack(*values)
    return Step(0, sc.SYS_IOCTL, (uffd, request, ctypes.create_string_buffer(packed, len(packed))))


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """A collection could run finalizers, which are bytecode."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
