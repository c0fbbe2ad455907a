"""Tasks that outlast what goes wrong in them."""

from __future__ import annotations

import errno
import logging

import pytest
import trio
from trio.testing import MockClock

from mshared.lasting import lasting


class Task:
    """Fails as often as it has errors, then ends."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.runs = 0

    async def __call__(self) -> None:
        self.runs += 1
        if self.errors:
            raise self.errors.pop(0)


def run(task: Task) -> None:
    trio.run(lasting, task, clock=MockClock(autojump_threshold=0))


def test_one_that_ends_has_ended() -> None:
    task = Task()
    run(task)
    assert task.runs == 1


def test_a_mistake_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    task = Task(ValueError("a mistake"), ExceptionGroup("of children", [KeyError("another")]))
    run(task)
    assert task.runs == 3
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


def test_what_is_lacking_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    task = Task(*(OSError(errno.EMFILE, "Too many open files") for _ in range(5)))
    run(task)
    assert task.runs == 6
    assert len(caplog.messages) == 1
    assert "Too many open files" in caplog.text


def test_the_end_of_the_daemon_is_its_end() -> None:
    task = Task(*(OSError(errno.EMFILE, "Too many open files") for _ in range(1000)))

    async def main() -> None:
        with trio.move_on_after(1):
            await lasting(task)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert 5 < task.runs < 20
