"""Descriptors of clients: what they prove, and how they are closed without waiting for anybody."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mshared import tickets
from mshared.tickets import CLOSE_PATIENCE, Closer, Ticket, read_ticket
from msharefs.errors import BadDescriptorError

PATIENCE = 60


class TestReadTicket:
    """What an opened file stands for."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "file"
        path.touch()
        return path

    @pytest.fixture
    def device(self, file: Path) -> tuple[int, int]:
        number = file.stat().st_dev
        return os.major(number), os.minor(number)

    @pytest.fixture
    def opened(self, file: Path) -> Iterator[Callable[[int], int]]:
        fds: list[int] = []

        def open_it(flags: int) -> int:
            fds.append(os.open(file, flags))
            return fds[-1]

        yield open_it
        for fd in fds:
            os.close(fd)

    @pytest.mark.parametrize(("flags", "writable"), [(os.O_RDONLY, False), (os.O_RDWR, True)])
    @pytest.mark.parametrize("more", [0, os.O_NONBLOCK, os.O_APPEND, os.O_CLOEXEC])
    def test_inode_and_access(
        self,
        file: Path,
        device: tuple[int, int],
        opened: Callable[[int], int],
        flags: int,
        writable: bool,
        more: int,
    ) -> None:
        assert read_ticket(opened(flags | more), device) == Ticket(file.stat().st_ino, writable)

    def test_a_removed_file_is_still_the_same(
        self, file: Path, device: tuple[int, int], opened: Callable[[int], int]
    ) -> None:
        inode = file.stat().st_ino
        fd = opened(os.O_RDWR)
        file.unlink()
        assert read_ticket(fd, device) == Ticket(inode, writable=True)

    def test_writing_only_is_no_way_to_attach(self, device: tuple[int, int], opened: Callable[[int], int]) -> None:
        with pytest.raises(BadDescriptorError, match="open the file O_RDWR"):
            read_ticket(opened(os.O_WRONLY), device)

    @pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
    def test_a_path_proves_nothing(self, device: tuple[int, int], opened: Callable[[int], int], access: int) -> None:
        with pytest.raises(BadDescriptorError, match="O_PATH proves nothing"):
            read_ticket(opened(os.O_PATH | access), device)

    def test_files_elsewhere_are_no_tickets(self, device: tuple[int, int], opened: Callable[[int], int]) -> None:
        major, minor = device
        for other in ((major, minor + 1), (major + 1, minor), (minor, major)):
            with pytest.raises(BadDescriptorError, match="not of a file in this mount"):
                read_ticket(opened(os.O_RDWR), other)

    def test_what_is_no_file_is_no_ticket(self, device: tuple[int, int]) -> None:
        pipe = os.pipe()
        with socket.socket(socket.AF_UNIX) as sock:
            for fd in (sock.fileno(), pipe[0]):
                with pytest.raises(BadDescriptorError):
                    read_ticket(fd, device)
        for fd in pipe:
            os.close(fd)


class Closing:
    """Closes that are watched, of which some hang until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hanging: set[int] = set()
        self.let_go = threading.Event()
        self.begun: dict[int, str] = {}
        self.done: set[int] = set()
        self._changed = threading.Condition()
        monkeypatch.setattr(tickets, "os", SimpleNamespace(close=self.close))

    def close(self, fd: int) -> None:
        with self._changed:
            self.begun[fd] = threading.current_thread().name
            self._changed.notify_all()
        if fd in self.hanging:
            assert self.let_go.wait(PATIENCE)
        os.close(fd)
        with self._changed:
            self.done.add(fd)
            self._changed.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE)

    async def until(self, condition: Callable[[], bool]) -> None:
        """The same, while the loop runs on."""
        await trio.to_thread.run_sync(self.wait_until, condition)


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Closing]:
    found = Closing(monkeypatch)
    yield found
    found.let_go.set()


def new_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


class TestCloser:
    """Closing off the loop."""

    def test_not_in_the_thread_of_the_loop(self, closing: Closing) -> None:
        fds = [new_fd() for _ in range(3)]

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                Closer(nursery).close(fds)

        trio.run(main)
        assert closing.done == set(fds)
        assert threading.current_thread().name not in closing.begun.values()

    def test_nothing_to_close(self, closing: Closing) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                Closer(nursery).close([])

        trio.run(main)
        assert closing.begun == {}

    def test_a_descriptor_that_is_none_does_not_keep_others_open(self, closing: Closing) -> None:
        fd = new_fd()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                Closer(nursery).close([1 << 30, fd])

        trio.run(main)
        assert closing.done == {fd}

    def test_one_that_hangs_holds_up_its_own_connection_only(self, closing: Closing) -> None:
        hanging, behind, elsewhere = new_fd(), new_fd(), new_fd()
        closing.hanging = {hanging}

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                first, second = Closer(nursery), Closer(nursery)
                first.close([hanging])
                await closing.until(lambda: hanging in closing.begun)
                first.close([behind])
                second.close([elsewhere])
                await closing.until(lambda: elsewhere in closing.done)
                assert closing.begun.keys() == {hanging, elsewhere}
                closing.let_go.set()

        trio.run(main)
        assert closing.done == {hanging, behind, elsewhere}

    def test_one_that_hangs_is_left_alone_after_a_while(self, closing: Closing) -> None:
        """So that the end of a connection, and of the daemon, does not wait for ever."""
        hanging = new_fd()
        closing.hanging = {hanging}

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                Closer(nursery).close([hanging])
                await closing.until(lambda: hanging in closing.begun)
                clock.jump(CLOSE_PATIENCE)

        clock = MockClock()
        trio.run(main, clock=clock)
        assert closing.done == set()
        closing.let_go.set()
        closing.wait_until(lambda: closing.done == {hanging})

    def test_those_behind_one_that_hung_for_long_are_closed_in_the_end(self, closing: Closing) -> None:
        hanging, *behind = (new_fd() for _ in range(4))
        closing.hanging = {hanging}

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                closer = Closer(nursery)
                closer.close([hanging])
                await closing.until(lambda: hanging in closing.begun)
                closer.close(behind)
                await trio.testing.wait_all_tasks_blocked()
                clock.jump(CLOSE_PATIENCE)

        clock = MockClock()
        trio.run(main, clock=clock)
        assert closing.done == set()
        closing.let_go.set()
        closing.wait_until(lambda: closing.done == {hanging, *behind})

    def test_whoever_sends_more_can_wait_until_there_are_fewer(self, closing: Closing) -> None:
        """The one that is being closed counts as long as it is not."""
        hanging, *behind = (new_fd() for _ in range(4))
        closing.hanging = {hanging}
        waited: list[int] = []

        async def wait(closer: Closer, count: int) -> None:
            await closer.until_at_most(count)
            waited.append(count)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                closer = Closer(nursery)
                await closer.until_at_most(0)
                closer.close([hanging, *behind])
                await closing.until(lambda: hanging in closing.begun)
                for count in (4, 3, 0):
                    nursery.start_soon(wait, closer, count)
                await trio.testing.wait_all_tasks_blocked()
                assert waited == [4]
                closing.let_go.set()

        trio.run(main)
        assert sorted(waited) == [0, 3, 4]
        assert closing.done == {hanging, *behind}
