"""Forks as the daemon makes them: with memfds for memory, and attachments that only note what is asked of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from mshared import encoding, sparse, uffd
from mshared import records as rec
from mshared.backing import Backing, MemfdStore
from mshared.book import everything_of
from mshared.journal import NAME, Journal, load
from mshared.lifetimes import Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.pager import Pager
from mshared.relaxing import Relaxing
from mshared.saved import Saved, SavedRegion
from mshared.snapshots import Snapshots, Wish, expect_stores
from msharefs import forking, protocol
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Bring, ZeroFill
from msharefs.errors import ExistsError, NoMemoryError, NoSpaceError, NotFoundError
from msharefs.fault import Fault
from msharefs.frames import StoreNo
from msharefs.namespace import Limits, Namespace, Policy
from msharefs.perms import Access, Credentials, Ownership, Prot
from msharefs.region import BackingKind
from msharefs.vma import Arming, FileSource

ROOT = Credentials(0, 0)
SIZE = PMD_SIZE


class FakeUffd:
    """Notes what is protected; it asks to read events first as often as ``busy`` says."""

    def __init__(self) -> None:
        self.fd = -1
        self.log: list[tuple[str, AddrRange]] = []
        self.busy = 0

    def arm(self, ar: AddrRange, arming: Arming) -> None:
        self._note(f"arm {arming.name}", ar)

    def write_protect(self, ar: AddrRange, *, protect: bool = True) -> None:
        self._note("protect" if protect else "allow", ar)

    def wake(self, ar: AddrRange) -> None:
        self._note("wake", ar)

    def _note(self, what: str, ar: AddrRange) -> None:
        if self.busy:
            self.busy -= 1
            raise BlockingIOError(errno.EAGAIN, "read events first")
        self.log.append((what, ar))


class FullStore(MemfdStore):
    """Where there is room for so many regions."""

    room = 1 << 30

    def create(self, *args: Any, **kwargs: Any) -> Backing:
        if not self.room:
            raise NoSpaceError("no room")
        self.room -= 1
        return super().create(*args, **kwargs)


class World:
    """Regions, and who forks them."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.pager = Pager()
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy(limits=limits or Limits()))
        self.lifetimes = Lifetimes(self.namespace, self.pager, uffd.WANTED, None)
        self.store = FullStore()
        self.snapshots = Snapshots(self.namespace, self.lifetimes, self.store)

    def region(self, name: str = "it") -> LiveRegion:
        """A region of 2 MiB, whose first page starts with a 1."""
        model = self.namespace.create(name, None, SIZE, 0o600, BackingKind.SMALL, ROOT)
        model.ready = True
        region = self.lifetimes.add_region(model, self.store.create(model.id, BackingKind.SMALL, SIZE))
        os.pwrite(region.backing.fd, b"\1", 0)
        return region

    def attach(self, region: LiveRegion) -> LiveAttachment:
        model = self.namespace.attach(region.model, region.model.ar.start, os.getpid(), readonly=False)
        fake: Any = FakeUffd()
        live = LiveAttachment(model, region, fake, Address(0))
        region.attachments.append(live)
        self.lifetimes._attachments[model.id] = live
        return live

    def detach(self, live: LiveAttachment) -> None:
        """As when its process dies."""
        live.region.attachments.remove(live)
        del self.lifetimes._attachments[live.model.id]
        if self.namespace.detach(live.region.model, live.model):
            self.lifetimes.forget(live.region)

    def fork(self, *wishes: tuple[LiveRegion, str | None], mode: int = 0o600) -> list[LiveRegion]:
        return trio.run(self.snapshots.fork, [Wish(origin, name, mode) for origin, name in wishes], ROOT)

    def names(self) -> list[str | None]:
        return [region.name for region in self.namespace]

    def close(self) -> None:
        for region in self.lifetimes.regions():
            for live in list(region.attachments):
                self.detach(live)
            if not region.ended:
                self.namespace.abandon(region.model)
                self.lifetimes.forget(region)
        self.lifetimes.settling.finish()
        self.pager.close()


@pytest.fixture
def world(open_descriptors: Callable[[], int]) -> Iterator[World]:
    before = open_descriptors()
    world = World()
    yield world
    world.close()
    assert open_descriptors() == before


