"""Attachments from first to last: clients are processes of the test, and the pager is drained by the test itself."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import MockClock

from mshared import apply, processes, uffd
from mshared.backing import MemfdStore
from mshared.lifetimes import SWEEP_INTERVAL, Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.pager import RETRY_DELAY, Pager
from mshared.uffd import Outcome
from mshared.under_way import Staged
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.errors import BadDescriptorError, InvalidArgumentError, NotFoundError
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership
from msharefs.protocol import ANCHOR_PAGES
from msharefs.region import BackingKind

MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 1, 2, 0x20, 0x4000, 0x100000
MAYMOVE_FIXED = 3
C = ctypes.CDLL(None)
C.mmap.restype = ctypes.c_void_p
C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

Start = Callable[[Callable[[socket.socket], object]], tuple[int, socket.socket]]


def serve(sock: socket.socket) -> None:
    """In a client: do what it is told."""
    faulthandler.disable()
    while True:
        text, fds, _, _ = socket.recv_fds(sock, 100, 1)
        match text.decode().split():
            case ["map", start, size, readonly]:
                flags = (MAP_PRIVATE | MAP_NORESERVE if int(readonly) else MAP_SHARED) | MAP_FIXED_NOREPLACE
                C.mmap(int(start), int(size), 1 if int(readonly) else 3, flags, fds[0], 0)
                anchor = C.mmap(None, ANCHOR_PAGES * PAGE_SIZE, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                socket.send_fds(sock, [b"%d" % anchor], [uffd.new(None).fd])
            case ["move", start, to, size]:
                C.mremap(*(ctypes.c_size_t(int(each)) for each in (start, size, size, MAYMOVE_FIXED, to)))
                sock.send(b"moved")
            case ["look", address]:
                sock.send(b"%d" % ctypes.c_ubyte.from_address(int(address)).value)
            case ["fork"]:
                if os.fork():
                    sock.send(b"forked")
            case ["exec"]:
                os.dup2(sock.fileno(), 0)
                os.dup2(sock.fileno(), 1)
                os.execv("/bin/sh", ["sh", "-c", "echo here; read _"])
            case _:
                return


class Client:
    """A process that maps what it is sent, and sends its userfaultfd back."""

    def __init__(self, start: Start) -> None:
        self.pid, self._sock = start(serve)

    def map(self, region: LiveRegion, *, readonly: bool = False) -> tuple[int, int]:
        """Have it map a region where it lies; its userfaultfd, and the address of an anchor."""
        fd = region.backing.readonly if readonly else region.backing.writable
        words = b"map %d %d %d" % (region.model.ar.start, region.model.ar.size, readonly)
        socket.send_fds(self._sock, [words], [fd])
        answer, (userfaultfd,), _, _ = socket.recv_fds(self._sock, 100, 1)
        return userfaultfd, int(answer)

    def tell(self, *words: object) -> None:
        self._sock.send(" ".join(map(str, words)).encode())

    def answer(self) -> str:
        return self._sock.recv(100).decode()

    def status(self) -> int:
        """What it ended with."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class World:
    """A daemon's memory of who is attached, without the daemon around it."""

    def __init__(self, features: abi.Feature) -> None:
        self.pager = Pager()
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        self.lifetimes = Lifetimes(self.namespace, self.pager, features, None)

    def region(self, name: str = "it", *, empty: bool = False) -> LiveRegion:
        who = Credentials(0, 0)
        model = self.namespace.create(name, None, PMD_SIZE, 0o600, BackingKind.SMALL, who, empty=empty)
        return self.lifetimes.add_region(model, MemfdStore().create(model.id, BackingKind.SMALL, PMD_SIZE))

    def attach(self, region: LiveRegion, client: Client, *, readonly: bool = False) -> LiveAttachment:
        fd, anchor = client.map(region, readonly=readonly)
        start = region.model.ar.start
        return self.lifetimes.attach(region, start, client.pid, fd, anchor, readonly=readonly)

    def serve_until(self, condition: Callable[[], bool]) -> None:
        """See to what the kernel reports."""
        for _ in range(1000):
            if condition():
                return
            select.select([self.pager._epoll.fileno()], [], [], 0.01)  # What else it may wait for is not in there.
            self.pager.drain()
        pytest.fail("nothing is reported")

    def close(self) -> None:
        for region in self.lifetimes.regions():
            for attachment in list(region.attachments):
                self.lifetimes.drop(attachment)
            if region in self.lifetimes.regions():
                self.lifetimes.forget(region)
        self.lifetimes.settling.finish()
        self.pager.close()


