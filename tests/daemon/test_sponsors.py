"""Sponsors: processes whose end is noticed, by real pidfds."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mshared.pager import Pager
from mshared.sponsors import Sponsors, is_pidfd
from msharefs.errors import BadDescriptorError


class Region:
    """What is kept."""

    sponsor: int | None = None


Other = Callable[..., tuple[int, Any]]


@pytest.fixture
def pager() -> Iterator[Pager]:
    pager = Pager()
    yield pager
    pager.close()


@pytest.fixture
def gone_regions() -> list[object]:
    return []


@pytest.fixture
def sponsors(pager: Pager, gone_regions: list[object]) -> Sponsors:
    return Sponsors(pager, gone_regions.append)


def test_the_end_of_a_process_is_told_once(
    sponsors: Sponsors,
    pager: Pager,
    gone_regions: list[object],
    other_process: Other,
    open_descriptors: Callable[[], int],
) -> None:
    pid, sock = other_process(lambda sock: sock.recv(1))
    region: Any = Region()
    before = open_descriptors()
    mine = [os.pidfd_open(pid)]
    watched = os.dup(mine[0])
    sponsors.keep(region, mine)
    assert mine == []
    pager.drain()
    assert gone_regions == []
    sock.send(b".")
    assert select.select([watched], [], [], 60)[0]
    os.close(watched)
    pager.drain()
    pager.drain()
    assert gone_regions == [region]
    assert open_descriptors() == before


def test_of_a_region_that_ended_before_nothing_is_told(
    sponsors: Sponsors,
    pager: Pager,
    gone_regions: list[object],
    other_process: Other,
    open_descriptors: Callable[[], int],
) -> None:
    pid, sock = other_process(lambda sock: sock.recv(1))
    region: Any = Region()
    before = open_descriptors()
    sponsors.keep(region, [os.pidfd_open(pid)])
    sponsors.discard(region)
    sponsors.discard(region)
    assert open_descriptors() == before
    sock.send(b".")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    pager.drain()
    assert gone_regions == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_other_descriptors_are_refused_and_left(sponsors: Sponsors, pipe_ends: list[int], count: int) -> None:
    region: Any = Region()
    given = pipe_ends[:count]
    with pytest.raises(BadDescriptorError, match="pidfd"):
        sponsors.keep(region, given)
    assert given == pipe_ends[:count]


def test_only_a_pidfd_is_one(pipe_ends: list[int]) -> None:
    mine = os.pidfd_open(os.getpid())
    assert is_pidfd(mine)
    os.close(mine)
    assert not is_pidfd(mine)
    assert not is_pidfd(pipe_ends[0])


@pytest.fixture
def pipe_ends() -> Iterator[list[int]]:
    ends = list(os.pipe())
    yield ends
    for fd in ends:
        os.close(fd)
