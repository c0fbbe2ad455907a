"""Mounts of the test's own, as root; and what is said of mounts without asking any."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mshared import libc, mounts

Tmpfs = Callable[[str], Path]


def test_the_root_is_a_mount_and_a_plain_directory_is_none(tmp_path: Path) -> None:
    found = mounts.mount_at(Path("/"))
    assert found is not None
    assert found.point == "/"
    assert mounts.mount_at(tmp_path) is None
    assert mounts.mount_at(Path("/nowhere/at/all")) is None


def test_the_topmost_of_several_is_found(tmpfs: Tmpfs) -> None:
    place = tmpfs("size=1M")
    below = mounts.mount_at(place)
    mounts.mount_tmpfs(place, "size=2M")
    above = mounts.mount_at(place)
    assert below is not None
    assert above is not None
    assert (below.fstype, above.fstype) == ("tmpfs", "tmpfs")
    assert below.mount_id != above.mount_id
    assert above.device == (os.major(place.stat().st_dev), os.minor(place.stat().st_dev))
    mounts.unmount(place)
    assert mounts.mount_at(place) == below


@pytest.mark.parametrize("name", ["with blank", "with\nline", "with\ttab", "back\\slash", "ünï", "\udcff", "#", "a\rb"])
def test_a_mount_is_found_by_any_name(directory: Path, as_root: None, name: str) -> None:
    place = directory / name
    place.mkdir()
    mounts.mount_tmpfs(place, "size=1M")
    try:
        found = mounts.mount_at(place)
        assert found is not None
        assert found.point == str(place)
    finally:
        mounts.unmount(place)


def test_what_is_mounted_is_the_daemons_alone(tmpfs: Tmpfs) -> None:
    place = tmpfs("size=1M")
    assert place.stat().st_mode & 0o777 == 0o700
    options = next(line for line in Path("/proc/self/mountinfo").read_text().split("\n") if f" {place} " in line)
    assert {"nosuid", "nodev", "noexec"} <= set(options.split()[5].split(","))


def test_a_mount_in_use_goes_all_the_same(tmpfs: Tmpfs) -> None:
    place = tmpfs("size=1M")
    with (place / "open").open("wb") as used:
        mounts.unmount(place)
        assert mounts.mount_at(place) is None
        used.write(b"still there")
    mounts.mount_tmpfs(place, "size=1M")


def test_options_that_do_not_exist_are_an_error(directory: Path, as_root: None) -> None:
    with pytest.raises(OSError, match=r"mount: Invalid argument"):
        mounts.mount_tmpfs(directory, "colour=blue")
    assert mounts.mount_at(directory) is None


def test_unmounting_what_is_no_mount_is_an_error(directory: Path, as_root: None) -> None:
    with pytest.raises(OSError, match=r"umount2: Invalid argument"):
        mounts.unmount(directory)


class TestReadonlyCopy:
    """A second way to the same files that only reads."""

    def test_nothing_opened_through_it_is_ever_writable(self, tmpfs: Tmpfs) -> None:
        place = tmpfs("size=1M")
        (place / "file").write_bytes(b"contents")
        tree = mounts.readonly_copy(place)
        assert tree is not None
        fd = os.open("file", os.O_RDONLY, dir_fd=tree)
        try:
            assert os.read(fd, 100) == b"contents"
            for path, where in (("file", tree), (f"/proc/self/fd/{fd}", None)):
                for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
                    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                        os.open(path, flags, dir_fd=where)
            with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=tree)
        finally:
            os.close(fd)
            os.close(tree)

    def test_the_mount_itself_stays_writable(self, tmpfs: Tmpfs) -> None:
        place = tmpfs("size=1M")
        tree = mounts.readonly_copy(place)
        assert tree is not None
        (place / "file").write_bytes(b"written")
        fd = os.open("file", os.O_RDONLY, dir_fd=tree)
        assert os.read(fd, 100) == b"written"
        os.close(fd)
        os.close(tree)

    def test_it_is_mounted_nowhere_and_inherited_by_nobody(self, tmpfs: Tmpfs) -> None:
        place = tmpfs("size=1M")
        number = place.stat().st_dev
        tree = mounts.readonly_copy(place)
        assert tree is not None
        device = f" {os.major(number)}:{os.minor(number)} "
        assert Path("/proc/self/mountinfo").read_text().count(device) == 1
        assert not os.get_inheritable(tree)
        os.close(tree)

    @pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
    def test_where_it_is_not_allowed_there_is_none(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def refuse(*_args: object) -> int:
            raise OSError(number, "no")

        monkeypatch.setattr(libc, "syscall", refuse)
        assert mounts.readonly_copy(Path("/")) is None

    @pytest.mark.usefixtures("as_root")
    def test_anything_else_is_an_error(self) -> None:
        with pytest.raises(FileNotFoundError):
            mounts.readonly_copy(Path("/nowhere/at/all"))
