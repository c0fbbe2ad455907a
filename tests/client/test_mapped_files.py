"""Finding the files behind mappings again: by every way there is, and no other file."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshare import mapped_files as module
from mshare import syscalls as sc
from mshare.mapped_files import MappedFiles, shows_file
from mshare.syscalls import Mapping
from msharefs.addr import PAGE_SIZE

RW = sc.PROT_READ | sc.PROT_WRITE
Show = Callable[..., Mapping]


@pytest.fixture
def show() -> Iterator[Show]:
    """Map a page of a file; its line of maps. Unmapped at the end."""
    starts = []

    def new(fd: int, prot: int = RW, flags: int = sc.MAP_SHARED) -> Mapping:
        starts.append(sc.mmap(None, PAGE_SIZE, prot, flags, fd))
        return next(m for m in sc.own_mappings(starts[-1], starts[-1] + 1))

    yield new
    for start in starts:
        sc.munmap(start, PAGE_SIZE)


@pytest.fixture
def files(open_descriptors: Callable[[], int]) -> Iterator[MappedFiles]:
    before = open_descriptors()
    files = MappedFiles()
    yield files
    files.close()
    files.close()
    assert open_descriptors() == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(2 * PAGE_SIZE))
    return tmp_path / "file"


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for most people, /proc/self/map_files is closed."""
    monkeypatch.setattr(module, "_linked", lambda *_args: iter(()))


def same(fd: int, other: int | Path) -> bool:
    about = os.fstat(other) if isinstance(other, int) else other.stat()
    return os.path.samestat(os.fstat(fd), about)


def access_of(fd: int) -> int:
    return module.fcntl.fcntl(fd, module.fcntl.F_GETFL) & os.O_ACCMODE


@pytest.mark.parametrize(
    ("inode", "path", "expected"),
    [
        (0, "", False),
        (0, "[anon:mine]", False),
        (5, "/dev/zero (deleted)", False),
        (5, "/SYSV00000000 (deleted)", False),
        (5, "[anon_shmem:mine]", False),
        (5, "/memfd:mine (deleted)", True),
        (5, "/dev/shm/mine", True),
        (5, "/home/me/file", True),
    ],
)
def test_what_shows_a_file(inode: int, path: str, expected: bool) -> None:
    assert shows_file(Mapping(0, PAGE_SIZE, 3, True, inode, path)) is expected


class TestAccess:
    """It is opened as the mapping needs it."""

    @pytest.mark.parametrize(
        ("how", "prot", "flags", "expected"),
        [
            (os.O_RDWR, RW, sc.MAP_SHARED, os.O_RDWR),
            (os.O_RDWR, sc.PROT_READ, sc.MAP_SHARED, os.O_RDWR),
            (os.O_RDWR, sc.PROT_NONE, sc.MAP_SHARED, os.O_RDWR),
            (os.O_RDONLY, sc.PROT_READ, sc.MAP_SHARED, os.O_RDONLY),
            (os.O_RDONLY, sc.PROT_NONE, sc.MAP_SHARED, os.O_RDONLY),
            (os.O_RDWR, RW, sc.MAP_PRIVATE, os.O_RDONLY),
            (os.O_RDONLY, RW, sc.MAP_PRIVATE, os.O_RDONLY),
        ],
    )
    def test_as_it_was_or_for_reading(
        self, show: Show, files: MappedFiles, path: Path, how: int, prot: int, flags: int, expected: int
    ) -> None:
        fd = os.open(path, how)
        mapping = show(fd, prot, flags)
        os.close(fd)
        assert files.place_of(mapping) == 0
        assert same(files.fds[0], path)
        assert access_of(files.fds[0]) == expected
        assert not os.get_inheritable(files.fds[0])


