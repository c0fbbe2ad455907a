"""Donating memory to a file, without any daemon: what is given, in which steps, and what a failure leaves."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import itertools
import mmap
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mshare import arming
from mshare import syscalls as sc
from mshare.donation import Donation
from mshare.syscalls import Mapping
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE
from msharefs.protocol import DonatedRange

BASE = 0x5400_0000_0000
PAGES = 32
PRIVATE, SHARED = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, sc.MAP_SHARED | sc.MAP_ANONYMOUS
RW = sc.PROT_READ | sc.PROT_WRITE

Apart = Callable[[Callable[[], object]], None]


def at(page: int) -> int:
    return BASE + page * PAGE_SIZE


def put(page: int, count: int = 1, prot: int = RW, flags: int = PRIVATE, fd: int = -1, offset: int = 0) -> None:
    """Map memory at a page of the range."""
    sc.mmap(at(page), count * PAGE_SIZE, prot, flags | sc.MAP_FIXED_NOREPLACE, fd, offset * PAGE_SIZE)


def write(page: int, text: bytes) -> None:
    ctypes.memmove(at(page), text, len(text))


def read(page: int, length: int) -> bytes:
    return ctypes.string_at(at(page), length)


def take(first: int = 0, count: int = PAGES) -> Donation:
    return Donation.of(at(first), count * PAGE_SIZE)


def new_file(pages: int = PAGES) -> int:
    fd = os.memfd_create("backing")
    os.ftruncate(fd, pages * PAGE_SIZE)
    return fd


def mapped() -> list[tuple[int, int, int, str]]:
    """What stands in the range: first page, pages, protection, and whether it is of a file."""
    return [
        ((m.start - BASE) // PAGE_SIZE, (m.end - m.start) // PAGE_SIZE, m.prot, m.path.partition(" ")[0])
        for m in sc.own_mappings(BASE, at(PAGES))
    ]


def held(fd: int) -> list[int]:
    """Pages that a file holds."""
    pages = range(os.fstat(fd).st_size // PAGE_SIZE)
    return [page for page in pages if os.lseek(fd, page * PAGE_SIZE, os.SEEK_HOLE) != page * PAGE_SIZE]


class TestOf:
    """What stands in a range."""

    def test_nothing(self) -> None:
        found = take()
        assert (found.parts, found.ranges) == ((), ())
        assert list(found.gaps()) == [(at(0), at(PAGES))]

    def test_parts_and_gaps(self, apart: Apart) -> None:
        def work() -> None:
            put(2, 3)
            put(5, 1, sc.PROT_READ)
            put(10, 2, sc.PROT_NONE)
            found = take()
            assert found.ranges == (
                DonatedRange(2 * PAGE_SIZE, 3 * PAGE_SIZE, 3),
                DonatedRange(5 * PAGE_SIZE, PAGE_SIZE, 1),
                DonatedRange(10 * PAGE_SIZE, 2 * PAGE_SIZE, 0),
            )
            assert list(found.gaps()) == [(at(0), at(2)), (at(6), at(10)), (at(12), at(PAGES))]

        apart(work)

    def test_a_mapping_that_sticks_out_is_clipped(self, apart: Apart) -> None:
        def work() -> None:
            put(0, 10)
            assert [(part.start, part.end) for part in take(3, 4).parts] == [(at(3), at(7))]
            assert list(take(3, 4).gaps()) == []
            assert take(3, 4).ranges == (DonatedRange(0, 4 * PAGE_SIZE, 3),)
            assert take(8, 5).ranges == (DonatedRange(0, 2 * PAGE_SIZE, 3),)
            assert take(10, 5).ranges == ()

        apart(work)

    def test_a_full_range_has_no_gap(self, apart: Apart) -> None:
        def work() -> None:
            put(0, PAGES)
            assert list(take().gaps()) == []

        apart(work)

    def test_the_stack_stays_ours(self) -> None:
        stack = next(m for m in sc.own_mappings(0, 1 << 47) if m.path == "[stack]")
        with pytest.raises(OSError, match=r"\[stack\] at 0x.* cannot be donated; use another range") as caught:
            Donation.of(stack.end - PAGE_SIZE, PAGE_SIZE)
        assert caught.value.errno == errno.EINVAL

    @pytest.mark.parametrize(
        ("path", "special"),
        [
            ("[heap]", True),
            ("[vdso]", True),
            ("[vvar]", True),
            ("/dev/dri/card0", True),
            ("/dev/hugepages/mine", True),
            ("/anon_hugepage (deleted)", True),
            ("", False),
            ("[anon:mine]", False),
            ("[anon_shmem:mine]", False),
            ("/dev/zero (deleted)", False),
            ("/dev/shm/mine", False),
            ("/memfd:mine (deleted)", False),
            ("/SYSV00000000 (deleted)", False),
            ("/home/me/file", False),
        ],
    )
    def test_what_is_no_ordinary_memory_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, path: str, special: bool
    ) -> None:
        there = Mapping(BASE, at(1), 3, False, 0, path)
        monkeypatch.setattr(sc, "own_mappings", lambda _start, _end: [there])
        if special:
            with pytest.raises(OSError, match="cannot be donated"):
                take()
        else:
            assert take().parts == (there,)


class TestSteps:
    """What is done while nobody may run, in order."""

    def steps(self, part: Mapping, runs: list[tuple[int, int]] | None = None) -> list[str]:
        names = {
            sc.SYS_MREMAP: "move aside",
            sc.SYS_MPROTECT: "let read",
            sc.SYS_PWRITE64: "copy",
            sc.SYS_MMAP: "replace",
        }
        uffd = sc.userfaultfd(None)
        fcntl.ioctl(uffd, abi.UFFDIO_API, abi.API_STRUCT.pack(abi.API_VERSION, abi.Feature(0), 0))
        try:
            found = take()._steps(part, [(part.start, part.end)] if runs is None else runs, 99, uffd, 1 << 40)
        finally:
            os.close(uffd)
        ioctls = {abi.UFFDIO_REGISTER: "arm", abi.UFFDIO_WRITEPROTECT: "protect", abi.UFFDIO_WAKE: "wake"}
        return [names.get(step.number) or ioctls[int(step.args[1])] for step in found]  # type: ignore[arg-type]

    def of(self, apart: Apart, expected: list[str], **changed: int) -> None:
        def work() -> None:
            put(0, 4, **changed)
            (part,) = take().parts
            assert self.steps(part) == expected

        apart(work)

    def test_private_memory_is_moved_aside(self, apart: Apart) -> None:
        self.of(apart, ["arm", "move aside", "copy", "replace", "wake"])

    def test_memory_that_cannot_be_read_is_made_readable_where_nobody_sees_it(self, apart: Apart) -> None:
        self.of(apart, ["arm", "move aside", "let read", "copy", "replace", "wake"], prot=sc.PROT_NONE)
        self.of(apart, ["arm", "move aside", "let read", "copy", "replace", "wake"], prot=sc.PROT_WRITE)

    def test_shared_memory_is_protected_where_it_is(self, apart: Apart) -> None:
        self.of(apart, ["protect", "copy", "replace", "wake"], flags=SHARED)

    def test_untouched_parts_are_not_copied(self, apart: Apart) -> None:
        def work() -> None:
            put(0, 8)
            (part,) = take().parts
            runs = [(at(0), at(1)), (at(5), at(8))]
            assert self.steps(part, runs) == ["arm", "move aside", "copy", "copy", "replace", "wake"]
            assert self.steps(part, []) == ["arm", "move aside", "replace", "wake"]

        apart(work)

    def test_no_copy_is_longer_than_a_system_call_writes(self, apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(arming, "_MOST_AT_ONCE", 3 * PAGE_SIZE)
        self.of(apart, ["arm", "move aside", "copy", "copy", "replace", "wake"])


class TestHandOver:
    """Memory becomes the file's."""

    @pytest.mark.parametrize(
        ("flags", "prot"),
        [(PRIVATE, RW), (PRIVATE, sc.PROT_READ), (PRIVATE, sc.PROT_NONE), (SHARED, RW), (SHARED, sc.PROT_NONE)],
    )
    def test_contents_and_protections_arrive(self, apart: Apart, flags: int, prot: int) -> None:
        def work() -> None:
            put(2, 5, RW, flags)
            write(2, b"first")
            write(6, b"last")
            sc.mprotect(at(2), 5 * PAGE_SIZE, prot)
            backing = new_file()
            donation = take()
            donation.hand_over(backing, None)
            assert os.pread(backing, 5, 2 * PAGE_SIZE) == b"first"
            assert os.pread(backing, 4, 6 * PAGE_SIZE) == b"last"
            assert mapped() == [
                (0, 2, sc.PROT_NONE, "/memfd:backing"),
                (2, 5, prot, "/memfd:backing"),
                (7, PAGES - 7, sc.PROT_NONE, "/memfd:backing"),
            ] or (prot == sc.PROT_NONE and mapped() == [(0, PAGES, sc.PROT_NONE, "/memfd:backing")])

        apart(work)

    def test_what_is_stored_afterwards_is_in_the_file(self, apart: Apart) -> None:
        def work() -> None:
            put(0, 2)
            write(0, b"before")
            backing = new_file()
            take().hand_over(backing, None)
            write(0, b"after!")
            os.pwrite(backing, b"from outside", PAGE_SIZE)
            assert os.pread(backing, 6, 0) == b"after!"
            assert read(1, 12) == b"from outside"

        apart(work)

    def test_of_one_thread_only_what_was_touched_is_copied(self, apart: Apart) -> None:
        def work() -> None:
            put(0, PAGES)
            sc.madvise(BASE, PAGES * PAGE_SIZE, mmap.MADV_NOHUGEPAGE)
            for page in (1, 2, 9):
                write(page, b"x")
            backing = new_file()
            take().hand_over(backing, None)
            assert held(backing) == [1, 2, 9]
            assert read(5, 1) == b"\0"

        apart(work)

    def test_of_several_threads_everything_since_they_may_touch_the_rest_meanwhile(self, apart: Apart) -> None:
        def work() -> None:
            end = threading.Event()
            threading.Thread(target=end.wait, daemon=True).start()
            put(0, 4)
            backing = new_file()
            take().hand_over(backing, None)
            assert held(backing) == [0, 1, 2, 3]

        apart(work)

    def test_no_lock_is_kept_no_collector_left_off_and_nothing_open(
        self, apart: Apart, left_over: Callable[[], list[int]]
    ) -> None:
        def work() -> None:
            put(0, 4)
            put(8, 4)
            backing = new_file()
            fds = len(os.listdir("/proc/self/fd"))
            take().hand_over(backing, None)
            assert gc.isenabled()
            assert len(os.listdir("/proc/self/fd")) == fds
            assert left_over() == []
            thread = threading.Thread(target=write, args=(0, b"from a thread"))
            thread.start()
            thread.join()
            assert os.pread(backing, 13, 0) == b"from a thread"

        apart(work)

    def test_with_the_device(self, apart: Apart) -> None:
        try:
            device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            pytest.skip(f"/dev/userfaultfd: {error.strerror}")

        def work() -> None:
            put(0, 2)
            write(0, b"here")
            backing = new_file()
            take().hand_over(backing, device)
            assert os.pread(backing, 4, 0) == b"here"

        try:
            apart(work)
        finally:
            os.close(device)

    def test_a_mapping_that_sticks_out_is_split_at_the_border(self, apart: Apart) -> None:
        def work() -> None:
            put(0, 12)
            for page in range(12):
                write(page, b"%02d" % page)
            backing = new_file(4)
            take(4, 4).hand_over(backing, None)
            assert [read(page, 2) for page in range(12)] == [b"%02d" % page for page in range(12)]
            assert os.pread(backing, 2, 0) == b"04"
            assert mapped() == [(0, 4, RW, ""), (4, 4, RW, "/memfd:backing"), (8, 4, RW, "")]

        apart(work)