def brought(twin: LiveRegion, page: int = 0) -> int:
    """What a page of a twin starts with."""
    mm = twin.model.mm
    ar = AddrRange.sized(mm.ar.start + page * PAGE_SIZE, PAGE_SIZE)
    twin.family.make_or_reclaim(mm, forking.to_bring(mm, ar))
    return os.pread(twin.backing.fd, 1, page * PAGE_SIZE)[0]


def log_of(live: LiveAttachment) -> list[tuple[str, AddrRange]]:
    fake: Any = live.uffd
    return list(fake.log)


class TestTwins:
    """What a twin is made of."""

    def test_mappings_contents_and_owner(self, world: World) -> None:
        origin = world.region()
        hole = AddrRange.sized(origin.model.ar.start + 4 * PAGE_SIZE, PAGE_SIZE)
        origin.model.mm.munmap(hole)
        twin = world.fork((origin, "twin"), mode=0o640)[0]
        assert (twin.model.name, twin.model.owner.mode, twin.model.ar) == ("twin", 0o640, origin.model.ar)
        assert twin.model.ready
        assert twin.settled.is_set()
        assert [vma.ar for vma in twin.model.mm.vmas] == [vma.ar for vma in origin.model.mm.vmas]
        assert brought(twin) == 1
        assert world.names() == ["it", "twin"]

    def test_hidden_contents_are_copied(self, world: World) -> None:
        origin = world.region()
        origin.model.mm.mprotect(AddrRange.sized(origin.model.ar.start, PAGE_SIZE), Prot.NONE)
        os.pwrite(origin.stash(), b"\7", 0)
        twin = world.fork((origin, "twin"))[0]
        assert os.pread(twin.stash(), 1, 0) == b"\7"

    def test_files_are_its_own(self, world: World, tmp_path: Path) -> None:
        origin = world.region()
        (tmp_path / "data").write_bytes(b"file")
        number = origin.add_file(os.open(tmp_path / "data", os.O_RDWR))
        page = AddrRange.sized(origin.model.ar.start, PAGE_SIZE)
        origin.model.mm.mmap(page, PAGE_SIZE, fixed=True, replace=True, source=FileSource(number, 0, True, True))
        origin.model.mm.filled(page)
        origin.model.mm.stored_to(page)
        os.pwrite(origin.backing.fd, b"new!", 0)
        twin = world.fork((origin, "twin"))[0]
        assert (tmp_path / "data").read_bytes() == b"new!"
        assert twin.files[number].fd != origin.files[number].fd
        other = os.open("/dev/null", os.O_RDONLY)
        assert twin.add_file(other) != number
        twin.drop_unused_files()
        assert set(twin.files) == {number}


