"""Descriptors that cannot truncate, and threads that are as free as before."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mshared import landlock, libc
from mshared.landlock import open_without_truncate

SIZE = 8192


@pytest.fixture
def file(tmp_path: Path) -> Path:
    if not landlock.is_available():
        pytest.skip("no Landlock that binds truncation: Linux 6.2 has it, if it is among the active LSMs")
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    return path


def test_what_is_opened_can_be_written_and_mapped_and_not_truncated(file: Path) -> None:
    fd = open_without_truncate(str(file), os.O_RDWR)
    try:
        for size in (0, SIZE - 1, SIZE + 1):
            with pytest.raises(PermissionError) as caught:
                os.ftruncate(fd, size)
            assert caught.value.errno == errno.EACCES
        os.pwrite(fd, b"here", 0)
        with mmap.mmap(fd, SIZE) as mapped:
            mapped[4:9] = b"there"
        assert file.read_bytes()[:9] == b"herethere"
        assert file.stat().st_size == SIZE
    finally:
        os.close(fd)


def test_it_stays_so_in_other_processes_and_threads(file: Path, apart: Callable[[Callable[[], object]], None]) -> None:
    fd = open_without_truncate(str(file), os.O_RDWR)

    def work() -> None:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(os.dup(fd), 0)

    try:
        apart(work)
    finally:
        os.close(fd)


def test_whoever_called_is_not_restricted(file: Path) -> None:
    before = Path("/proc/thread-self/status").read_text().split("NoNewPrivs:")[1].split()[0]
    os.close(open_without_truncate(str(file), os.O_RDWR))
    assert Path("/proc/thread-self/status").read_text().split("NoNewPrivs:")[1].split()[0] == before
    with file.open("r+b") as ordinary:
        ordinary.truncate(1)
    os.truncate(file, 0)
    assert file.stat().st_size == 0


def test_several_are_opened_by_one_thread_and_one_that_fails_keeps_none_from_it(file: Path) -> None:
    before = threading.active_count()
    with landlock.opener() as open_file:
        first = open_file(str(file), os.O_RDWR)
        with pytest.raises(FileNotFoundError):
            open_file(str(file.parent / "other"), os.O_RDWR)
        second = open_file(str(file), os.O_RDWR)
        assert threading.active_count() == before + 1
    for fd in (first, second):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(fd)


def test_no_thread_stays_behind(file: Path) -> None:
    os.close(open_without_truncate(str(file), os.O_RDWR))
    assert [thread.name for thread in threading.enumerate() if thread.name == "landlocked"] == []


def test_it_does_not_survive_an_exec(file: Path) -> None:
    fd = open_without_truncate(str(file), os.O_RDWR)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_truncating_while_opening_is_refused_too(file: Path) -> None:
    with pytest.raises(PermissionError):
        open_without_truncate(str(file), os.O_RDWR | os.O_TRUNC)
    assert file.stat().st_size == SIZE


def test_what_cannot_be_opened_is_the_callers_error(file: Path, open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        open_without_truncate(str(file.parent / "missing"), os.O_RDWR)
    assert open_descriptors() == before


def test_descriptors_are_as_many_as_opened(file: Path, open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    fd = open_without_truncate(str(file), os.O_RDWR)
    assert open_descriptors() == before + 1
    os.close(fd)


@pytest.mark.parametrize(("version", "available"), [(1, False), (2, False), (3, True), (7, True)])
def test_the_first_versions_cannot_do_it(monkeypatch: pytest.MonkeyPatch, version: int, available: bool) -> None:
    monkeypatch.setattr(libc, "syscall", lambda *_args: version)
    assert landlock.is_available() is available


def test_kernels_without_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(libc, "syscall", missing)
    assert not landlock.is_available()
