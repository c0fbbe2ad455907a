"""Backing files stay as long as their regions: what somebody writes behind the end is cut off."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mshared import sizes
from mshared.backing import Backing

SIZE = 1 << 20


class World:
    """Regions of one size that are none."""

    def __init__(self, directory: Path, count: int) -> None:
        self.fds = [os.open(directory / str(number), os.O_RDWR | os.O_CREAT) for number in range(count)]
        for fd in self.fds:
            os.truncate(fd, SIZE)

    def regions(self) -> list[Any]:
        model = SimpleNamespace(name="x", ar=SimpleNamespace(size=SIZE))
        return [
            SimpleNamespace(
                backing=Backing(fd, fd, fd, None), model=model, closed=number == 0, shows_own_file=number == 3
            )
            for number, fd in enumerate(self.fds)
        ]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path, 4)
    yield found
    for fd in found.fds:
        os.close(fd)


def look_once(world: World) -> None:
    async def main() -> None:
        with trio.move_on_after(1.5 * sizes.INTERVAL):
            await sizes.keep_sizes(world)  # type: ignore[arg-type]

    trio.run(main, clock=MockClock(autojump_threshold=0.01))


def test_what_has_grown_is_cut_off(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """And said, and nothing else is touched; files of regions that are gone, and files of users, least of all."""
    os.pwrite(world.fds[1], b"inside", 100)
    for fd in (world.fds[0], world.fds[1], world.fds[3]):
        os.pwrite(fd, b"outside", 8 * SIZE)
    with caplog.at_level(logging.WARNING), contextlib.suppress(trio.TooSlowError):
        look_once(world)
    assert [os.fstat(fd).st_size for fd in world.fds] == [8 * SIZE + 7, SIZE, SIZE, 8 * SIZE + 7]
    assert os.pread(world.fds[1], 6, 100) == b"inside"
    assert caplog.messages == ["region x: somebody wrote behind its end; cut off"]
