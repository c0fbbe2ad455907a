"""Mappings of files that are shared without a name: with real files, and nobody attached."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from mshared import file_mappings
from mshared.answers import Caller, Pending
from mshared.backing import MemfdStore
from mshared.file_mappings import FileMappings
from mshared.files import is_writable
from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from mshared.pager import Pager
from msharefs import protocol, uffd_abi
from msharefs.addr import PMD_SIZE, AddrRange
from msharefs.errors import (
    AccessDeniedError,
    BadDescriptorError,
    InvalidArgumentError,
    MshareError,
    NoDeviceError,
    NotSupportedError,
    QuotaError,
)
from msharefs.file_sharing import FileKey
from msharefs.namespace import Limits, Namespace, Policy
from msharefs.perms import PROT_RW, Credentials, Ownership
from msharefs.region import BackingKind
from msharefs.vma import FileId

ME = Caller(os.getpid(), Credentials(1000, 1000))
SIZE = 2 * PMD_SIZE
RW, RO = os.O_RDWR, os.O_RDONLY
PLAIN = protocol.MapFile(None, SIZE, 0, 3)


class World:
    """File mappings and what they work on; ``limits`` are the namespace's."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.pager = Pager()
        self.namespace = Namespace(Ownership(0, 0, 0o1777), Policy(limits=limits or Limits()))
        self.lifetimes = Lifetimes(self.namespace, self.pager, uffd_abi.Feature(0), None)
        self.files = FileMappings(self.namespace, self.lifetimes, MemfdStore(), self._kind, self._end)

    def _end(self, live: LiveRegion) -> None:
        self.namespace.abandon(live.model)
        self.lifetimes.forget(live)

    def _kind(self, name: str | None) -> BackingKind:
        return BackingKind(name or "4k")

    def map(self, fd: int, request: protocol.MapFile = PLAIN, **changed: Any) -> tuple[LiveRegion, Pending] | str:
        """What is answered to a request for the file."""

        async def ask() -> tuple[LiveRegion, Pending] | str:
            return await self.files.map(ME, attrs.evolve(request, **changed), fd)

        return trio.run(ask)

    def region(self, fd: int, **changed: Any) -> LiveRegion:
        found = self.map(fd, **changed)
        assert not isinstance(found, str), found
        return found[0]

    def close(self) -> None:
        for region in self.lifetimes.regions():
            self.namespace.abandon(region.model)
            self.lifetimes.forget(region)
        self.pager.close()


@pytest.fixture
def world(open_descriptors: Callable[[], int]) -> Iterator[World]:
    """In the end every descriptor is closed again."""
    before = open_descriptors()
    world = World()
    yield world
    world.close()
    assert open_descriptors() == before


