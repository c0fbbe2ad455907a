"""Finding a mount, and what it says of itself."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mshare.discovery import ENVIRONMENT, find_mount, read_info

OTHERS = "36 35 98:0 / /mnt rw,noatime - ext4 /dev/root rw"


def line(point: str, uid: int, fstype: str = "fuse.msharefs") -> str:
    """A mount, as /proc/self/mountinfo has it."""
    return f"77 40 0:52 / {point} rw,nosuid shared:9 - {fstype} mshared rw,user_id={uid},group_id={uid}"


class Mounts:
    """What is mounted, for a process of some user."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = [OTHERS]
        plain = Path.read_bytes
        monkeypatch.delenv(ENVIRONMENT, raising=False)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(
            Path,
            "read_bytes",
            lambda path: os.fsencode("\n".join(self.lines) + "\n") if path.name == "mountinfo" else plain(path),
        )


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    return Mounts(monkeypatch)


class TestFindMount:
    """Named, else in the environment, else our own, else root's."""

    def test_the_one_that_is_named(self, mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
        mounts.lines += [line("/run/user/1000/mshare", 1000)]
        monkeypatch.setenv(ENVIRONMENT, "/environment")
        assert find_mount("/named") == Path("/named")
        assert find_mount(Path("/named")) == Path("/named")

    def test_the_one_in_the_environment(self, mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
        mounts.lines += [line("/run/user/1000/mshare", 1000)]
        monkeypatch.setenv(ENVIRONMENT, "/environment")
        assert find_mount() == Path("/environment")

    def test_an_empty_environment_says_nothing(self, mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
        mounts.lines += [line("/run/mshare", 0)]
        monkeypatch.setenv(ENVIRONMENT, "")
        assert find_mount() == Path("/run/mshare")

    def test_our_own_before_roots(self, mounts: Mounts) -> None:
        mounts.lines += [line("/run/user/1000/mshare", 1000), line("/run/mshare", 0)]
        assert find_mount() == Path("/run/user/1000/mshare")
        mounts.lines.reverse()
        assert find_mount() == Path("/run/user/1000/mshare")

    def test_roots_when_we_have_none(self, mounts: Mounts) -> None:
        mounts.lines += [line("/run/mshare", 0)]
        assert find_mount() == Path("/run/mshare")

    def test_root_has_its_own(self, mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        mounts.lines += [line("/run/user/1000/mshare", 1000), line("/run/mshare", 0)]
        assert find_mount() == Path("/run/mshare")

    def test_the_last_of_several(self, mounts: Mounts) -> None:
        mounts.lines += [line("/first", 0), line("/second", 0)]
        assert find_mount() == Path("/second")

    @pytest.mark.parametrize("uid", [1001, 1, 65534])
    def test_other_users_are_not_trusted(self, mounts: Mounts, uid: int) -> None:
        mounts.lines += [line("/tmp/trap", uid)]
        with pytest.raises(FileNotFoundError, match=r"no msharefs is mounted; start one with `mshare up`") as caught:
            find_mount()
        assert caught.value.errno == errno.ENOENT

    def test_other_filesystems_are_none(self, mounts: Mounts) -> None:
        mounts.lines += [line("/run/mshare", 0, "fuse.other"), line("/run/mshare", 0, "ext4")]
        with pytest.raises(FileNotFoundError):
            find_mount()

    @pytest.mark.parametrize("point", [r"/with\040blank", r"/with\012line", "/with\rreturn", "/with\udcffbyte"])
    def test_a_mount_may_have_any_name(self, mounts: Mounts, point: str) -> None:
        mounts.lines += [line(point, 0)]
        expected = point.replace(r"\040", " ").replace(r"\012", "\n")
        assert find_mount() == Path(expected)


class TestReadInfo:
    """The file mshare_info."""

    def test_what_it_says(self, tmp_path: Path) -> None:
        (tmp_path / "mshare_info").write_text("2097152\nversion 1.2\nsocket /run/a b/socket\nnew\n")
        info = read_info(tmp_path)
        assert (info.mount, info.align, info.socket) == (tmp_path, 2 << 20, Path("/run/a b/socket"))
        assert info.fields["version"] == "1.2"

    def test_a_directory_that_is_no_mount(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"is no msharefs mount \(No such file.*start one with") as caught:
            read_info(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_what_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="is no msharefs mount"):
            read_info(tmp_path / "file")

    @pytest.mark.parametrize("text", ["", "\n", "words\nsocket /s\n", "-1\nsocket /s\n", "2097152\n", "2097152\nx y\n"])
    def test_a_file_that_is_none_of_ours(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "mshare_info").write_text(text)
        with pytest.raises(OSError, match="none of ours") as caught:
            read_info(tmp_path)
        assert caught.value.errno == errno.EINVAL

    @pytest.mark.parametrize(
        ("number", "words"),
        [(errno.ENOTCONN, "the daemon of {} is dead; start one"), (errno.EACCES, "{} is no msharefs mount")],
    )
    def test_a_mount_that_nobody_serves_is_told_from_one_that_is_closed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
    ) -> None:
        def fail(_path: Path) -> str:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "read_text", fail)
        with pytest.raises(OSError, match=words.format(tmp_path)) as caught:
            read_info(tmp_path)
        assert caught.value.errno == number
