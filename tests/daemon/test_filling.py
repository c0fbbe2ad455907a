"""Pages of files for those who wait: read off the loop, installed where nothing is, decided anew when things change."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from mshared import apply, files
from mshared.backing import MemfdStore
from mshared.comparing import Digests
from mshared.files import MappedFile
from mshared.filling import Filling, Waiting
from mshared.live import LiveAttachment, LiveRegion
from mshared.sparse import extents
from mshared.uffd import Outcome
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, PMD_SIZE, WINDOW_START, Address, AddrRange
from msharefs.effects import Deliver, Fill
from msharefs.invariants import check_mm
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Advice, Credentials, Ownership, Prot
from msharefs.readahead import MOST, PIECE
from msharefs.region import BackingKind
from msharefs.vma import FileSource, Vma

SIZE = 4 * PMD_SIZE
PAGES = SIZE // PAGE_SIZE
ELSEWHERE = Address(0x5600_0000_0000)


class FakeUffd:
    """Notes who is woken."""

    def __init__(self) -> None:
        self.woken: list[AddrRange] = []

    def wake(self, ar: AddrRange) -> None:
        self.woken.append(ar)


class World:
    """A region that shows a file throughout, and faults in it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        self.model = self.namespace.create("it", None, SIZE, 0o600, BackingKind.SMALL, Credentials(0, 0), empty=True)
        self.region = LiveRegion(self.model, MemfdStore().create(self.model.id, BackingKind.SMALL, SIZE), None)
        file = self.region.add_file(os.open(path, os.O_RDWR))
        self.model.mm.mmap(self.model.ar, SIZE, fixed=True, source=FileSource(file, 0, shared=True, writable=True))
        self.attachment = self.attach(WINDOW_START)
        self.decided: list[int] = []
        self.delivered: list[int] = []
        self.reads: list[tuple[int, int]] = []
        self.filling = Filling(lambda fault: self.decided.append(fault.addr))
        plain = files.read
        monkeypatch.setattr(files, "read", lambda *args: (self.reads.append((args[2], args[1])), plain(*args))[1])
        monkeypatch.setattr(MappedFile, "read_now", self.read_now)
        self.at_once: list[tuple[int, int]] = []
        self.in_memory = False
        monkeypatch.setattr(apply, "answer_fault", self.answer)

    def read_now(self, buffer: files.Buffer, length: int, offset: int) -> bool:
        """Stand in for what the page cache has: nothing, unless a test says otherwise."""
        if not self.in_memory:
            return False
        self.at_once.append((offset, length))
        (mapped,) = self.region.files.values()
        return os.preadv(mapped.fd, [buffer.view[:length]], offset) == length

    def attach(self, at: Address) -> LiveAttachment:
        uffd: Any = FakeUffd()
        model = self.namespace.attach(self.model, at, 1, readonly=False)
        live = LiveAttachment(model, self.region, uffd, Address(0))
        self.region.attachments.append(live)
        return live

    def answer(self, _attachment: object, addr: int, _tid: int, effect: object, _access: object) -> None:
        assert isinstance(effect, Deliver)
        self.delivered.append((addr - WINDOW_START) // PAGE_SIZE)

    def fault(self, page: int, attachment: LiveAttachment | None = None) -> None:
        live = attachment or self.attachment
        addr = live.model.window.start + page * PAGE_SIZE + 77
        self.filling.request(*self.wanted(page), Waiting(live, abi.FLAG_WRITE, addr, 5, 0))

    def wanted(self, page: int) -> tuple[Fill, Vma]:
        """What the model says of a page, and where it lies."""
        vma = self.model.mm.vmas.find(self.page(page).start)
        assert vma is not None
        source = vma.file_at(self.page(page).start)
        assert source is not None
        return Fill(self.page(page), source.file, source.offset), vma

    def page(self, number: int) -> AddrRange:
        return AddrRange.sized(self.model.ar.start + number * PAGE_SIZE, PAGE_SIZE)

    def woken(self, attachment: LiveAttachment | None = None) -> list[int]:
        live = attachment or self.attachment
        uffd: Any = live.uffd
        return [(ar.start - live.model.window.start) // PAGE_SIZE for ar in uffd.woken]

    def run(self, *steps: Callable[[], object]) -> None:
        """Take the steps, and let what they ask for be done."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.filling.run)
                for step in steps:
                    step()
                    await self.settle()
                nursery.cancel_scope.cancel()

        trio.run(main)

    async def settle(self) -> None:
        with trio.fail_after(10):
            await trio.testing.wait_all_tasks_blocked()
            while self.region.reading.under_way:
                await trio.lowlevel.checkpoint()

    def held(self) -> list[int]:
        return [page.start // PAGE_SIZE for ar in extents(self.region.backing.fd) for page in ar.pieces(PAGE_SIZE)]

    def byte(self, page: int) -> int:
        return os.pread(self.region.backing.fd, 1, page * PAGE_SIZE)[0]


def byte_of(page: int) -> int:
    """What the file holds in a page."""
    return page % 251 + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(b"".join(bytes([byte_of(page)]) * PAGE_SIZE for page in range(PAGES)))
    return found


@pytest.fixture
def world(path: Path, monkeypatch: pytest.MonkeyPatch, open_descriptors: Callable[[], int]) -> Iterator[World]:
    before = open_descriptors()
    world = World(path, monkeypatch)
    yield world
    if not world.region.closed:
        world.region.close()
    assert open_descriptors() == before


def test_a_page_comes_with_those_around_it(world: World) -> None:
    around = PIECE // PAGE_SIZE
    world.run(lambda: world.fault(around + 3))
    assert world.held() == list(range(around, 2 * around))
    assert [world.byte(page) for page in (around, around + 3)] == [byte_of(around), byte_of(around + 3)]
    assert world.woken() == [around + 3]
    assert world.reads == [(PIECE, PIECE)]
    assert world.decided == []


def test_faults_in_what_is_being_read_wait_for_the_same_read(world: World) -> None:
    other = world.attach(ELSEWHERE)
    world.run(lambda: (world.fault(3), world.fault(3), world.fault(5), world.fault(4, other)))
    assert len(world.reads) == 1
    assert world.woken() == [3, 3, 5]
    assert world.woken(other) == [4]


def test_pages_touched_in_order_are_read_ahead_and_ever_more_of_them(world: World) -> None:
    ends: list[int] = []

    def go_on() -> None:
        ends.append((world.region.reading.readahead.end - world.model.ar.start) // PAGE_SIZE)
        world.fault(ends[-1])

    world.run(lambda: world.fault(0), *[go_on] * 4)
    lengths = [length for _, length in sorted(world.reads)]
    assert lengths == sorted(lengths)
    assert lengths[0] == PIECE
    assert max(lengths) <= MOST
    assert len(lengths) == 1 + 2 * 4
    assert world.held() == list(range(sum(lengths) // PAGE_SIZE))


def test_jumping_about_is_not_reading_in_order(world: World) -> None:
    world.run(*[lambda page=page: world.fault(page) for page in (0, 500, 1000, 700)])
    assert {length for _, length in world.reads} == {PIECE}


def test_nothing_is_read_beyond_the_mapping(world: World) -> None:
    mm = world.model.mm
    mm.munmap(world.page(2))
    mm.munmap(world.page(6))
    world.run(lambda: world.fault(4))
    assert world.held() == [3, 4, 5]
    assert world.reads == [(3 * PAGE_SIZE, 3 * PAGE_SIZE)]


def test_what_is_in_memory_is_not_written_over(world: World) -> None:
    os.pwrite(world.region.backing.fd, b"\xff" * PAGE_SIZE, 4 * PAGE_SIZE)
    world.model.mm.filled(world.page(4))
    os.pwrite(world.region.backing.fd, b"\xfe" * PAGE_SIZE, 5 * PAGE_SIZE)
    world.run(lambda: world.fault(3))
    assert [world.byte(page) for page in (3, 4, 5, 6)] == [byte_of(3), 0xFF, 0xFE, byte_of(6)]


def test_behind_the_end_of_the_file_is_a_sigbus(world: World, path: Path) -> None:
    os.truncate(path, 3 * PAGE_SIZE + 10)
    world.run(lambda: (world.fault(1), world.fault(3), world.fault(4), world.fault(9)))
    assert world.woken() == [1, 3]
    assert world.delivered == [4, 9]
    assert world.held() == [0, 1, 2, 3]
    assert os.pread(world.region.backing.fd, 12, 3 * PAGE_SIZE) == bytes([byte_of(3)]) * 10 + bytes(2)


def test_a_file_that_cannot_be_read_is_one_too(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> tuple[bytes, int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "read", fail)
    world.run(lambda: world.fault(1))
    assert world.delivered == [1]
    assert "region it: reading a mapped file: Input/output error" in caplog.text


class TestMeanwhile:
    """What changes while a file is read."""

    def run(self, world: World, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
        """Fault on page 1, and make a change before the file has been read."""
        reading, changed = threading.Event(), threading.Event()
        plain = files.read

        def read(*args: Any) -> Any:
            reading.set()
            assert changed.wait(60)
            return plain(*args)

        async def meanwhile() -> None:
            await trio.to_thread.run_sync(reading.wait)
            change()
            changed.set()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.filling.run)
                world.fault(1)
                await meanwhile()
                await world.settle()
                nursery.cancel_scope.cancel()

        monkeypatch.setattr(files, "read", read)
        trio.run(main)

    @pytest.mark.parametrize("change", ["unmapped", "forbidden", "moved"])
    def test_the_fault_is_decided_anew_and_nothing_installed(
        self, world: World, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        changes: dict[str, Callable[[], object]] = {
            "unmapped": lambda: world.model.mm.munmap(world.page(1)),
            "forbidden": lambda: world.model.mm.mprotect(world.page(1), Prot.NONE),
            "moved": lambda: setattr(world.region, "moves", world.region.moves + 1),
        }
        self.run(world, monkeypatch, changes[change])
        assert world.decided == [world.attachment.model.window.start + PAGE_SIZE + 77]
        assert (world.held(), world.woken(), world.delivered) == ([], [], [])

    def test_a_region_that_goes_has_nobody_who_waits(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run(world, monkeypatch, world.region.close)
        assert (world.decided, world.woken(), world.delivered) == ([], [], [])

    def test_nor_has_an_attachment_that_went(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run(world, monkeypatch, lambda: world.namespace.detach(world.model, world.attachment.model))
        assert (world.decided, world.woken(), world.delivered) == ([], [], [])
        assert 1 in world.held()


class TestAtOnce:
    """What the system has in memory."""

    @pytest.fixture
    def filled(self, world: World, monkeypatch: pytest.MonkeyPatch) -> list[tuple[AddrRange, bytes, bool]]:
        """A world whose files are in memory; what was put into windows."""
        world.in_memory = True
        found: list[tuple[AddrRange, bytes, bool]] = []

        def fill(_attachment: object, ar: AddrRange, source: int, *, protected: bool) -> Outcome:
            found.append((ar, ctypes.string_at(source, ar.size), protected))
            return Outcome.SERVED

        monkeypatch.setattr(apply, "fill", fill)
        return found

    def test_goes_straight_into_the_window(self, world: World, filled: list[tuple[AddrRange, bytes, bool]]) -> None:
        world.run(lambda: world.fault(3))
        ((ar, data, protected),) = filled
        assert (ar, protected) == (AddrRange.sized(world.model.ar.start, PIECE), True)
        assert data == b"".join(bytes([byte_of(page)]) * PAGE_SIZE for page in range(PIECE // PAGE_SIZE))
        assert (world.reads, world.woken()) == ([], [])
        assert world.model.mm.table.holes(ar) == []

    def test_of_a_mapping_read_at_random_it_is_one_page(
        self, world: World, filled: list[tuple[AddrRange, bytes, bool]]
    ) -> None:
        world.model.mm.madvise_reading(world.model.ar, Advice.RANDOM)
        world.run(lambda: world.fault(3), lambda: world.fault(9))
        assert [(ar, data[:1]) for ar, data, _ in filled] == [
            (world.page(3), bytes([byte_of(3)])),
            (world.page(9), bytes([byte_of(9)])),
        ]

    def test_a_page_read_at_random_goes_into_the_window_without_being_asked_for(
        self, world: World, filled: list[tuple[AddrRange, bytes, bool]]
    ) -> None:
        world.model.mm.madvise_reading(world.model.ar, Advice.RANDOM)
        assert world.filling.at_once(world.attachment, *world.wanted(9))
        assert filled == [(world.page(9), bytes([byte_of(9)]) * PAGE_SIZE, True)]
        assert world.model.mm.table.present(world.model.ar) == [world.page(9)]
        check_mm(world.model.mm)

    @pytest.mark.parametrize("why", ["in order", "there", "on disk", "being read", "compared", "read-only"])
    def test_otherwise_nothing_is_done_before_it_is_asked_for(
        self, world: World, filled: list[tuple[AddrRange, bytes, bool]], why: str
    ) -> None:
        world.model.mm.madvise_reading(world.model.ar, Advice.NORMAL if why == "in order" else Advice.RANDOM)
        fill, vma = world.wanted(9)
        fill = attrs.evolve(fill, there=why == "there")
        world.in_memory = why != "on disk"
        world.attachment.model.readonly = why == "read-only"
        if why == "being read":
            world.region.reading.under_way.append(world.page(100))
        if why == "compared":
            world.region.digests = Digests()
        assert not world.filling.at_once(world.attachment, fill, vma)
        assert (filled, world.at_once, world.model.mm.table.pages) == ([], [], 0)

    @pytest.mark.parametrize("outcome", [Outcome.EXISTS, Outcome.RETRY, Outcome.UNMAPPED, Outcome.GONE])
    def test_what_the_window_did_not_take_is_not_in_the_tables(
        self, world: World, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
    ) -> None:
        world.in_memory = True
        world.model.mm.madvise_reading(world.model.ar, Advice.RANDOM)
        monkeypatch.setattr(apply, "fill", lambda *_args, **_options: outcome)
        assert not world.filling.at_once(world.attachment, *world.wanted(9))
        assert world.model.mm.table.pages == 0

    def test_what_is_there_already_stays(self, world: World, filled: list[tuple[AddrRange, bytes, bool]]) -> None:
        world.model.mm.filled(world.page(4))
        world.run(lambda: world.fault(3))
        first = world.model.ar.start
        assert [ar for ar, _, _ in filled] == [
            AddrRange(first, world.page(4).start),
            AddrRange(world.page(4).end, Address(first + PIECE)),
        ]

    def test_where_the_window_takes_nothing_the_backing_does(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.in_memory = True
        monkeypatch.setattr(apply, "fill", lambda *_args, **_options: Outcome.UNMAPPED)
        world.run(lambda: world.fault(3))
        assert world.held() == list(range(PIECE // PAGE_SIZE))
        assert (world.reads, world.woken()) == ([], [3])

    def test_read_ahead_is_read_off_the_loop(self, world: World) -> None:
        world.in_memory = True
        world.model.mm.madvise_reading(world.model.ar, Advice.SEQUENTIAL)
        world.run(lambda: world.fault(0))
        assert world.at_once == []
        assert sorted(world.reads) == [(0, MOST), (MOST, MOST)]


class TestNoMemory:
    """Who waits for a page that nothing has room for gets a SIGBUS; the daemon goes on."""

    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """Whether there is no memory."""
        short = [True]
        plain = LiveRegion.put_new

        def put_new(self: LiveRegion, data: bytes, offset: int) -> None:
            if short[0]:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            plain(self, data, offset)

        monkeypatch.setattr(LiveRegion, "put_new", put_new)
        return short

    def test_for_what_was_read(self, world: World, full: list[bool], caplog: pytest.LogCaptureFixture) -> None:
        world.run(lambda: world.fault(3))
        assert (world.delivered, world.woken(), world.held()) == ([3], [], [])
        assert "no memory for a mapped file: Cannot allocate memory" in caplog.text
        full[0] = False
        world.run(lambda: world.fault(3))
        assert (world.delivered, world.woken()) == ([3], [3])

    def test_for_what_is_in_memory(self, world: World, full: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        world.in_memory = True
        monkeypatch.setattr(apply, "fill", lambda *_, **__: Outcome.UNMAPPED)
        world.fault(3)
        assert (world.delivered, world.woken()) == ([3], [])
        full[0] = False
        world.fault(3)
        assert (world.delivered, world.woken()) == ([3], [3])