class TestWays:
    """Who has no privilege needs a path or a descriptor."""

    pytestmark = pytest.mark.usefixtures("unprivileged")

    def test_by_its_path(self, show: Show, files: MappedFiles, path: Path) -> None:
        with path.open("r+b") as file:
            mapping = show(file.fileno())
        assert same(files.fds[files.place_of(mapping)], path)

    def test_by_a_descriptor(self, show: Show, files: MappedFiles) -> None:
        others = [os.memfd_create("it") for _ in range(3)]
        for fd in others:
            os.ftruncate(fd, PAGE_SIZE)
        mapping = show(others[1])
        assert same(files.fds[files.place_of(mapping)], others[1])
        assert not os.get_inheritable(files.fds[0])
        for fd in others:
            os.close(fd)

    @pytest.mark.parametrize("how", [os.O_RDONLY, os.O_WRONLY, os.O_PATH])
    def test_not_by_one_that_allows_less(self, show: Show, files: MappedFiles, path: Path, how: int) -> None:
        with path.open("r+b") as file:
            mapping = show(file.fileno())
        fd = os.open(path, how)
        path.unlink()
        with pytest.raises(OSError, match="keep a descriptor of it open for reading and writing") as caught:
            files.place_of(mapping)
        assert caught.value.errno == errno.EINVAL
        assert files.fds == []
        os.close(fd)

    @pytest.mark.parametrize("instead", ["another", "a directory", "a pipe", "a link to it", "nothing"])
    def test_not_by_a_path_that_leads_elsewhere(self, show: Show, files: MappedFiles, path: Path, instead: str) -> None:
        with path.open("r+b") as file:
            mapping = show(file.fileno())
        moved = path.rename(path.with_name("moved"))
        match instead:
            case "another":
                path.write_bytes(bytes(PAGE_SIZE))
            case "a directory":
                path.mkdir()
            case "a pipe":
                os.mkfifo(path)
            case "a link to it":
                path.symlink_to(moved)
        old = Mapping(mapping.start, mapping.end, 3, True, mapping.inode, str(path), 0, mapping.device)
        with pytest.raises(OSError, match="cannot be opened again"):
            files.place_of(old)

    def test_an_inode_of_another_filesystem_is_another_file(self, show: Show, files: MappedFiles, path: Path) -> None:
        with path.open("r+b") as file:
            mapping = show(file.fileno())
            elsewhere = Mapping(mapping.start, mapping.end, 3, True, mapping.inode, str(path), 0, "ff:ff")
            with pytest.raises(OSError, match="cannot be opened again"):
                files.place_of(elsewhere)

    def test_memory_of_huge_pages_is_none(
        self, show: Show, files: MappedFiles, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with path.open("r+b") as file:
            mapping = show(file.fileno())
        monkeypatch.setattr(sc, "filesystem", lambda _fd: 0x958458F6)
        with pytest.raises(OSError, match="cannot be opened again"):
            files.place_of(mapping)


class TestPlaces:
    """Each file is sent once."""

    def test_of_one_file_all_mappings_have_one_place(self, show: Show, files: MappedFiles, path: Path) -> None:
        other = os.memfd_create("it")
        os.ftruncate(other, PAGE_SIZE)
        with path.open("r+b") as file:
            fd = file.fileno()
            mappings = [show(fd), show(other), show(fd, sc.PROT_READ), show(fd, RW, sc.MAP_PRIVATE), show(fd)]
            assert [files.place_of(mapping) for mapping in mappings] == [0, 1, 0, 2, 0]
        assert len(files.fds) == 3
        os.close(other)

    def test_there_are_so_many_and_no_more(self, show: Show, files: MappedFiles, tmp_path: Path) -> None:
        for number in range(17):
            (tmp_path / str(number)).write_bytes(bytes(PAGE_SIZE))
            with (tmp_path / str(number)).open("r+b") as file:
                mapping = show(file.fileno())
            if number < 16:
                assert files.place_of(mapping) == number
        with pytest.raises(OSError, match=r"more than 16 files.*Region.mmap\(fd=...\)") as caught:
            files.place_of(mapping)
        assert caught.value.errno == errno.E2BIG


def test_what_is_looked_at_is_not_touched(show: Show, files: MappedFiles, path: Path) -> None:
    with path.open("r+b") as file:
        mapping = show(file.fileno())
    ctypes.memset(mapping.start, 7, 1)
    files.place_of(mapping)
    # Of this file: threads that end meanwhile take their stacks with them.
    assert len([each for each in sc.own_mappings(0, 1 << 47) if each.path == str(path)]) == 1
    assert path.read_bytes()[:2] == b"\7\0"