class TestWrittenDown:
    """What the next daemon makes of the journal is what there is."""

    @pytest.fixture
    def journal(self, world: World, directory: Path) -> Iterator[Path]:
        journal = Journal(directory / NAME)
        world.lifetimes.book.journal = journal
        world.lifetimes.book.rewrite()
        yield journal.path
        journal.close()

    def known(self, world: World) -> LiveRegion:
        """A region that is written down, with a hole, a file, and memory that may only be read."""
        region = world.region()
        mm, start = region.model.mm, region.model.ar.start
        mm.munmap(AddrRange.sized(start + 4 * PAGE_SIZE, PAGE_SIZE))
        mm.mprotect(AddrRange.sized(start + 6 * PAGE_SIZE, PAGE_SIZE), Prot.READ)
        number = region.add_file(os.open("/dev/null", os.O_RDWR))
        place = AddrRange.sized(start + 8 * PAGE_SIZE, PAGE_SIZE)
        source = FileSource(number, 0, shared=True, writable=True)
        mm.mmap(place, PAGE_SIZE, fixed=True, replace=True, source=source)
        world.lifetimes.book.commit(*everything_of(region))
        world.lifetimes.book.regions[region.model.id] = region
        return region

    def entries(self, path: Path) -> tuple[bytes, ...]:
        state = load(path)
        assert state is not None
        return state.records

    def check(self, world: World, path: Path) -> Saved:
        """What the journal comes to, which is how everything is."""
        saved, now = Saved.of(self.entries(path)), Saved()
        for region in world.lifetimes.regions():
            for record in everything_of(region):
                now.add(record)
        assert saved.regions.keys() == now.regions.keys()
        for number, each in saved.regions.items():
            there = now.regions[number]
            assert attrs.evolve(each.last, model={}) == attrs.evolve(there.last, model={})
            assert (
                encoding.structured_fields(each.last.model).items()
                <= encoding.structured_fields(there.last.model).items()
            )
            assert (list(each.vmas), each.files, each.dirty) == (list(there.vmas), there.files, there.dirty)
            assert whose(each) == whose(there)
        return saved

    def test_forks_and_forks_of_forks(self, world: World, journal: Path) -> None:
        origin = self.known(world)
        one = world.fork((origin, "one"), mode=0o640)[0]
        world.fork((one, "two"), (origin, None))
        self.check(world, journal)

    def test_pages_that_have_come_and_pages_that_were_left_to_others(self, world: World, journal: Path) -> None:
        origin = self.known(world)
        os.pwrite(origin.backing.fd, b"\2", 9 * PAGE_SIZE)
        one = world.fork((origin, "one"))[0]
        os.pwrite(origin.backing.fd, b"\3", 11 * PAGE_SIZE)
        two = world.fork((origin, "two"), (one, "three"))[0]
        page = AddrRange.sized(origin.model.ar.start + 9 * PAGE_SIZE, PAGE_SIZE)
        world.fork((one, "four"))
        origin.family.make_or_reclaim(origin.model.mm, forking.to_preserve(origin.model.mm, page))
        world.fork((one, "five"), (two, "six"), (origin, "seven"))
        saved = self.check(world, journal)
        five = whose(saved.regions[world.namespace.find("five").id])
        assert five == {AddrRange.sized(origin.model.ar.start, PAGE_SIZE): 0, page: one.model.mm.store}
        assert one.fork_notes.own_pages(one.model.mm) == (page,)

    def test_that_stores_are_seen_is_written_down_once(self, world: World, journal: Path) -> None:
        """Also of relatives, whom a fork that failed had protected already."""
        origin = self.known(world)
        one = world.fork((origin, "one"))[0]
        world.store.room = 0
        with pytest.raises(NoSpaceError):
            world.fork((origin, "two"))
        assert one.model.mm.rule.forked & Arming.WP
        world.store.room = 1 << 30
        world.fork((origin, "two"))
        self.check(world, journal)
        world.fork((origin, "three"))
        self.check(world, journal)
        kinds = [[type(record) for record in encoding.decode(entry)] for entry in self.entries(journal)]
        new = [rec.Forked, rec.FileIs, rec.Dirty]
        assert kinds[2:] == [[rec.RegionIs, *new], [rec.RegionIs, *new], [rec.RegionIs, *new]]

    def test_and_again_when_they_were_not_seen_meanwhile(self, world: World, journal: Path) -> None:
        origin = self.known(world)
        twin = world.fork((origin, None))[0]
        world.snapshots.end(twin)
        world.lifetimes.settling.finish()
        relaxing = Relaxing(world.lifetimes)
        for _ in range(2):
            relaxing.look()
        assert origin.model.mm.rule.forked is Arming.NATIVE
        world.fork((origin, "two"))
        self.check(world, journal)


def whose(region: SavedRegion) -> dict[AddrRange, StoreNo]:
    """In whose store pages of a region lie, where that is not its own."""
    return {page: store for run, store in region.foreign for page in run.pieces(PAGE_SIZE)}


