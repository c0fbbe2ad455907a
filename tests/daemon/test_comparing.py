"""Stores that nobody reports, found by comparing: with small pages in place of huge ones, and a file on a disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mshared import comparing
from mshared.backing import MemfdStore
from mshared.comparing import Digests, changed, digest
from mshared.live import LiveAttachment, LiveRegion
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.errors import NoMemoryError, NoSpaceError
from msharefs.file_sharing import FileKey, SharedFile
from msharefs.namespace import Namespace, Policy
from msharefs.perms import PROT_RW, Ownership
from msharefs.region import BackingKind
from msharefs.vma import FileSource

SIZE = 3 * PMD_SIZE
START = PMD_SIZE
"""What of the file lies at the region's start."""


class World:
    """A region that shows the last 6 MiB, less a bit, of a file of 8, all of whose bytes are 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"\1" * (START + SIZE - 100))
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        file = SharedFile(FileKey(0, 1, 2), START, PROT_RW, resident=False)
        model = self.namespace.share(file, None, SIZE, Ownership(0, 0, 0o400), BackingKind.SMALL)
        self.live = LiveRegion(model, MemfdStore().create(model.id, BackingKind.SMALL, SIZE), None)
        self.digests = self.live.digests = Digests()
        number = self.live.add_file(os.open(path, os.O_RDWR))
        source = FileSource(number, START, shared=True, writable=True, compared=True)
        model.mm.mmap(model.ar, SIZE, fixed=True, source=source)

    def read_in(self) -> None:
        trio.run(comparing.read_in, self.live)

    def let_write(self) -> None:
        trio.run(comparing.let_write, self.live)
        self.digests.writers = True

    def store(self, offset: int, data: bytes) -> None:
        os.pwrite(self.live.backing.fd, data, offset)

    def write_changed(self) -> None:
        trio.run(comparing.write_changed, self.live)

    def in_file(self, offset: int, size: int) -> bytes:
        return self.path.read_bytes()[START + offset :][:size]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "data")
    yield found
    found.live.close()


@pytest.fixture
def writing(world: World) -> World:
    """One that is all in memory, and may be written."""
    world.read_in()
    world.let_write()
    return world


class TestDigests:
    def test_the_same_is_the_same(self) -> None:
        data = os.urandom(PMD_SIZE)
        assert changed(digest(data), digest(bytearray(data))) == []

    @settings(max_examples=20)
    @given(st.sets(st.integers(0, PMD_SIZE - 1), max_size=5))
    def test_pieces_with_another_byte_are_found(self, places: set[int]) -> None:
        data = bytearray(PMD_SIZE)
        for at in places:
            data[at] = 1
        found = changed(digest(bytes(PMD_SIZE)), digest(data))
        pieces = {piece.start for part in found for piece in part.pieces(PAGE_SIZE)}
        assert pieces == {at // PAGE_SIZE * PAGE_SIZE for at in places}

    def test_neighbours_are_one_part(self) -> None:
        data = bytes(PAGE_SIZE) + b"x" * 3 * PAGE_SIZE + bytes(PMD_SIZE - 4 * PAGE_SIZE)
        assert changed(digest(bytes(PMD_SIZE)), digest(data)) == [AddrRange.sized(PAGE_SIZE, 3 * PAGE_SIZE)]

    def test_pages_of_a_read_are_told_apart(self) -> None:
        first, second = b"a" * PMD_SIZE, b"b" * PMD_SIZE
        digests = Digests()
        digests.note(AddrRange.sized(4 * PMD_SIZE, PMD_SIZE), digest(first + second), 3 * PMD_SIZE)
        assert not digests.wanted
        digests.want()
        digests.note(AddrRange.sized(4 * PMD_SIZE, PMD_SIZE), digest(first + second), 3 * PMD_SIZE)
        assert {page: digests[page] for page in digests} == {4 * PMD_SIZE: digest(second)}
        digests.close()

    def test_those_that_were_kept_are_there_again(self) -> None:
        """Of a page that is there and has none, all pieces are others."""
        digests, held = Digests(), [AddrRange(Address(0), Address(3 * PMD_SIZE))]
        digests.want()
        digests[PMD_SIZE] = digest(b"a" * PMD_SIZE)
        again = comparing.restored(os.dup(digests.fd), held)
        assert (again.wanted, again.writers, list(again)) == (True, True, [0, PMD_SIZE, 2 * PMD_SIZE])
        assert [changed(again[page], digest(b"a" * PMD_SIZE)) for page in again] == [
            [AddrRange(Address(0), Address(PMD_SIZE))],
            [],
            [AddrRange(Address(0), Address(PMD_SIZE))],
        ]
        for each in (digests, again):
            each.close()

    def test_where_nobody_could_write_nothing_is_written(self) -> None:
        again = comparing.restored(Digests().fd, [AddrRange(Address(0), Address(3 * PMD_SIZE))])
        assert (again.wanted, again.writers, list(again)) == (False, False, [])
        again.close()

    def test_where_nobody_has_kept_them_all_is_written(self) -> None:
        again = comparing.restored(None, [AddrRange(Address(0), Address(PMD_SIZE))])
        assert (again.wanted, again.writers, list(again)) == (True, True, [0])
        again.close()

    def test_a_read_past_the_end_is_remembered_with_zeros(self, world: World) -> None:
        with world.path.open("rb") as file:
            data, size, marks = comparing.read(file.fileno(), PMD_SIZE, START + 2 * PMD_SIZE)
        assert (len(data), size) == (PMD_SIZE - 100, START + SIZE - 100)
        assert marks == digest(data + bytes(100))


class TestReadingIn:
    def test_all_of_the_file_is_there_and_zeros_after_it(self, world: World) -> None:
        world.read_in()
        assert world.live.backing.read(SIZE, 0) == b"\1" * (SIZE - 100) + bytes(100)
        assert world.live.model.mm.table.present(world.live.model.ar) == [world.live.model.ar]

    def test_nothing_is_remembered_for_readers(self, world: World) -> None:
        world.read_in()
        assert list(world.digests) == []
        assert not world.live.has_stores

    def test_what_is_there_stays(self, world: World) -> None:
        world.let_write()
        page = world.live.model.range_at(PMD_SIZE, PMD_SIZE)
        world.live.put_new(b"\2" * PMD_SIZE, PMD_SIZE)
        world.live.model.mm.filled(page)
        world.read_in()
        assert set(world.live.backing.read(PMD_SIZE, PMD_SIZE)) == {2}
        assert list(world.digests) == [0, 2 * PMD_SIZE]

    def test_a_file_that_has_shrunk_meanwhile_is_zeros(self, world: World) -> None:
        os.truncate(world.path, START + 10)
        world.read_in()
        assert world.live.backing.read(20, 0) == b"\1" * 10 + bytes(10)
        assert world.live.model.mm.table.present(world.live.model.ar) == [world.live.model.ar]

    def test_one_that_cannot_be_read_is_an_error(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_args: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(NoMemoryError, match="cannot be read in: Input/output error"):
            world.read_in()
        assert world.live.model.mm.table.resident == 0


class TestWriting:
    def test_only_what_was_stored_is_written(self, writing: World) -> None:
        """What others have written to the file meanwhile, a page further on, stays."""
        with writing.path.open("rb+") as file:
            os.pwrite(file.fileno(), b"theirs", START + PAGE_SIZE)
        writing.store(5, b"ours")
        writing.write_changed()
        assert writing.in_file(0, 10) == b"\1" * 5 + b"ours\1"
        assert writing.in_file(PAGE_SIZE, 6) == b"theirs"

    def test_the_file_grows_by_nothing(self, writing: World) -> None:
        writing.store(SIZE - 101, b"xyz")
        writing.write_changed()
        assert writing.in_file(SIZE - 102, 10) == b"\1x"

    def test_it_is_written_once(self, writing: World) -> None:
        writing.store(0, b"one")
        writing.write_changed()
        with writing.path.open("rb+") as file:
            os.pwrite(file.fileno(), b"two", START)
        writing.digests.writers = True
        writing.write_changed()
        assert writing.in_file(0, 3) == b"two"

    def test_stores_from_before_there_were_writers_are_none(self, world: World) -> None:
        """Pages are remembered before anybody can store."""
        world.read_in()
        world.let_write()
        assert list(world.digests) == [0, PMD_SIZE, 2 * PMD_SIZE]
        world.store(PMD_SIZE, b"x")
        world.let_write()
        world.write_changed()
        assert world.in_file(PMD_SIZE, 2) == b"x\1"

    def test_without_writers_nothing_is_looked_at(self, writing: World) -> None:
        writing.write_changed()
        assert not writing.live.has_stores
        writing.store(0, b"x")
        writing.write_changed()
        assert writing.in_file(0, 1) == b"\1"

    def test_who_may_write_may_have_stored(self, writing: World) -> None:
        """Windows that can write are looked after, again and again; those that cannot are not."""
        for readonly, found in ((True, False), (False, True)):
            model = writing.namespace.attach(writing.live.model, writing.live.model.ar.start, 1, readonly=readonly)
            uffd: Any = None
            writing.live.attachments.append(LiveAttachment(model, writing.live, uffd, Address(0)))
            writing.digests.writers = True  # Somebody who has left by now.
            writing.write_changed()
            assert writing.live.has_stores is found
        writing.live.attachments.clear()

    def test_what_cannot_be_written_is_tried_again(self, writing: World, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_args: object) -> None:
            raise OSError(28, "No space left on device")

        writing.store(0, b"x")
        with monkeypatch.context() as patched:
            patched.setattr(comparing, "write_within", fail)
            with pytest.raises(NoSpaceError, match="No space left"):
                writing.write_changed()
        assert writing.live.has_stores
        writing.write_changed()
        assert writing.in_file(0, 1) == b"x"

    def test_the_same_without_a_loop(self, writing: World) -> None:
        writing.store(2 * PMD_SIZE, b"last")
        comparing.write_changed_now(writing.live)
        assert writing.in_file(2 * PMD_SIZE, 4) == b"last"
        assert not writing.live.has_stores
