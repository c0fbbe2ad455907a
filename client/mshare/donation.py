"""Donating memory: what the caller has mapped inside the range becomes the region's, and no store is lost on the way.

Anonymous memory is given away mapping by mapping: arm it, so that whoever stores to it waits; copy its contents to the
backing file; put the backing in its place; wake who waits, who then finds the same contents in the region. Private
memory is moved aside by mremap(2) for the copy, shared memory is write-protected where it is.

Mappings of files stay that: see ``mshare.staging``. They come last, when the daemon has armed the window, since every
touch of them is its to answer from then on. A private mapping of a file on a disk can be neither moved aside nor
write-protected: other Python threads are held off all the same, but a store that a native thread makes during the copy
may be missed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from typing import Final

import attrs

from mshare import syscalls as sc
from mshare.arming import (
    MAYMOVE_FIXED,
    collector_off,
    copy_steps,
    disarm_step,
    huge_copy_steps,
    no_room,
    open_userfaultfd,
    protect_steps,
    uffd_step,
    wake_step,
)
from mshare.mapped_files import MappedFiles, shows_file
from mshare.staging import FilePart, move_in
from mshare.syscalls import Mapping, Step
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, round_down, round_up
from msharefs.protocol import DonatedRange

_MAYMOVE_FIXED_DONTUNMAP: Final = 1 | 2 | 4
_MREMAP_DONE: Final = 2
"""Steps after which private memory stands at its scratch address."""
_SPECIAL: Final = ("[stack]", "[heap]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")


@attrs.frozen(eq=False)
class Donation:
    """The parts of a range that the caller has mapped, clipped to it, and the gaps between them.

    Owns descriptors of the files that are shown there. Without a range there is nothing to give.
    """

    start: int = 0
    end: int = 0
    parts: tuple[Mapping, ...] = ()
    _files: dict[Mapping, FilePart] = attrs.field(factory=dict)
    _opened: MappedFiles = attrs.field(factory=MappedFiles)
    _filled: list[tuple[int, int]] = attrs.field(factory=list, init=False)

    @classmethod
    def of(cls, start: int, length: int) -> Donation:
        """What stands in the range now. Raises OSError: EINVAL for what cannot be given away, E2BIG."""
        parts, files, opened = [], {}, MappedFiles()
        try:
            for mapping in sc.own_mappings(start, start + length):
                _check_ordinary(mapping)
                part = mapping.clipped(start, start + length)
                parts.append(part)
                if shows_file(mapping):
                    place = opened.place_of(mapping)
                    files[part] = FilePart(part, start, opened.fds[place], place)
        except BaseException:
            opened.close()
            raise
        return cls(start, start + length, tuple(parts), files, opened)

    @property
    def ranges(self) -> tuple[DonatedRange, ...]:
        """The parts as the daemon is told."""
        files = {part: each.told for part, each in self._files.items()}
        return tuple(DonatedRange(p.start - self.start, p.end - p.start, p.prot, files.get(p)) for p in self.parts)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of the files that are shown, to be sent along."""
        return tuple(self._opened.fds)

    @property
    def staged(self) -> tuple[int, ...]:
        """Where the region's memory for each part of a file stands until ``move_in``."""
        return tuple(each.scratch for each in self._files.values())

    def close(self) -> None:
        """Close the descriptors."""
        self._opened.close()

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Start and end of what is not mapped, in order."""
        at = self.start
        for part in self.parts:
            if at < part.start:
                yield at, part.start
            at = part.end
        if at < self.end:
            yield at, self.end

    def hand_over(self, backing: int, device: int | None, *, page: int = PAGE_SIZE) -> None:
        """Put the region's backing in the place of all anonymous memory, contents and all; gaps become its PROT_NONE.

        What shows files stays as it is, and is staged. ``page`` is the size of the region's pages; for huge ones memory
        is reserved already. Raises OSError: EINVAL when another thread has mapped something into a gap, ENOSPC when
        there is no memory for a second copy. Memory then holds what it held.
        """
        runs = {part: _whole_pages(_to_copy(part), page) for part in self.parts if part not in self._files}
        for start, end in itertools.chain.from_iterable(runs.values()) if page == PAGE_SIZE else ():
            _fallocate(backing, start - self.start, end - start)
        self._fill_gaps(backing)
        uffd = open_userfaultfd(device)
        try:
            for part in runs:
                self._move(part, runs[part], backing, uffd, huge=page > PAGE_SIZE)
            for each in self._files.values():
                each.stage(backing, uffd)
        finally:
            os.close(uffd)  # Wakes whoever still waits.

    def move_in(self, backing: int, device: int | None) -> None:
        """Put what is staged in its place. Preconditions: the daemon has armed it. Raises OSError."""
        move_in(tuple(self._files.values()), backing, device)

    def complete(self) -> None:
        """After a failure, while the region is still there: have all that its memory should show."""
        for each in self._files.values():
            each.complete()

    def give_back(self) -> None:
        """Undo it, after a failure, and after the region's end: unmap the gaps, and map files as they were.

        What was anonymous stays where it is, contents, protection and all.
        """
        for part in self.parts:
            if part not in self._files:
                sc.mprotect(part.start, part.end - part.start, part.prot)
        for start, end in self._filled:
            sc.munmap(start, end - start)
        self._filled.clear()
        for each in self._files.values():
            each.give_back()

    def _fill_gaps(self, backing: int) -> None:
        """Map the gaps, where nothing must have appeared since; nobody may touch them before they are armed."""
        flags = sc.MAP_SHARED | sc.MAP_FIXED_NOREPLACE | sc.MAP_NORESERVE
        for start, end in self.gaps():
            try:
                sc.mmap(start, end - start, sc.PROT_NONE, flags, backing, start - self.start)
            except FileExistsError as error:
                text = "another thread mapped memory into the range meanwhile; try again"
                raise OSError(errno.EINVAL, text) from error
            self._filled.append((start, end))

    def _move(self, part: Mapping, runs: list[tuple[int, int]], backing: int, uffd: int, *, huge: bool) -> None:
        """Hand one mapping over. From arming to waking, or undoing, not one bytecode is executed."""
        length = part.end - part.start
        scratch = sc.mmap(None, length, sc.PROT_NONE, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE)
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(self._armed_mapping(part, backing, uffd)) if huge else None
            self._move_by(part, self._steps(part, runs, backing, uffd, scratch, target), uffd, scratch)

    def _move_by(self, part: Mapping, steps: list[Step], uffd: int, scratch: int) -> None:
        length = part.end - part.start
        moved = range(_MREMAP_DONE, len(steps) - 1) if _is_moved_away(part) else range(0)
        undo = _undo_steps(part, steps, uffd, scratch, moved)
        with collector_off():
            done = sc.run_unswitched(steps, undo)
        error = sc.errno_error("donating")
        if done not in moved:  # Else it is at its old place again, and nothing is left at scratch.
            sc.munmap(scratch, length)
        if done < len(steps):
            raise error

    @contextlib.contextmanager
    def _armed_mapping(self, part: Mapping, backing: int, uffd: int) -> Iterator[int]:
        """The region's memory for a part at a scratch address, where UFFDIO_COPY may put pages."""
        length = part.end - part.start
        flags = sc.MAP_SHARED | sc.MAP_NORESERVE
        start = sc.mmap(None, length, sc.PROT_NONE, flags, backing, part.start - self.start)
        try:
            fcntl.ioctl(uffd, abi.UFFDIO_REGISTER, abi.REGISTER_STRUCT.pack(start, length, int(abi.Mode.MISSING), 0))
            yield start
        finally:
            sc.munmap(start, length)

    def _steps(
        self,
        part: Mapping,
        runs: list[tuple[int, int]],
        backing: int,
        uffd: int,
        scratch: int,
        target: int | None = None,
    ) -> list[Step]:
        """All calls that it takes; ``target`` is where huge pages are copied to."""
        length = part.end - part.start
        source = scratch if _is_moved_away(part) else part.start
        if _is_moved_away(part):
            arm = (part.start, length, int(abi.Mode.MISSING), 0)
            steps = [
                uffd_step(uffd, abi.UFFDIO_REGISTER, abi.REGISTER_STRUCT, *arm),
                Step(scratch, sc.SYS_MREMAP, (part.start, length, length, _MAYMOVE_FIXED_DONTUNMAP, scratch)),
            ]
        else:
            steps = protect_steps(part, uffd)
        if not part.prot & sc.PROT_READ:
            steps.append(Step(0, sc.SYS_MPROTECT, (source, length, sc.PROT_READ)))
        if target is None:
            steps += copy_steps(backing, runs, source=source - part.start, target=-self.start)
        else:
            steps += huge_copy_steps(uffd, runs, source=source - part.start, target=target - part.start)
        flags = sc.MAP_SHARED | sc.MAP_FIXED | sc.MAP_NORESERVE
        place = (part.start, length, part.prot, flags, backing, part.start - self.start)
        return [*steps, Step(part.start, sc.SYS_MMAP, place), wake_step(part, uffd)]