class TestTold:
    """Who asked is told as soon as nothing can come between any more, and before the twins are made."""

    def told(self, world: World, *wishes: Wish) -> tuple[list[protocol.Reply], list[LiveRegion]]:
        """What was said, when all is protected, and the twins."""
        said: list[protocol.Reply] = []

        def tell(reply: protocol.Reply) -> None:
            said.append(reply)
            assert world.names() == ["it"]
            assert all(wish.origin.model.mm.rule.shielded for wish in wishes)
            assert all(wish.origin.changing for wish in wishes)

        return said, trio.run(world.snapshots.fork, wishes, ROOT, protocol.Done(), tell)

    def test_once_for_all(self, world: World) -> None:
        origin = world.region()
        said, twins = self.told(world, Wish(origin, "one", 0o600), Wish(origin, "two", 0o600))
        assert said == [protocol.Done()]
        assert [brought(twin) for twin in twins] == [1, 1]
        assert not any(region.changing for region in (origin, *twins))

    def test_it_is_written_down(self, world: World, directory: Path) -> None:
        journal = Journal(directory / NAME)
        world.lifetimes.book.journal = journal
        world.lifetimes.book.rewrite()
        origin = world.region()
        known: list[set[int]] = []

        def tell(_: protocol.Reply) -> None:
            state = load(journal.path)
            assert state is not None
            known.append(set(Saved.of(state.records).regions))

        world.lifetimes.book.commit(*everything_of(origin))
        twin = trio.run(world.snapshots.fork, [Wish(origin, "one", 0o600)], ROOT, protocol.Done(), tell)[0]
        assert known == [{origin.model.id, twin.model.id}]
        journal.close()

    def test_not_of_what_is_refused(self, world: World) -> None:
        origin = world.region()
        world.store.room = 1
        said: list[protocol.Reply] = []
        wishes = [Wish(origin, "one", 0o600), Wish(origin, "two", 0o600)]
        with pytest.raises(NoSpaceError):
            trio.run(world.snapshots.fork, wishes, ROOT, protocol.Done(), said.append)
        assert said == []

    def test_not_before_files_have_what_was_stored_to_them(self, world: World, tmp_path: Path) -> None:
        """The twin has its pages of them from there."""
        origin = world.region()
        (tmp_path / "data").write_bytes(b"file")
        number = origin.add_file(os.open(tmp_path / "data", os.O_RDWR))
        page = AddrRange.sized(origin.model.ar.start, PAGE_SIZE)
        origin.model.mm.mmap(page, PAGE_SIZE, fixed=True, replace=True, source=FileSource(number, 0, True, True))
        said, twins = self.told(world, Wish(origin, "one", 0o600))
        assert (said, len(twins)) == ([], 1)

    def test_a_child_may_come_at_once(self, world: World) -> None:
        """Its twin is there when the daemon turns to anybody else."""
        live = world.attach(world.region())
        said: list[protocol.Reply] = []

        async def fork() -> list[str]:
            return await world.snapshots.for_child([live], ROOT, said.append)

        tokens = trio.run(fork)
        assert said == [protocol.Snapshots(tuple(tokens))]
        assert brought(world.snapshots.take(tokens[0], ROOT).twin) == 1
        world.snapshots.end(next(each for each in world.lifetimes.regions() if each.model.name is None))


