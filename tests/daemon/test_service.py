"""Requests, from message to answer: with memfds for memory, and nobody attached."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mshared import apply, donations, service, sparse
from mshared.answers import Answer, Caller, Pending
from mshared.backing import BackingStore, MemfdStore
from mshared.changes import Opened
from mshared.files import TMPFS_MAGIC
from mshared.lifetimes import Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.pager import Pager
from mshared.service import INODES_A_REGION, Service
from mshared.tickets import Ticket
from mshared.under_way import Staged
from msharefs import protocol, uffd_abi
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Punch
from msharefs.errors import (
    AccessDeniedError,
    BadDescriptorError,
    ExistsError,
    InvalidArgumentError,
    MshareError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    NotSupportedError,
    ProtocolError,
    TryAgainError,
)
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership
from msharefs.region import AttachmentId, BackingKind

ME = Caller(os.getpid(), Credentials(1000, 1000))
STRANGER = Caller(1, Credentials(2000, 2000))
DEVICE = (0, 1)
AT = 0x5000_0000_0000


class FullStore(MemfdStore):
    """Where there is no room."""

    def create(self, *_args: object) -> Any:
        raise NoSpaceError("no room")


class World:
    """A service and what it works on."""

    def __init__(self, store: BackingStore | None = None, device: int | None = None) -> None:
        self.pager = Pager()
        self.namespace = Namespace(Ownership(0, 0, 0o1777), Policy())
        self.lifetimes = Lifetimes(self.namespace, self.pager, uffd_abi.Feature(0), device)
        changes: Any = None
        self.service = Service(
            self.namespace,
            self.lifetimes,
            store or MemfdStore(),
            default_backing=BackingKind.SMALL,
            changes=changes,
        )

    def create(self, caller: Caller = ME, files: list[Opened] | None = None, **changed: Any) -> tuple[Answer, Pending]:
        answer, pending = self.service.create(caller, request(**changed), files or [])
        assert pending is not None
        return answer, pending

    def attach(self, region: LiveRegion, pid: int) -> LiveAttachment:
        """As if that process had mapped the region."""
        model = self.namespace.attach(region.model, region.model.ar.start, pid, readonly=False)
        uffd: Any = AliveUffd()
        live = LiveAttachment(model, region, uffd, Address(0))
        self.lifetimes._add(live)
        region.settled.set()
        return live

    def close(self) -> None:
        for region in self.lifetimes.regions():
            for attachment in list(region.attachments):
                self.lifetimes.drop(attachment)
            if region in self.lifetimes.regions():
                self.lifetimes.forget(region)
        self.lifetimes.settling.finish()
        self.pager.close()


class AliveUffd:
    """One of an address space that lives, and asks nothing."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.protected: list[AddrRange] = []

    def is_alive(self) -> bool:
        return True

    def arm(self, _ar: object, _arming: object) -> None:
        """Have nothing to report."""

    def write_protect(self, ar: AddrRange) -> None:
        """Note it."""
        self.protected.append(ar)

    def close(self) -> None:
        os.close(self.fd)


def request(**changed: Any) -> protocol.Create:
    fields = {"name": "it", "addr": None, "size": PMD_SIZE, "mode": 0o600, "exclusive": True, "empty": False}
    return protocol.Create(**(fields | changed))


@pytest.fixture
def world(open_descriptors: Callable[[], int]) -> Iterator[World]:
    before = open_descriptors()
    world = World()
    yield world
    world.close()
    assert open_descriptors() == before