class TestFailure:
    """Memory then holds what it held."""

    @pytest.mark.parametrize("prot", [RW, sc.PROT_READ, sc.PROT_WRITE, sc.PROT_NONE])
    @pytest.mark.parametrize("kind", ["private", "shared"])
    @pytest.mark.parametrize("limit", [0, 5])
    def test_while_copying(
        self, apart: Apart, left_over: Callable[[], list[int]], limit: int, kind: str, prot: int
    ) -> None:
        def work() -> None:
            put(2, 6, RW, PRIVATE if kind == "private" else SHARED)
            for page in range(2, 8):
                write(page, b"%d" % page)
            sc.mprotect(at(2), 6 * PAGE_SIZE, prot)
            before = mapped()
            backing = new_file()
            fds = len(os.listdir("/proc/self/fd"))
            # Writes beyond this are cut short, or fail: the fallocate before them is no write.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit * PAGE_SIZE, resource.RLIM_INFINITY))
            donation = take()
            with pytest.raises(OSError, match="donating") as caught:
                donation.hand_over(backing, None)
            assert caught.value.errno == (errno.EFBIG if limit < 2 else errno.EFAULT)
            donation.give_back()
            assert mapped() == before
            assert left_over() == []
            assert len(os.listdir("/proc/self/fd")) == fds
            sc.mprotect(at(2), 6 * PAGE_SIZE, RW)
            assert [read(page, 1) for page in range(2, 8)] == [b"%d" % page for page in range(2, 8)]
            write(7, b"!")
            assert read(7, 1) == b"!"

        apart(work)

    @pytest.mark.parametrize("flags", [PRIVATE, SHARED])
    def test_while_another_thread_stores(self, apart: Apart, flags: int) -> None:
        """One that waits for the memory keeps the interpreter lock: nobody could ever end its waiting."""

        size = 64 << 20

        def work() -> None:
            sc.mmap(BASE, size, RW, flags | sc.MAP_FIXED_NOREPLACE)
            ctypes.memset(BASE, 1, size)
            backing = new_file(size // PAGE_SIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
            counters = (ctypes.c_ulong * (size // 8)).from_address(BASE)

            def store() -> None:
                for number in itertools.cycle(range(0, size // 8, PAGE_SIZE // 8)):
                    counters[number] += 1

            threading.Thread(target=store, daemon=True).start()
            for _ in range(3):
                with pytest.raises(OSError, match="donating"):
                    Donation.of(BASE, size).hand_over(backing, None)

        apart(work)

    def test_of_the_second_part_the_first_is_none_the_worse(self, apart: Apart) -> None:
        def work() -> None:
            put(0, 2)
            put(8, 2)
            write(0, b"one")
            write(8, b"two")
            backing = new_file()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE_SIZE, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match=r"donating"):
                take().hand_over(backing, None)
            assert (read(0, 3), read(8, 3)) == (b"one", b"two")
            write(0, b"1")
            write(8, b"2")

        apart(work)

    def test_without_memory_for_the_copy_nothing_is_begun(self, apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)

        def work() -> None:
            put(1, 1)
            write(1, b"here")
            before = mapped()
            with pytest.raises(OSError, match=r"copy of 4096 donated bytes; free some, or raise mshared --max-bytes"):
                take().hand_over(new_file(), None)
            assert mapped() == before

        apart(work)

    def test_a_gap_that_is_none_any_more(self, apart: Apart) -> None:
        def work() -> None:
            put(4, 2)
            donation = take()
            put(20, 1)
            write(20, b"newcomer")
            with pytest.raises(OSError, match="another thread mapped memory into the range meanwhile") as caught:
                donation.hand_over(new_file(), None)
            assert caught.value.errno == errno.EINVAL
            donation.give_back()
            donation.give_back()
            assert mapped() == [(4, 2, RW, ""), (20, 1, RW, "")]
            assert read(20, 8) == b"newcomer"

        apart(work)

    def test_without_a_userfaultfd(self, apart: Apart) -> None:
        def work() -> None:
            put(4, 2)
            write(4, b"here")
            donation = take()
            with Path("/dev/null").open() as null, pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
                donation.hand_over(new_file(), null.fileno())
            donation.give_back()
            assert mapped() == [(4, 2, RW, "")]
            assert read(4, 4) == b"here"

        apart(work)
