"""Writing back unasked: from time to time, what may have been stored."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mshared import writeback
from mshared.files import MappedFile
from mshared.writeback import Settling, sync_files
from msharefs.errors import NoSpaceError

PAUSE = 30


class Region:
    """One that is none, and counts how often its files were brought up to date; each time takes ``takes`` seconds."""

    def __init__(self, *, has_stores: bool = True, attached: bool = True, takes: float = 0) -> None:
        self.has_stores, self.attachments, self.takes = has_stores, [object()] * attached, takes
        self.lock, self.closed = trio.Lock(), False
        self.written: list[float] = []
        self.error: NoSpaceError | None = None
        self.model: Any = type("Model", (), {"title": "x", "name": "x", "ar": None})


@pytest.fixture
def settling(monkeypatch: pytest.MonkeyPatch) -> Settling:
    async def flush(region: Any, *_: object) -> None:
        assert region.lock.locked()
        await trio.sleep(region.takes)
        region.written.append(trio.current_time())
        if region.error:
            raise region.error

    async def nothing(_region: object) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(writeback, "flush", flush)
    monkeypatch.setattr(writeback, "write_changed", nothing)
    monkeypatch.setattr(writeback, "write_out", nothing)
    return Settling(lambda: None)


def run_for(seconds: float, settling: Settling, *regions: Region) -> None:
    found: Any = regions

    async def main() -> None:
        start = trio.current_time()
        with trio.move_on_after(seconds):
            await settling.from_time_to_time(lambda: found, PAUSE)
        for region in regions:
            region.written = [at - start for at in region.written]

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_it_is_done_each_time(settling: Settling) -> None:
    region = Region()
    run_for(100, settling, region)
    assert [round(at) for at in region.written] == [30, 60, 90]


def test_there_must_be_something_to_write_and_somebody_who_stored_it(settling: Settling) -> None:
    """Of a region that nobody is attached to any more that is under way."""
    idle, left = Region(has_stores=False), Region(attached=False)
    run_for(100, settling, idle, left)
    assert idle.written == left.written == []


def test_what_takes_long_is_done_less_often(settling: Settling) -> None:
    region = Region(takes=10)
    run_for(500, settling, region)
    assert [round(at) for at in region.written] == [40, 250, 460]


def test_what_cannot_be_written_is_said_and_tried_again(settling: Settling, caplog: pytest.LogCaptureFixture) -> None:
    region = Region()
    region.error = NoSpaceError("no room")
    with caplog.at_level(logging.WARNING):
        run_for(70, settling, region)
    assert caplog.messages == ["region x: no room; it is tried again"] * 2


def test_a_region_that_everybody_left_meanwhile_is_settled(settling: Settling, monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region()
    asked: list[object] = []
    monkeypatch.setattr(settling, "request", asked.append)

    async def leave(left: Any, *_: object) -> None:
        left.attachments.clear()
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(writeback, "flush", leave)
    run_for(40, settling, region)
    assert asked == [region]


class Disk:
    """A region with one file, which is a pipe: no disk takes that."""

    def __init__(self) -> None:
        self.ends = os.pipe()
        self.backing = type("Backing", (), {"fd": self.ends[0]})
        self.files = {1: MappedFile(self.ends[1])}
        self.reading: Any = type("Reading", (), {"limiter": trio.CapacityLimiter(1)})


@pytest.fixture
def disk() -> Iterator[Any]:
    found = Disk()
    yield found
    for fd in found.ends:
        os.close(fd)


def test_a_disk_that_does_not_take_it_is_an_error(disk: Any) -> None:
    with pytest.raises(NoSpaceError, match="does not take it"):
        trio.run(sync_files, disk)


def test_what_a_disk_takes_is_on_it(disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_ino))
    trio.run(sync_files, disk)
    assert synced == [os.fstat(disk.ends[1]).st_ino]