@pytest.fixture
def memory(world: World) -> Iterator[int]:
    """A file in memory, open for reading and writing."""
    fd = os.memfd_create("it", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    yield fd
    world.close()
    os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file on a disk."""
    path = tmp_path / "data"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.fixture
def opened(world: World) -> Iterator[Callable[..., int]]:
    """Open a file until the end of the test."""
    fds: list[int] = []

    def start(path: Path | str, flags: int = RW) -> int:
        fds.append(os.open(path, flags))
        return fds[-1]

    yield start
    for fd in fds:
        os.close(fd)


Opener = Callable[..., int]


class TestInMemory:
    def test_the_first_makes_a_region_of_the_file_itself(self, world: World, memory: int) -> None:
        live = world.region(memory)
        about = os.fstat(memory)
        assert live.model.file is not None
        assert live.model.file.key == FileKey(os.major(about.st_dev), os.minor(about.st_dev), about.st_ino)
        assert live.model.file.resident
        assert live.shows_own_file
        assert os.path.sameopenfile(live.backing.fd, memory)
        assert [(vma.ar, vma.prot, vma.source) for vma in live.model.mm.vmas] == [(live.model.ar, PROT_RW, None)]
        assert list(live.model.mm.armings()) == []

    def test_others_find_it(self, world: World, memory: int, opened: Opener) -> None:
        again = opened(f"/proc/self/fd/{memory}")
        assert (
            world.region(memory) is world.region(again) is world.region(again, addr=world.region(memory).model.ar.start)
        )

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"length": PMD_SIZE}, "not 2 MiB"),
            ({"offset": PMD_SIZE}, "not from 0x200000"),
            ({"addr": PMD_SIZE}, "not at 0x200000"),
            ({"prot": 1}, "does not include"),
            ({"length": PMD_SIZE + 4096}, "not a multiple"),
        ],
    )
    def test_who_asks_for_something_else_is_told_why(
        self, world: World, memory: int, changed: dict[str, int], why: str
    ) -> None:
        world.region(memory)
        found = world.map(memory, **changed)
        assert isinstance(found, str)
        assert why in found

    def test_a_window_that_cannot_write_is_left_unarmed(self, world: World, memory: int, opened: Opener) -> None:
        found = world.map(opened(f"/proc/self/fd/{memory}", RO), prot=1)
        assert not isinstance(found, str)
        assert found[1] == Pending(found[0], readonly=True, creator=False, unarmed=True)

    def test_the_best_descriptor_is_kept(self, world: World, memory: int, opened: Opener) -> None:
        live = world.region(opened(f"/proc/self/fd/{memory}", RO), prot=1)
        assert not is_writable(live.backing.fd)
        assert world.region(memory) is live
        assert is_writable(live.backing.fd)
        assert live.family.backings[live.model.mm.store] is live.backing

    def test_one_that_starts_further_on(self, world: World, memory: int) -> None:
        os.pwrite(memory, b"there", PMD_SIZE)
        live = world.region(memory, length=PMD_SIZE, offset=PMD_SIZE)
        assert live.backing.read(5, 0) == b"there"
        assert live.backing.holds(0)
        assert live.held(AddrRange.sized(0, PMD_SIZE)) == [AddrRange.sized(0, 4096)]
        live.backing.write(b"T", 0)
        assert os.pread(memory, 5, PMD_SIZE) == b"There"

    def test_a_sealed_one_cannot_be_written(self, world: World, memory: int) -> None:
        import fcntl

        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(AccessDeniedError, match="sealed"):
            world.map(memory)
        found = world.map(memory, prot=1)
        assert not isinstance(found, str)
        assert found[1].unarmed

    def test_huge_pages_of_another_size_are_not_shared(
        self, world: World, memory: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(file_mappings, "filesystem", lambda _fd: (0x958458F6, 1 << 30))
        assert world.map(memory) == "the file has pages of 1 GiB, not of 2 MiB"


class TestOnDisk:
    def test_a_backing_stands_in_for_it(self, world: World, path: Path, opened: Opener) -> None:
        live = world.region(opened(path), offset=PMD_SIZE, length=PMD_SIZE)
        (vma,) = live.model.mm.vmas
        assert vma.source is not None
        assert (vma.source.file, vma.source.offset, vma.source.shared) == (FileId(1), PMD_SIZE, True)
        assert os.path.sameopenfile(live.files[FileId(1)].fd, opened(path))
        assert os.fstat(live.backing.fd).st_size == PMD_SIZE
        assert not live.shows_own_file

    def test_the_best_descriptor_is_kept(self, world: World, path: Path, opened: Opener) -> None:
        live = world.region(opened(path, RO), prot=1)
        assert not is_writable(live.files[FileId(1)].fd)
        assert world.region(opened(path)) is live
        assert is_writable(live.files[FileId(1)].fd)

    def test_a_new_one_waits_until_the_last_is_written(self, world: World, path: Path, opened: Opener) -> None:
        """However many want it, who holds its lock meanwhile is not kept from ending it."""
        fd = opened(path)
        old = world.region(fd)
        found: list[LiveRegion] = []

        async def ask() -> None:
            live = await world.files.map(ME, PLAIN, fd)
            assert not isinstance(live, str)
            found.append(live[0])

        async def work() -> None:
            async with trio.open_nursery() as nursery:
                async with old.lock:
                    world.namespace.abandon(old.model)
                    world.lifetimes.forget(old)
                    for _ in range(3):
                        nursery.start_soon(ask)
                    await trio.testing.wait_all_tasks_blocked(0.1)
                    assert not old.closed
                    assert found == []
                world.lifetimes.settling.request(old)

        trio.run(work)
        assert old.closed
        assert len(found) == 3
        assert found[0] is found[1] is found[2] is not old

    def test_what_cannot_be_had_by_default_is_an_ordinary_mapping(self, path: Path) -> None:
        world = World(Limits(max_regions_per_uid=1))
        world.namespace.create("a", None, PMD_SIZE, 0o600, BackingKind.SMALL, ME.who)
        fd = os.open(path, RW)
        try:
            found = world.map(fd)
            assert isinstance(found, str)
            assert "the limit is 1" in found
            with pytest.raises(QuotaError):
                world.map(fd, backing="4k")
        finally:
            os.close(fd)
            world.pager.close()

    def test_what_was_asked_for_and_cannot_be_had_is_an_error(self, world: World, path: Path, opened: Opener) -> None:
        with pytest.raises(NotSupportedError):
            world.map(opened(path), backing="thp")
        assert world.namespace.all() == []


@pytest.mark.parametrize(
    ("where", "flags", "changed", "error"),
    [
        ("file", os.O_WRONLY, {}, AccessDeniedError),
        ("file", RO, {}, AccessDeniedError),
        ("file", RO, {"prot": 2}, AccessDeniedError),
        ("file", RW, {"prot": 7}, AccessDeniedError),
        ("file", RW, {"prot": 8}, InvalidArgumentError),
        ("file", RW, {"length": 0}, InvalidArgumentError),
        ("file", RW, {"length": -PMD_SIZE}, InvalidArgumentError),
        ("file", RW, {"offset": -PMD_SIZE}, InvalidArgumentError),
        ("file", RW, {"addr": 1 << 60}, InvalidArgumentError),
        ("file", RW, {"addr": -PMD_SIZE}, InvalidArgumentError),
        ("file", os.O_PATH, {}, BadDescriptorError),
        ("/", RO, {"prot": 1}, NoDeviceError),
        ("/dev/null", RW, {}, NoDeviceError),
    ],
)
def test_what_is_refused_leaves_nothing(
    world: World, path: Path, opened: Opener, where: str, flags: int, changed: dict[str, int], error: type[MshareError]
) -> None:
    fd = opened(path if where == "file" else where, flags)
    with pytest.raises(error):
        world.map(fd, **changed)
    assert world.namespace.all() == world.lifetimes.regions() == []


def test_files_that_are_no_memory_are_not_shared(world: World, opened: Opener) -> None:
    """Such as those of /proc: mapping them fails, which the client will see."""
    found = world.map(opened("/proc/self/status", RO), prot=1)
    assert isinstance(found, str)
    assert "cannot be mapped" in found


class TestChanges:
    WHOLE = protocol.Mprotect(1, 0, SIZE, 1)

    def test_all_of_it_may_change(self, world: World, memory: int) -> None:
        live = world.region(memory)
        world.files.check(live, self.WHOLE)
        world.files.check(live, protocol.Msync(1, 0, None))

    @pytest.mark.parametrize(
        "request_",
        [
            attrs.evolve(WHOLE, length=PMD_SIZE),
            attrs.evolve(WHOLE, offset=PMD_SIZE, length=PMD_SIZE),
            protocol.Munmap(1, 0, SIZE),
            protocol.Mmap(1, None, 4096, 3, 0x21),
            protocol.Madvise(1, 0, SIZE, 9),
        ],
    )
    def test_nothing_else(self, world: World, memory: int, request_: protocol.Changing) -> None:
        with pytest.raises(InvalidArgumentError, match="as a whole"):
            world.files.check(world.region(memory), request_)

    def test_files_in_memory_cannot_be_hidden(self, world: World, memory: int, path: Path, opened: Opener) -> None:
        with pytest.raises(NotSupportedError) as caught:
            world.files.check(world.region(memory), attrs.evolve(self.WHOLE, prot=0))
        assert caught.value.errno == errno.EOPNOTSUPP
        world.files.check(world.region(opened(path)), attrs.evolve(self.WHOLE, prot=0))
