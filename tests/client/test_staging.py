"""Mappings of files on their way into a region: with a memfd for its memory, and nobody who arms anything."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mshare import staging as module
from mshare import syscalls as sc
from mshare.donation import Donation
from msharefs.addr import PAGE_SIZE
from msharefs.protocol import DonatedFile, DonatedRange

BASE = 0x5500_0000_0000
PAGES = 16
RW = sc.PROT_READ | sc.PROT_WRITE
Apart = Callable[[Callable[[], object]], None]


def at(page: int) -> int:
    return BASE + page * PAGE_SIZE


def put(page: int, count: int, fd: int = -1, prot: int = RW, flags: int = sc.MAP_SHARED, offset: int = 0) -> None:
    """Map a file at a page of the range, or anonymous memory."""
    kind = flags if fd >= 0 else sc.MAP_PRIVATE | sc.MAP_ANONYMOUS
    sc.mmap(at(page), count * PAGE_SIZE, prot, kind | sc.MAP_FIXED_NOREPLACE, fd, offset * PAGE_SIZE)


def write(page: int, text: bytes) -> None:
    ctypes.memmove(at(page), text, len(text))


def read(page: int, length: int) -> bytes:
    return ctypes.string_at(at(page), length)


def new_file(pages: int = PAGES, name: str = "backing") -> int:
    fd = os.memfd_create(name)
    os.ftruncate(fd, pages * PAGE_SIZE)
    return fd


def numbered(pages: int) -> int:
    """A file whose pages begin with their number."""
    fd = new_file(pages, "file")
    for page in range(pages):
        os.pwrite(fd, b"page %d" % page, page * PAGE_SIZE)
    return fd


def held(fd: int) -> list[int]:
    """Pages that a file holds."""
    pages = range(os.fstat(fd).st_size // PAGE_SIZE)
    return [page for page in pages if os.lseek(fd, page * PAGE_SIZE, os.SEEK_HOLE) != page * PAGE_SIZE]


def mapped() -> list[tuple[int, int, int, str]]:
    """What stands in the range: first page, pages, protection and what it is called."""
    return [
        ((m.start - BASE) // PAGE_SIZE, (m.end - m.start) // PAGE_SIZE, m.prot, m.path.removesuffix(" (deleted)"))
        for m in sc.own_mappings(BASE, at(PAGES))
    ]


def take() -> Donation:
    return Donation.of(BASE, PAGES * PAGE_SIZE)


def threads_run(count: int = 1) -> None:
    """Have other threads, which do nothing."""
    for _ in range(count):
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class TestTelling:
    """What the daemon hears."""

    def test_files_by_their_places_and_offsets(self, apart: Apart) -> None:
        def work() -> None:
            first, second = numbered(8), numbered(8)
            put(-2, 4, first, offset=1)
            put(2, 1)
            put(4, 2, second, sc.PROT_READ, sc.MAP_PRIVATE)
            put(6, 1, first, sc.PROT_NONE)
            donation = take()
            assert donation.ranges == (
                DonatedRange(0, 2 * PAGE_SIZE, 3, DonatedFile(0, 3 * PAGE_SIZE, shared=True)),
                DonatedRange(2 * PAGE_SIZE, PAGE_SIZE, 3),
                DonatedRange(4 * PAGE_SIZE, 2 * PAGE_SIZE, 1, DonatedFile(1, 0, shared=False)),
                DonatedRange(6 * PAGE_SIZE, PAGE_SIZE, 0, DonatedFile(0, 0, shared=True)),
            )
            sent = donation.descriptors
            assert [os.path.samestat(os.fstat(a), os.fstat(b)) for a, b in zip(sent, (first, second), strict=True)]
            assert donation.staged == (0, 0, 0)
            donation.close()
            assert donation.descriptors == ()
            for fd in sent:
                with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                    os.fstat(fd)

        apart(work)

    def test_what_cannot_be_opened_leaves_nothing_open(self, apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
        def work() -> None:
            put(0, 1, numbered(1))
            lost = numbered(1)
            put(2, 1, lost)
            os.close(lost)
            monkeypatch.setattr("mshare.mapped_files._linked", lambda *_args: iter(()))
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(OSError, match=r"/memfd:file \(deleted\) at 0x.* cannot be donated"):
                take()
            assert len(os.listdir("/proc/self/fd")) == before

        apart(work)


class TestStaging:
    """The old mapping is untouched, and the new one waits elsewhere."""

    @pytest.mark.parametrize("others", [0, 1])
    @pytest.mark.parametrize("prot", [RW, sc.PROT_READ, sc.PROT_NONE])
    def test_of_a_shared_file_nothing_is_copied(self, apart: Apart, prot: int, others: int) -> None:
        def work() -> None:
            threads_run(others)
            file, backing = numbered(8), new_file()
            put(4, 4, file, offset=2)
            write(5, b"stored")
            sc.mprotect(at(4), 4 * PAGE_SIZE, prot)
            donation = take()
            donation.hand_over(backing, None)
            assert held(backing) == []
            assert (4, 4, prot, "/memfd:file") in mapped()
            (scratch,) = donation.staged
            (new,) = sc.own_mappings(scratch, scratch + 1)
            assert (new.prot, new.shared, new.offset) == (prot, True, 4 * PAGE_SIZE)
            assert new.path == "/memfd:backing (deleted)"
            assert os.pread(file, 6, 3 * PAGE_SIZE) == b"stored"

        apart(work)

    @pytest.mark.parametrize(
        ("others", "prot", "expected"),
        [
            (0, RW, [5, 7]),
            (1, RW, [4, 5, 6, 7, 8, 9]),
            (0, sc.PROT_READ, [5, 7]),
            (1, sc.PROT_READ, [4, 5, 6, 7, 8, 9]),
            (0, sc.PROT_NONE, [4, 5, 6, 7, 8, 9]),
            (1, sc.PROT_NONE, [4, 5, 6, 7, 8, 9]),
        ],
    )
    def test_of_a_private_one_what_may_be_ours_alone(
        self, apart: Apart, others: int, prot: int, expected: list[int]
    ) -> None:
        """Up to the file's end: with other threads any page may be stored to before it is moved."""

        def work() -> None:
            threads_run(others)
            file, backing = numbered(8), new_file()
            put(4, 8, file, flags=sc.MAP_PRIVATE, offset=2)
            write(5, b"stored")
            write(7, b"too")
            assert read(6, 6) == b"page 4"
            sc.mprotect(at(4), 8 * PAGE_SIZE, prot)
            take().hand_over(backing, None)
            assert held(backing) == expected
            assert os.pread(backing, 6, 5 * PAGE_SIZE) == b"stored"
            assert os.pread(backing, 3, 7 * PAGE_SIZE) == b"too"
            if 6 in expected:
                assert os.pread(backing, 6, 6 * PAGE_SIZE) == b"page 4"

        apart(work)

    def test_what_neighbours_have_brought_is_given_back(self, apart: Apart) -> None:
        def work() -> None:
            file, backing = numbered(8), new_file()
            put(0, 2)
            write(1, b"memory")
            put(2, 2, file)
            os.pwrite(backing, bytes(PAGES * PAGE_SIZE), 0)
            take().hand_over(backing, None)
            assert held(backing) == [0, 1, *range(4, PAGES)]
            assert os.pread(backing, 6, PAGE_SIZE) == b"memory"

        apart(work)

    def test_a_file_that_ends_before_its_mapping(self, apart: Apart) -> None:
        def work() -> None:
            threads_run()
            file, backing = numbered(2), new_file()
            put(0, 8, file, flags=sc.MAP_PRIVATE)
            put(8, 2, file, flags=sc.MAP_PRIVATE, offset=6)
            os.ftruncate(file, PAGE_SIZE + 1)
            take().hand_over(backing, None)
            assert held(backing) == [0, 1]

        apart(work)