@pytest.fixture
def world() -> Iterator[World]:
    """Where forks are not reported."""
    world = World(uffd.WANTED)
    yield world
    world.close()


@pytest.fixture
def forking(as_root: None) -> Iterator[World]:
    """Where forks are reported."""
    world = World(uffd.WANTED | abi.Feature.EVENT_FORK)
    yield world
    world.close()


@pytest.fixture
def new_client(other_process: Start) -> Callable[[], Client]:
    return lambda: Client(other_process)


@pytest.fixture
def client(new_client: Callable[[], Client]) -> Client:
    return new_client()


class TestAttach:
    """A window becomes a reference."""

    def test_it_counts_and_makes_the_region_ready(self, world: World, client: Client) -> None:
        region = world.region()
        assert not region.model.ready
        live = world.attach(region, client)
        assert region.model.ready
        assert region.settled.is_set()
        assert (live.model.pid, live.model.window, live.model.readonly) == (client.pid, region.model.ar, False)
        assert world.lifetimes.attachment(live.model.id) is live
        assert world.lifetimes.attachment_count == 1
        assert world.lifetimes.of_process(region.model, client.pid) == [live]
        assert world.lifetimes.of_process(region.model, os.getpid()) == []
        assert region.attachments == [live]

    def test_dropping_leaves_the_region_and_nothing_open(
        self, world: World, client: Client, open_descriptors: Callable[[], int]
    ) -> None:
        region = world.region()
        before = open_descriptors()
        live = world.attach(region, client)
        assert open_descriptors() == before + 2  # The userfaultfd, and a pidfd.
        world.lifetimes.drop(live)
        world.lifetimes.drop(live)
        assert open_descriptors() == before
        assert world.lifetimes.attachment_count == 0
        assert world.lifetimes.regions() == [region]
        with pytest.raises(NotFoundError, match=f"there is no attachment {live.model.id}; attach again"):
            world.lifetimes.attachment(live.model.id)

    def test_a_process_with_two_windows_is_watched_until_the_last_goes(
        self, world: World, client: Client, open_descriptors: Callable[[], int]
    ) -> None:
        regions = [world.region("one"), world.region("two")]
        before = open_descriptors()
        lives = [world.attach(region, client) for region in regions]
        assert open_descriptors() == before + 3
        world.lifetimes.drop(lives[0])
        assert open_descriptors() == before + 2
        client.kill()
        world.serve_until(lambda: not world.lifetimes.attachment_count)
        assert open_descriptors() == before

    def test_what_is_no_userfaultfd_is_refused(self, world: World, client: Client) -> None:
        region = world.region()
        fd, anchor = client.map(region)
        null = os.open("/dev/null", os.O_RDWR)
        with pytest.raises(BadDescriptorError, match="no userfaultfd"):
            world.lifetimes.attach(region, region.model.ar.start, client.pid, null, anchor, readonly=False)
        for each in (fd, null):
            os.close(each)
        assert not region.model.ready
        assert world.lifetimes.attachment_count == 0

    def test_a_used_one_is_refused_and_stays_the_callers(self, world: World, client: Client) -> None:
        region = world.region()
        live = world.attach(region, client)
        again = os.dup(live.uffd.fd)
        with pytest.raises(BadDescriptorError, match="send a new one"):
            world.lifetimes.attach(region, region.model.ar.start, client.pid, again, 0, readonly=False)
        os.close(again)
        assert region.attachments == [live]

    @pytest.mark.parametrize("what", ["window", "anchor", "process"])
    def test_what_is_not_there_is_refused_and_changes_nothing(
        self, forking: World, client: Client, gone: int, what: str, open_descriptors: Callable[[], int]
    ) -> None:
        region = forking.region(empty=True)
        mine = forking.region("another")
        fd, anchor = client.map(mine if what == "window" else region)
        before = open_descriptors()
        with pytest.raises(InvalidArgumentError, match="cannot be armed"):
            forking.lifetimes.attach(
                region,
                region.model.ar.start,
                gone if what == "process" else client.pid,
                fd,
                PAGE_SIZE if what == "anchor" else anchor,
                readonly=False,
            )
        assert open_descriptors() == before
        os.close(fd)
        assert not region.model.ready
        assert region.model.attachments == {}
        assert region.attachments == []
        assert forking.lifetimes.attachment_count == 0

    def test_a_region_that_was_ready_stays_so(self, world: World, client: Client) -> None:
        region = world.region(empty=True)
        world.attach(region, client)
        fd, anchor = client.map(world.region("another"))
        with pytest.raises(InvalidArgumentError):
            world.lifetimes.attach(region, region.model.ar.end + PMD_SIZE, client.pid, fd, anchor, readonly=False)
        os.close(fd)
        assert region.model.ready
        assert len(region.attachments) == 1

    def test_a_window_is_at_an_address_that_may_be(self, world: World, client: Client) -> None:
        region = world.region()
        fd, anchor = client.map(region)
        with pytest.raises(InvalidArgumentError):
            world.lifetimes.attach(region, region.model.ar.start + 1, client.pid, fd, anchor, readonly=False)
        os.close(fd)
        assert region.model.attachments == {}


