"""Copies between regions of a family: with memfds for memory, and nobody attached."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest
import trio

from mshared.backing import MemfdStore
from mshared.family import Family
from mshared.live import LiveRegion
from mshared.sparse import extents, resident
from msharefs import forking
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.errors import NoMemoryError
from msharefs.fault import Fault
from msharefs.invariants import check_mm
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Access, Credentials, Ownership
from msharefs.region import BackingKind

SIZE = 16 << 20
PAGES = SIZE // PAGE_SIZE
ROOT = Credentials(0, 0)
OWNER = Ownership(0, 0, 0o600)


class World:
    """A family that starts with the region ``r``, every page of which has its number in it, from 1 on."""

    def __init__(self) -> None:
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        self.family = Family()
        self.regions: dict[str, LiveRegion] = {}
        model = self.namespace.create("r", None, SIZE, 0o600, BackingKind.SMALL, ROOT)
        self.r = self.regions["r"] = self._live(model)
        self.start = self.r.model.ar.start
        for page in range(PAGES):
            os.pwrite(self.r.backing.fd, (page + 1).to_bytes(4, "little"), page * PAGE_SIZE)

    def _live(self, model: object) -> LiveRegion:
        backing = MemfdStore().create(model.id, BackingKind.SMALL, SIZE)  # type: ignore[attr-defined]
        return LiveRegion(model, backing, None, self.family)  # type: ignore[arg-type]

    def fork(self, origin: str, name: str) -> LiveRegion:
        for region in self.regions.values():
            forking.shield(region.model.mm)
        region = self.regions[origin]
        held = [part.moved(self.start) for part in extents(region.backing.fd)]
        region.model.mm.sync(held, huge=False)
        mm = forking.fork(region.model.mm)
        self.regions[name] = self._live(
            self.namespace.fork(self.namespace.next_region(), region.model, mm, name, OWNER)
        )
        return self.regions[name]

    def end(self, name: str) -> None:
        self.regions.pop(name).close()

    def ar(self, first: int, count: int = 1) -> AddrRange:
        return AddrRange.sized(Address(self.start + first * PAGE_SIZE), count * PAGE_SIZE)

    def preserve(self, name: str, first: int, count: int = 1) -> None:
        mm = self.regions[name].model.mm
        self.family.make_or_reclaim(mm, forking.to_preserve(mm, self.ar(first, count)))

    def bring(self, name: str, first: int, count: int = 1) -> None:
        mm = self.regions[name].model.mm
        self.family.make_or_reclaim(mm, forking.to_bring(mm, self.ar(first, count)))

    def make_way(self, name: str, first: int, count: int, *, bring: bool = False) -> None:
        mm = self.regions[name].model.mm
        trio.run(lambda: self.family.make_way(mm, self.ar(first, count), bring=bring))

    def held(self, name: str) -> list[int]:
        """Pages that a region's own memory has."""
        return [
            ar.start // PAGE_SIZE for part in extents(self.regions[name].backing.fd) for ar in part.pieces(PAGE_SIZE)
        ]

    def store(self, name: str, page: int) -> None:
        """What a process does that may store there."""
        os.pwrite(self.regions[name].backing.fd, b"\xff\xff\xff\xff", page * PAGE_SIZE)

    def seen(self, name: str, page: int) -> int:
        """What a process of a region would find in a page, when it has it brought."""
        self.bring(name, page)
        return int.from_bytes(os.pread(self.regions[name].backing.fd, 4, page * PAGE_SIZE), "little")