class TestCreate:
    """A region comes, and is offered to its creator."""

    def test_an_offer_for_a_region_that_is_not_ready(self, world: World) -> None:
        answer, pending = world.create()
        offer = answer.reply
        assert isinstance(offer, protocol.Offer)
        region = pending.region
        assert (offer.addr, offer.size, offer.readonly, offer.device) == (region.model.ar.start, PMD_SIZE, False, False)
        assert offer.inode == region.model.id * INODES_A_REGION
        assert answer.fds == (region.backing.writable,)
        assert pending.creator
        assert not region.model.ready
        assert region.model.owner == Ownership(1000, 1000, 0o600)
        assert list(world.namespace) == []

    def test_a_readonly_creator_gets_a_descriptor_that_only_reads(self, world: World) -> None:
        answer, pending = world.create(readonly=True)
        assert answer.fds == (pending.region.backing.readonly,)
        assert isinstance(answer.reply, protocol.Offer)
        assert answer.reply.readonly
        assert pending.readonly

    def test_the_device_goes_along(self) -> None:
        world = World(device=77)
        answer, pending = world.create()
        assert answer.fds == (pending.region.backing.writable, 77)
        assert isinstance(answer.reply, protocol.Offer)
        assert answer.reply.device
        world.close()

    def test_one_that_exists_is_to_be_attached_to_unless_it_must_be_new(self, world: World) -> None:
        _, first = world.create()
        answer, pending = world.service.create(ME, request(exclusive=False), [])
        assert (answer.reply, answer.fds, pending) == (protocol.Exists(), (), None)
        with pytest.raises(ExistsError):
            world.service.create(ME, request(), [])
        assert world.lifetimes.regions() == [first.region]

    def test_without_room_it_never_was(self, open_descriptors: Callable[[], int]) -> None:
        before = open_descriptors()
        world = World(FullStore())
        with pytest.raises(NoSpaceError):
            world.service.create(ME, request(), [])
        assert world.namespace.all() == []
        assert world.lifetimes.regions() == []
        world.close()
        assert open_descriptors() == before

    @pytest.mark.parametrize(
        ("changed", "error"),
        [
            ({"name": ".hidden"}, InvalidArgumentError),
            ({"size": 1}, InvalidArgumentError),
            ({"addr": 5}, InvalidArgumentError),
            ({"mode": 0o1777}, InvalidArgumentError),
            ({"backing": "floppy"}, InvalidArgumentError),
            ({"backing": "thp"}, NotSupportedError),
            ({"donated": (protocol.DonatedRange(0, PAGE_SIZE, 3),), "readonly": True}, InvalidArgumentError),
            ({"donated": (protocol.DonatedRange(0, PAGE_SIZE, 5),)}, AccessDeniedError),
            ({"donated": (protocol.DonatedRange(0, PAGE_SIZE, 8),)}, InvalidArgumentError),
            ({"donated": (protocol.DonatedRange(1, PAGE_SIZE, 3),)}, InvalidArgumentError),
            ({"donated": (protocol.DonatedRange(PMD_SIZE, PAGE_SIZE, 3),)}, InvalidArgumentError),
            ({"donated": (protocol.DonatedRange(0, 0, 3),)}, InvalidArgumentError),
            ({"donated": (protocol.DonatedRange(0, PAGE_SIZE, 3),) * 2}, ProtocolError),
        ],
    )
    def test_what_cannot_be_leaves_nothing(
        self, world: World, changed: dict[str, Any], error: type[MshareError]
    ) -> None:
        with pytest.raises(error):
            world.service.create(ME, request(**changed), [])
        assert world.namespace.all() == []
        assert world.lifetimes.regions() == []

    def test_what_is_donated_is_mapped_and_the_rest_is_not(self, world: World) -> None:
        parts = (protocol.DonatedRange(PAGE_SIZE, 2 * PAGE_SIZE, 1), protocol.DonatedRange(8 * PAGE_SIZE, PAGE_SIZE, 0))
        _, pending = world.create(donated=parts)
        model = pending.region.model
        mapped = [(vma.ar.start - model.ar.start, vma.ar.size, int(vma.prot)) for vma in model.mm.vmas]
        assert mapped == [(PAGE_SIZE, 2 * PAGE_SIZE, 3), (8 * PAGE_SIZE, PAGE_SIZE, 3)]
        assert pending.donated == parts


