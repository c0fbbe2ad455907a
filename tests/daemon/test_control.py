"""The control socket: packets, descriptors and credentials, with a service that is none."""

from __future__ import annotations

import array
import errno
import logging
import os
import select
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mshared import control, processes
from mshared import records as rec
from mshared.answers import Answer, Caller, Pending, Tell
from mshared.book import Book, asked
from mshared.changes import Opened
from mshared.control import HELLO_PATIENCE, ControlServer
from mshared.packets import Packets, _descriptors
from mshared.pager import Pager
from msharefs import protocol
from msharefs.errors import NoSpaceError

DEVICE = (0, 1)
HELLO = protocol.Hello("a test")


class FakeService:
    """Answers as it is told to; notes what it was asked, and what was given up."""

    def __init__(self) -> None:
        self.lifetimes = SimpleNamespace(fork_events=True)
        self.book = Book()
        self.views = SimpleNamespace(stat=self.stat)
        self.asked: list[object] = []
        self.callers: list[Caller] = []
        self.given_up: list[Pending] = []
        self.error: Exception | None = None
        self.takes_files = False
        self.answer = Answer(protocol.Done())
        written = trio.Event()
        written.set()
        self.pending: Any = SimpleNamespace(region=SimpleNamespace(written=written))

    def _note(self, caller: Caller, request: object) -> None:
        self.callers.append(caller)
        self.asked.append(request)
        if self.error is not None:
            raise self.error

    def create(
        self, caller: Caller, request: protocol.Create, files: list[Opened], sponsor: list[int]
    ) -> tuple[Answer, Pending | None]:
        self._note(caller, (request, [file.fd for file in files], list(sponsor)))
        if self.takes_files:
            files.clear()
            sponsor.clear()
        return Answer(protocol.Offer(0, 16, 0, 0, readonly=False, device=False), self.answer.fds), self.pending

    async def fork(self, caller: Caller, request: protocol.Fork, tell: Tell) -> Answer:
        """Tell first, and make it then; another one's answer comes as always."""
        self._note(caller, request)
        if request.mode:
            tell(protocol.Done())
        self.asked.append("made")
        return attrs.evolve(self.answer, reply=protocol.Placed(7))

    def detach(self, caller: Caller, request: protocol.Detach) -> Answer:
        self._note(caller, request)
        return self.answer

    def mapped(self, caller: Caller, request: protocol.Mapped, pending: Pending, fds: list[int]) -> Answer:
        self._note(caller, (request, pending, list(fds)))
        fds.clear()
        return self.answer

    def settled(self, caller: Caller, pending: Pending) -> Answer:
        self._note(caller, pending)
        return self.answer

    async def stat(self, region: object) -> protocol.RegionStat:
        raise AssertionError(f"nobody may ask about {region}")

    def give_up(self, pending: Pending) -> None:
        self.given_up.append(pending)


CREATE = protocol.Create("it", None, 0, 0, exclusive=False, empty=False)


class Peer:
    """The other end, in the same loop."""

    def __init__(self, path: Path) -> None:
        self.sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._path = path

    async def __aenter__(self) -> Peer:
        await self.sock.connect(str(self._path))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.sock.close()

    async def say(
        self, message: protocol.Message, fds: list[int] | None = None, announced: int | None = None
    ) -> protocol.Message:
        return await self.send(protocol.encode(message, len(fds or []) if announced is None else announced), fds)

    async def send(self, packet: bytes, fds: list[int] | None = None) -> protocol.Message:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        await self.sock.sendmsg([packet], ancillary)
        answer, got = await self.receive()
        for fd in got:
            os.close(fd)
        return answer

    async def receive(self) -> tuple[protocol.Message, list[int]]:
        packet, ancillary, _, _ = await self.sock.recvmsg(protocol.MAX_PACKET, 100)
        return protocol.decode(packet)[0], _descriptors(ancillary)

    async def is_hung_up(self) -> bool:
        with trio.fail_after(10):
            return not await self.sock.recv(10)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def pager() -> Iterator[Pager]:
    pager = Pager()
    yield pager
    pager.close()