@pytest.fixture
def world(open_descriptors: Callable[[], int]) -> Iterator[World]:
    before = open_descriptors()
    world = World()
    yield world
    for region in world.regions.values():
        check_mm(region.model.mm)
    for name in list(world.regions):
        world.end(name)
    assert world.family.backings == {}
    assert open_descriptors() == before


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes there is memory for, once a number is in the list; errors are those of the kernel."""
    left: list[int] = []
    plain = LiveRegion.put_new

    def put_new(self: LiveRegion, data: bytes, offset: int) -> None:
        if left:
            fits = data[: left[0]]
            left[0] -= len(fits)
            if fits:
                plain(self, fits, offset)
            if fits != data:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        else:
            plain(self, data, offset)

    monkeypatch.setattr(LiveRegion, "put_new", put_new)
    return left


class TestCopies:
    """Pages are where somebody needs them, once."""

    def test_a_page_goes_to_the_oldest_of_those_that_refer_to_it(self, world: World) -> None:
        for name in "stu":
            world.fork("r", name)
        world.preserve("r", 7)
        world.preserve("r", 7)
        world.store("r", 7)
        assert [world.held(name) for name in "stu"] == [[7], [], []]
        assert world.family.copied == PAGE_SIZE
        assert [world.seen(name, 7) for name in "stu"] == [8, 8, 8]

    def test_what_is_brought_stays_what_it_was(self, world: World) -> None:
        world.fork("r", "s")
        world.bring("s", 3)
        world.store("r", 3)
        assert (world.seen("s", 3), world.held("s")) == (4, [3])
        assert forking.to_preserve(world.r.model.mm, world.ar(3)) == []

    def test_the_memory_of_one_that_has_ended_stays_as_far_as_it_is_needed(self, world: World) -> None:
        world.fork("r", "s")
        world.fork("r", "t")
        fd = os.dup(world.r.backing.fd)
        for name in "st":
            world.bring(name, 0, 100)
        world.end("r")
        assert resident(fd) == SIZE - 100 * PAGE_SIZE
        world.bring("s", 100, 100)
        assert resident(fd) == SIZE - 100 * PAGE_SIZE
        world.bring("t", 100, 50)
        assert resident(fd) == SIZE - 150 * PAGE_SIZE
        world.end("t")
        assert resident(fd) == SIZE - 200 * PAGE_SIZE
        assert [world.seen("s", page) for page in (0, 199, 200, PAGES - 1)] == [1, 200, 201, PAGES]
        world.bring("s", 0, PAGES)
        assert resident(fd) == 0
        os.close(fd)

    def test_it_is_closed_when_the_last_page_is_brought(self, world: World) -> None:
        world.fork("r", "s")
        world.fork("r", "t")
        world.end("r")
        world.bring("s", 0, PAGES)
        world.bring("t", 0, PAGES - 1)
        assert world.family.backings.keys() == {0, 1, 2}
        world.bring("t", PAGES - 1)
        assert world.family.backings.keys() == {1, 2}

    def test_the_middle_of_a_chain_ends(self, world: World) -> None:
        world.fork("r", "s")
        world.bring("s", 5)
        world.store("s", 5)
        world.fork("s", "t")
        world.end("s")
        assert [world.seen("t", page) for page in (5, 6)] == [0xFFFFFFFF, 7]
        world.end("r")
        assert world.seen("t", 8) == 9


class TestMakingWay:
    """Before memory goes, those who refer to it have it."""

    def test_for_what_will_go(self, world: World) -> None:
        world.fork("r", "s")
        world.make_way("r", 10, 20)
        assert world.held("s") == list(range(10, 30))
        assert all(world.r.model.mm.frame_at(world.ar(page).start) is not None for page in (10, 29))

    def test_with_what_others_hold(self, world: World) -> None:
        world.fork("r", "s")
        world.make_way("s", 10, 20)
        assert world.held("s") == []
        world.make_way("s", 10, 20, bring=True)
        assert world.held("s") == list(range(10, 30))

    def test_a_region_without_relatives_has_nothing_to_do(self, world: World) -> None:
        world.make_way("r", 0, PAGES, bring=True)
        assert world.family.copied == 0

    def test_what_comes_meanwhile_does_not_stay(self, world: World) -> None:
        """Stores to the origin, between two pieces, leave a page with the region that is about to lose it."""
        world.fork("r", "s")
        world.fork("r", "t")
        mm = world.regions["s"].model.mm

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store_soon)
                await world.family.make_way(mm, world.ar(0, PAGES))
                assert stored  # Else this shows nothing.
                assert world.held("s") == [0]
                assert forking.to_preserve(mm, world.ar(0, PAGES)) == []

        async def store_soon() -> None:
            world.preserve("r", 0)
            stored.append(0)

        stored: list[int] = []
        trio.run(main)
        assert world.held("t") == [0]
        assert world.seen("t", 0) == 1


class TestNoMemory:
    """Where memory is short what was copied counts, and what was not is nowhere."""

    def test_what_was_copied_before_counts(self, world: World, short: list[int]) -> None:
        world.fork("r", "s")
        world.bring("s", 5)  # So that there are two runs to copy.
        short.append(6 * PAGE_SIZE)
        with pytest.raises(OSError, match="Cannot allocate"):
            world.preserve("r", 0, 10)
        assert world.held("s") == [0, 1, 2, 3, 4, 5]
        assert world.family.copied == 6 * PAGE_SIZE
        short.clear()
        world.preserve("r", 0, 10)
        assert world.held("s") == list(range(10))
        assert world.family.copied == 10 * PAGE_SIZE
        for page in range(10):
            world.store("r", page)
        assert [world.seen("s", page) for page in range(10)] == list(range(1, 11))

    def test_half_a_copy_is_taken_back(self, world: World, short: list[int]) -> None:
        """Else its new owner could store to it unseen, and others would come to refer to that."""
        world.fork("r", "s")
        world.fork("r", "t")
        short.append(3 * PAGE_SIZE)
        with pytest.raises(NoMemoryError, match="no memory for what forks refer to: Cannot allocate memory; free some"):
            world.make_way("r", 0, 10)
        assert world.held("s") == world.held("t") == []

    def test_what_nobody_needs_is_given_back_first(self, world: World, short: list[int]) -> None:
        world.fork("r", "s")
        fd = world.r.backing.fd
        world.end("r")
        mm = world.regions["s"].model.mm
        mm.munmap(world.ar(100, PAGES - 100))
        assert resident(fd) == SIZE
        short.append(0)
        with pytest.raises(OSError, match="Cannot allocate"):
            world.bring("s", 0)
        assert resident(fd) == 100 * PAGE_SIZE

    def test_a_fault_is_decided_again_as_before(self, world: World, short: list[int]) -> None:
        world.fork("r", "s")
        fault = Fault(world.ar(4).start, Access.READ)
        before = world.regions["s"].model.mm.fault(fault)
        short.append(0)
        with pytest.raises(OSError, match="Cannot allocate"):
            world.bring("s", 4)
        assert world.regions["s"].model.mm.fault(fault) == before