class TestMovingIn:
    """It takes the place of the old mapping."""

    @pytest.mark.parametrize("others", [0, 1])
    def test_everything_stands_in_its_place(
        self, apart: Apart, left_over: Callable[[], list[int]], others: int
    ) -> None:
        def work() -> None:
            threads_run(others)
            file, backing = numbered(8), new_file()
            put(-2, 4, file)
            put(4, 4, file, flags=sc.MAP_PRIVATE)
            write(5, b"stored")
            put(8, 2, file, sc.PROT_READ, sc.MAP_PRIVATE)
            put(12, 2, file, sc.PROT_NONE)
            donation = take()
            donation.hand_over(backing, None)
            write(6, b"since")
            fds = len(os.listdir("/proc/self/fd"))
            donation.move_in(backing, None)
            assert len(os.listdir("/proc/self/fd")) == fds
            assert {name for *_, name in mapped()} == {"/memfd:backing"}
            assert read(-1, 6) == b"page 1"
            assert read(5, 6) == b"stored"
            assert (read(6, 5) == b"since") is bool(others)
            write(7, b"later")
            assert os.pread(backing, 5, 7 * PAGE_SIZE) == b"later"
            assert os.pread(file, 6, PAGE_SIZE) == b"page 1"
            assert [m.prot for m in sc.own_mappings(at(8), at(9))] == [sc.PROT_READ]
            assert left_over() == []

        apart(work)

    def test_what_cannot_be_moved_is_an_error_and_all_can_go_back(self, apart: Apart) -> None:
        """A scratch place that is gone stands for a kernel that is out of memory."""

        def work() -> None:
            threads_run()
            file, backing = numbered(8), new_file()
            put(0, 2, file)
            put(4, 2, file, flags=sc.MAP_PRIVATE)
            write(4, b"ours")
            put(8, 2, file)
            put(12, 2, file, sc.PROT_READ)
            before = mapped()
            donation = take()
            donation.hand_over(backing, None)
            gone = donation.staged[2]
            sc.munmap(gone, 2 * PAGE_SIZE)
            with pytest.raises(OSError, match="donating") as caught:
                donation.move_in(backing, None)
            assert caught.value.errno in (errno.EFAULT, errno.EINVAL)
            assert [name for *_, name in mapped() if name == "/memfd:backing"]
            donation.complete()
            donation.give_back()
            expected = [part if part[0] != 4 else (4, 2, RW, "/memfd:backing") for part in before]
            assert mapped() == expected
            assert (read(0, 6), read(4, 4), read(5, 6), read(8, 6)) == (b"page 0", b"ours", b"page 1", b"page 0")
            write(0, b"stored")
            assert os.pread(file, 6, 0) == b"stored"
            donation.give_back()
            assert mapped() == expected

        apart(work)

    def test_a_copy_that_fails_moves_nothing(self, apart: Apart) -> None:
        """The file has become shorter since, and its pages are gone."""

        def work() -> None:
            threads_run()
            file, backing = numbered(8), new_file()
            put(0, 2, file)
            put(4, 4, file, flags=sc.MAP_PRIVATE)
            before = mapped()
            donation = take()
            donation.hand_over(backing, None)
            os.ftruncate(file, 2 * PAGE_SIZE)
            with pytest.raises(OSError, match="donating"):
                donation.move_in(backing, None)
            donation.give_back()
            assert mapped() == before
            write(0, b"stored")
            assert os.pread(file, 6, 0) == b"stored"
            write(5, b"ours")
            assert read(5, 4) == b"ours"

        apart(work)


