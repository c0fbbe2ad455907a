"""Mapping a file as one with others, against a daemon that is none: what is asked, and what becomes of the answer."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mshare
from mshare import syscalls as sc
from mshare.file_mapping import FileMapping
from mshare.region import attached_regions
from msharefs import protocol
from msharefs.addr import PMD_SIZE

HERE = 0x5700_0000_0000
SIZE = 2 * PMD_SIZE
RW, RO = os.O_RDWR, os.O_RDONLY

Opener = Callable[..., int]


@pytest.fixture
def file() -> Iterator[int]:
    """One in memory."""
    fd = os.memfd_create("it")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"hello", 0)
    yield fd
    os.close(fd)


@pytest.fixture
def asked(fake_daemon: Any, open_descriptors: Callable[[], int]) -> Iterator[list[protocol.MapFile]]:
    """What the daemon is asked for; it offers the file itself, armed by nobody. In the end all is as it was."""
    found: list[protocol.MapFile] = []

    def offer(request: protocol.MapFile, fds: list[int]) -> protocol.Offer:
        assert len(fds) == 1
        found.append(request)
        at = HERE if request.addr is None else request.addr
        return protocol.Offer(7, 0, at, request.length, readonly=False, device=False, own=True)

    fake_daemon.on[protocol.MapFile] = offer
    fake_daemon.on[protocol.Mapped] = lambda _request, _fds: protocol.Attached(5)
    for kind in (protocol.Detach, protocol.Abort, protocol.Msync, protocol.Mprotect):
        fake_daemon.on[kind] = lambda _request, _fds: protocol.Done()
    yield found
    assert sc.own_mappings(HERE, HERE + SIZE) == []


def ordinary(mapping: FileMapping) -> str:
    """Why it is not shared. Unmaps it."""
    assert not mapping.shared
    assert mapping.why is not None
    mapping.munmap()
    return mapping.why


class TestShared:
    def test_the_file_itself_is_mapped_where_the_daemon_says(self, asked: list[protocol.MapFile], file: int) -> None:
        with mshare.mmap(file, SIZE) as m:
            assert asked == [protocol.MapFile(None, SIZE, 0, 3, None)]
            assert (m.address, m.size, m.shared, m.why, m.closed) == (HERE, SIZE, True, None, False)
            m.buf[:5] = b"HELLO"
            assert os.pread(file, 5, 0) == b"HELLO"
        assert m.closed

    def test_all_that_was_said_is_asked(self, asked: list[protocol.MapFile], file: int) -> None:
        mshare.mmap(file, PMD_SIZE, addr=HERE, prot=1, offset=PMD_SIZE, backing="4k").munmap()
        assert asked == [protocol.MapFile(HERE, PMD_SIZE, PMD_SIZE, 1, "4k")]

    def test_changes_go_to_the_daemon(self, asked: list[protocol.MapFile], file: int, fake_daemon: Any) -> None:
        m = mshare.mmap(file, SIZE)
        m.msync()
        m.mprotect(1)
        m.munmap()
        m.munmap()
        said = [each for each in fake_daemon.heard if not isinstance(each, protocol.Hello)][2:]
        assert said == [protocol.Msync(5, 0, None), protocol.Mprotect(5, 0, SIZE, 1), protocol.Detach(5)]
        assert asked

    def test_who_asked_for_less_gets_more_by_asking(self, asked: list[protocol.MapFile], file: int) -> None:
        """Also in its own mapping, which until then the kernel keeps it from writing."""
        with mshare.mmap(file, SIZE, prot=1) as m:
            assert m.buf.readonly
            view = m.buf[:5]
            with pytest.raises(BufferError):
                m.mprotect(3)
            view.release()
            m.mprotect(3)
            m.buf[0] = 72
            assert os.pread(file, 1, 0) == b"H"
        assert asked

    def test_it_is_no_region(self, asked: list[protocol.MapFile], file: int) -> None:
        with mshare.mmap(file, SIZE):
            assert attached_regions() == []
            with pytest.raises(OSError, match="the range holds a shared mapping of a file"):
                mshare.mshare("x", HERE, PMD_SIZE, os.O_CREAT | RW)
        assert asked

    @pytest.mark.parametrize("part", [(0, PMD_SIZE), (PMD_SIZE, PMD_SIZE), (PMD_SIZE, None), (0, 2 * SIZE)])
    def test_a_part_is_not_unmapped(
        self, asked: list[protocol.MapFile], file: int, part: tuple[int, int | None]
    ) -> None:
        with mshare.mmap(file, SIZE) as m:
            with pytest.raises(OSError, match="a part of a file's mapping") as caught:
                m.munmap(*part)
            assert caught.value.errno == errno.EINVAL
            assert m.buf[0] == ord("h")
        assert asked

    def test_a_failure_on_the_way_leaves_nothing(
        self, asked: list[protocol.MapFile], file: int, fake_daemon: Any, open_descriptors: Callable[[], int]
    ) -> None:
        mshare.mmap(file, SIZE).munmap()
        before = open_descriptors()
        fake_daemon.on[protocol.Mapped] = lambda _request, _fds: protocol.Failed(errno.EINVAL, "no")
        with pytest.raises(OSError, match="no"):
            mshare.mmap(file, SIZE)
        assert fake_daemon.heard[-1] == protocol.Abort(7)
        assert open_descriptors() == before
        assert asked

    def test_who_finds_the_others_gone_starts_over(
        self, asked: list[protocol.MapFile], file: int, fake_daemon: Any
    ) -> None:
        answers = [protocol.Failed(errno.ENOENT, "gone"), protocol.Attached(5)]
        fake_daemon.on[protocol.Mapped] = lambda _request, _fds: answers.pop(0)
        mshare.mmap(file, SIZE).munmap()
        assert len(asked) == 2

    def test_but_not_for_ever(self, asked: list[protocol.MapFile], file: int, fake_daemon: Any) -> None:
        fake_daemon.on[protocol.Mapped] = lambda _request, _fds: protocol.Failed(errno.ENOENT, "gone")
        assert "come and go" in ordinary(mshare.mmap(file, SIZE))
        assert len(asked) == 10


class TestOrdinary:
    def test_what_the_daemon_will_not_share(self, fake_daemon: Any, file: int) -> None:
        fake_daemon.on[protocol.MapFile] = lambda _request, _fds: protocol.Ordinary("others have it otherwise")
        m = mshare.mmap(file, SIZE)
        assert (m.shared, m.why) == (False, "others have it otherwise")
        m.buf[:5] = b"HELLO"
        m.msync()
        assert os.pread(file, 5, 0) == b"HELLO"
        m.mprotect(1)
        view = m.buf[:1]
        with pytest.raises(BufferError):
            m.munmap()
        view.release()
        m.munmap()
        with pytest.raises(ValueError, match="detached"):
            _ = m.buf

    def test_more_than_was_asked_for_at_first(self, fake_daemon: Any, file: int) -> None:
        fake_daemon.on[protocol.MapFile] = lambda _request, _fds: protocol.Ordinary("no")
        with mshare.mmap(file, SIZE, prot=1) as m:
            m.mprotect(3)
            m.buf[0] = 72
            with pytest.raises(PermissionError):
                m.mprotect(7)

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            ({"flags": 1}, "MAP_SHARED_PT is not"),
            ({"length": 4096}, "the length 0x1000"),
            ({"offset": 4096, "length": PMD_SIZE}, "the offset 0x1000"),
            ({"addr": HERE + 4096}, "the address 0x570000001000"),
        ],
    )
    def test_what_need_not_be_asked(self, fake_daemon: Any, file: int, arguments: dict[str, int], why: str) -> None:
        m = mshare.mmap(**{"fd": file, "length": SIZE, **arguments})  # type: ignore[arg-type]
        assert why in ordinary(m)
        assert fake_daemon.heard == []

    def test_a_place_that_is_taken(self, asked: list[protocol.MapFile], file: int, fake_daemon: Any) -> None:
        """Where the others have it, it cannot be; elsewhere it is not shared. What is there stays."""
        sc.mmap(HERE, 4096, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        ctypes.memset(HERE, 9, 4096)
        try:
            assert "in use in this process" in ordinary(mshare.mmap(file, SIZE))
            assert "in use in this process" in ordinary(mshare.mmap(file, SIZE, addr=HERE))
            with pytest.raises(FileExistsError):
                mshare.mmap(file, SIZE, addr=HERE, flags=mshare.MAP_SHARED_PT | 1 | sc.MAP_FIXED_NOREPLACE)
            assert [type(each) for each in fake_daemon.heard].count(protocol.Abort) == 4
            assert ctypes.string_at(HERE, 1) == b"\t"
        finally:
            sc.munmap(HERE, 4096)
        assert asked

    def test_no_daemon(self, file: int, tmp_path: Path) -> None:
        assert ordinary(mshare.mmap(file, SIZE, mount=tmp_path)).startswith("no daemon: ")

    def test_an_error_of_the_daemon_is_one(self, fake_daemon: Any, file: int) -> None:
        fake_daemon.on[protocol.MapFile] = lambda _request, _fds: protocol.Failed(errno.EDQUOT, "too much")
        with pytest.raises(OSError, match="too much") as caught:
            mshare.mmap(file, SIZE, backing="thp")
        assert caught.value.errno == errno.EDQUOT


def test_it_says_what_it_is(asked: list[protocol.MapFile], file: int) -> None:
    with mshare.mmap(file, SIZE) as m:
        assert repr(m) == "<FileMapping: 0x400000 bytes at 0x570000000000, shared>"
    assert repr(m) == "<FileMapping: unmapped, shared>"
    assert asked
