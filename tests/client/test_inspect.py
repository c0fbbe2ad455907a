"""Looking at regions from outside, against a daemon that answers as the test says."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from mshare import connection, inspect
from msharefs import protocol
from msharefs.protocol import RegionName, RegionStat, Vma

STAT = RegionStat(
    *("it", 32 << 40, 2 << 20, "4k", 0, 0, 0o600, 1, 4096, 0, 1, {"pte": 1}, 8, 8, 8),
    tables_shared=False,
    huge_bytes=0,
)


@pytest.fixture
def daemon(fake_daemon: Any) -> Iterator[Any]:
    (fake_daemon.mount / "it").touch()
    yield fake_daemon
    link = connection._connections.pop(fake_daemon.mount, None)
    if link is not None:
        link.forget()


def ticketed(reply: Callable[[Any], Any], seen: list[bool], daemon: Any) -> Callable[[Any, list[int]], Any]:
    """Answer, and note whether the opened file came along, for reading."""

    def answer(request: Any, fds: list[int]) -> Any:
        (fd,) = fds
        readonly = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        seen.append(readonly and os.path.samestat(os.fstat(fd), (daemon.mount / "it").stat()))
        return reply(request)

    return answer


def test_regions_are_listed_however_many_packets_it_takes(daemon: Any) -> None:
    names = [RegionName(f"r{number}", 32 << 40, 2 << 20, "4k", 0, 0, 0o600, 1) for number in range(5)]

    def answer(request: protocol.GetList, _fds: list[int]) -> protocol.Listing:
        rest = [each for each in names if request.after is None or each.name > request.after]
        return protocol.Listing(tuple(rest[:2]), more=len(rest) > 2)

    daemon.on[protocol.GetList] = answer
    assert inspect.regions() == names
    assert inspect.regions(daemon.mount) == names
    assert [message.after for message in daemon.heard if isinstance(message, protocol.GetList)][:3] == [
        *(None, "r1", "r3")
    ]


def test_files_are_asked_for_in_the_same_way(daemon: Any) -> None:
    daemon.on[protocol.GetList] = lambda request, _fds: protocol.Listing((), more=not request.files)
    assert inspect.files() == []


def test_no_regions_are_an_empty_list(daemon: Any) -> None:
    daemon.on[protocol.GetList] = lambda _request, _fds: protocol.Listing(())
    assert inspect.regions() == []


def test_numbers_are_asked_for_with_the_opened_file(daemon: Any) -> None:
    seen: list[bool] = []
    daemon.on[protocol.GetStat] = ticketed(lambda _request: STAT, seen, daemon)
    assert inspect.stat("it") == STAT
    assert inspect.stat(b"it", daemon.mount) == attrs.evolve(STAT)
    assert seen == [True, True]


def test_so_are_mappings_each_time(daemon: Any) -> None:
    seen: list[bool] = []
    vmas = [Vma(offset, 4096, 3, paged=False, resident=0) for offset in (0, 8192, 16384)]

    def reply(request: protocol.GetMaps) -> protocol.Maps:
        rest = [vma for vma in vmas if request.after is None or vma.offset > request.after]
        return protocol.Maps(tuple(rest[:2]), more=len(rest) > 2)

    daemon.on[protocol.GetMaps] = ticketed(reply, seen, daemon)
    assert inspect.maps("it") == vmas
    assert seen == [True, True]


@pytest.mark.parametrize("look", [inspect.stat, inspect.maps])
def test_what_is_not_there(daemon: Any, look: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError, match="no region is named 'other'"):
        look("other")
    assert daemon.heard == []


@pytest.mark.parametrize("look", [inspect.stat, inspect.maps])
def test_what_may_not_be_read_is_told_with_the_cure(
    daemon: Any, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], object]
) -> None:
    def refuse(*_args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"does not let you read it; its owner can chmod .*/it"):
        look("it")
    assert daemon.heard == []