class TestDeath:
    """References go, however a process ends."""

    def test_a_process_that_is_killed(self, world: World, client: Client, new_client: Callable[[], Client]) -> None:
        region, other = world.region(), new_client()
        world.attach(region, client)
        survivor = world.attach(region, other)
        client.kill()
        world.serve_until(lambda: region.attachments == [survivor])
        assert world.lifetimes.attachment_count == 1

    def test_a_process_that_calls_exec_lives_on_without(self, world: World, client: Client) -> None:
        region = world.region()
        world.attach(region, client)
        client.tell("exec")
        assert client.answer() == "here\n"
        world.pager.drain()
        assert world.lifetimes.attachment_count == 1
        world.lifetimes.sweep()
        assert world.lifetimes.attachment_count == 0
        assert world.lifetimes.regions() == [region]

    def test_sweeping_takes_the_dead_of_those_that_are_named(
        self, world: World, client: Client, new_client: Callable[[], Client]
    ) -> None:
        other = new_client()
        one, two = world.region("one"), world.region("two")
        world.attach(one, client)
        world.attach(two, other)
        client.kill()
        other.kill()
        world.lifetimes.sweep(two.attachments)
        assert (len(one.attachments), len(two.attachments)) == (1, 0)

    def test_who_lives_is_not_swept_away(self, world: World, client: Client) -> None:
        world.attach(world.region(), client)
        world.lifetimes.sweep()
        assert world.lifetimes.attachment_count == 1

    def test_a_region_without_a_name_goes_with_its_last_reference(
        self, world: World, client: Client, new_client: Callable[[], Client], open_descriptors: Callable[[], int]
    ) -> None:
        other = new_client()
        before = open_descriptors()
        region = world.region()
        world.attach(region, client)
        world.attach(region, other)
        world.namespace.remove(region.model, Credentials(0, 0))
        client.kill()
        world.serve_until(lambda: len(region.attachments) == 1)
        assert world.lifetimes.regions() == [region]
        other.kill()
        world.serve_until(lambda: world.lifetimes.regions() == [])
        assert open_descriptors() == before

    def test_sweeping_goes_on_for_ever(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        times: list[float] = []
        monkeypatch.setattr(world.lifetimes, "sweep", lambda: times.append(trio.current_time() - began))

        async def main() -> None:
            nonlocal began
            began = trio.current_time()
            with trio.move_on_after(3.5 * SWEEP_INTERVAL):
                await world.lifetimes.sweep_forever()

        began = 0.0
        trio.run(main, clock=MockClock(autojump_threshold=0))
        assert times == pytest.approx([SWEEP_INTERVAL, 2 * SWEEP_INTERVAL, 3 * SWEEP_INTERVAL])


class TestFork:
    """Children inherit windows, and are told apart."""

    def test_a_child_is_attached_before_it_has_a_pid(self, forking: World, client: Client) -> None:
        region = forking.region()
        parent = forking.attach(region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        assert client.answer() == "forked"
        child = region.attachments[1]
        assert child.model.pid is None
        assert child.model.forked_from == parent.model.id
        assert (child.anchor, child.parent_pid) == (parent.anchor, client.pid)
        assert region.model.process_count == 2

    def test_it_is_found_among_the_children_of_its_parent(self, forking: World, client: Client) -> None:
        region = forking.region()
        forking.attach(region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        client.answer()
        forking.lifetimes.forks.look()
        (expected,) = processes.children_of(client.pid)
        assert region.attachments[1].model.pid == expected
        assert region.model.pids == {client.pid, expected}

    def test_it_is_told_which_attachment_is_its_own(self, forking: World, client: Client) -> None:
        region = forking.region()
        parent = forking.attach(region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        client.answer()
        (pid,) = processes.children_of(client.pid)
        assert forking.lifetimes.adopt(parent.model.id, pid) is region.attachments[1]
        for wrong in ((parent.model.id + 77, pid), (parent.model.id, os.getpid())):
            with pytest.raises(NotFoundError, match="has inherited no window"):
                forking.lifetimes.adopt(*wrong)

    def test_its_death_is_its_own(self, forking: World, client: Client) -> None:
        region = forking.region()
        parent = forking.attach(region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        client.answer()
        (pid,) = processes.children_of(client.pid)
        forking.lifetimes.adopt(parent.model.id, pid)
        os.kill(pid, signal.SIGKILL)
        forking.serve_until(lambda: region.attachments == [parent])

    @pytest.mark.parametrize("seen_by", ["sweeper", "who looks for children"])
    def test_one_that_dies_before_it_is_found_is_dropped(self, forking: World, client: Client, seen_by: str) -> None:
        region = forking.region()
        parent = forking.attach(region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        client.answer()
        (pid,) = processes.children_of(client.pid)
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)
        if seen_by == "sweeper":
            forking.lifetimes.sweep()
        else:
            forking.lifetimes.forks.look()
        assert region.attachments == [parent]

    def test_one_that_is_gone_when_it_is_found_is_dropped(self, forking: World, client: Client, gone: int) -> None:
        region = forking.region()
        parent = forking.attach(region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        client.answer()
        forking.lifetimes._on_child_found(region.attachments[1], gone)
        assert region.attachments == [parent]


class TestForkWithoutEvents:
    """Where the kernel reports no forks a child brings a userfaultfd of its own."""

    def test_the_child_of_one_that_is_attached(self, world: World, new_client: Callable[[], Client]) -> None:
        """The test itself is the parent here: it has a window, and forked the client."""
        region = world.region()
        model = world.namespace.attach(region.model, region.model.ar.start, os.getpid(), readonly=True)
        client = new_client()
        fd, anchor = client.map(region, readonly=True)
        parent = LiveAttachment(model, region, None, anchor)  # type: ignore[arg-type]
        world.lifetimes._attachments[model.id] = parent
        child = world.lifetimes.adopt_without_events(model.id, client.pid, fd)
        assert child.model.forked_from == model.id
        assert (child.model.pid, child.model.readonly, child.anchor) == (client.pid, True, anchor)
        world.lifetimes.drop(child)
        del world.lifetimes._attachments[model.id]

    def test_nobody_elses(self, world: World, client: Client, new_client: Callable[[], Client]) -> None:
        region = world.region()
        parent = world.attach(region, client)
        stranger = new_client()
        fd, _ = stranger.map(region)
        with pytest.raises(NotFoundError, match="is no child"):
            world.lifetimes.adopt_without_events(parent.model.id, stranger.pid, fd)
        with pytest.raises(NotFoundError, match="attach again"):
            world.lifetimes.adopt_without_events(parent.model.id + 1, stranger.pid, fd)
        os.close(fd)


class TestFaults:
    """What the kernel asks is answered as the region says."""

    def test_a_touch_of_a_hole_is_a_sigbus(
        self, world: World, client: Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        region = world.region(empty=True)
        world.attach(region, client)
        client.tell("look", region.model.ar.start + 5 * PAGE_SIZE)
        world.serve_until(lambda: region.model.faults > 0)
        assert client.status() == -signal.SIGBUS
        assert f"region it pid {client.pid}: SIGBUS to thread {client.pid} at" in caplog.text
        assert region.model.faults == 1

    def test_paged_memory_is_filled(self, client: Client) -> None:
        world = World(uffd.WANTED)
        world.namespace.policy = Policy(paging_all=True)
        region = world.region()
        world.attach(region, client)
        client.tell("look", region.model.ar.start)
        world.serve_until(lambda: region.model.faults > 0)
        assert client.answer() == "0"
        world.close()

    def test_while_a_region_changes_they_wait(self, world: World, client: Client) -> None:
        region = world.region(empty=True)
        world.attach(region, client)
        region.changing = True
        client.tell("look", region.model.ar.start)
        assert select.select([world.pager._epoll.fileno()], [], [], 60)[0]
        for _ in range(5):
            world.pager.drain()
        assert region.model.faults == 0
        ar = AddrRange.sized(region.model.ar.start, PMD_SIZE)
        region.model.mm.mmap(ar, PMD_SIZE, fixed=True)
        region.changing = False
        world.pager.drain()
        assert region.model.faults == 1
        assert client.answer() == "0"

    def test_what_the_kernel_does_not_take_is_tried_ever_more_seldom(
        self, world: World, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process can have its forks wait for ever, and its faults with them: it must not take the loop's time."""
        region = world.region(empty=True)
        region.model.mm.mmap(AddrRange.sized(region.model.ar.start, PMD_SIZE), PMD_SIZE, fixed=True)
        live = world.attach(region, client)
        delays: list[float] = []
        monkeypatch.setattr(apply, "answer_fault", lambda *_args: Outcome.RETRY)
        monkeypatch.setattr(world.pager, "later", lambda _work, delay=0.0: delays.append(delay))
        now = time.monotonic_ns()
        monkeypatch.setattr(time, "monotonic_ns", lambda: now)
        for waited in (0, 0.001, 0.1, 10, 1000):
            since = now - int(waited * 1e9)
            world.lifetimes.faults.decide(live, abi.FLAG_WP, region.model.ar.start, client.pid, since)
        assert delays[0] == 0
        assert delays[1] < RETRY_DELAY
        assert 0.01 < delays[2] < 0.1
        assert delays[3] == delays[4] == pytest.approx(1)

    def test_those_of_an_attachment_that_went_meanwhile_are_nobodys(self, world: World, client: Client) -> None:
        region = world.region(empty=True)
        live = world.attach(region, client)
        client.kill()
        world.lifetimes.drop(live)
        world.lifetimes.faults.decide(live, abi.FLAG_WRITE, region.model.ar.start, client.pid, 0)
        assert region.model.faults == 0

    @pytest.mark.parametrize("distance", [-PAGE_SIZE, PMD_SIZE])
    def test_those_outside_the_window_are_refused(self, world: World, client: Client, distance: int) -> None:
        """An anchor is registered too: whoever touches it harms only itself."""
        region = world.region(empty=True)
        live = world.attach(region, client)
        world.lifetimes.faults.decide(live, abi.FLAG_WRITE, region.model.ar.start + distance, client.pid, 0)
        assert (region.model.faults, live.refusals) == (0, 1)


class TestMoves:
    """What a process moves stays armed."""

    ELSEWHERE = 0x6400_0000_0000

    def test_memory_that_left_its_window_is_none(self, world: World, client: Client) -> None:
        region = world.region(empty=True)
        live = world.attach(region, client)
        client.tell("move", region.model.ar.start, self.ELSEWHERE, PMD_SIZE)
        world.serve_until(lambda: select.select([client._sock], [], [], 0)[0] != [])
        assert client.answer() == "moved"
        client.tell("look", self.ELSEWHERE + 5 * PAGE_SIZE)
        world.serve_until(lambda: live.refusals > 0)
        assert client.status() == -signal.SIGBUS
        assert region.model.faults == 0

    def _attach_with_second_page_elsewhere(
        self, world: World, region: LiveRegion, client: Client
    ) -> tuple[LiveAttachment, list[Staged]]:
        start = region.model.ar.start
        fd, anchor = client.map(region)
        client.tell("move", start + PAGE_SIZE, self.ELSEWHERE, PAGE_SIZE)
        assert client.answer() == "moved"
        staged = [Staged(AddrRange.sized(start + PAGE_SIZE, PAGE_SIZE), Address(self.ELSEWHERE))]
        live = world.lifetimes.attach(region, start, client.pid, fd, anchor, readonly=False, staged=staged)
        return live, staged

    def test_what_is_staged_is_armed_where_it_stands_and_where_it_goes(self, world: World, client: Client) -> None:
        region = world.region(empty=True)
        start = region.model.ar.start
        live, staged = self._attach_with_second_page_elsewhere(world, region, client)
        assert (live.staged, region.model.ready, region.settled.is_set()) == (staged, False, False)
        client.tell("move", self.ELSEWHERE, start + PAGE_SIZE, PAGE_SIZE)
        world.serve_until(lambda: not live.staged)
        assert client.answer() == "moved"
        assert (region.model.ready, region.settled.is_set()) == (False, False)
        client.tell("look", start + PAGE_SIZE)
        world.serve_until(lambda: region.model.faults > 0)
        assert client.status() == -signal.SIGBUS

    def test_a_child_has_staged_what_its_parent_has(self, forking: World, client: Client) -> None:
        region = forking.region(empty=True)
        parent, staged = self._attach_with_second_page_elsewhere(forking, region, client)
        client.tell("fork")
        forking.serve_until(lambda: len(region.attachments) == 2)
        _, child = region.attachments
        assert (child.staged, region.model.ready) == (staged, False)
        assert child.staged is not parent.staged
