"""mshare(), mshare_unlink() and remove() against a daemon that answers as the test says, with memfds for regions."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mshare
from mshare import connection
from mshare import syscalls as sc
from msharefs import protocol
from msharefs.addr import PAGE_SIZE, PMD_SIZE

BASE = 0x5700_0000_0000
CREATE = os.O_CREAT | os.O_RDWR | os.O_EXCL


class Daemon:
    """Offers one memfd for every region, at ``addr``, and takes every window."""

    def __init__(self, fake: Any) -> None:
        self.fake = fake
        self.backing = os.memfd_create("backing")
        os.ftruncate(self.backing, PMD_SIZE)
        self.addr = BASE
        fake.on[protocol.Create] = lambda request, _fds: self.offer(readonly=request.readonly)
        fake.on[protocol.Attach] = lambda _request, _fds: self.offer()
        fake.on[protocol.Mapped] = lambda _request, _fds: protocol.Attached(7)
        for kind in (protocol.Abort, protocol.Detach, protocol.Unlink, protocol.Remove):
            fake.on[kind] = lambda _request, _fds: protocol.Done()

    def offer(self, *, readonly: bool = False, fds: int = 1) -> tuple[protocol.Offer, list[int]]:
        return protocol.Offer(3, 16, self.addr, PMD_SIZE, readonly, device=False), [self.backing] * fds

    def have(self, name: str) -> None:
        """Have the file of a region."""
        (self.fake.mount / name).touch()

    def heard(self, *kinds: type) -> list[Any]:
        return [message for message in self.fake.heard if isinstance(message, kinds)]

    def copies(self) -> int:
        """Descriptors of the backing that this process has open, beyond the daemon's own."""
        found = -1
        for fd in os.listdir("/proc/self/fd"):
            try:
                found += os.path.samestat(os.stat(f"/proc/self/fd/{fd}"), os.fstat(self.backing))
            except FileNotFoundError:
                continue
        return found


@pytest.fixture
def daemon(fake_daemon: Any) -> Iterator[Daemon]:
    daemon = Daemon(fake_daemon)
    yield daemon
    link = connection._connections.pop(fake_daemon.mount, None)
    if link is not None:
        link.forget()
    assert daemon.copies() == 0
    os.close(daemon.backing)
    assert sc.own_mappings(BASE, BASE + PMD_SIZE) == []