@pytest.fixture
def run(
    directory: Path, service: FakeService, pager: Pager, open_descriptors: Callable[[], int]
) -> Callable[[Callable[[Path], Awaitable[None]]], None]:
    """Serve while a function of clients runs; afterwards all is closed."""

    def go(work: Callable[[Path], Awaitable[None]], clock: trio.abc.Clock | None = None) -> None:
        async def main() -> None:
            path = directory / "socket"
            fake: Any = service
            server = ControlServer(fake, pager, Path("/run/mshare"), DEVICE)
            with trio.socket.from_stdlib_socket(control.listen(path)) as listener:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.serve, listener)
                    await work(path)
                    nursery.cancel_scope.cancel()

        before = open_descriptors()
        trio.run(main, clock=clock)
        assert open_descriptors() == before

    return go


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def failure(message: protocol.Message) -> int:
    assert isinstance(message, protocol.Failed), message
    assert message.message
    return message.errno


def test_anybody_may_connect_and_nobody_inherits_it(directory: Path) -> None:
    before = os.umask(0o077)
    try:
        sock = control.listen(directory / "socket")
    finally:
        os.umask(before)
    with sock:
        assert stat.S_IMODE((directory / "socket").stat().st_mode) == 0o666
        assert sock.type == socket.SOCK_SEQPACKET
        assert not sock.get_inheritable()


