"""Files of regions as proofs, in a directory that stands in for the mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mshare.connection import Ticket
from mshare.tickets import checked_name, inode_of, opened


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    (tmp_path / "mshare_info").write_text("2097152\nsocket /s\n")
    (tmp_path / "it").touch()
    return tmp_path


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_RDWR])
def test_it_is_open_as_asked_for_while_it_is_needed(
    mount: Path, access: int, open_descriptors: Callable[[], int]
) -> None:
    before = open_descriptors()
    with opened(mount / "it", access) as (fd,):
        assert os.path.samestat(os.fstat(fd), (mount / "it").stat())
        assert not os.get_inheritable(fd)
        assert int(Path(f"/proc/self/fdinfo/{fd}").read_text().split()[3], 8) & os.O_ACCMODE == access
    assert open_descriptors() == before


def test_it_is_closed_after_an_error_too(mount: Path, open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    with pytest.raises(ZeroDivisionError), opened(mount / "it", os.O_RDONLY):
        raise ZeroDivisionError
    assert open_descriptors() == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_opened_is_no_ticket(mount: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with opened(mount / "it", os.O_RDWR) as ticket:
        assert ticket == ()


def test_what_is_not_there_is_told_with_the_way_to_make_it(mount: Path) -> None:
    for look in (lambda: inode_of(mount / "other", Ticket()), lambda: opened(mount / "other", os.O_RDONLY).__enter__()):
        with pytest.raises(FileNotFoundError, match=r"no region is named 'other' in .*; O_CREAT makes one"):
            look()
    assert inode_of(mount / "it", Ticket()) == (mount / "it").stat().st_ino


def test_a_place_that_is_no_mount_is_told_instead(tmp_path: Path) -> None:
    for look in (lambda: inode_of(tmp_path / "it", Ticket()), lambda: opened(tmp_path / "it", os.O_RDONLY).__enter__()):
        with pytest.raises(FileNotFoundError, match="is no msharefs mount"):
            look()


def test_other_errors_stay_what_they_are(mount: Path) -> None:
    (mount / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        inode_of(mount / "loop", Ticket())


def test_an_opened_file_tells_its_inode_whatever_has_the_name_now(mount: Path) -> None:
    with opened(mount / "it", os.O_RDWR) as ticket:
        known = (mount / "it").stat().st_ino
        (mount / "it").rename(mount / "kept")
        (mount / "it").touch()
        assert inode_of(mount / "it", ticket) == known
    assert inode_of(mount / "it", ticket) == (mount / "it").stat().st_ino != known


@pytest.mark.parametrize(
    ("name", "text"),
    [("it", "it"), (b"it", "it"), ("ü", "ü"), ("ü".encode(), "ü"), (b"\xff", "\udcff"), ("a b", "a b")],
)
def test_names_are_text_or_bytes(name: str | bytes, text: str) -> None:
    assert checked_name(name) == text


@pytest.mark.parametrize(
    ("name", "number"), [("", errno.EINVAL), ("a/b", errno.EINVAL), ("x" * 256, errno.ENAMETOOLONG)]
)
def test_those_that_can_be_none_are_oserrors(name: str, number: int) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        checked_name(name)
    assert caught.value.errno == number


@pytest.mark.parametrize("name", [None, 5, ("a",), Path("a")])
def test_anything_else_is_a_mistake_of_the_caller(name: object) -> None:
    with pytest.raises(TypeError, match=f"str or bytes, not {type(name).__name__}"):
        checked_name(name)  # type: ignore[arg-type]