class TestCreate:
    """A new region."""

    def test_it_is_asked_for_mapped_and_shown(self, daemon: Daemon) -> None:
        with mshare.mshare("it", None, PMD_SIZE, CREATE) as region:
            assert daemon.fake.kinds() == [protocol.Hello, protocol.Create, protocol.Mapped]
            (create,), (mapped,) = daemon.heard(protocol.Create), daemon.heard(protocol.Mapped)
            assert (create.name, create.addr, create.size, create.donated) == ("it", None, PMD_SIZE, ())
            assert (create.exclusive, create.empty, create.readonly, create.backing) == (True, False, False, None)
            assert (mapped.offer, mapped.addr) == (3, BASE)
            assert sc.own_mappings(mapped.anchor, mapped.anchor + 1)[0].prot == sc.PROT_NONE
            assert (region.name, region.address, region.size) == ("it", BASE, PMD_SIZE)
            region.buf[:5] = b"hello"
            assert os.pread(daemon.backing, 5, 0) == b"hello"
            assert daemon.copies() == 0
        assert daemon.heard(protocol.Detach) == [protocol.Detach(7)]

    @pytest.mark.parametrize(
        ("mask", "mode", "expected"), [(0o022, 0o666, 0o644), (0o077, 0o777, 0o700), (0, 0o640, 0o640)]
    )
    def test_its_mode_is_what_the_umask_leaves(self, daemon: Daemon, mask: int, mode: int, expected: int) -> None:
        before = os.umask(mask)
        try:
            mshare.mshare("it", None, PMD_SIZE, CREATE, mode).detach()
        finally:
            os.umask(before)
        assert daemon.heard(protocol.Create)[0].mode == expected

    def test_everything_else_is_handed_on(self, daemon: Daemon) -> None:
        flags = os.O_CREAT | os.O_RDONLY
        with mshare.mshare(b"it", BASE, PMD_SIZE, flags, backing="thp", empty=True) as region:
            assert region.readonly
        (create,) = daemon.heard(protocol.Create)
        assert (create.name, create.addr, create.exclusive, create.empty) == ("it", BASE, False, True)
        assert (create.readonly, create.backing) == (True, "thp")

    def test_a_mount_can_be_named(self, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MSHAREFS", "/nowhere/at/all")
        mshare.mshare("it", None, PMD_SIZE, CREATE, mount=daemon.fake.mount).detach()
        mshare.mshare("it", None, PMD_SIZE, CREATE, mount=str(daemon.fake.mount)).detach()
        assert len(daemon.heard(protocol.Hello)) == 1

    def test_what_the_daemon_refuses_is_raised(self, daemon: Daemon) -> None:
        daemon.fake.on[protocol.Create] = lambda _request, _fds: protocol.Failed(errno.EEXIST, "it exists")
        with pytest.raises(FileExistsError, match="it exists"):
            mshare.mshare("it", None, PMD_SIZE, CREATE)
        assert daemon.heard(protocol.Attach) == []

    @pytest.mark.usefixtures("daemon")
    def test_nothing_piles_up(self, open_descriptors: Callable[[], int], left_over: Callable[[], list[int]]) -> None:
        mshare.mshare("it", None, PMD_SIZE, CREATE).detach()
        before = open_descriptors()
        for _ in range(5):
            with mshare.mshare("it", None, PMD_SIZE, CREATE):
                assert left_over()
        assert (open_descriptors(), left_over()) == (before, [])


class TestAttach:
    """One that exists."""

    @pytest.mark.parametrize(("access", "writable"), [(os.O_RDONLY, False), (os.O_RDWR, True)])
    def test_the_opened_file_is_the_ticket(self, daemon: Daemon, access: int, writable: bool) -> None:
        daemon.have("it")
        tickets: list[tuple[bool, bool]] = []

        def attach(_request: object, fds: list[int]) -> object:
            (fd,) = fds
            flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            same = os.path.samestat(os.fstat(fd), (daemon.fake.mount / "it").stat())
            tickets.append((same, flags & os.O_ACCMODE == os.O_RDWR))
            return daemon.offer(readonly=not writable)

        daemon.fake.on[protocol.Attach] = attach
        with mshare.mshare("it", None, 0, access) as region:
            assert region.readonly is not writable
        assert tickets == [(True, writable)]
        assert daemon.heard(protocol.Attach) == [protocol.Attach(None, 0)]
        assert daemon.heard(protocol.Create) == []

    def test_where_and_how_long_can_be_said(self, daemon: Daemon) -> None:
        daemon.have("it")
        mshare.mshare("it", BASE, PMD_SIZE, os.O_RDWR).detach()
        assert daemon.heard(protocol.Attach) == [protocol.Attach(BASE, PMD_SIZE)]

    def test_what_is_not_there_is_told_with_the_way_to_make_it(self, daemon: Daemon) -> None:
        with pytest.raises(FileNotFoundError, match=r"no region is named 'it' in .*; O_CREAT makes one"):
            mshare.mshare("it", None, 0, os.O_RDWR)
        assert daemon.fake.heard == []

    def test_one_that_exists_is_attached_to_though_it_might_have_been_made(self, daemon: Daemon) -> None:
        daemon.have("it")
        daemon.fake.on[protocol.Create] = lambda _request, _fds: protocol.Exists()
        mshare.mshare("it", None, PMD_SIZE, os.O_CREAT | os.O_RDWR).detach()
        assert daemon.fake.kinds()[1:4] == [protocol.Create, protocol.Attach, protocol.Mapped]

    def test_one_that_goes_meanwhile_is_made_anew(self, daemon: Daemon) -> None:
        replies: list[Any] = [protocol.Exists(), daemon.offer()]
        daemon.fake.on[protocol.Create] = lambda _request, _fds: replies.pop(0)
        mshare.mshare("it", None, PMD_SIZE, os.O_CREAT | os.O_RDWR).detach()
        assert len(daemon.heard(protocol.Create)) == 2

    def test_one_that_goes_between_open_and_attach_too(self, daemon: Daemon) -> None:
        daemon.have("it")
        replies: list[Any] = [protocol.Exists(), daemon.offer()]
        daemon.fake.on[protocol.Create] = lambda _request, _fds: replies.pop(0)
        daemon.fake.on[protocol.Attach] = lambda _request, _fds: protocol.Failed(errno.ENOENT, "gone")
        mshare.mshare("it", None, PMD_SIZE, os.O_CREAT | os.O_RDWR).detach()
        assert len(daemon.heard(protocol.Create)) == 2

    def test_one_that_comes_and_goes_for_ever_is_given_up(self, daemon: Daemon) -> None:
        daemon.fake.on[protocol.Create] = lambda _request, _fds: protocol.Exists()
        with pytest.raises(BlockingIOError, match="'it' comes and goes") as caught:
            mshare.mshare("it", None, PMD_SIZE, os.O_CREAT | os.O_RDWR)
        assert caught.value.errno == errno.EAGAIN

    def test_one_that_is_being_made_is_asked_for_until_it_is(self, daemon: Daemon) -> None:
        daemon.have("it")
        replies: list[Any] = [*[protocol.Failed(errno.EAGAIN, "still being made")] * 200, daemon.offer()]
        daemon.fake.on[protocol.Attach] = lambda _request, _fds: replies.pop(0)
        mshare.mshare("it", None, 0, os.O_RDWR).detach()
        assert replies == []


class TestOffers:
    """What cannot be taken up is said, and leaves nothing."""

    def occupy(self) -> None:
        sc.mmap(BASE, PAGE_SIZE, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        ctypes.memset(BASE, 7, 1)

    def free(self) -> None:
        assert ctypes.string_at(BASE, 1) == b"\7"
        sc.munmap(BASE, PAGE_SIZE)

    def test_a_range_in_use_is_an_error_when_it_was_chosen(self, daemon: Daemon) -> None:
        daemon.have("it")
        self.occupy()
        with pytest.raises(OSError, match="is in use in this process; attach at another address") as caught:
            mshare.mshare("it", BASE, 0, os.O_RDWR)
        assert caught.value.errno == errno.EINVAL
        assert daemon.heard(protocol.Abort) == [protocol.Abort(3)]
        self.free()

    def test_and_another_is_tried_when_the_daemon_chose_it(self, daemon: Daemon) -> None:
        self.occupy()

        def create(_request: object, _fds: object) -> object:
            daemon.addr += PMD_SIZE
            return protocol.Offer(3, 16, daemon.addr - PMD_SIZE, PMD_SIZE, readonly=False, device=False), [
                daemon.backing
            ]

        daemon.fake.on[protocol.Create] = create
        with mshare.mshare("it", None, PMD_SIZE, CREATE) as region:
            assert region.address == BASE + PMD_SIZE
        assert daemon.fake.kinds()[1:] == [
            *(protocol.Create, protocol.Abort, protocol.Create, protocol.Mapped, protocol.Detach)
        ]
        self.free()

    def test_a_window_that_the_daemon_does_not_take_goes(
        self, daemon: Daemon, open_descriptors: Callable[[], int], left_over: Callable[[], list[int]]
    ) -> None:
        mshare.mshare("it", None, PMD_SIZE, CREATE).detach()
        before = open_descriptors()
        daemon.fake.on[protocol.Mapped] = lambda _request, _fds: protocol.Failed(errno.ENOSPC, "no room")
        with pytest.raises(OSError, match="no room") as caught:
            mshare.mshare("it", None, PMD_SIZE, CREATE)
        assert caught.value.errno == errno.ENOSPC
        assert daemon.heard(protocol.Abort) == [protocol.Abort(3)]
        assert (open_descriptors(), left_over()) == (before, [])

    def test_a_daemon_that_went_meanwhile_hears_no_more(self, daemon: Daemon) -> None:
        daemon.fake.on[protocol.Mapped] = lambda _request, _fds: None
        daemon.fake.on[protocol.Abort] = lambda _request, _fds: protocol.Failed(errno.ENOENT, "no such offer")
        with pytest.raises(ConnectionResetError):
            mshare.mshare("it", None, PMD_SIZE, CREATE)

    def test_a_reply_that_is_no_offer(self, daemon: Daemon) -> None:
        daemon.fake.on[protocol.Create] = lambda _request, _fds: (protocol.Done(), [daemon.backing])
        with pytest.raises(OSError, match="Done instead of Offer") as caught:
            mshare.mshare("it", None, PMD_SIZE, CREATE)
        assert caught.value.errno == errno.EPROTO

    @pytest.mark.parametrize(("fds", "device"), [(0, False), (1, True), (2, False)])
    def test_an_offer_with_descriptors_that_do_not_fit(self, daemon: Daemon, fds: int, device: bool) -> None:
        offer = protocol.Offer(3, 16, BASE, PMD_SIZE, readonly=False, device=device)
        daemon.fake.on[protocol.Create] = lambda _request, _fds: (offer, [daemon.backing] * fds)
        with pytest.raises(OSError, match="descriptors") as caught:
            mshare.mshare("it", None, PMD_SIZE, CREATE)
        assert caught.value.errno == errno.EPROTO


class TestDonation:
    """What is mapped in the range becomes the region's."""

    def test_it_is_announced_and_handed_over(self, daemon: Daemon) -> None:
        sc.mmap(BASE + PAGE_SIZE, PAGE_SIZE, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        ctypes.memmove(BASE + PAGE_SIZE, b"given", 5)
        region = mshare.mshare("it", BASE, PMD_SIZE, CREATE)
        (create,) = daemon.heard(protocol.Create)
        assert create.donated == (protocol.DonatedRange(PAGE_SIZE, PAGE_SIZE, 3),)
        assert os.pread(daemon.backing, 5, PAGE_SIZE) == b"given"
        assert bytes(region.buf[PAGE_SIZE : PAGE_SIZE + 5]) == b"given"
        region.detach()

    def test_when_the_daemon_does_not_take_the_window_memory_stays_and_gaps_go(self, daemon: Daemon) -> None:
        daemon.fake.on[protocol.Mapped] = lambda _request, _fds: protocol.Failed(errno.ENOSPC, "no room")
        sc.mmap(BASE + PAGE_SIZE, PAGE_SIZE, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        ctypes.memmove(BASE + PAGE_SIZE, b"given", 5)
        with pytest.raises(OSError, match="no room"):
            mshare.mshare("it", BASE, PMD_SIZE, CREATE)
        (found,) = sc.own_mappings(BASE, BASE + PMD_SIZE)
        assert (found.start, found.end) == (BASE + PAGE_SIZE, BASE + 2 * PAGE_SIZE)
        assert ctypes.string_at(BASE + PAGE_SIZE, 5) == b"given"
        sc.munmap(BASE + PAGE_SIZE, PAGE_SIZE)

    def test_a_mapping_of_a_file_is_moved_in_and_others_wait_for_it(self, daemon: Daemon) -> None:
        file = os.memfd_create("file")
        os.ftruncate(file, PAGE_SIZE)
        sc.mmap(BASE + PAGE_SIZE, PAGE_SIZE, 3, sc.MAP_SHARED | sc.MAP_FIXED_NOREPLACE, file)
        sent, stood = [], []

        def create(_request: object, fds: list[int]) -> Any:
            sent.extend(os.path.samestat(os.fstat(fd), os.fstat(file)) for fd in fds)
            return daemon.offer()

        def mapped(_request: object, _fds: list[int]) -> protocol.Attached:
            stood.append([m.path for m in sc.own_mappings(BASE + PAGE_SIZE, BASE + 2 * PAGE_SIZE)])
            return protocol.Attached(7)

        def settled(_request: object, _fds: list[int]) -> protocol.Done:
            stood.append([(m.path, m.prot) for m in sc.own_mappings(BASE, BASE + PMD_SIZE)])
            return protocol.Done()

        daemon.fake.on |= {protocol.Create: create, protocol.Mapped: mapped, protocol.Settled: settled}
        with mshare.mshare("it", BASE, PMD_SIZE, CREATE) as region:
            expected = [protocol.Hello, protocol.Create, protocol.Mapped, protocol.Settled]
            assert daemon.fake.kinds() == expected
            (create_,), (mapped_,) = daemon.heard(protocol.Create), daemon.heard(protocol.Mapped)
            shown = protocol.DonatedFile(0, 0, shared=True)
            assert create_.donated == (protocol.DonatedRange(PAGE_SIZE, PAGE_SIZE, 3, shown),)
            assert len(mapped_.staged) == 1
            assert daemon.heard(protocol.Settled) == [protocol.Settled(3)]
            assert (sent, stood) == ([True], [["/memfd:file (deleted)"], [("/memfd:backing (deleted)", 3)]])
            region.buf[PAGE_SIZE] = 9
            assert os.pread(daemon.backing, 1, PAGE_SIZE) == b"\t"
        os.close(file)

    @pytest.mark.parametrize("kind", [protocol.Create, protocol.Mapped, protocol.Settled])
    def test_when_the_daemon_refuses_a_file_it_is_shown_as_before(self, daemon: Daemon, kind: type) -> None:
        file = os.memfd_create("file")
        os.ftruncate(file, 2 * PAGE_SIZE)
        sc.mmap(BASE + PAGE_SIZE, PAGE_SIZE, 3, sc.MAP_SHARED | sc.MAP_FIXED_NOREPLACE, file, PAGE_SIZE)
        sc.mmap(BASE + 8 * PAGE_SIZE, PAGE_SIZE, 1, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        stood: list[list[str]] = []

        def abort(_request: object, _fds: list[int]) -> protocol.Done:
            stood.append([m.path for m in sc.own_mappings(BASE + PAGE_SIZE, BASE + 2 * PAGE_SIZE)])
            return protocol.Done()

        daemon.fake.on |= {protocol.Abort: abort, kind: lambda _request, _fds: protocol.Failed(errno.ENOSPC, "no room")}
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="no room"):
            mshare.mshare("it", BASE, PMD_SIZE, CREATE)
        ends_of_the_connection = 2
        assert len(os.listdir("/proc/self/fd")) == before + ends_of_the_connection
        where = {protocol.Create: [], protocol.Mapped: ["file"], protocol.Settled: ["backing"]}[kind]
        assert stood == [[f"/memfd:{name} (deleted)"] for name in where]
        first, second = sc.own_mappings(BASE, BASE + PMD_SIZE)
        assert (first.path, first.prot, first.shared, first.offset) == ("/memfd:file (deleted)", 3, True, PAGE_SIZE)
        assert (second.start, second.prot) == (BASE + 8 * PAGE_SIZE, 1)
        ctypes.memset(first.start, 9, 1)
        assert os.pread(file, 1, PAGE_SIZE) == b"\t"
        os.close(file)
        for found in (first, second):
            sc.munmap(found.start, PAGE_SIZE)

    def test_a_window_is_not_donated(self, daemon: Daemon) -> None:
        with mshare.mshare("it", None, PMD_SIZE, CREATE):
            count = len(daemon.heard(protocol.Create))
            with pytest.raises(OSError, match="a window of region 'it'; detach it first"):
                mshare.mshare("other", BASE, PMD_SIZE, CREATE)
            assert len(daemon.heard(protocol.Create)) == count

    def test_attaching_donates_nothing(self, daemon: Daemon) -> None:
        daemon.have("it")
        sc.mmap(BASE, PAGE_SIZE, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        with pytest.raises(OSError, match="in use"):
            mshare.mshare("it", BASE, 0, os.O_RDWR)
        sc.munmap(BASE, PAGE_SIZE)


class TestArguments:
    """What can never be right is not even asked."""

    @pytest.mark.parametrize("name", ["", ".", ".x", "a/b", "a\0b", "mshare_info", b"", b"a/b"])
    def test_names(self, daemon: Daemon, name: str | bytes) -> None:
        calls: list[Callable[[], object]] = [
            lambda: mshare.mshare(name, None, PMD_SIZE, CREATE),
            lambda: mshare.mshare_unlink(name),
            lambda: mshare.remove(name),
        ]
        for call in calls:
            with pytest.raises(OSError, match="cannot name a region") as caught:
                call()
            assert caught.value.errno == errno.EINVAL
        assert daemon.fake.heard == []

    @pytest.mark.parametrize("name", [5, None, ["a"], Path("a"), bytearray(b"a")])
    def test_names_of_another_type(self, daemon: Daemon, name: Any) -> None:
        for call in (lambda: mshare.mshare(name, None, 0, 0), lambda: mshare.mshare_unlink(name)):
            with pytest.raises(TypeError, match="str or bytes, not"):
                call()
        assert daemon.fake.heard == []

    @pytest.mark.parametrize(
        ("addr", "length", "flags"),
        [
            (None, PMD_SIZE, CREATE | os.O_TRUNC),
            (None, PMD_SIZE, CREATE | os.O_APPEND),
            (None, PMD_SIZE, os.O_CREAT | os.O_WRONLY),
            (None, 0, os.O_WRONLY),
            (None, 0, 3),
            (None, -1, CREATE),
            (-1, PMD_SIZE, CREATE),
            (1 << 64, PMD_SIZE, CREATE),
            (None, 1 << 64, CREATE),
        ],
    )
    def test_flags_and_numbers(self, daemon: Daemon, addr: int | None, length: int, flags: int) -> None:
        with pytest.raises(OSError, match=r".") as caught:
            mshare.mshare("it", addr, length, flags)
        assert caught.value.errno == errno.EINVAL
        assert daemon.fake.heard == []

    @pytest.mark.parametrize("flags", [CREATE | os.O_CLOEXEC, os.O_CREAT | os.O_RDONLY])
    @pytest.mark.usefixtures("daemon")
    def test_flags_that_are_fine(self, flags: int) -> None:
        mshare.mshare("it", None, PMD_SIZE, flags).detach()


class TestUnlink:
    """The end of an access."""

    def test_windows_go_first_and_then_the_daemon_is_told(self, daemon: Daemon) -> None:
        daemon.have("it")
        inode = (daemon.fake.mount / "it").stat().st_ino
        offer = protocol.Offer(3, inode, BASE, PMD_SIZE, readonly=False, device=False)
        daemon.fake.on[protocol.Create] = lambda _request, _fds: (offer, [daemon.backing])
        stood: list[int] = []

        def unlink(_request: object, fds: list[int]) -> protocol.Done:
            stood.append(len(sc.own_mappings(BASE, BASE + PMD_SIZE)) + 10 * len(fds))
            return protocol.Done()

        daemon.fake.on[protocol.Unlink] = unlink
        region = mshare.mshare("it", None, PMD_SIZE, CREATE)
        with region.buf[:1], pytest.raises(BufferError):
            mshare.mshare_unlink("it")
        assert (region.closed, stood) == (False, [])
        mshare.mshare_unlink("it")
        assert (region.closed, stood) == (True, [10])
        assert daemon.heard(protocol.Unlink) == [protocol.Unlink("it")]
        assert daemon.heard(protocol.Detach) == []

    def test_of_another_region_the_window_stays(self, daemon: Daemon) -> None:
        daemon.have("other")
        with mshare.mshare("it", None, PMD_SIZE, CREATE) as region:
            mshare.mshare_unlink("other")
            assert not region.closed

    def test_what_is_not_there(self, daemon: Daemon) -> None:
        with pytest.raises(FileNotFoundError, match="no region is named 'it'"):
            mshare.mshare_unlink("it")
        assert daemon.fake.heard == []

    def test_a_place_that_is_no_mount(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is no msharefs mount"):
            mshare.mshare_unlink("it", mount=tmp_path)

    def test_a_removal_is_asked_for_by_name(self, daemon: Daemon) -> None:
        mshare.remove("it")
        assert daemon.heard(protocol.Remove) == [protocol.Remove("it")]
        daemon.fake.on[protocol.Remove] = lambda _request, _fds: protocol.Failed(errno.EPERM, "not yours")
        with pytest.raises(PermissionError, match="not yours"):
            mshare.remove("it")
