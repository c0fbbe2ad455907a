"""A region as its users hold it, on a memfd, with a connection that notes what the daemon would be told."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mshare import region as module
from mshare import syscalls as sc
from mshare.region import Region, attached_as, check_no_window, close_windows
from mshare.window import Window
from msharefs import protocol
from msharefs.addr import PAGE_SIZE

BASE = 0x5600_0000_0000
SIZE = 4 * PAGE_SIZE
MOUNT = Path("/run/mshare")
ATTACHMENT = 5
RW = mmap.PROT_READ | mmap.PROT_WRITE

Apart = Callable[[Callable[[], object]], None]


class FakeLink:
    """Answers every request with what was expected, unless told otherwise."""

    def __init__(self) -> None:
        self.mount = MOUNT
        self.fork_events = True
        self.answered_before = False  # A daemon before this one has carried out the request.
        self.asked: list[tuple[object, int]] = []
        self.replies: dict[type, Any] = {
            protocol.Mmap: protocol.Placed(2 * PAGE_SIZE),
            protocol.Adopt: protocol.Attached(77),
            protocol.GetMaps: protocol.Maps((protocol.Vma(0, SIZE, 3, False, 0),)),
        }

    def call(
        self,
        request: object,
        _expected: type,
        fds: tuple[int, ...] = (),
        meanwhile: Callable[[], object] | None = None,
    ) -> object:
        if meanwhile is not None and not self.answered_before:
            meanwhile()
        self.asked.append((request, len(fds)))
        reply = self.replies.get(type(request), protocol.Done())
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def requests(self) -> list[object]:
        return [request for request, _ in self.asked]


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def new_region(link: Any) -> Iterator[Callable[..., Region]]:
    made: list[Region] = []

    def make(name: str = "it", number: int = 0, *, readonly: bool = False) -> Region:
        backing = os.memfd_create("backing")
        os.ftruncate(backing, SIZE)
        offer = protocol.Offer(1, 16 * (number + 1), BASE + number * SIZE, SIZE, readonly=readonly, device=False)
        window = Window(offer)
        window.map(backing)
        os.close(backing)
        window.open()
        made.append(Region(name, link, window, offer, ATTACHMENT))
        return made[-1]

    yield make
    for region in made:
        region.detach()
    assert module._attached == []


@pytest.fixture
def region(new_region: Callable[..., Region]) -> Region:
    return new_region()


class TestWhatItSays:
    """Names and numbers."""

    def test_of_an_attached_region(self, region: Region) -> None:
        assert (region.name, region.address, region.size) == ("it", BASE, SIZE)
        assert (region.readonly, region.closed, len(region.buf)) == (False, False, SIZE)
        assert repr(region) == f"<Region 'it': {SIZE:#x} bytes at {BASE:#x}>"

    def test_of_a_readonly_one(self, new_region: Callable[..., Region]) -> None:
        region = new_region(readonly=True)
        assert region.readonly
        assert repr(region) == f"<Region 'it': {SIZE:#x} bytes at {BASE:#x}, read-only>"

    def test_of_a_detached_one(self, region: Region) -> None:
        region.detach()
        assert (region.closed, repr(region)) == (True, "<Region 'it': detached>")
        assert (region.name, region.address, region.size) == ("it", BASE, SIZE)

    def test_names_stay_what_they_were(self, region: Region) -> None:
        for name in ("name", "address", "size", "buf", "readonly", "closed"):
            with pytest.raises(AttributeError):
                setattr(region, name, None)


class TestDetach:
    """The end of a reference."""

    def test_the_window_goes_and_the_daemon_is_told_once(self, region: Region, link: FakeLink) -> None:
        region.buf[0] = 1
        region.detach()
        region.detach()
        assert link.asked == [(protocol.Detach(ATTACHMENT), 0)]
        assert sc.own_mappings(BASE, BASE + SIZE) == []

    def test_a_context_detaches(self, region: Region, link: FakeLink) -> None:
        with region as same:
            assert same is region
            assert not same.closed
        assert region.closed
        assert link.requests() == [protocol.Detach(ATTACHMENT)]

    def test_also_after_an_error_which_is_not_hidden(self, region: Region) -> None:
        with pytest.raises(ZeroDivisionError), region:
            raise ZeroDivisionError
        assert region.closed

    def test_while_somebody_looks_nothing_changes(self, region: Region, link: FakeLink) -> None:
        view = region.buf[1:3]
        with pytest.raises(BufferError, match="views of the region's buf are alive"):
            region.detach()
        assert not region.closed
        assert link.asked == []
        assert attached_as(MOUNT, 16) == [region]
        view.release()

    @pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "gone"), FileNotFoundError(2, "gone")])
    def test_without_a_daemon_there_is_nobody_to_tell(self, region: Region, link: FakeLink, error: OSError) -> None:
        link.replies[protocol.Detach] = error
        region.detach()
        assert region.closed

    @pytest.mark.parametrize(
        "call",
        [
            lambda r: r.buf,
            lambda r: r.stat(),
            lambda r: r.maps(),
            lambda r: r.mmap(PAGE_SIZE),
            lambda r: r.munmap(0, PAGE_SIZE),
            lambda r: r.mprotect(0, PAGE_SIZE, 0),
            lambda r: r.madvise(0, PAGE_SIZE, mmap.MADV_WILLNEED),
        ],
    )
    def test_afterwards_every_call_says_so(
        self, region: Region, link: FakeLink, call: Callable[[Region], object]
    ) -> None:
        region.detach()
        link.asked.clear()
        with pytest.raises(ValueError, match="the region is detached"):
            call(region)
        assert link.asked == []

    def test_of_many_threads_one_detaches(self, region: Region, link: FakeLink) -> None:
        threads = [threading.Thread(target=region.detach) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert link.requests() == [protocol.Detach(ATTACHMENT)]


class TestCalls:
    """From arguments to requests, which have offsets and this process's attachment."""

    def test_memory_is_mapped_at_an_offset_the_daemon_says(self, region: Region, link: FakeLink) -> None:
        assert region.mmap(PAGE_SIZE) == 2 * PAGE_SIZE
        (request,) = link.requests()
        assert isinstance(request, protocol.Mmap)
        assert (request.attachment, request.offset, request.length) == (ATTACHMENT, None, PAGE_SIZE)
        assert (request.prot, request.flags) == (RW, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)

    def test_or_at_one_that_is_asked_for(self, region: Region, link: FakeLink) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE
        region.mmap(PAGE_SIZE, mmap.PROT_READ, flags, offset=PAGE_SIZE)
        (request,) = link.requests()
        assert isinstance(request, protocol.Mmap)
        assert (request.offset, request.prot, request.flags) == (PAGE_SIZE, mmap.PROT_READ, flags)

    def test_populating_is_done_once_it_is_mapped(self, region: Region, link: FakeLink) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x8000  # MAP_POPULATE
        for prot, advice in ((RW, 23), (mmap.PROT_READ, 22)):
            link.asked.clear()
            region.mmap(PAGE_SIZE, prot, flags)
            assert link.requests()[1:] == [protocol.Madvise(ATTACHMENT, 2 * PAGE_SIZE, PAGE_SIZE, advice)]
        link.asked.clear()
        region.mmap(PAGE_SIZE, 0, flags)
        assert len(link.asked) == 1

    def test_unmapping_and_protecting(self, region: Region, link: FakeLink) -> None:
        region.munmap(PAGE_SIZE, 2 * PAGE_SIZE)
        region.mprotect(0, PAGE_SIZE, mmap.PROT_READ)
        assert link.requests() == [
            protocol.Munmap(ATTACHMENT, PAGE_SIZE, 2 * PAGE_SIZE),
            protocol.Mprotect(ATTACHMENT, 0, PAGE_SIZE, mmap.PROT_READ),
        ]

    def test_advice_goes_to_the_daemon_first_and_then_to_the_kernel(
        self, region: Region, link: FakeLink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[tuple[int, ...]] = []
        monkeypatch.setattr(sc, "madvise", lambda *args: taken.append((len(link.asked), *args)))
        region.madvise(PAGE_SIZE, PAGE_SIZE, mmap.MADV_WILLNEED)
        assert link.requests() == [protocol.Madvise(ATTACHMENT, PAGE_SIZE, PAGE_SIZE, mmap.MADV_WILLNEED)]
        assert taken == [(1, BASE + PAGE_SIZE, PAGE_SIZE, mmap.MADV_WILLNEED)]

    @pytest.mark.parametrize("advice", [mmap.MADV_REMOVE, mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL])
    def test_what_concerns_all_or_splits_mappings_is_not_the_kernels(
        self, region: Region, monkeypatch: pytest.MonkeyPatch, advice: int
    ) -> None:
        monkeypatch.setattr(sc, "madvise", lambda *_args: pytest.fail("asked the kernel"))
        region.madvise(0, PAGE_SIZE, advice)

    def test_what_the_daemon_refuses_the_kernel_is_not_asked(
        self, region: Region, link: FakeLink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link.replies[protocol.Madvise] = OSError(errno.ENOMEM, "not mapped")
        monkeypatch.setattr(sc, "madvise", lambda *_args: pytest.fail("asked the kernel"))
        with pytest.raises(OSError, match="not mapped"):
            region.madvise(0, PAGE_SIZE, mmap.MADV_WILLNEED)

    def test_what_is_mapped_is_asked_for_by_attachment(self, region: Region, link: FakeLink) -> None:
        assert [vma.length for vma in region.maps()] == [SIZE]
        assert link.requests() == [protocol.GetMaps(ATTACHMENT, None)]


class TestSeveral:
    """All the windows of this process."""

    def test_they_are_found_by_mount_and_inode(self, new_region: Callable[..., Region]) -> None:
        one, two = new_region("one", 0), new_region("two", 1)
        assert attached_as(MOUNT, 16) == [one]
        assert attached_as(MOUNT, 32) == [two]
        assert attached_as(MOUNT, 48) == []
        assert attached_as(Path("/elsewhere"), 16) == []
        one.detach()
        assert attached_as(MOUNT, 16) == []

    @pytest.mark.parametrize(
        ("start", "end", "free"),
        [
            (BASE - SIZE, BASE, True),
            (BASE + SIZE, BASE + 2 * SIZE, True),
            (BASE - SIZE, BASE + 1, False),
            (BASE + SIZE - 1, BASE + SIZE, False),
            (BASE, BASE + SIZE, False),
            (BASE - 1, BASE + SIZE + 1, False),
        ],
    )
    def test_what_is_a_window_is_not_donated(self, region: Region, start: int, end: int, free: bool) -> None:
        if free:
            check_no_window(start, end)
        else:
            with pytest.raises(OSError, match="a window of region 'it'; detach it first") as caught:
                check_no_window(start, end)
            assert caught.value.errno == errno.EINVAL
        region.detach()
        check_no_window(start, end)

    def test_an_unlink_closes_all_without_ending_them_one_by_one(
        self, new_region: Callable[..., Region], link: FakeLink
    ) -> None:
        regions = [new_region("it", number) for number in range(3)]
        close_windows(regions)
        assert [region.closed for region in regions] == [True] * 3
        assert link.asked == []

    def test_when_one_is_looked_at_those_before_it_are_detached(
        self, new_region: Callable[..., Region], link: FakeLink
    ) -> None:
        regions = [new_region("it", number) for number in range(3)]
        view = regions[1].buf[:1]
        with pytest.raises(BufferError):
            close_windows(regions)
        assert [region.closed for region in regions] == [True, False, False]
        assert link.requests() == [protocol.Detach(ATTACHMENT)]
        view.release()


class TestForkedChild:
    """The same window, another process."""

    def test_it_asks_for_its_own_attachment_once_and_when_it_must(
        self, region: Region, link: FakeLink, apart: Apart
    ) -> None:
        def work() -> None:
            region.buf[0] = 7
            assert link.asked == []
            region.stat()
            region.stat()
            assert link.asked == [(protocol.Adopt(ATTACHMENT), 0)] + [(protocol.GetStat(77), 0)] * 2
            region.detach()
            assert link.requests()[-1] == protocol.Detach(77)

        apart(work)
        assert region.buf[0] == 7
        region.stat()
        assert link.requests() == [protocol.GetStat(ATTACHMENT)]

    def test_without_a_daemon_its_window_goes_all_the_same(self, region: Region, link: FakeLink, apart: Apart) -> None:
        def work() -> None:
            link.replies[protocol.Adopt] = ConnectionResetError(errno.ECONNRESET, "gone")
            region.detach()
            assert region.closed
            assert link.requests() == [protocol.Adopt(ATTACHMENT)]

        apart(work)
        assert not region.closed

    def test_where_forks_are_not_reported_it_asks_at_once_with_a_userfaultfd(
        self, region: Region, link: FakeLink, apart: Apart
    ) -> None:
        def work() -> None:
            assert link.asked == [(protocol.Adopt(ATTACHMENT), 1)]
            region.stat()
            assert link.requests()[1:] == [protocol.GetStat(77)]

        link.fork_events = False
        apart(work)

    def test_and_gives_the_window_up_when_it_gets_none(self, region: Region, link: FakeLink, apart: Apart) -> None:
        """Else a touch of a hole would put a page there for everybody."""
        link.fork_events = False
        link.replies[protocol.Adopt] = FileNotFoundError(errno.ENOENT, "no such attachment")
        apart(lambda: _none_stands())
        assert region.buf[0] == 0

    def test_one_forked_while_a_thread_holds_the_lock_is_not_kept_waiting(self, region: Region, apart: Apart) -> None:
        held, end = threading.Event(), threading.Event()

        def hold() -> None:
            with region._lock, module._attached_lock:
                held.set()
                end.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(60)
            apart(region.detach)
        finally:
            end.set()
            thread.join()


def _none_stands() -> None:
    assert sc.own_mappings(BASE, BASE + SIZE) == []


@pytest.mark.parametrize("answered_before", [False, True])
def test_the_umask_is_heeded_whoever_has_answered_a_fork(
    link: FakeLink, region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered_before: bool
) -> None:
    """What it takes from others is never given; what it takes from the owner is taken at the end."""
    (tmp_path / "own").touch(mode=0o600)
    link.mount, link.answered_before = tmp_path, answered_before
    monkeypatch.setattr(sc, "umask", lambda: 0o277)
    region.fork("own", 0o600)
    region.fork("others", 0o660)
    assert [request.mode for request in link.requests() if isinstance(request, protocol.Fork)] == [0o600, 0o400]
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o400