def test_a_place_where_nothing_can_listen(directory: Path, open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        control.listen(directory / "missing" / "socket")
    assert open_descriptors() == before


def test_what_an_answer_asks_for_is_done_once_it_was_sent(run: Any, service: FakeService) -> None:
    async def work(path: Path) -> None:
        async with Peer(path) as peer:
            await peer.say(HELLO)
            with trio.fail_after(10):
                assert await peer.say(protocol.Detach(1)) == protocol.Done()
                await done.wait()

    done = trio.Event()
    service.answer = Answer(protocol.Done(), then=done.set)
    run(work)


class TestToldBefore:
    """A request whose answer is sent before it is through."""

    FORK = protocol.Fork(1, "twin", 0o600)

    def test_it_is_answered_once(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                with trio.fail_after(10):
                    assert await peer.say(self.FORK) == protocol.Done()
                    assert await peer.say(attrs.evolve(self.FORK, mode=0)) == protocol.Placed(7)
                    assert await peer.say(protocol.Detach(1)) == protocol.Done()

        done: list[int] = []
        service.answer = Answer(protocol.Done(), then=lambda: done.append(len(service.asked)))
        run(work)
        assert done == [2, 4, 5]

    def test_also_when_it_cannot_be_sent_at_once(
        self, run: Any, service: FakeService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                with trio.fail_after(10):
                    assert await peer.say(self.FORK) == protocol.Placed(7)
                    assert await peer.say(protocol.Detach(1)) == protocol.Done()

        monkeypatch.setattr(Packets, "send_now", lambda *_: False)
        run(work)
        assert service.asked == [self.FORK, "made", protocol.Detach(1)]

    def test_what_goes_wrong_then_is_the_logs(
        self, run: Any, service: FakeService, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fork(_caller: object, _request: object, tell: Tell) -> Answer:
            tell(protocol.Done())
            raise ZeroDivisionError

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                with trio.fail_after(10):
                    assert await peer.say(self.FORK) == protocol.Done()
                    assert await peer.say(protocol.Detach(1)) == protocol.Done()

        service.fork = fork  # type: ignore[method-assign]
        run(work)
        assert "ZeroDivisionError" in caplog.text


class TestSessions:
    """Answers of a daemon before, and requests that come again."""

    def test_what_was_carried_out_is_answered_as_it_was_and_not_done_again(
        self, run: Any, service: FakeService
    ) -> None:
        """The answer is for that session, process and number only."""
        started = processes.start_time(os.getpid())
        packet = protocol.encode(protocol.Placed(4096))
        service.book.answers["mine"] = rec.Answered("mine", os.getpid(), started, 5, packet)
        service.book.answers["other"] = rec.Answered("other", os.getpid(), started, 4, packet)
        service.book.answers["theirs"] = rec.Answered("theirs", 1, started, 5, packet)

        async def work(path: Path) -> None:
            for session, answered, known in [("mine", 4, True), ("other", 4, False), ("theirs", 4, False)]:
                async with Peer(path) as peer:
                    welcome = await peer.say(protocol.Hello("a test", session, answered, waiting=True))
                    assert isinstance(welcome, protocol.Welcome)
                    assert welcome.known is known
                    if known:
                        assert await peer.receive() == (protocol.Placed(4096), [])

        run(work)
        assert service.asked == []

    def test_requests_are_numbered_from_the_last_that_was_answered(self, run: Any, service: FakeService) -> None:
        seen: list[Any] = []
        plain = service.detach

        def detach(caller: Caller, request: protocol.Detach) -> Answer:
            seen.append(asked.get())
            return plain(caller, request)

        service.detach = detach  # type: ignore[method-assign]

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(protocol.Hello("a test", "mine", 7))
                for _ in range(2):
                    await peer.say(protocol.Detach(1))

        run(work)
        assert [(each.session, each.pid, each.number) for each in seen] == [("mine", os.getpid(), n) for n in (8, 9)]
        assert seen[0].started == processes.start_time(os.getpid())


class TestConversation:
    """Hello, then requests."""

    def test_hello_comes_first(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                assert failure(await peer.say(protocol.Detach(1))) == errno.EPROTO
                welcome = await peer.say(HELLO)
                assert welcome == protocol.Welcome("mshared", "/run/mshare", fork_events=True)
                assert await peer.say(protocol.Detach(1)) == protocol.Done()
                assert failure(await peer.say(HELLO)) == errno.EPROTO

        run(work)
        assert service.asked == [protocol.Detach(1)]

    def test_the_caller_is_who_the_kernel_says(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                await peer.say(protocol.Detach(1))

        run(work)
        (caller,) = service.callers
        assert (caller.pid, caller.who.uid, caller.who.gid) == (os.getpid(), os.geteuid(), os.getegid())
        assert caller.who.groups == frozenset(os.getgroups())

    def test_our_own_errors_are_told_in_their_words(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                service.error = NoSpaceError("no room; buy some")
                assert await peer.say(protocol.Detach(1)) == protocol.Failed(errno.ENOSPC, "no room; buy some")

        run(work)

    def test_what_nobody_expected_is_told_without_details_and_logged_with_them(
        self, run: Any, service: FakeService, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                service.error = ZeroDivisionError("the details")
                answer = await peer.say(protocol.Detach(1))
                assert failure(answer) == errno.EIO
                assert "details" not in str(answer).replace("its log has the details", "")
                service.error = None
                assert await peer.say(protocol.Detach(1)) == protocol.Done()

        run(work)
        assert f"pid {os.getpid()}: request failed" in caplog.text
        assert "ZeroDivisionError: the details" in caplog.text

    def test_one_that_is_no_packet_is_told_and_the_next_is_heard(self, run: Any) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                assert failure(await peer.send(b"nonsense")) == errno.EPROTO
                await peer.say(HELLO)
                assert failure(await peer.send(b"MSHR\1\0\0\0{}")) == errno.EPROTO
                assert await peer.say(protocol.Detach(1)) == protocol.Done()

        run(work)

    def test_one_that_is_too_long_ends_it(self, run: Any) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                assert failure(await peer.send(bytes(protocol.MAX_PACKET + 2))) == errno.EPROTO
                assert await peer.is_hung_up()

        run(work)

    def test_saying_nothing_ends_it_in_the_end(self, run: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                with trio.fail_after(2 * HELLO_PATIENCE):
                    assert not await peer.sock.recv(10)

        run(work, clock=MockClock(autojump_threshold=0.05))
        assert f"pid {os.getpid()}: said nothing for 10 s" in caplog.text

    def test_who_has_said_hello_may_be_silent_for_ever(self, run: Any) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                await trio.sleep(100 * HELLO_PATIENCE)
                assert await peer.say(protocol.Detach(1)) == protocol.Done()

        run(work, clock=MockClock(autojump_threshold=0.05))

    def test_each_is_served_while_another_says_nothing(self, run: Any) -> None:
        async def work(path: Path) -> None:
            async with Peer(path), Peer(path) as silent, Peer(path) as peer:
                await silent.say(HELLO)
                await peer.say(HELLO)
                assert await peer.say(protocol.Detach(1)) == protocol.Done()

        run(work)


class TestDescriptorsOfRequests:
    """Each is taken by the service, or closed."""

    @staticmethod
    def wait_until_closed(reader: int) -> Awaitable[bool]:
        """Whether all other ends of the pipe are closed, soon."""
        return trio.to_thread.run_sync(lambda: bool(select.select([reader], [], [], 60)[0]))

    def test_too_many_or_too_few_are_refused_and_closed(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                for message, count, announced in (
                    (protocol.Detach(1), 1, 1),
                    (protocol.Detach(1), 0, 1),
                    (protocol.Detach(1), 1, 0),
                    (CREATE, 2, 2),
                    (protocol.Mapped(1, 0, 0), 0, 0),
                    (protocol.Mapped(1, 0, 0), 16, 16),
                    (protocol.GetStat(5), 1, 1),
                    (protocol.GetStat(), 0, 0),
                    (protocol.Attach(None, 0), 0, 0),
                    (protocol.Attach(None, 0), 2, 2),
                ):
                    reader, writer = os.pipe()
                    answer = await peer.say(message, [writer] * count, announced)
                    assert failure(answer) == errno.EBADF, message
                    os.close(writer)
                    assert await self.wait_until_closed(reader)
                    os.close(reader)

        run(work)
        assert service.asked == []

    def test_those_that_come_with_nonsense_are_closed(self, run: Any) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                for packet in (b"nonsense", bytes(protocol.MAX_PACKET + 2)):
                    reader, writer = os.pipe()
                    assert failure(await peer.send(packet, [writer] * 3)) == errno.EPROTO
                    os.close(writer)
                    assert await self.wait_until_closed(reader)
                    os.close(reader)

        run(work)

    def test_one_that_the_service_takes_is_its_own(self, run: Any, service: FakeService, pipe: tuple[int, int]) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                offer = await peer.say(CREATE)
                assert isinstance(offer, protocol.Offer)
                service.answer = Answer(protocol.Attached(5))
                mapped = protocol.Mapped(offer.offer, 0, 0)
                assert await peer.say(mapped, [pipe[1]]) == protocol.Attached(5)
                request, pending, (fd,) = service.asked[-1]  # type: ignore[misc]
                assert (request, pending) == (mapped, service.pending)
                assert os.fstat(fd).st_ino == os.fstat(pipe[1]).st_ino
                assert failure(await peer.say(mapped, [pipe[1]])) == errno.ENOENT
                os.close(fd)

        run(work)
        assert service.given_up == []

    def test_one_that_it_does_not_take_is_closed(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                offer = await peer.say(CREATE)
                assert isinstance(offer, protocol.Offer)
                reader, writer = os.pipe()
                for error in (NoSpaceError("full"), ZeroDivisionError("a mistake")):
                    service.error = error
                    assert failure(await peer.say(protocol.Mapped(offer.offer, 0, 0), [writer]))
                os.close(writer)
                assert await self.wait_until_closed(reader)
                os.close(reader)

        run(work)

    def test_those_of_an_answer_stay_the_daemons(self, run: Any, service: FakeService, pipe: tuple[int, int]) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                service.answer = Answer(protocol.Done(), pipe)
                await peer.sock.send(protocol.encode(CREATE))
                offer, fds = await peer.receive()
                assert isinstance(offer, protocol.Offer)
                assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(fd).st_ino for fd in pipe]
                for fd in fds:
                    os.close(fd)

        run(work)
        assert all(os.fstat(fd) for fd in pipe)


class TestDonatedFiles:
    """Files that come with a request to create become the daemon's own, or are closed."""

    FILES = tuple(protocol.DonatedFile(n % 2, 0, shared=True) for n in range(3))
    RANGES = tuple(protocol.DonatedRange(n << 12, 1 << 12, 3, file) for n, file in enumerate(FILES))
    REQUEST = attrs.evolve(CREATE, donated=RANGES)

    def test_those_that_are_taken_stay_open(self, run: Any, service: FakeService) -> None:
        fds = [os.memfd_create("it") for _ in range(2)]
        service.takes_files = True

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                assert isinstance(await peer.say(self.REQUEST, fds), protocol.Offer)
                request, taken, sponsor = service.asked[-1]  # type: ignore[misc]
                assert (request, sponsor) == (self.REQUEST, [])
                assert [os.fstat(fd).st_ino for fd in taken] == [os.fstat(fd).st_ino for fd in fds]
                for fd in taken:
                    os.close(fd)

        run(work)
        for fd in fds:
            os.close(fd)

    @pytest.mark.parametrize("files", [0, 2])
    @pytest.mark.parametrize("takes", [False, True])
    def test_a_sponsor_comes_last_and_is_taken_or_closed(
        self, run: Any, service: FakeService, files: int, *, takes: bool
    ) -> None:
        """``run`` counts descriptors."""
        fds = [os.memfd_create("it") for _ in range(files)] + [os.eventfd(0)]
        service.takes_files = takes
        request = attrs.evolve(self.REQUEST if files else CREATE, kept=True)

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                assert failure(await peer.say(request, fds[:-1])) == errno.EBADF
                assert isinstance(await peer.say(request, fds), protocol.Offer)
                _, taken, (sponsor,) = service.asked[-1]  # type: ignore[misc]
                assert len(taken) == files
                if takes:
                    os.eventfd_write(sponsor, 5)
                    assert os.eventfd_read(fds[-1]) == 5
                    for fd in (*taken, sponsor):
                        os.close(fd)

        run(work)
        for fd in fds:
            os.close(fd)

    @pytest.mark.parametrize("error", [None, NoSpaceError("full"), ZeroDivisionError("a mistake")])
    def test_those_that_are_not_are_closed(self, run: Any, service: FakeService, error: Exception | None) -> None:
        """``run`` counts them."""
        fds = [os.memfd_create("it") for _ in range(2)]
        service.error = error

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                assert isinstance(await peer.say(self.REQUEST, fds), protocol.Failed if error else protocol.Offer)

        run(work)
        for fd in fds:
            os.close(fd)

    def test_one_that_cannot_be_mapped(self, run: Any, service: FakeService, pipe: tuple[int, int]) -> None:
        fd = os.memfd_create("it")

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                assert failure(await peer.say(self.REQUEST, [fd, pipe[0]])) == errno.ENODEV

        run(work)
        assert service.asked == []
        os.close(fd)

    @pytest.mark.parametrize("count", [0, 1, 3, 16])
    def test_as_many_as_are_named(self, run: Any, service: FakeService, pipe: tuple[int, int], count: int) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                assert failure(await peer.say(self.REQUEST, [pipe[0]] * count)) == errno.EBADF

        run(work)
        assert service.asked == []


class TestOffers:
    """An offer is of one connection, and for once."""

    def test_one_that_is_staged_lasts_until_it_is_settled(
        self, run: Any, service: FakeService, pipe: tuple[int, int]
    ) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                for end in ("settled", "hung up"):
                    offer = await peer.say(CREATE)
                    assert isinstance(offer, protocol.Offer)
                    mapped = protocol.Mapped(offer.offer, 0, 0, (1 << 40,))
                    assert await peer.say(mapped, [pipe[1]]) == protocol.Done()
                    _, _, (fd,) = service.asked[-1]  # type: ignore[misc]
                    os.close(fd)
                    if end == "settled":
                        assert await peer.say(protocol.Settled(offer.offer)) == protocol.Done()
                        assert service.asked[-1] == service.pending
                        assert failure(await peer.say(protocol.Settled(offer.offer))) == errno.ENOENT
            while not service.given_up:
                await trio.lowlevel.checkpoint()

        run(work)
        assert service.given_up == [service.pending]

    def test_each_has_a_number_of_its_own(self, run: Any) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                offers = [await peer.say(CREATE) for _ in range(3)]
                assert len({offer.offer for offer in offers if isinstance(offer, protocol.Offer)}) == 3

        run(work)

    def test_what_was_never_taken_is_given_up_at_the_end(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                await peer.say(CREATE)
                await peer.say(CREATE)
            while len(service.given_up) < 2:
                await trio.lowlevel.checkpoint()

        run(work)
        assert service.given_up == [service.pending] * 2

    def test_what_is_aborted_is_given_up_at_once_and_once(self, run: Any, service: FakeService) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                await peer.say(HELLO)
                offer = await peer.say(CREATE)
                assert isinstance(offer, protocol.Offer)
                assert await peer.say(protocol.Abort(offer.offer)) == protocol.Done()
                assert service.given_up == [service.pending]
                assert failure(await peer.say(protocol.Abort(offer.offer))) == errno.ENOENT

        run(work)
        assert service.given_up == [service.pending]

    def test_those_of_others_are_none(self, run: Any, service: FakeService, pipe: tuple[int, int]) -> None:
        async def work(path: Path) -> None:
            async with Peer(path) as peer, Peer(path) as thief:
                await peer.say(HELLO)
                await thief.say(HELLO)
                offer = await peer.say(CREATE)
                assert isinstance(offer, protocol.Offer)
                assert failure(await thief.say(protocol.Mapped(offer.offer, 0, 0), [pipe[1]])) == errno.ENOENT
                assert failure(await thief.say(protocol.Abort(offer.offer))) == errno.ENOENT
                assert service.given_up == []

        run(work)


class TestCredentials:
    """Who connects is known, or not served."""

    @pytest.mark.parametrize("number", [errno.ERANGE, errno.ENOPROTOOPT])
    def test_without_credentials_nobody_is_served(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
    ) -> None:
        """ERANGE: more groups than Python can ask for."""

        def refuse(_sock: object) -> Caller:
            raise OSError(number, os.strerror(number))

        async def work(path: Path) -> None:
            async with Peer(path) as peer:
                assert await peer.is_hung_up()
            monkeypatch.undo()
            async with Peer(path) as peer:
                assert isinstance(await peer.say(HELLO), protocol.Welcome)

        monkeypatch.setattr(Caller, "at", refuse)
        run(work)
        assert "a connection has no credentials" in caplog.text

    @pytest.mark.usefixtures("as_root")
    def test_all_groups_count_and_too_many_are_refused(
        self, other_process: Callable[..., tuple[int, socket.socket]]
    ) -> None:
        def connect(groups: list[int], name: str) -> Callable[[socket.socket], None]:
            def work(sock: socket.socket) -> None:
                os.setgroups(groups)
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mine:
                    mine.connect(f"\0{name}")
                    sock.send(b"connected")
                    sock.recv(1)

            return work

        async def caller(groups: list[int]) -> Caller:
            name = f"msharefs-test-{os.getpid()}-{len(groups)}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(f"\0{name}")
                listener.listen()
                other_process(connect(groups, name))[1].recv(9)
                with trio.socket.from_stdlib_socket(listener.accept()[0]) as accepted:
                    return Caller.at(accepted)

        groups = list(range(5000, 5256))
        assert trio.run(caller, groups).who.groups == frozenset(groups)
        assert trio.run(caller, []).who.groups == frozenset()
        with pytest.raises(OSError, match=os.strerror(errno.ERANGE)):
            trio.run(caller, [*groups, 6000])


class TestAccepting:
    """Connections go on coming, whatever one of them brings."""

    class Listener:
        """Fails as it is told to, and then for good."""

        def __init__(self, *numbers: int) -> None:
            self.numbers = list(numbers)
            self.times: list[float] = []

        async def accept(self) -> tuple[Any, Any]:
            self.times.append(trio.current_time())
            await trio.lowlevel.checkpoint()
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))

    @pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED])
    def test_what_passes_is_waited_for(
        self, service: FakeService, pager: Pager, caplog: pytest.LogCaptureFixture, number: int
    ) -> None:
        fake: Any = service
        listener: Any = self.Listener(number, number, errno.EBADF)

        async def main() -> None:
            with pytest.RaisesGroup(OSError, flatten_subgroups=True):
                await ControlServer(fake, pager, Path("/m"), DEVICE).serve(listener)

        trio.run(main, clock=MockClock(autojump_threshold=0))
        assert len(listener.times) == 3
        assert listener.times[1] > listener.times[0]
        assert caplog.text.count("cannot accept") == 2
