"""Mapped files: what can be read without waiting."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import files
from mshared.files import SWAP_NEWS, Buffer, MappedFile, Swap
from msharefs.addr import PAGE_SIZE

CONTENT = bytes(range(256)) * 64


@pytest.fixture(params=["tmp_path", "/dev/shm"])
def mapped(request: pytest.FixtureRequest, tmp_path: Path, open_descriptors: Callable[[], int]) -> Iterator[MappedFile]:
    """A file of four pages on a disk, and one on tmpfs."""
    before = open_descriptors()
    place = tmp_path if request.param == "tmp_path" else request.param
    with tempfile.NamedTemporaryFile(dir=place) as file:
        file.write(CONTENT)
        file.flush()
        found = MappedFile(os.open(file.name, os.O_RDWR))
    yield found
    found.close()
    assert open_descriptors() == before


def test_what_is_in_memory_is_read_at_once(mapped: MappedFile) -> None:
    buffer = Buffer(2 * PAGE_SIZE)
    assert mapped.read_now(buffer, PAGE_SIZE, 100)
    assert bytes(buffer.view[:PAGE_SIZE]) == CONTENT[100 : 100 + PAGE_SIZE]


@pytest.mark.parametrize("offset", [3 * PAGE_SIZE, 4 * PAGE_SIZE, 9 * PAGE_SIZE])
def test_what_reaches_past_the_end_is_not(mapped: MappedFile, offset: int) -> None:
    assert not mapped.read_now(Buffer(2 * PAGE_SIZE), 2 * PAGE_SIZE, offset)


def test_what_lies_on_the_disk_is_not(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    path.write_bytes(CONTENT)
    cold = MappedFile(os.open(path, os.O_RDONLY))
    try:
        os.fsync(cold.fd)
        os.posix_fadvise(cold.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert not cold.read_now(Buffer(PAGE_SIZE), PAGE_SIZE, 0)
        assert files.read(cold.fd, PAGE_SIZE, 0) == (CONTENT[:PAGE_SIZE], len(CONTENT), b"")
        assert cold.read_now(Buffer(PAGE_SIZE), PAGE_SIZE, 0)
    finally:
        cold.close()


def test_memory_that_may_be_swapped_out_is_not_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("tmpfs")
    os.write(fd, CONTENT)
    in_memory = MappedFile(fd)
    monkeypatch.setattr(files, "_swap", Swap())
    monkeypatch.setattr(files, "_anything_swapped", lambda: True)
    try:
        assert not in_memory.read_now(Buffer(PAGE_SIZE), PAGE_SIZE, 0)
    finally:
        in_memory.close()


def test_a_file_that_knows_no_reading_without_waiting_is_read_elsewhere() -> None:
    kernel = MappedFile(os.open("/proc/version", os.O_RDONLY))
    try:
        assert not kernel.read_now(Buffer(PAGE_SIZE), 10, 0)
    finally:
        kernel.close()


def test_the_buffer_stands_where_it_says() -> None:
    buffer = Buffer(PAGE_SIZE)
    buffer.view[:4] = b"here"
    assert ctypes.string_at(buffer.address, 4) == b"here"
    assert buffer.address % PAGE_SIZE == 0


def test_whether_anything_is_swapped_out_agrees_with_proc() -> None:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert files._anything_swapped() == (fields["SwapTotal"].split() != fields["SwapFree"].split())


def test_what_is_known_of_the_swap_is_soon_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(files, "_anything_swapped", lambda: next(answers))
    swap = Swap()
    assert [swap.in_use(now) for now in (5.0, 5.0 + SWAP_NEWS / 2, 5.0 + 2 * SWAP_NEWS)] == [False, False, True]