class TestWithoutRoom:
    """Nothing has been changed."""

    def test_for_pages_of_a_private_mapping(self, apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
        def work() -> None:
            file, backing = numbered(4), new_file()
            put(0, 4, file, flags=sc.MAP_PRIVATE)
            write(1, b"ours")
            before = mapped()
            monkeypatch.setattr(module.ctypes, "cast", lambda *_args: ctypes.c_void_p(8))  # Nothing lies there.
            donation = take()
            with pytest.raises(OSError, match="raise mshared --max-bytes"):
                donation.hand_over(backing, None)
            donation.give_back()
            assert mapped() == before
            assert read(1, 4) == b"ours"

        apart(work)

    def test_when_the_file_shrinks_under_the_copy(self, apart: Apart, tmp_path: Path) -> None:
        def work() -> None:
            path = tmp_path / "file"
            path.write_bytes(bytes(4 * PAGE_SIZE))
            file, backing = os.open(path, os.O_RDWR), new_file()
            put(0, 4, file, sc.PROT_NONE, sc.MAP_PRIVATE)
            before = mapped()
            donation = take()
            plain = module._read

            def shrink(memory: int, size: int, start: int) -> bytes:
                os.ftruncate(file, PAGE_SIZE)
                return plain(memory, size, start)

            module._read = shrink
            with pytest.raises(OSError, match=r"cannot be read any more|Input/output error"):
                donation.hand_over(backing, None)
            donation.give_back()
            assert mapped() == before

        apart(work)