def _check_ordinary(mapping: Mapping) -> None:
    if _is_special(mapping):
        raise OSError(errno.EINVAL, f"{mapping.path} at {mapping.start:#x} cannot be donated; use another range")


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
        raise no_room(error, length) from error


def _to_copy(part: Mapping) -> list[tuple[int, int]]:
    """What must be copied: with one thread only what is there; with more, untouched pages may be touched meanwhile."""
    if part.inode or part.shared or sc.thread_count() > 1:
        return [(part.start, part.end)]
    return list(sc.populated(part.start, part.end))


def _whole_pages(runs: list[tuple[int, int]], page: int) -> list[tuple[int, int]]:
    """The runs, widened to pages of that size; in order, apart."""
    found: list[tuple[int, int]] = []
    for start, end in runs:
        start, end = round_down(start, page), round_up(end, page)
        if found and start <= found[-1][1]:
            start, end = found.pop()[0], end
        found.append((start, end))
    return found


def _undo_steps(part: Mapping, steps: list[Step], uffd: int, scratch: int, moved: range) -> list[tuple[range, Step]]:
    """What to do when that many steps have succeeded and the next has not: memory is back, and armed no longer."""
    length, failed = part.end - part.start, range(len(steps))
    back = Step(part.start, sc.SYS_MREMAP, (scratch, length, length, MAYMOVE_FIXED, part.start))
    disarm = disarm_step(part, uffd)
    protect = Step(0, sc.SYS_MPROTECT, (part.start, length, part.prot))
    armed = steps[0].number == sc.SYS_IOCTL  # What a device lends may not be.
    return [(moved, back), *([(failed, disarm)] if armed else []), (failed, protect)]