class TestDonatedFiles:
    """Mappings of files, which stay that."""

    @pytest.fixture
    def opened(self) -> list[Opened]:
        """Two files, the second for reading only."""
        return [Opened(os.memfd_create("it"), writable, TMPFS_MAGIC) for writable in (True, False)]

    @staticmethod
    def part(page: int, prot: int = 3, descriptor: int = 0, *, offset: int = 0, shared: bool = True) -> Any:
        file = protocol.DonatedFile(descriptor, offset, shared)
        return protocol.DonatedRange(page * PAGE_SIZE, PAGE_SIZE, prot, file)

    def staging(self, world: World, opened: list[Opened], *addresses: int) -> tuple[Pending, LiveAttachment]:
        """A region with mappings of files that are staged at certain addresses."""
        parts = (*(self.part(2 * n) for n in range(len(addresses))), self.part(100, 1, 1))
        _, pending = world.create(files=opened, addr=AT, donated=parts)
        live = world.attach(pending.region, ME.pid)
        places = [*addresses, AT + 100 * PAGE_SIZE]
        live.staged = donations.stage(pending.region.model, parts, places)[:-1]
        pending.region.model.ready = False
        pending.region.settled = trio.Event()
        return pending, live

    def test_they_are_mapped_and_their_files_kept(self, world: World, opened: list[Opened]) -> None:
        parts = (
            self.part(1),
            self.part(2, offset=PAGE_SIZE),
            self.part(4, 1, 1),
            self.part(5, 0, 1, offset=PAGE_SIZE),
            self.part(6, 0, shared=False),
            protocol.DonatedRange(8 * PAGE_SIZE, PAGE_SIZE, 0),
        )
        _, pending = world.create(files=opened, donated=parts)
        assert opened == []
        region = pending.region
        found = [
            (
                (vma.ar.start - region.model.ar.start) // PAGE_SIZE,
                vma.ar.size // PAGE_SIZE,
                int(vma.prot),
                vma.source and (vma.source.file, vma.source.offset, vma.source.shared, vma.source.writable),
            )
            for vma in region.model.mm.vmas
        ]
        assert found == [
            (1, 2, 3, (1, 0, True, True)),
            (4, 1, 1, (2, 0, True, False)),
            (5, 1, 0, (2, PAGE_SIZE, True, False)),
            (6, 1, 3, (1, 0, False, True)),  # Until its contents are in.
            (8, 1, 3, None),
        ]
        assert set(region.files) == {1, 2}

    def test_files_that_nothing_shows_are_closed(self, world: World, opened: list[Opened]) -> None:
        fd = opened[1].fd
        _, pending = world.create(files=opened, donated=(self.part(0),))
        assert list(pending.region.files) == [1]
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)

    @pytest.mark.parametrize(
        ("part", "error"),
        [
            ((0, 3, 2), BadDescriptorError),
            ((0, 3, -1), BadDescriptorError),
            ((0, 3, 1), AccessDeniedError),
            ((0, 5, 0), AccessDeniedError),
            ((1, 3, 0), ProtocolError),
        ],
    )
    def test_what_cannot_be_leaves_nothing(
        self, world: World, opened: list[Opened], part: tuple[int, ...], error: type[MshareError]
    ) -> None:
        with pytest.raises(error):
            world.create(files=opened, donated=(self.part(1), self.part(*part)))
        assert (opened, world.namespace.all(), world.lifetimes.regions()) == ([], [], [])

    @pytest.mark.parametrize("offset", [1, -PAGE_SIZE, (1 << 63) - PAGE_SIZE])
    def test_offsets_that_no_file_has(self, world: World, opened: list[Opened], offset: int) -> None:
        with pytest.raises(MshareError):
            world.create(files=opened, donated=(self.part(0, offset=offset),))
        assert world.lifetimes.regions() == []

    def test_where_the_region_exists_already_the_files_are_the_callers(
        self, world: World, opened: list[Opened]
    ) -> None:
        world.create()
        answer, pending = world.service.create(ME, request(exclusive=False, donated=(self.part(0),)), opened)
        assert (answer.reply, pending, len(opened)) == (protocol.Exists(), None, 2)
        donations.close_files(opened)

    @pytest.mark.parametrize("staged", [(), (1 << 40, 1 << 41), (5,), (1 << 47,), (-PAGE_SIZE,), ((1 << 64) - 1,)])
    def test_each_must_be_staged_somewhere(self, world: World, opened: list[Opened], staged: tuple[int, ...]) -> None:
        _, pending = world.create(files=opened, addr=AT, donated=(self.part(0),))
        with pytest.raises(InvalidArgumentError):
            world.service.mapped(ME, protocol.Mapped(1, AT, 0, staged), pending, [-1])
        assert pending.region.attachments == []

    def test_others_are_let_in_when_all_has_moved(self, world: World, opened: list[Opened]) -> None:
        pending, live = self.staging(world, opened, 1 << 40, 1 << 41)
        region = pending.region
        for start, page in ((1 << 40, 0), (1 << 41, 2)):
            with pytest.raises(InvalidArgumentError, match="are staged"):
                world.service.settled(ME, pending)
            with pytest.raises(TryAgainError):
                world.service.own_region(ME, live.model.id)
            world.lifetimes._on_moved(live, start, AT + (page + 1) * PAGE_SIZE, PAGE_SIZE)  # Not its place.
            world.lifetimes._on_moved(live, start, AT + page * PAGE_SIZE, 2 * PAGE_SIZE)
            world.lifetimes._on_moved(live, start, AT + page * PAGE_SIZE, PAGE_SIZE)
        assert (region.model.ready, region.settled.is_set()) == (False, False)
        assert world.service.settled(ME, pending).reply == protocol.Done()
        assert (region.model.ready, region.settled.is_set()) == (True, True)
        assert world.service.own_region(ME, live.model.id) is region

    def test_what_is_not_there_cannot_be_settled(self, world: World) -> None:
        _, pending = world.create()
        with pytest.raises(InvalidArgumentError):
            world.service.settled(ME, pending)
        world.service.give_up(pending)
        with pytest.raises(NotFoundError):
            world.service.settled(ME, pending)

    def test_an_attacher_settles_nothing(self, world: World) -> None:
        _, pending = world.create()
        world.attach(pending.region, ME.pid)
        with pytest.raises(InvalidArgumentError):
            world.service.settled(ME, Pending(pending.region, readonly=False, creator=False))

    def test_a_window_stands_once(self, world: World, opened: list[Opened]) -> None:
        pending, _ = self.staging(world, opened, 1 << 40)
        with pytest.raises(InvalidArgumentError, match="stands already"):
            world.service.mapped(ME, protocol.Mapped(1, AT, 0, (1 << 40,)), pending, [-1])

    def test_when_the_creator_gives_up_files_have_all_stores(self, world: World, opened: list[Opened]) -> None:
        kept = os.dup(opened[0].fd)
        os.ftruncate(kept, PAGE_SIZE)
        pending, live = self.staging(world, opened, 1 << 40)
        region = pending.region
        os.pwrite(region.backing.fd, b"stored", 0)
        region.model.mm.filled(AddrRange.sized(AT, PAGE_SIZE))
        region.model.mm.stored_to(AddrRange.sized(AT, PAGE_SIZE))
        world.service.give_up(pending)
        assert not region.written.is_set()
        world.lifetimes.settling.finish()
        assert (region.written.is_set(), region.closed) == (True, True)
        assert os.pread(kept, 6, 0) == b"stored"
        assert live.uffd.protected == [AddrRange.sized(1 << 40, PAGE_SIZE)]  # type: ignore[attr-defined]
        assert (world.namespace.all(), world.lifetimes.regions()) == ([], [])
        os.close(kept)

    def test_what_was_hidden_comes_back_when_the_creator_gives_up(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, pending = world.create(addr=AT, donated=(protocol.DonatedRange(0, PAGE_SIZE, 0),))
        region = pending.region
        os.pwrite(region.backing.fd, b"hidden", 0)
        monkeypatch.setattr(world.lifetimes, "attach", lambda region, *_args, **_named: world.attach(region, ME.pid))
        world.service.mapped(ME, protocol.Mapped(1, AT, 0), pending, [-1])
        assert os.pread(region.backing.fd, 6, 0) == bytes(6)
        region.model.ready = False
        theirs = os.dup(region.backing.fd)
        world.service.give_up(pending)
        assert os.pread(theirs, 6, 0) == b"hidden"
        os.close(theirs)


class TestPlaces:
    """Where an attachment has what."""

    def test_staged_parts_elsewhere_and_the_rest_in_the_window(self, world: World) -> None:
        _, pending = world.create(addr=AT)
        live = world.attach(pending.region, ME.pid)
        ar = AddrRange.sized(AT, 8 * PAGE_SIZE)
        assert live.places(ar) == [ar]
        live.staged = [
            Staged(AddrRange.sized(AT + PAGE_SIZE, PAGE_SIZE), Address(1 << 40)),
            Staged(AddrRange.sized(AT + 2 * PAGE_SIZE, 2 * PAGE_SIZE), Address(1 << 41)),
        ]
        assert live.places(ar) == [
            AddrRange.sized(AT, PAGE_SIZE),
            AddrRange.sized(1 << 40, PAGE_SIZE),
            AddrRange.sized(1 << 41, 2 * PAGE_SIZE),
            AddrRange.sized(AT + 4 * PAGE_SIZE, 4 * PAGE_SIZE),
        ]
        inside = AddrRange.sized(AT + 3 * PAGE_SIZE, PAGE_SIZE)
        assert live.places(inside) == [AddrRange.sized((1 << 41) + PAGE_SIZE, PAGE_SIZE)]
        assert live.places(AddrRange.sized(AT + 4 * PAGE_SIZE, PAGE_SIZE)) == [
            AddrRange.sized(AT + 4 * PAGE_SIZE, PAGE_SIZE)
        ]


class TestGiveUp:
    """Offers that are not taken."""

    def test_a_region_whose_creator_gives_up_never_was(self, world: World, open_descriptors: Callable[[], int]) -> None:
        before = open_descriptors()
        _, pending = world.create()
        world.service.give_up(pending)
        assert world.namespace.all() == []
        assert world.lifetimes.regions() == []
        assert pending.region.settled.is_set()
        assert open_descriptors() == before

    def test_one_with_somebody_attached_stays(self, world: World) -> None:
        _, pending = world.create()
        world.attach(pending.region, ME.pid)
        world.service.give_up(pending)
        assert world.lifetimes.regions() == [pending.region]

    def test_whoever_only_wanted_to_attach_changes_nothing(self, world: World) -> None:
        _, pending = world.create()
        world.service.give_up(Pending(pending.region, readonly=False, creator=False))
        assert world.lifetimes.regions() == [pending.region]


class TestAttach:
    """An opened file becomes an offer."""

    @pytest.fixture
    def ticket(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Have the next descriptor stand for something."""

        def stand_for(inode: int, *, writable: bool = True) -> None:
            monkeypatch.setattr(service, "read_ticket", lambda _fd, _device: Ticket(inode, writable))

        return stand_for

    def run(
        self, world: World, caller: Caller = ME, addr: int | None = None, length: int = 0
    ) -> tuple[Answer, Pending]:
        async def main() -> tuple[Answer, Pending]:
            return await world.service.attach(caller, protocol.Attach(addr, length), -1, DEVICE)

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    @pytest.fixture
    def region(self, world: World) -> LiveRegion:
        """Made, with its creator attached."""
        _, pending = world.create()
        world.attach(pending.region, 1)
        return pending.region

    @pytest.mark.parametrize("writable", [True, False])
    def test_how_it_was_opened_is_how_it_is_seen(
        self, world: World, region: LiveRegion, ticket: Callable[..., None], writable: bool
    ) -> None:
        ticket(region.model.id * INODES_A_REGION, writable=writable)
        answer, pending = self.run(world)
        assert isinstance(answer.reply, protocol.Offer)
        assert answer.reply.readonly is not writable
        assert answer.fds == (region.backing.writable if writable else region.backing.readonly,)
        assert pending == Pending(region, readonly=not writable, creator=False)

    def test_elsewhere_if_asked_for(self, world: World, region: LiveRegion, ticket: Callable[..., None]) -> None:
        ticket(region.model.id * INODES_A_REGION)
        answer, _ = self.run(world, addr=AT, length=PMD_SIZE)
        assert isinstance(answer.reply, protocol.Offer)
        assert answer.reply.addr == AT

    @pytest.mark.parametrize(("addr", "length"), [(None, PAGE_SIZE), (None, 2 * PMD_SIZE), (None, -1), (AT + 1, 0)])
    def test_lengths_and_addresses_that_cannot_be(
        self, world: World, region: LiveRegion, ticket: Callable[..., None], addr: int | None, length: int
    ) -> None:
        ticket(region.model.id * INODES_A_REGION)
        with pytest.raises(InvalidArgumentError):
            self.run(world, addr=addr, length=length)

    @pytest.mark.parametrize("part", [1, 2, 15])
    def test_other_files_of_a_region_are_no_tickets(
        self, world: World, region: LiveRegion, ticket: Callable[..., None], part: int
    ) -> None:
        ticket(region.model.id * INODES_A_REGION + part)
        with pytest.raises(NotFoundError):
            self.run(world)

    @pytest.mark.parametrize("inode", [0, 1, 2, 999 * INODES_A_REGION])
    def test_nor_are_files_of_no_region(self, world: World, ticket: Callable[..., None], inode: int) -> None:
        ticket(inode)
        with pytest.raises(NotFoundError):
            self.run(world)

    def test_one_that_is_still_being_made_is_to_be_asked_for_again(
        self, world: World, ticket: Callable[..., None]
    ) -> None:
        _, pending = world.create()
        ticket(pending.region.model.id * INODES_A_REGION)
        with pytest.raises(TryAgainError, match="still being made"):
            self.run(world)

    def test_one_whose_creator_is_nearly_done_is_waited_for(self, world: World, ticket: Callable[..., None]) -> None:
        _, creating = world.create()
        ticket(creating.region.model.id * INODES_A_REGION)
        offers: list[Pending] = []

        async def attach() -> None:
            _, pending = await world.service.attach(ME, protocol.Attach(None, 0), -1, DEVICE)
            offers.append(pending)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(attach)
                await trio.testing.wait_all_tasks_blocked()
                world.attach(creating.region, 1)

        trio.run(main)
        assert [pending.region for pending in offers] == [creating.region]

    def test_one_whose_creator_fails_is_gone(self, world: World, ticket: Callable[..., None]) -> None:
        _, creating = world.create()
        ticket(creating.region.model.id * INODES_A_REGION)
        errors: list[Exception] = []

        async def attach() -> None:
            try:
                await world.service.attach(ME, protocol.Attach(None, 0), -1, DEVICE)
            except NotFoundError as error:
                errors.append(error)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(attach)
                await trio.testing.wait_all_tasks_blocked()
                world.service.give_up(creating)

        trio.run(main)
        assert ["its creator did not finish" in str(error) for error in errors] == [True]

    def test_own_windows_that_died_are_forgotten_first(
        self, world: World, region: LiveRegion, ticket: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an exec the same process comes again, and counts once."""
        mine = world.attach(region, ME.pid)
        monkeypatch.setattr(mine.uffd, "is_alive", lambda: False)
        ticket(region.model.id * INODES_A_REGION)
        self.run(world)
        assert mine not in region.attachments
        assert len(region.attachments) == 1


class TestOwnership:
    """Attachments are those of the process that has them."""

    def test_ones_own(self, world: World) -> None:
        _, pending = world.create()
        live = world.attach(pending.region, ME.pid)
        assert world.service.own_region(ME, live.model.id) is pending.region
        world.service.detach(ME, protocol.Detach(live.model.id))
        assert pending.region.attachments == []

    def test_of_another_process_nobody_is_told_and_nothing_is_done(self, world: World) -> None:
        _, pending = world.create()
        live = world.attach(pending.region, ME.pid)
        with pytest.raises(NotPermittedError, match="belongs to another process"):
            world.service.own_region(STRANGER, live.model.id)
        with pytest.raises(NotPermittedError):
            world.service.detach(STRANGER, protocol.Detach(live.model.id))
        with pytest.raises(NotPermittedError):
            trio.run(world.service.change, STRANGER, protocol.Munmap(live.model.id, 0, PAGE_SIZE), None)
        assert pending.region.attachments == [live]

    def test_one_that_is_not_there(self, world: World) -> None:
        for call in (
            lambda: world.service.own_region(ME, 7),
            lambda: world.service.detach(ME, protocol.Detach(7)),
            lambda: trio.run(world.service.change, ME, protocol.Munmap(7, 0, PAGE_SIZE), None),
        ):
            with pytest.raises(NotFoundError, match="there is no attachment 7"):
                call()


class TestMapped:
    """The window stands."""

    def test_a_region_removed_meanwhile_is_gone(self, world: World) -> None:
        _, pending = world.create()
        world.service.give_up(pending)
        with pytest.raises(NotFoundError, match="removed in the meantime"):
            world.service.mapped(ME, protocol.Mapped(1, AT, 0), pending, [-1])

    def test_without_a_userfaultfd_the_region_waits_for_its_creator(self, world: World) -> None:
        _, pending = world.create()
        with pytest.raises(BadDescriptorError):
            world.service.mapped(ME, protocol.Mapped(1, AT, 0), pending, [0])
        assert world.lifetimes.regions() == [pending.region]
        assert not pending.region.model.ready


class TestAdopt:
    """Children of a fork."""

    def test_where_forks_are_not_reported_a_userfaultfd_is_needed(self, world: World) -> None:
        _, pending = world.create()
        live = world.attach(pending.region, ME.pid)
        with pytest.raises(BadDescriptorError, match="must send a userfaultfd of its own"):
            world.service.adopt(ME, protocol.Adopt(live.model.id), None)

    def test_where_they_are_it_is_found_by_its_marks(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        _, pending = world.create()
        child = world.attach(pending.region, ME.pid)
        child.model.forked_from = AttachmentId(77)
        monkeypatch.setattr(Lifetimes, "fork_events", True)
        assert world.service.adopt(ME, protocol.Adopt(77), None).reply == protocol.Attached(child.model.id)


class TestUnlinkAndRemove:
    """Names that go."""

    def ready(self, world: World, *pids: int) -> LiveRegion:
        _, pending = world.create()
        for pid in pids:
            world.attach(pending.region, pid)
        return pending.region

    def ticket(self, region: LiveRegion) -> Ticket:
        return Ticket(region.model.id * INODES_A_REGION, writable=True)

    def test_one_that_is_being_made_has_no_name_yet(self, world: World) -> None:
        world.create()
        with pytest.raises(NotFoundError, match="still being made"):
            world.service.names.unlink(ME, protocol.Unlink("it"), None)
        with pytest.raises(NotFoundError, match="still being made"):
            world.service.names.remove(ME, protocol.Remove("it"))

    def test_the_last_one_ends_the_region(self, world: World) -> None:
        region = self.ready(world, ME.pid)
        world.service.names.unlink(ME, protocol.Unlink("it"), self.ticket(region))
        assert world.lifetimes.regions() == []
        assert world.namespace.all() == []

    def test_one_of_several_ends_only_his_access(self, world: World) -> None:
        region = self.ready(world, ME.pid, 1)
        world.service.names.unlink(ME, protocol.Unlink("it"), self.ticket(region))
        assert [live.model.pid for live in region.attachments] == [1]
        assert list(world.namespace) == [region.model]

    def test_a_ticket_of_another_region_proves_nothing(self, world: World) -> None:
        orphan = self.ready(world, 1)
        world.lifetimes.drop(orphan.attachments[0])
        _, pending = world.create(name="mine")
        with pytest.raises(AccessDeniedError):
            world.service.names.unlink(ME, protocol.Unlink("it"), self.ticket(pending.region))
        assert orphan in world.lifetimes.regions()

    def test_a_removed_name_leaves_the_memory_to_those_who_have_it(self, world: World) -> None:
        region = self.ready(world, 1)
        world.service.names.remove(ME, protocol.Remove("it"))
        assert list(world.namespace) == []
        assert world.lifetimes.regions() == [region]
        world.lifetimes.drop(region.attachments[0])
        assert world.lifetimes.regions() == []

    def test_the_listing_has_what_has_a_name_and_is_ready(self, world: World) -> None:
        self.ready(world, 1)
        world.create(name="unready")
        reply = world.service.views.listing(protocol.GetList()).reply
        assert isinstance(reply, protocol.Listing)
        assert [(each.name, each.attached) for each in reply.regions] == [("it", 1)]
        assert not reply.more


class TestLooking:
    """What the kernel knows is asked before it is told."""

    def test_native_memory_is_counted_when_asked_for(self, world: World) -> None:
        _, pending = world.create()
        region = pending.region
        world.attach(region, os.getpid())
        os.pwrite(region.backing.fd, b"x", 5 * PAGE_SIZE)
        stat = trio.run(world.service.views.stat, region)
        assert (stat.resident, stat.attached, stat.vmas) == (PAGE_SIZE, 1, 1)
        assert stat.table_bytes_kernel > 0
        answer = trio.run(world.service.views.maps, region, protocol.GetMaps())
        assert isinstance(answer.reply, protocol.Maps)
        assert [(vma.offset, vma.length, vma.resident) for vma in answer.reply.vmas] == [(0, PMD_SIZE, PAGE_SIZE)]

    def looks(self, world: World, region: LiveRegion) -> list[Callable[[], Awaitable[object]]]:
        """All that waits while it looks at a region."""
        told = world.service.views
        return [
            partial(told.stat, region),
            partial(told.maps, region, protocol.GetMaps()),
            partial(told.heat, region, protocol.GetHeat(16)),
        ]

    def test_a_region_that_goes_while_it_is_looked_at_is_not_found(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = LiveRegion.held_where_mapped

        def held_late(region: LiveRegion, *args: Any) -> Any:
            trio.from_thread.run_sync(world.service.give_up, pending)
            return held(region, *args)

        monkeypatch.setattr(LiveRegion, "held_where_mapped", held_late)
        for number in range(3):
            _, pending = world.create()
            with pytest.raises(NotFoundError, match="is gone"):
                trio.run(self.looks(world, pending.region)[number])

    def test_one_that_has_gone_is_not_looked_at(self, world: World) -> None:
        """The numbers of its descriptors may stand for something else by now."""
        _, pending = world.create()
        world.service.give_up(pending)
        for look in self.looks(world, pending.region):
            with pytest.raises(NotFoundError, match="is gone"):
                trio.run(look)

    def test_one_that_ends_with_a_process_found_dead_is_not_found(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Looking for the dead comes first."""
        _, pending = world.create()
        live = world.attach(pending.region, os.getpid())
        world.service.names.remove(ME, protocol.Remove("it"))
        monkeypatch.setattr(live.uffd, "is_alive", lambda: False)
        with pytest.raises(NotFoundError, match="is gone"):
            trio.run(world.service.views.stat, pending.region)

    def test_metrics_leave_out_what_ends_meanwhile(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also what only loses its name: the next of that name would be told of by the same words."""
        regions = {name: world.create(name=name)[1] for name in ("first", "ends", "nameless", "last")}
        world.attach(regions["nameless"].region, os.getpid())
        stat = world.service.views.stat

        async def stat_late(region: LiveRegion) -> protocol.RegionStat:
            found = await stat(region)
            if region.model.name == "first":
                world.service.give_up(regions["ends"])
            if region.model.name == "last":
                world.service.names.remove(ME, protocol.Remove("nameless"))
            return found

        monkeypatch.setattr(world.service.views, "stat", stat_late)
        text = trio.run(world.service.views.metrics)
        assert "msharefs_regions 2\n" in text
        assert set(re.findall(r'_size_bytes{region="(\w*)"}', text)) == {"first", "last"}


class TestWhatComesUponAChange:
    """Deaths and failures in the middle of a change."""

    def test_a_death_takes_effect_when_the_change_is_done(self, world: World) -> None:
        _, pending = world.create()
        live = world.attach(pending.region, 99)
        seen: list[list[LiveAttachment]] = []

        def die() -> None:
            world.lifetimes.drop(live)
            seen.append(list(pending.region.attachments))

        apply.carry_out(pending.region, [Punch(pending.region.model.ar)], die)
        assert seen == [[live]]
        world.pager.drain()
        assert pending.region.attachments == []

    def test_a_donation_that_cannot_be_settled_leaves_no_region(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, pending = world.create(addr=AT, donated=(protocol.DonatedRange(0, PAGE_SIZE, 0),))

        def full(*_args: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        def attach(region: LiveRegion, *_args: object, unsettled: bool, **_named: object) -> LiveAttachment:
            live = world.attach(region, ME.pid)
            region.model.ready = not unsettled
            return live

        monkeypatch.setattr(world.lifetimes, "attach", attach)
        monkeypatch.setattr(sparse, "copy_all", full)
        with pytest.raises(NoSpaceError):
            world.service.mapped(ME, protocol.Mapped(1, AT, 0), pending, [-1])
        world.service.give_up(pending)
        assert world.namespace.all() == []
