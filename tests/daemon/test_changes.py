"""Changes inside a region: what is refused, what reaches every attachment, and that failures leave all as it was."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mshared import apply
from mshared.backing import MemfdStore
from mshared.changes import Changes, checked_prot
from mshared.live import LiveAttachment, LiveRegion
from mshared.sparse import extents
from msharefs import clean_pages, protocol
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.errors import (
    AccessDeniedError,
    BadDescriptorError,
    ExistsError,
    InvalidArgumentError,
    MshareError,
    NoDeviceError,
    NoMemoryError,
)
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership, Prot
from msharefs.refpage import RefPage
from msharefs.region import BackingKind
from msharefs.vma import Arming

RW = mmap.PROT_READ | mmap.PROT_WRITE
ANONYMOUS = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
FIXED, NOREPLACE = 0x10, 0x100000
NUMBER = 1


class FakeUffd:
    """Notes what is armed."""

    def __init__(self) -> None:
        self.armed: list[tuple[AddrRange, Arming]] = []

    def arm(self, ar: AddrRange, arming: Arming) -> None:
        self.armed.append((ar, arming))

    def write_protect(self, ar: AddrRange, *, protect: bool = True) -> None:
        self.armed.append((ar, Arming.WP if protect else Arming.NATIVE))


class World:
    """A region of two attachments, and changes that one of them asks for."""

    def __init__(self) -> None:
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        model = self.namespace.create("it", None, PMD_SIZE, 0o600, BackingKind.SMALL, Credentials(0, 0))
        self.region = LiveRegion(model, MemfdStore().create(model.id, BackingKind.SMALL, PMD_SIZE), None)
        self.events = 0
        self.changes = Changes(self.read_events)
        self.mine, self.other = self.attach(1), self.attach(2)

    def read_events(self) -> None:
        self.events += 1

    def attach(self, pid: int, *, readonly: bool = False) -> LiveAttachment:
        start = self.region.model.ar.start
        model = self.namespace.attach(self.region.model, start, pid, readonly=readonly)
        uffd: Any = FakeUffd()
        live = LiveAttachment(model, self.region, uffd, Address(0))
        self.region.attachments.append(live)
        return live

    def ar(self, first: int, count: int = 1) -> AddrRange:
        return AddrRange.sized(self.region.model.ar.start + first * PAGE_SIZE, count * PAGE_SIZE)

    def vmas(self) -> list[tuple[int, int, int]]:
        """First page, pages and protection of each."""
        start = self.region.model.ar.start
        return [
            ((v.ar.start - start) // PAGE_SIZE, v.ar.size // PAGE_SIZE, int(v.prot)) for v in self.region.model.mm.vmas
        ]

    def armed(self) -> list[tuple[AddrRange, Arming]]:
        """What was armed last, in both attachments alike."""
        mine: Any = self.mine.uffd
        other: Any = self.other.uffd
        assert mine.armed == other.armed
        return list(mine.armed)

    def mmap(self, first: int | None, count: int, prot: int = RW, flags: int = ANONYMOUS, **more: Any) -> int:
        """Map; the page where it was placed."""
        live, file = more.pop("live", self.mine), more.pop("file", None)
        offset = None if first is None else first * PAGE_SIZE
        refpage = more.get("refpage")
        request = protocol.Mmap(NUMBER, offset, count * PAGE_SIZE, prot, flags, more.get("at", 0), refpage)
        return trio.run(self.changes.mmap, live, request, file).offset // PAGE_SIZE

    def munmap(self, first: int, count: int = 1, live: LiveAttachment | None = None) -> None:
        trio.run(self.changes.munmap, live or self.mine, protocol.Munmap(NUMBER, first * PAGE_SIZE, count * PAGE_SIZE))

    def mprotect(self, first: int, count: int, prot: int, live: LiveAttachment | None = None) -> None:
        request = protocol.Mprotect(NUMBER, first * PAGE_SIZE, count * PAGE_SIZE, prot)
        trio.run(self.changes.mprotect, live or self.mine, request)

    def madvise(self, first: int, count: int, advice: int) -> None:
        request = protocol.Madvise(NUMBER, first * PAGE_SIZE, count * PAGE_SIZE, advice)
        trio.run(self.changes.madvise, self.mine, request)

    def held(self) -> list[int]:
        return [page.start // PAGE_SIZE for ar in extents(self.region.backing.fd) for page in ar.pieces(PAGE_SIZE)]

    def write(self, *numbers: int) -> None:
        for number in numbers:
            os.pwrite(self.region.backing.fd, bytes([number]) * PAGE_SIZE, number * PAGE_SIZE)


@pytest.fixture
def world(open_descriptors: Callable[[], int]) -> Iterator[World]:
    before = open_descriptors()
    world = World()
    yield world
    world.region.close()
    assert open_descriptors() == before


class TestMmap:
    """Where memory goes."""

    def test_into_a_gap(self, world: World) -> None:
        world.munmap(10, 5)
        assert world.mmap(None, 5) == 10
        assert world.vmas() == [(0, 512, 3)]

    def test_to_an_offset_if_it_is_free_and_elsewhere_if_not(self, world: World) -> None:
        world.munmap(10, 10)
        assert world.mmap(14, 2) == 14
        assert world.mmap(14, 2) == 10

    def test_fixed_replaces_what_is_there(self, world: World) -> None:
        world.write(4, 5)
        assert world.mmap(4, 1, mmap.PROT_READ, ANONYMOUS | FIXED) == 4
        assert world.held() == [5]
        assert world.vmas() == [(0, 4, 3), (4, 1, 1), (5, 507, 3)]

    @pytest.mark.parametrize("flags", [NOREPLACE, FIXED | NOREPLACE])
    def test_or_not_if_that_is_said(self, world: World, flags: int) -> None:
        world.write(4)
        with pytest.raises(ExistsError):
            world.mmap(4, 1, RW, ANONYMOUS | flags)
        assert world.held() == [4]
        world.munmap(4)
        assert world.mmap(4, 1, RW, ANONYMOUS | flags) == 4

    def test_shared_and_private_are_the_same_and_populating_is_the_clients(self, world: World) -> None:
        world.munmap(10, 5)
        assert world.mmap(None, 1, RW, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) == 10
        assert world.mmap(None, 1, RW, ANONYMOUS | 0x8000 | 0x4000) == 11

    @pytest.mark.parametrize(
        ("flags", "error"),
        [
            (mmap.MAP_ANONYMOUS, InvalidArgumentError),
            (ANONYMOUS | 0x100, InvalidArgumentError),
            (ANONYMOUS | 0x40000, InvalidArgumentError),
            (ANONYMOUS | 1 << 40, InvalidArgumentError),
            (ANONYMOUS | FIXED, InvalidArgumentError),
            (ANONYMOUS | NOREPLACE, InvalidArgumentError),
            (mmap.MAP_SHARED, BadDescriptorError),
        ],
    )
    def test_flags_that_cannot_be(self, world: World, flags: int, error: type[MshareError]) -> None:
        world.munmap(10, 5)
        before = world.vmas()
        with pytest.raises(error):
            world.mmap(None, 1, RW, flags)
        assert world.vmas() == before

    @pytest.mark.parametrize(
        ("first", "count", "prot", "error"),
        [
            (None, 0, RW, InvalidArgumentError),
            (None, -1, RW, InvalidArgumentError),
            (None, 6, RW, NoMemoryError),
            (511, 2, RW, InvalidArgumentError),
            (-1, 1, RW, InvalidArgumentError),
            (1 << 40, 1, RW, InvalidArgumentError),
            (None, 1, 8, InvalidArgumentError),
            (None, 1, -1, InvalidArgumentError),
            (None, 1, 7, AccessDeniedError),
        ],
    )
    def test_places_and_protections_that_cannot_be(
        self, world: World, first: int | None, count: int, prot: int, error: type[MshareError]
    ) -> None:
        world.munmap(10, 5)
        before = world.vmas()
        with pytest.raises(error):
            world.mmap(first, count, prot)
        assert world.vmas() == before


class TestForEverybody:
    """A change is done in every attachment, and memory moves when all follow."""

    def test_a_hole_is_armed_and_its_memory_goes(self, world: World) -> None:
        world.write(3, 4)
        world.munmap(4)
        assert world.armed()[-1] == (world.ar(4), Arming.MISSING)
        assert world.held() == [3]
        assert world.events >= 1

    def test_what_may_only_be_read_is_protected(self, world: World) -> None:
        world.mprotect(4, 2, mmap.PROT_READ)
        assert world.armed()[-1] == (world.ar(4, 2), Arming.WP)
        world.mprotect(4, 2, RW)
        assert world.armed()[-1] == (world.ar(4, 2), Arming.NATIVE)

    def test_what_may_not_be_touched_waits_elsewhere(self, world: World) -> None:
        world.write(4, 5)
        world.mprotect(4, 1, 0)
        assert world.held() == [5]
        world.mprotect(4, 1, RW)
        assert world.held() == [4, 5]
        assert os.pread(world.region.backing.fd, 1, 4 * PAGE_SIZE) == b"\4"

    def test_but_not_beyond_an_unmapping(self, world: World) -> None:
        world.write(4)
        world.mprotect(4, 1, 0)
        world.munmap(4)
        world.mmap(4, 1, 0)
        world.mprotect(4, 1, RW)
        assert world.held() == []

    def test_what_is_not_mapped_cannot_be_protected(self, world: World) -> None:
        world.munmap(4)
        with pytest.raises(NoMemoryError):
            world.mprotect(3, 3, mmap.PROT_READ)
        assert world.vmas() == [(0, 4, 3), (5, 507, 3)]


class TestReaders:
    """Who opened the region for reading changes nothing."""

    def test_every_change_is_refused(self, world: World) -> None:
        reader = world.attach(3, readonly=True)
        before = world.vmas()
        calls: list[Callable[[], object]] = [
            lambda: world.mmap(None, 1, live=reader),
            lambda: world.mmap(0, 1, RW, ANONYMOUS | FIXED, live=reader),
            lambda: world.munmap(0, 1, reader),
            lambda: world.mprotect(0, 1, 0, reader),
            lambda: trio.run(world.changes.madvise, reader, protocol.Madvise(NUMBER, 0, PAGE_SIZE, mmap.MADV_REMOVE)),
        ]
        for call in calls:
            with pytest.raises(AccessDeniedError, match="open it O_RDWR to change its mappings"):
                call()
        assert world.vmas() == before
        assert world.armed() == []


class TestNoMemory:
    """When memory is short all is as before."""

    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Copies fail as often as the list is long."""
        numbers: list[int] = []
        plain = apply.sparse.copy_all

        def copy_all(*args: Any, **kwargs: Any) -> None:
            if numbers:
                raise OSError(numbers[0], os.strerror(numbers.pop()))
            plain(*args, **kwargs)

        monkeypatch.setattr(apply.sparse, "copy_all", copy_all)
        return numbers

    def test_protecting_is_undone(self, world: World, full: list[int], caplog: pytest.LogCaptureFixture) -> None:
        world.write(4, 5, 6)
        world.mprotect(5, 1, mmap.PROT_READ)
        before = world.vmas()
        full.append(errno.ENOSPC)
        with pytest.raises(NoMemoryError, match="no memory for the change: No space left on device; free some"):
            world.mprotect(4, 3, 0)
        assert world.vmas() == before
        assert world.held() == [4, 5, 6]
        assert world.armed()[-1][1] == Arming.NATIVE
        assert (world.ar(5), Arming.WP) in world.armed()[-3:]
        assert "undone: No space left" in caplog.text
        assert not world.region.changing

    def test_what_cannot_be_had_again_stays_inaccessible(
        self, world: World, full: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody may see zeros where there are contents."""

        def nothing_free(*_args: object, **_kwargs: object) -> None:
            raise NoMemoryError("no pages")

        world.write(4)
        full.append(errno.ENOSPC)
        monkeypatch.setattr(type(world.region), "reserve", nothing_free)
        with pytest.raises(NoMemoryError, match="no memory for the change"):
            world.mprotect(4, 1, 0)
        assert world.vmas() == [(0, 4, 3), (4, 1, 0), (5, 507, 3)]
        assert "stays inaccessible: no pages" in caplog.text

    def test_so_is_giving_back(self, world: World, full: list[int]) -> None:
        world.write(4)
        world.mprotect(4, 1, 0)
        before = world.vmas()
        full.append(errno.ENOMEM)
        with pytest.raises(NoMemoryError):
            world.mprotect(4, 1, RW)
        assert world.vmas() == before
        assert world.held() == []
        world.mprotect(4, 1, RW)
        assert os.pread(world.region.backing.fd, 1, 4 * PAGE_SIZE) == b"\4"


class TestMadvise:
    """Advice that concerns everybody, and checks for the rest."""

    def test_removing_makes_zeros(self, world: World) -> None:
        world.write(4, 5)
        world.madvise(4, 1, mmap.MADV_REMOVE)
        assert world.held() == [5]
        assert world.vmas() == [(0, 512, 3)]

    @pytest.mark.parametrize("advice", [0, 1, 2, 3, 4, 14, 15, 20, 21, 22, 23, 25])
    def test_what_the_client_does_by_itself_changes_nothing_here(self, world: World, advice: int) -> None:
        world.write(4)
        world.madvise(4, 1, advice)
        assert world.held() == [4]
        assert world.armed() == []

    @pytest.mark.parametrize("advice", [8, 10, 11, 12, 13, 16, 17, 18, 19, 24, 100, 101, -1, 1 << 40])
    def test_what_makes_no_sense_is_refused(self, world: World, advice: int) -> None:
        with pytest.raises(InvalidArgumentError, match="makes no sense for a region"):
            world.madvise(4, 1, advice)

    @pytest.mark.parametrize("advice", [mmap.MADV_REMOVE, mmap.MADV_WILLNEED, 22])
    def test_what_is_not_mapped_takes_none(self, world: World, advice: int) -> None:
        world.munmap(4)
        with pytest.raises(NoMemoryError):
            world.madvise(3, 2, advice)

    def test_populating_needs_what_it_touches(self, world: World) -> None:
        world.mprotect(4, 1, mmap.PROT_READ)
        world.mprotect(5, 1, 0)
        world.madvise(3, 2, 22)
        for first, count, advice in ((3, 2, 23), (3, 3, 22), (5, 1, 22)):
            with pytest.raises(InvalidArgumentError, match="mprotect it first"):
                world.madvise(first, count, advice)


class TestFiles:
    """Descriptors of files that are to be mapped: checked as mmap(2) does, and closed when nobody needs them."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[Callable[[int], int]]:
        (tmp_path / "file").write_bytes(bytes(4 * PAGE_SIZE))
        fds: list[int] = []

        def opened(flags: int) -> int:
            fds.append(os.open(tmp_path / "file", flags))
            return fds[-1]

        yield opened
        for fd in fds:
            os.close(fd)

    def test_one_that_is_mapped_is_kept_until_nothing_shows_it(
        self, world: World, file: Callable[[int], int], open_descriptors: Callable[[], int]
    ) -> None:
        fd = file(os.O_RDWR)
        before = open_descriptors()
        world.munmap(10, 4)
        assert world.mmap(10, 4, RW, mmap.MAP_SHARED, file=fd) == 10
        assert open_descriptors() == before + 1
        assert world.armed()[-1][1] & Arming.MISSING
        world.munmap(10, 2)
        assert open_descriptors() == before + 1
        world.mmap(12, 2, RW, ANONYMOUS | FIXED)
        assert open_descriptors() == before

    @pytest.mark.parametrize(
        ("access", "prot", "flags"),
        [
            (os.O_RDONLY, mmap.PROT_READ, mmap.MAP_SHARED),
            (os.O_RDONLY, RW, mmap.MAP_PRIVATE),
            (os.O_RDWR, RW, mmap.MAP_SHARED),
            (os.O_RDWR | os.O_APPEND, RW, mmap.MAP_SHARED),
        ],
    )
    def test_what_its_access_allows(
        self, world: World, file: Callable[[int], int], access: int, prot: int, flags: int
    ) -> None:
        world.munmap(10, 4)
        assert world.mmap(10, 1, prot, flags, file=file(access)) == 10

    @pytest.mark.parametrize(
        ("access", "prot", "flags", "error"),
        [
            (os.O_RDONLY, RW, mmap.MAP_SHARED, AccessDeniedError),
            (os.O_WRONLY, mmap.PROT_WRITE, mmap.MAP_SHARED, AccessDeniedError),
            (os.O_PATH, mmap.PROT_READ, mmap.MAP_SHARED, BadDescriptorError),
            (os.O_RDWR, RW, ANONYMOUS, BadDescriptorError),
            (os.O_RDWR, RW, 0, InvalidArgumentError),
            (os.O_RDWR, 7, mmap.MAP_SHARED, AccessDeniedError),
        ],
    )
    def test_and_what_it_does_not(
        self,
        world: World,
        file: Callable[[int], int],
        access: int,
        prot: int,
        flags: int,
        error: type[MshareError],
        open_descriptors: Callable[[], int],
    ) -> None:
        world.munmap(10, 4)
        fd = file(access)
        before = open_descriptors()
        with pytest.raises(error):
            world.mmap(10, 1, prot, flags, file=fd)
        assert open_descriptors() == before
        assert world.region.files == {}

    def test_places_in_it_that_cannot_be(
        self, world: World, file: Callable[[int], int], open_descriptors: Callable[[], int]
    ) -> None:
        fd = file(os.O_RDWR)
        before = open_descriptors()
        for at in (1, PAGE_SIZE - 1, -PAGE_SIZE):
            with pytest.raises(InvalidArgumentError, match="file offset"):
                world.mmap(10, 1, RW, mmap.MAP_SHARED, file=fd, at=at)
        with pytest.raises(InvalidArgumentError):
            world.mmap(600, 1, RW, mmap.MAP_SHARED, file=fd)
        assert open_descriptors() == before

    def test_a_filesystem_that_does_not_answer_holds_up_its_own_client_only(
        self, world: World, file: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be the client that serves it."""
        asked, answer = threading.Event(), threading.Event()
        fd, plain = file(os.O_RDWR), os.open

        def slow(path: Any, *args: Any, **kwargs: Any) -> int:
            if path == f"/proc/self/fd/{fd}":
                asked.set()
                assert answer.wait(60)
            return plain(path, *args, **kwargs)

        async def main() -> None:
            request = protocol.Mmap(NUMBER, 10 * PAGE_SIZE, PAGE_SIZE, RW, mmap.MAP_SHARED | FIXED, 0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.changes.mmap, world.mine, request, fd)
                await trio.to_thread.run_sync(asked.wait)
                answer.set()  # The loop goes on meanwhile: else nobody would have come here.

        monkeypatch.setattr(os, "open", slow)
        trio.run(main)
        assert len(world.region.files) == 1

    def test_only_regular_files(self, world: World, tmp_path: Path) -> None:
        reader, writer = os.pipe()
        fds = [reader, writer, os.open(tmp_path, os.O_RDONLY), os.open("/dev/zero", os.O_RDWR), os.eventfd(0)]
        try:
            for fd in fds:
                with pytest.raises(NoDeviceError, match="only regular files"):
                    world.mmap(None, 1, mmap.PROT_READ, mmap.MAP_SHARED, file=fd)
        finally:
            for fd in fds:
                os.close(fd)

    def test_a_region_that_ends_closes_them(
        self, file: Callable[[int], int], open_descriptors: Callable[[], int]
    ) -> None:
        fd = file(os.O_RDWR)
        before = open_descriptors()
        world = World()
        world.mmap(10, 2, RW, mmap.MAP_SHARED | FIXED, file=fd)
        world.region.close()
        assert open_descriptors() == before


@pytest.mark.parametrize(("number", "prot"), [(0, Prot.NONE), (3, Prot.READ | Prot.WRITE), (4, Prot.EXEC)])
def test_protections_from_the_wire(number: int, prot: Prot) -> None:
    assert checked_prot(number) is prot


@pytest.mark.parametrize("number", [8, 16, -1, 1 << 24])
def test_bits_that_no_protection_has(number: int) -> None:
    with pytest.raises(InvalidArgumentError, match="unknown bits"):
        checked_prot(number)


class TestReferencePages:
    """Memory that shows a pattern."""

    SHOW = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x400000 | FIXED

    def test_they_are_mapped_and_armed_in_every_attachment(self, world: World) -> None:
        world.write(4, 5)
        assert world.mmap(4, 2, flags=self.SHOW, refpage="aabb") == 4
        assert world.armed() == [(world.ar(4, 2), Arming.MISSING | Arming.WP_CLEAN)]
        assert world.held() == []
        assert [vma.source for vma in world.region.model.mm.vmas] == [None, RefPage(b"\xaa\xbb"), None]

    def test_equal_ones_are_one_until_nobody_maps_them(self, world: World) -> None:
        for first, content in ((0, "aa"), (4, "aaaa"), (8, "aa" * 4096)):
            world.mmap(first, 2, flags=self.SHOW, refpage=content)
        shown = [vma.refpage for vma in world.region.model.mm.vmas if vma.refpage is not None]
        assert len({id(refpage) for refpage in shown}) == 1
        last = weakref.ref(shown.pop())
        shown.clear()
        for first in (0, 4):
            world.munmap(first, 2)
        gc.collect()
        assert last() is not None
        world.munmap(8, 2)
        gc.collect()
        assert last() is None

    @pytest.mark.parametrize(
        ("flags", "content"),
        [
            (SHOW, None),
            (ANONYMOUS | FIXED, "aa"),
            (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x400000, "aa"),
            (mmap.MAP_PRIVATE | 0x400000, "aa"),
            (SHOW, ""),
            (SHOW, "aaa"),
            (SHOW, "aabbcc"),
            (SHOW, "no"),
            (SHOW, "aa" * 8192),
        ],
    )
    def test_what_fits_no_rule_is_refused(self, world: World, flags: int, content: str | None) -> None:
        with pytest.raises(InvalidArgumentError):
            world.mmap(4, 2, flags=flags, refpage=content)
        assert world.vmas() == [(0, 512, 3)]

    def test_nor_together_with_a_file(self, world: World) -> None:
        with open(os.devnull, "rb") as file, pytest.raises(InvalidArgumentError, match="without a file"):
            world.mmap(4, 2, flags=self.SHOW & ~mmap.MAP_ANONYMOUS, refpage="aa", file=file.fileno())

    @pytest.mark.parametrize("advice", [20, 21])
    def test_clean_pages_are_given_back(self, world: World, advice: int) -> None:
        world.mmap(0, 512, flags=self.SHOW, refpage="aa")
        world.write(*range(0, 200, 2))
        for number in range(0, 200, 2):
            clean_pages.came(world.region.model.mm, world.ar(number), clean=number % 4 == 0)
        world.madvise(0, 512, advice)
        assert world.held() == list(range(2, 200, 4))
