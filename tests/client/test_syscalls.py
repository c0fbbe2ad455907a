"""System calls that Python has no words for, on this process's own memory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshare import syscalls as sc
from mshare.syscalls import Mapping, Step
from msharefs.addr import PAGE_SIZE

PRIVATE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS
RW = sc.PROT_READ | sc.PROT_WRITE
SYS_NANOSLEEP, SYS_GETPID, SYS_CLOSE, SYS_CLOCK_GETTIME = 35, 39, 3, 228


@pytest.fixture
def memory() -> Iterator[Callable[..., int]]:
    """Map memory at a place that is free, pages at a time; unmapped at the end."""
    mapped: list[tuple[int, int]] = []

    def new(pages: int, prot: int = RW, flags: int = PRIVATE, fd: int = -1, at: int | None = None) -> int:
        where = at if at is None else at + 0
        start = sc.mmap(where, pages * PAGE_SIZE, prot, flags | (sc.MAP_FIXED_NOREPLACE if where else 0), fd)
        mapped.append((start, pages * PAGE_SIZE))
        return start

    yield new
    for start, size in mapped:
        sc.munmap(start, size)


class TestMmap:
    """mmap(2) and its relatives."""

    def test_where_it_is_asked_for(self, memory: Callable[..., int]) -> None:
        start = memory(2)
        ctypes.memset(start, 7, 2 * PAGE_SIZE)
        assert ctypes.string_at(start + PAGE_SIZE, 1) == b"\7"

    def test_a_place_that_is_taken_stays_as_it_is(self, memory: Callable[..., int]) -> None:
        start = memory(2)
        ctypes.memset(start, 7, 1)
        with pytest.raises(FileExistsError, match="mmap: File exists"):
            sc.mmap(start, PAGE_SIZE, RW, PRIVATE | sc.MAP_FIXED_NOREPLACE)
        assert ctypes.string_at(start, 1) == b"\7"

    @pytest.mark.parametrize(
        ("arguments", "number"),
        [
            ((None, 0, RW, PRIVATE), errno.EINVAL),
            ((1, PAGE_SIZE, RW, PRIVATE | sc.MAP_FIXED), errno.EINVAL),
            ((None, PAGE_SIZE, RW, sc.MAP_SHARED, 999_999), errno.EBADF),
            ((None, 1 << 50, RW, PRIVATE), errno.ENOMEM),
        ],
    )
    def test_what_cannot_be_is_an_oserror(self, arguments: tuple[int, ...], number: int) -> None:
        with pytest.raises(OSError, match=f"mmap: {os.strerror(number)}") as caught:
            sc.mmap(*arguments)
        assert caught.value.errno == number

    def test_offsets_above_4_gib(self) -> None:
        fd = os.memfd_create("long")
        os.pwrite(fd, b"far", 5 << 32)
        os.ftruncate(fd, (5 << 32) + PAGE_SIZE)
        start = sc.mmap(None, PAGE_SIZE, sc.PROT_READ, sc.MAP_SHARED, fd, 5 << 32)
        os.close(fd)
        assert ctypes.string_at(start, 3) == b"far"
        sc.munmap(start, PAGE_SIZE)

    def test_the_others_fail_by_name(self) -> None:
        for call, name in ((sc.munmap, "munmap"), (sc.mprotect, "mprotect"), (sc.madvise, "madvise")):
            arguments = (1, PAGE_SIZE) if call is sc.munmap else (1, PAGE_SIZE, 0)
            with pytest.raises(OSError, match=f"{name}: Invalid argument"):
                call(*arguments)

    def test_advice_is_taken(self, memory: Callable[..., int]) -> None:
        start = memory(1)
        ctypes.memset(start, 7, 1)
        sc.madvise(start, PAGE_SIZE, mmap.MADV_DONTNEED)
        assert ctypes.string_at(start, 1) == b"\0"


def test_a_userfaultfd_neither_blocks_nor_survives_an_exec() -> None:
    fd = sc.userfaultfd(None)
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_what_is_no_device_gives_none() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)), Path("/dev/null").open() as null:
        sc.userfaultfd(null.fileno())


class TestOwnMappings:
    """Lines of /proc/self/maps."""

    def test_protections_and_sharing(self, memory: Callable[..., int]) -> None:
        fd = os.memfd_create("named memory")
        os.ftruncate(fd, 8 * PAGE_SIZE)
        inode = os.fstat(fd).st_ino
        device = f"{os.major(os.fstat(fd).st_dev):02x}:{os.minor(os.fstat(fd).st_dev):02x}"
        hole = memory(16, sc.PROT_NONE)
        sc.munmap(hole, 16 * PAGE_SIZE)
        expected = []
        for number, (prot, flags) in enumerate(
            [
                (sc.PROT_READ, sc.MAP_PRIVATE),
                (RW, sc.MAP_PRIVATE),
                (RW, sc.MAP_SHARED),
                (sc.PROT_NONE, sc.MAP_SHARED),
                (sc.PROT_READ | 4, sc.MAP_PRIVATE),
            ]
        ):
            at = hole + 2 * number * PAGE_SIZE
            sc.mmap(at, PAGE_SIZE, prot, flags | sc.MAP_FIXED_NOREPLACE, fd)
            shared = flags == sc.MAP_SHARED
            expected.append(
                Mapping(at, at + PAGE_SIZE, prot, shared, inode, "/memfd:named memory (deleted)", 0, device)
            )
        os.close(fd)
        assert sc.own_mappings(hole, hole + 16 * PAGE_SIZE) == expected
        sc.mmap(hole, 16 * PAGE_SIZE, sc.PROT_NONE, PRIVATE | sc.MAP_FIXED)

    def test_anonymous_memory_has_no_inode_and_no_name(self, memory: Callable[..., int]) -> None:
        start = memory(3, sc.PROT_READ | 4)
        (found,) = sc.own_mappings(start, start + 1)
        assert (found.prot, found.shared, found.inode, found.path) == (5, False, 0, "")

    def test_what_touches_the_range_and_no_more(self, memory: Callable[..., int]) -> None:
        start = memory(3, RW)
        sc.mprotect(start + PAGE_SIZE, PAGE_SIZE, sc.PROT_READ)
        second = start + PAGE_SIZE
        assert [m.start for m in sc.own_mappings(second, second + PAGE_SIZE)] == [second]
        assert [m.start for m in sc.own_mappings(second, second + 1)] == [second]
        assert [m.start for m in sc.own_mappings(second - 1, second + PAGE_SIZE + 1)][1:] == [
            second,
            second + PAGE_SIZE,
        ]

    def test_everything_there_is(self) -> None:
        found = sc.own_mappings(0, 1 << 64)
        assert "[stack]" in [mapping.path for mapping in found]
        assert all(one.end <= two.start for one, two in itertools.pairwise(found))

    @pytest.mark.parametrize(
        "name", ["with blank", " leading", "ünï", "\udcff", "a\rb", "a\x0bb", "a\x85b", "a\u2028b", "x (deleted)"]
    )
    def test_a_mapped_file_may_have_any_name(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(bytes(PAGE_SIZE))
        fd = os.open(tmp_path / name, os.O_RDONLY)
        start = sc.mmap(None, PAGE_SIZE, sc.PROT_READ, sc.MAP_PRIVATE, fd)
        os.close(fd)
        try:
            assert [mapping.path for mapping in sc.own_mappings(start, start + 1)] == [str(tmp_path / name)]
        finally:
            sc.munmap(start, PAGE_SIZE)

    def test_what_of_a_file_it_shows(self, memory: Callable[..., int]) -> None:
        fd = os.memfd_create("it")
        os.ftruncate(fd, 8 * PAGE_SIZE)
        start = memory(4, RW, sc.MAP_SHARED, fd)
        sc.mmap(start, 4 * PAGE_SIZE, RW, sc.MAP_SHARED | sc.MAP_FIXED, fd, 3 * PAGE_SIZE)
        os.close(fd)
        (found,) = sc.own_mappings(start, start + 1)
        assert found.offset == 3 * PAGE_SIZE
        part = found.clipped(start + PAGE_SIZE, start + 100 * PAGE_SIZE)
        assert (part.start, part.end, part.offset) == (start + PAGE_SIZE, found.end, 4 * PAGE_SIZE)
        part = found.clipped(0, start + PAGE_SIZE)
        assert (part.start, part.end, part.offset) == (start, start + PAGE_SIZE, 3 * PAGE_SIZE)

    @pytest.mark.parametrize(
        ("how", "prot", "flags", "expected"),
        [
            (os.O_RDWR, RW, sc.MAP_SHARED, True),
            (os.O_RDWR, sc.PROT_READ, sc.MAP_SHARED, True),
            (os.O_RDWR, sc.PROT_NONE, sc.MAP_SHARED, True),
            (os.O_RDONLY, sc.PROT_READ, sc.MAP_SHARED, False),
            (os.O_RDONLY, sc.PROT_NONE, sc.MAP_SHARED, False),
            (os.O_RDONLY, sc.PROT_READ, sc.MAP_PRIVATE, True),
        ],
    )
    def test_what_could_be_written(
        self, memory: Callable[..., int], tmp_path: Path, how: int, prot: int, flags: int, expected: bool
    ) -> None:
        (tmp_path / "file").write_bytes(bytes(PAGE_SIZE))
        fd = os.open(tmp_path / "file", how)
        start = memory(1, prot, flags, fd)
        os.close(fd)
        (found,) = sc.own_mappings(start, start + 1)
        assert sc.may_be_written(found) is expected


class TestFiles:
    """What Python has no name for."""

    def test_punching_gives_pages_back(self) -> None:
        fd = os.memfd_create("it")
        os.write(fd, b"x" * 4 * PAGE_SIZE)
        sc.punch(fd, PAGE_SIZE, 2 * PAGE_SIZE)
        assert os.pread(fd, 5 * PAGE_SIZE, 0) == b"x" * PAGE_SIZE + bytes(2 * PAGE_SIZE) + b"x" * PAGE_SIZE
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE_SIZE
        os.close(fd)
        with pytest.raises(OSError, match="fallocate"):
            sc.punch(fd, 0, PAGE_SIZE)

    def test_filesystems_have_numbers(self) -> None:
        fd = os.memfd_create("it")
        assert sc.filesystem(fd) == 0x01021994
        os.close(fd)
        with pytest.raises(OSError, match="fstatfs"):
            sc.filesystem(fd)


class TestPopulated:
    """Which pages hold something."""

    def found(self, start: int, pages: int) -> list[tuple[int, int]]:
        """In pages from the start."""
        return [
            ((low - start) // PAGE_SIZE, (high - start) // PAGE_SIZE)
            for low, high in sc.populated(start, start + pages * PAGE_SIZE)
        ]

    def test_ones_own_pages_of_a_private_mapping(self, memory: Callable[..., int]) -> None:
        fd = os.memfd_create("it")
        os.write(fd, bytes(8 * PAGE_SIZE))
        start = memory(8, RW, sc.MAP_PRIVATE, fd)
        os.close(fd)
        assert ctypes.string_at(start, 8 * PAGE_SIZE) == bytes(8 * PAGE_SIZE)
        self.touch(start, 1, 2, 5)
        end = start + 8 * PAGE_SIZE
        found = [
            ((low - start) // PAGE_SIZE, (high - start) // PAGE_SIZE)
            for low, high in sc.populated(start, end, own=True)
        ]
        assert found == [(1, 3), (5, 6)]
        assert self.found(start, 8) == [(0, 8)]

    def touch(self, start: int, *numbers: int) -> None:
        for number in numbers:
            ctypes.memset(start + number * PAGE_SIZE, 1, 1)

    @pytest.mark.parametrize(
        ("touched", "runs"),
        [
            ([], []),
            ([0], [(0, 1)]),
            ([9], [(9, 10)]),
            ([3, 4, 5], [(3, 6)]),
            ([0, 2, 4, 9], [(0, 1), (2, 3), (4, 5), (9, 10)]),
            (list(range(10)), [(0, 10)]),
        ],
    )
    def test_those_that_were_touched(
        self, memory: Callable[..., int], touched: list[int], runs: list[tuple[int, int]]
    ) -> None:
        start = memory(10)
        sc.madvise(start, 10 * PAGE_SIZE, mmap.MADV_NOHUGEPAGE)
        self.touch(start, *touched)
        assert self.found(start, 10) == runs

    def test_runs_across_more_than_is_read_at_once(self, memory: Callable[..., int]) -> None:
        start = memory(1300)
        sc.madvise(start, 1300 * PAGE_SIZE, mmap.MADV_NOHUGEPAGE)
        self.touch(start, 0, *range(510, 515), 1023, 1024, 1299)
        assert self.found(start, 1300) == [(0, 1), (510, 515), (1023, 1025), (1299, 1300)]

    def test_only_the_range_that_is_asked_for(self, memory: Callable[..., int]) -> None:
        start = memory(10)
        sc.madvise(start, 10 * PAGE_SIZE, mmap.MADV_NOHUGEPAGE)
        self.touch(start, *range(10))
        assert self.found(start + 3 * PAGE_SIZE, 4) == [(0, 4)]

    def test_untouched_memory_beside_what_was_given_back(self, memory: Callable[..., int]) -> None:
        start = memory(10)
        sc.madvise(start, 10 * PAGE_SIZE, mmap.MADV_NOHUGEPAGE)
        self.touch(start, *range(10))
        sc.madvise(start + 2 * PAGE_SIZE, 3 * PAGE_SIZE, mmap.MADV_DONTNEED)
        assert self.found(start, 10) == [(0, 2), (5, 10)]


class TestRunUnswitched:
    """System calls in a row."""

    @pytest.fixture(autouse=True)
    def _collector_off(self) -> Iterator[None]:
        gc.disable()
        yield
        gc.enable()

    def test_all_of_them(self) -> None:
        buffers = [ctypes.create_string_buffer(16) for _ in range(2)]
        steps = [Step(0, SYS_CLOCK_GETTIME, (1, buffer)) for buffer in buffers]
        assert sc.run_unswitched(steps) == 2
        assert all(any(buffer.raw) for buffer in buffers)
        assert sc.run_unswitched([]) == 0

    @pytest.mark.parametrize("bad", [0, 1, 2])
    def test_up_to_the_first_that_fails(self, bad: int) -> None:
        buffers = [ctypes.create_string_buffer(16) for _ in range(3)]
        steps = [Step(0, SYS_CLOCK_GETTIME, (1, buffer)) for buffer in buffers]
        steps.insert(bad, Step(0, SYS_CLOSE, (999_999,)))
        assert sc.run_unswitched(steps) == bad
        assert [any(buffer.raw) for buffer in buffers] == [number < bad for number in range(3)]
        assert sc.errno_error("closing").errno == errno.EBADF

    def test_up_to_the_first_that_comes_to_something_else(self) -> None:
        """As a write that is short."""
        reader, writer = os.pipe()
        try:
            write = Step(3, 1, (writer, ctypes.create_string_buffer(b"xy"), 3))
            short = Step(4, 1, (writer, ctypes.create_string_buffer(b"xy"), 3))
            assert sc.run_unswitched([write, short, write]) == 1
            assert os.read(reader, 100) == b"xy\0xy\0"
        finally:
            os.close(reader)
            os.close(writer)

    def test_numbers_of_64_bits_are_not_cut(self) -> None:
        fd = os.memfd_create("long")
        try:
            step = Step(1, sc.SYS_PWRITE64, (fd, ctypes.create_string_buffer(b"x"), 1, 5 << 32))
            assert sc.run_unswitched([step]) == 1
            assert os.fstat(fd).st_size == (5 << 32) + 1
        finally:
            os.close(fd)

    def test_no_other_thread_runs_in_between(self) -> None:
        """It is looked at clocks: one that the steps read, and one that a thread reads whenever it may run."""
        seen: list[int] = []
        end = threading.Event()

        def look() -> None:
            while not end.is_set():
                seen.append(time.clock_gettime_ns(time.CLOCK_MONOTONIC))

        first, last = (ctypes.create_string_buffer(16) for _ in range(2))
        nap = ctypes.create_string_buffer(struct.pack("qq", 0, 20_000_000))
        steps = [
            Step(0, SYS_CLOCK_GETTIME, (1, first)),
            *[Step(0, SYS_NANOSLEEP, (nap, 0))] * 5,
            *[Step(os.getpid(), SYS_GETPID, ())] * 1000,
            Step(0, SYS_CLOCK_GETTIME, (1, last)),
        ]
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        while not seen:
            thread.join(0.001)
        done = sc.run_unswitched(steps)
        count = len(seen)
        while len(seen) == count:
            thread.join(0.001)
        end.set()
        thread.join()
        assert done == len(steps)
        began, ended = (seconds * 10**9 + rest for seconds, rest in (struct.unpack("qq", b) for b in (first, last)))
        assert ended - began >= 100_000_000
        assert [at for at in seen if began < at < ended] == []
        assert seen[0] < began
        assert seen[-1] > ended


def test_threads_are_counted(apart: Callable[[Callable[[], object]], None]) -> None:
    def work() -> None:
        assert sc.thread_count() == 1
        end = threading.Event()
        threading.Thread(target=end.wait, daemon=True).start()
        assert sc.thread_count() == 2

    apart(work)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_the_umask_is_read_without_being_changed(mask: int) -> None:
    before = os.umask(mask)
    try:
        assert sc.umask() == mask
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def test_without_proc_the_umask_is_taken_to_be_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: str, _flags: int) -> int:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(os, "open", fail)
    assert sc.umask() == 0o022


class TestAllocate:
    """Memory for a file, before anybody touches it."""

    def test_it_is_there_then(self) -> None:
        fd = os.memfd_create("allocated")
        os.ftruncate(fd, 8 * PAGE_SIZE)
        sc.allocate(fd, 3 * PAGE_SIZE)
        assert (os.fstat(fd).st_blocks * 512, os.fstat(fd).st_size) == (3 * PAGE_SIZE, 8 * PAGE_SIZE)
        assert os.pread(fd, 8 * PAGE_SIZE, 0) == bytes(8 * PAGE_SIZE)
        os.close(fd)

    def test_more_than_the_machine_has_is_enomem_and_takes_nothing(self) -> None:
        fd = os.memfd_create("allocated")
        with pytest.raises(OSError, match="this machine has") as caught:
            sc.allocate(fd, 1 << 50)
        assert (caught.value.errno, os.fstat(fd).st_blocks) == (errno.ENOMEM, 0)
        os.close(fd)

    def test_other_errors_are_told(self) -> None:
        ends = os.pipe()
        with pytest.raises(OSError, match="no room for 4096 bytes") as caught:
            sc.allocate(ends[0], 4096)
        assert caught.value.errno == errno.EBADF
        for fd in ends:
            os.close(fd)


@pytest.mark.parametrize("align", [PAGE_SIZE, 1 << 21, 1 << 30])
def test_a_free_address_is_aligned_and_can_be_had(memory: Callable[..., int], align: int) -> None:
    start = sc.free_address(3 * PAGE_SIZE, align)
    assert start % align == 0
    assert memory(3, at=start) == start