class TestOneInstant:
    """All is protected before anything is answered."""

    def test_every_attachment_of_the_origin_is_protected(self, world: World) -> None:
        origin = world.region()
        lives = [world.attach(origin), world.attach(origin)]
        world.fork((origin, "one"))
        assert [log_of(live) for live in lives] == [[("arm WP", origin.model.ar)]] * 2
        world.fork((origin, "two"))
        assert [log_of(live)[1:] for live in lives] == [[]] * 2
        page = AddrRange.sized(origin.model.ar.start, PAGE_SIZE)
        origin.family.make_or_reclaim(origin.model.mm, forking.to_preserve(origin.model.mm, page))
        origin.model.mm.fault(Fault(page.start, Access.WRITE, protected=True))
        world.fork((origin, "three"))
        assert [log_of(live)[1:] for live in lives] == [[("protect", page)]] * 2

    def test_relatives_that_may_come_to_hold_what_others_need_are_too(self, world: World) -> None:
        origin = world.region()
        twin = world.fork((origin, "one"))[0]
        live = world.attach(twin)
        world.fork((origin, "two"))
        assert log_of(live) == [("arm MISSING|WP", origin.model.ar)]

    def test_a_fault_that_is_read_meanwhile_waits(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """While the last of them is being forked by its process, a store to the first one must not get through."""
        origins = [world.region("one"), world.region("two")]
        first, last = (world.attach(origin) for origin in origins)
        at = origins[0].model.ar.start
        busy: Any = last.uffd
        busy.busy = 1

        def events() -> None:
            world.lifetimes.faults.decide(first, 3, at, os.getpid(), 0)  # A store to a page that is protected.
            seen.append([what for what, _ in log_of(first)])

        seen: list[list[str]] = []
        monkeypatch.setattr(world.lifetimes, "read_events", events)
        twins = world.fork((origins[0], "three"), (origins[1], "four"))
        assert seen == [["arm WP"]]
        assert not any(region.changing for region in (*origins, *twins))
        world.pager.drain()
        assert log_of(first)[-1] == ("allow", AddrRange.sized(at, PAGE_SIZE))
        os.pwrite(origins[0].backing.fd, b"\2", 0)
        assert brought(twins[0]) == 1


class TestRefusals:
    """A fork that cannot be made leaves nothing."""

    def test_a_name_that_is_taken(self, world: World) -> None:
        origin = world.region()
        live = world.attach(origin)
        with pytest.raises(ExistsError):
            world.fork((origin, "it"))
        assert log_of(live) == []

    def test_one_name_for_two(self, world: World) -> None:
        origin = world.region()
        with pytest.raises(ExistsError):
            world.fork((origin, "twin"), (origin, "twin"))
        assert world.names() == ["it"]
        assert world.lifetimes.regions() == [origin]
        assert origin.family.backings.keys() == {0}

    def test_limits_hold_for_all_together(self) -> None:
        world = World(Limits(max_bytes=2 * SIZE))
        origin = world.region()
        with pytest.raises(NoSpaceError):
            world.fork((origin, "one"), (origin, "two"))
        assert world.names() == ["it"]
        assert len(world.fork((origin, "one"))) == 1
        world.close()

    def test_no_room_for_the_second(self, world: World) -> None:
        origin = world.region()
        world.store.room = 1
        with pytest.raises(NoSpaceError):
            world.fork((origin, "one"), (origin, "two"))
        assert world.names() == ["it"]
        assert origin.model.mm.lineage.alone

    def test_no_memory_for_what_is_hidden(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        origin = world.region()
        origin.model.mm.mprotect(AddrRange.sized(origin.model.ar.start, PAGE_SIZE), Prot.NONE)
        os.pwrite(origin.stash(), b"\7", 0)

        def copy(*_: object) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        monkeypatch.setattr(sparse, "copy", copy)
        with pytest.raises(NoMemoryError, match="hidden by PROT_NONE: Cannot allocate memory"):
            world.fork((origin, "twin"))
        assert world.names() == ["it"]
        assert origin.model.mm.lineage.alone


class TestMeanwhile:
    """Files are written first, which takes time, and much may happen."""

    @pytest.fixture
    def writing(self, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
        """What happens while files are written."""
        happenings: list[Callable[[], object]] = []

        async def flush(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            while happenings:
                happenings.pop(0)()

        monkeypatch.setattr("mshared.snapshots.flush", flush)
        return happenings

    def test_somebody_takes_the_name(self, world: World, writing: list[Callable[[], object]]) -> None:
        origin, other = world.region(), world.region("other")
        origin.add_file(os.open("/dev/null", os.O_RDONLY))
        taken: list[LiveRegion] = []
        writing.append(lambda: taken.append(world.region("twin")))
        with pytest.raises(ExistsError):
            world.fork((origin, "twin"))
        assert world.namespace.find("twin") is taken[0].model
        assert [each.model.name for each in world.lifetimes.regions()] == ["it", "other", "twin"]
        assert other.model.mm.lineage.alone

    def test_the_region_ends(self, world: World, writing: list[Callable[[], object]]) -> None:
        """It is gone, but not before whoever works on it lets go of it."""
        origin = world.region()
        origin.add_file(os.open("/dev/null", os.O_RDONLY))
        live = world.attach(origin)
        closed: list[bool] = []
        writing += [
            lambda: world.namespace.remove(origin.model, ROOT),
            lambda: world.detach(live),
            lambda: closed.append(origin.closed),
        ]
        twin = world.fork((origin, "twin"))[0]
        assert closed == [False]
        assert origin.closed
        assert brought(twin) == 1

    def test_it_is_gone_before(self, world: World) -> None:
        origin = world.region()
        world.namespace.abandon(origin.model)
        world.lifetimes.forget(origin)
        with pytest.raises(NotFoundError, match="the region is gone"):
            world.fork((origin, "twin"))


class TestForChildren:
    """Private twins wait until they are taken, once, by whom they were made for."""

    def tokens(self, world: World, *windows: LiveAttachment) -> list[str]:
        return trio.run(world.snapshots.for_child, windows, ROOT)

    def test_one_is_taken_once(self, world: World) -> None:
        live = world.attach(world.region())
        token = self.tokens(world, live)[0]
        with pytest.raises(NotFoundError):
            world.snapshots.take(token, Credentials(1, 1))
        with pytest.raises(NotFoundError):
            world.snapshots.take("other", ROOT)
        taken = world.snapshots.take(token, ROOT)
        assert (taken.twin.model.name, taken.taker.readonly, brought(taken.twin)) == (None, False, 1)
        with pytest.raises(NotFoundError):
            world.snapshots.take(token, ROOT)
        world.snapshots.forget([token])
        assert not taken.twin.ended
        world.snapshots.end(taken.twin)
        assert taken.twin.closed

    def test_one_that_nobody_takes_goes(self, world: World) -> None:
        origin = world.region()
        tokens = self.tokens(world, world.attach(origin))
        assert len(world.lifetimes.regions()) == 2
        world.snapshots.forget([*tokens, "other"])
        assert world.lifetimes.regions() == [origin]


def test_what_the_first_store_needs_is_ready(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of one that has ended meanwhile; and what cannot be had is made later."""
    origin = world.region()
    ended, other, last = world.fork((origin, None), (origin, "other"), (origin, "last"))
    world.snapshots.end(ended)
    world.lifetimes.settling.finish()
    expect_stores([ended, other])
    assert (ended._filler, last._filler) == (None, None)
    made = other._filler
    assert made is not None

    def none(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr("mshared.live.Filler", none)
        expect_stores([other, last])
    assert (other._filler, last._filler) == (made, None)
    assert last.filler()


def test_loads_of_a_twin_are_brought(world: World) -> None:
    """And what its origin never had is zeros."""
    twin = world.fork((world.region(), "twin"))[0]
    places = (Address(twin.model.ar.start + page * PAGE_SIZE) for page in (0, 9))
    effects = [twin.model.mm.fault(Fault(place, Access.READ)).effect for place in places]
    assert [type(effect) for effect in effects] == [Bring, ZeroFill]


class TestWhatIsThere:
    """A fork has what the kernel has filled by itself, and looks for that only where something may have come."""

    @pytest.fixture
    def searched(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The descriptors of files that were searched."""
        found: list[int] = []
        plain = sparse.extents

        def extents(fd: int) -> Iterator[AddrRange]:
            found.append(fd)
            return plain(fd)

        monkeypatch.setattr(sparse, "extents", extents)
        return found

    def test_nothing_has_come(self, world: World, searched: list[int]) -> None:
        origin = world.region()
        twins = [world.fork((origin, name))[0] for name in ("one", "two", "three")]
        assert searched == [origin.backing.fd]
        assert [brought(twin) for twin in twins] == [1, 1, 1]

    def test_something_has(self, world: World, searched: list[int]) -> None:
        origin = world.region()
        world.fork((origin, "one"))
        os.pwrite(origin.backing.fd, b"\2", 5 * PAGE_SIZE)
        twin = world.fork((origin, "two"))[0]
        assert len(searched) == 2
        assert (brought(twin), brought(twin, 5)) == (1, 2)

    def test_as_much_has_gone_as_has_come(self, world: World, searched: list[int]) -> None:
        origin = world.region()
        world.fork((origin, "one"))
        page = AddrRange.sized(origin.model.ar.start, PAGE_SIZE)
        origin.family.make_or_reclaim(origin.model.mm, forking.to_preserve(origin.model.mm, page))
        origin.model.mm.madvise_remove(page)
        origin.punch(AddrRange.sized(0, PAGE_SIZE))
        os.pwrite(origin.backing.fd, b"\2", 5 * PAGE_SIZE)
        twin = world.fork((origin, "two"))[0]
        assert len(searched) == 2
        assert brought(twin, 5) == 2
        assert forking.to_bring(twin.model.mm, page) == []


def test_a_file_is_made_ready_for_the_fork_after_this_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that fails, for want of descriptors or of threads, the fork will have to make it."""
    prepared: list[BackingKind] = []
    done = trio.Event()

    def prepare(kind: BackingKind) -> None:
        prepared.append(kind)
        if len(prepared) < 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) if len(prepared) == 1 else RuntimeError("no thread")
        trio.from_thread.run_sync(done.set)

    monkeypatch.setattr(world.store, "prepare", prepare, raising=False)
    origin = world.region()
    twins = world.fork((origin, "one"), (origin, "two"), (origin, "three"))

    async def until_done() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.snapshots.prepare)
            with trio.fail_after(30):
                await done.wait()
            nursery.cancel_scope.cancel()

    assert [twin.page_tables_before for twin in twins] == [None] * 3
    trio.run(until_done)
    assert prepared == [BackingKind.SMALL] * 3
    assert all(twin.page_tables_before for twin in twins)
