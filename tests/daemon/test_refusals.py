"""Refusals: who gets a signal, whose system call fails and how, and that no page is left that is not to be there."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_kernel import ELSEWHERE, PID, TID, FakeUffd, World, calls, fail, pages

from mshared import forks, processes, refusals
from mshared.live import LiveAttachment
from mshared.sparse import extents
from mshared.uffd import Outcome
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.effects import Punch, Signal
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import Arming, FileSource

ADDR = Address(ELSEWHERE + 5 * PAGE_SIZE + 9)
PAGE = pages(5, at=ELSEWHERE)


class Threads:
    """What /proc says of the thread that waits, and what is sent to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_call: bool | None = False
        self.blocks = self.gone = False
        self.sent: list[tuple[int, ...]] = []
        self.killed: list[tuple[int, int]] = []
        self.process: int | None = PID
        monkeypatch.setattr(forks, "process_of", lambda _child, _tid: self.process)
        monkeypatch.setattr(processes, "thread_seen_from_here", lambda _pid, tid: tid + 1000)
        monkeypatch.setattr(processes, "in_system_call", lambda *_args: self.in_call)
        monkeypatch.setattr(processes, "would_miss", lambda *_args: self.blocks)
        monkeypatch.setattr(processes, "send_fault_signal", self.send)
        monkeypatch.setattr(refusals.os, "kill", self.kill)

    def send(self, pid: int, tid: int, number: int, addr: int) -> None:
        if self.gone:
            raise ProcessLookupError(errno.ESRCH, "gone")
        self.sent.append((pid, tid, number, addr))

    def kill(self, pid: int, number: int) -> None:
        if self.gone:
            raise ProcessLookupError(errno.ESRCH, "gone")
        self.killed.append((pid, number))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(monkeypatch)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.region.close()


@pytest.fixture
def attachment(world: World) -> LiveAttachment:
    """A window with a second userfaultfd, on a region whose fifth page is there and may be loaded only."""
    attachment = world.attach(ELSEWHERE)
    sigbus: Any = FakeUffd()
    attachment.sigbus = sigbus
    world.region.model.mm.mprotect(pages(5), Prot.READ)
    os.pwrite(world.region.backing.fd, b"kept", 5 * PAGE_SIZE)
    return attachment


def refuse(attachment: LiveAttachment, number: Signal = Signal.SIGBUS, *, protected: bool = False) -> Outcome:
    return refusals.refuse(attachment, ADDR, TID, number, protected=protected)


def made(world: World) -> list[int]:
    """The pages that the region has."""
    return [page.start // PAGE_SIZE for ar in extents(world.region.backing.fd) for page in ar.pieces(PAGE_SIZE)]


class TestSignal:
    """Code of the thread's own touched what it may not."""

    @pytest.mark.parametrize("number", [Signal.SIGBUS, Signal.SIGSEGV])
    def test_it_carries_the_address_that_the_thread_knows(
        self, attachment: LiveAttachment, threads: Threads, number: Signal
    ) -> None:
        assert refuse(attachment, number) is Outcome.SERVED
        assert threads.sent == [(PID, TID + 1000, number, ADDR)]
        assert calls(attachment) == []

    def test_a_child_not_told_apart_yet_is_found_by_its_thread(self, world: World, threads: Threads) -> None:
        threads.process = 99
        assert refuse(world.attach(ELSEWHERE, pid=None)) is Outcome.SERVED
        assert threads.sent == [(99, TID + 1000, Signal.SIGBUS, ADDR)]

    def test_one_that_is_gone_gets_nothing(self, world: World, threads: Threads) -> None:
        threads.process = None
        assert refuse(world.attach(ELSEWHERE, pid=None)) is Outcome.GONE
        threads.gone = True
        assert refuse(world.attach(ELSEWHERE)) is Outcome.GONE
        assert threads.sent == []

    def test_who_does_not_wait_is_left_alone(self, attachment: LiveAttachment, threads: Threads) -> None:
        """It was woken since, or never slept: it reports anew if it still has to."""
        threads.in_call = None
        assert refuse(attachment) is Outcome.EXISTS
        assert (threads.sent, calls(attachment), attachment.refusals) == ([], [("wake", PAGE)], 0)


class TestPoison:
    """What nobody may touch is marked, and the system call fails."""

    @pytest.mark.parametrize("why", ["in_call", "blocks"])
    def test_a_system_call_and_who_blocks_the_signal(
        self, attachment: LiveAttachment, threads: Threads, why: str
    ) -> None:
        setattr(threads, why, True)
        assert refuse(attachment) is Outcome.SERVED
        assert calls(attachment) == [("poison", PAGE)]
        assert attachment.poisoned == {PAGE.start}
        assert threads.sent == []

    def test_protection_of_what_is_there_stays(self, attachment: LiveAttachment, threads: Threads) -> None:
        threads.in_call = True
        fail(attachment, "poison", errno.EEXIST)
        assert refuse(attachment) is Outcome.EXISTS
        assert calls(attachment) == [("wake", PAGE)]

    def test_protection_of_what_is_not_there_makes_way(
        self, world: World, attachment: LiveAttachment, threads: Threads
    ) -> None:
        threads.in_call = True
        world.carry_out(Punch(pages(5)))
        fail(attachment, "poison", errno.EEXIST)
        assert refuse(attachment) is Outcome.SERVED
        assert calls(attachment) == [("unprotect empty", PAGE), ("poison", PAGE)]

    @pytest.mark.parametrize("in_call", [False, True])
    def test_who_comes_late_is_woken(self, attachment: LiveAttachment, threads: Threads, *, in_call: bool) -> None:
        """The kernel refuses the page already: what was reported is past."""
        threads.in_call = in_call
        attachment.poisoned.add(PAGE.start)
        fail(attachment, "poison", errno.EEXIST)
        assert refuse(attachment) is Outcome.EXISTS
        assert (threads.sent, calls(attachment)) == ([], [("wake", PAGE)])


class TestStore:
    """A page that may be loaded, and is there, changes hands for a while."""

    @pytest.fixture(autouse=True)
    def in_call(self, threads: Threads) -> None:
        threads.in_call = True

    def test_the_second_userfaultfd_gets_it_and_the_caller_is_woken(self, attachment: LiveAttachment) -> None:
        before = time.monotonic()
        assert refuse(attachment, Signal.SIGSEGV, protected=True) is Outcome.SERVED
        assert calls(attachment) == [("hand over", PAGE, attachment.sigbus, Arming.WP), ("wake", PAGE)]
        assert attachment.refused[PAGE.start] > before
        assert attachment.poisoned == set()

    def test_who_comes_late_is_woken(self, attachment: LiveAttachment, threads: Threads) -> None:
        attachment.refused[PAGE.start] = 0.0
        threads.in_call = False
        assert refuse(attachment, protected=True) is Outcome.EXISTS
        assert (threads.sent, calls(attachment)) == ([], [("wake", PAGE)])

    def test_one_that_slips_in_is_undone_and_its_process_ended(
        self, world: World, attachment: LiveAttachment, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hand_over(_uffd: FakeUffd, page: AddrRange, _taker: FakeUffd, _arming: Arming) -> None:
            os.pwrite(world.region.backing.fd, b"lost", page.start - ELSEWHERE)

        monkeypatch.setattr(FakeUffd, "hand_over", hand_over)
        refuse(attachment, protected=True)
        assert threads.killed == [(PID, signal.SIGKILL)]
        assert os.pread(world.region.backing.fd, 4, 5 * PAGE_SIZE) == b"kept"

    def test_a_page_that_went_meanwhile_changes_no_hands(self, world: World, attachment: LiveAttachment) -> None:
        """Whoever loaded from it would have the kernel make a page of zeros."""
        world.carry_out(Punch(pages(5)))
        assert refuse(attachment, protected=True) is Outcome.EXISTS
        assert calls(attachment) == [("wake", PAGE)]
        assert attachment.refused == {}

    def test_one_that_is_missing_is_brought_first(self, attachment: LiveAttachment, threads: Threads) -> None:
        """For a call that is to fail only; and one look at the thread decides, which may be another the next moment."""
        brought: list[str] = []

        def bring() -> None:
            brought.append("page")

        assert refusals.refuse(attachment, ADDR, TID, Signal.SIGSEGV, bring=bring) is Outcome.EXISTS
        assert (brought, calls(attachment), attachment.refusals) == (["page"], [], 0)
        for threads.in_call in (None, False):
            refusals.refuse(attachment, ADDR, TID, Signal.SIGSEGV, bring=bring)
        assert (brought, len(threads.sent)) == (["page"], 1)

    def test_without_a_second_one_the_process_ends(self, attachment: LiveAttachment, threads: Threads) -> None:
        attachment.sigbus = None
        assert refuse(attachment, protected=True) is Outcome.SERVED
        assert threads.killed == [(PID, signal.SIGKILL)]
        threads.gone = True
        assert refuse(attachment, protected=True) is Outcome.GONE
        assert threads.sent == []


class TestTakeBack:
    """Pages that changed hands come back."""

    def test_each_in_its_time_and_armed_as_the_region_is(self, attachment: LiveAttachment) -> None:
        attachment.refused = {PAGE.start: 10.0, Address(PAGE.start + PAGE_SIZE): 11.0}
        refusals.take_back(attachment, 10.5)
        sigbus: Any = attachment.sigbus
        assert sigbus.calls == [("hand over", PAGE, attachment.uffd, Arming.WP)]
        assert attachment.refused == {PAGE.end: 11.0}

    def test_all_before_a_change(self, world: World, attachment: LiveAttachment) -> None:
        """Protected still, whatever the change makes of it: that follows."""
        attachment.refused[PAGE.start] = time.monotonic() + 100
        world.carry_out(*world.region.model.mm.mprotect(pages(5), PROT_RW))
        sigbus: Any = attachment.sigbus
        assert sigbus.calls == [("hand over", PAGE, attachment.uffd, Arming.WP)]
        assert calls(attachment)[-1] == ("arm", PAGE, Arming.NATIVE)
        assert attachment.refused == {}


class TestUnpoison:
    """Marks that made system calls fail go when the page may be touched."""

    @pytest.fixture
    def poisoned(self, world: World) -> LiveAttachment:
        """A window on holes, of which two pages are marked."""
        attachment = world.attach(ELSEWHERE)
        world.region.model.mm.munmap(pages(0, 16))
        attachment.poisoned |= {pages(number, at=ELSEWHERE).start for number in (3, 8)}
        return attachment

    def source(self, world: World, path: Path, size: int, *, shared: bool) -> FileSource:
        path.write_bytes(b"f" * size)
        return FileSource(world.region.add_file(os.open(path, os.O_RDWR)), 0, shared, writable=True)

    def test_when_the_page_may_be_touched_from_now_on(self, world: World, poisoned: LiveAttachment) -> None:
        """Native memory takes no page: it is registered for a moment."""
        page = pages(3, at=ELSEWHERE)
        _, effects = world.region.model.mm.mmap(pages(3), PAGE_SIZE, fixed=True)
        world.carry_out(*effects)
        assert calls(poisoned)[-3:] == [("mark", page), ("show", page, False), ("arm", page, Arming.NATIVE)]
        assert made(world) == [3]
        assert poisoned.poisoned == {pages(8, at=ELSEWHERE).start}

    def test_what_may_be_loaded_only_is_shown_protected(self, world: World, poisoned: LiveAttachment) -> None:
        fail(poisoned, "show", errno.EAGAIN)
        _, effects = world.region.model.mm.mmap(pages(3), PAGE_SIZE, Prot.READ, fixed=True)
        world.carry_out(*effects)
        assert calls(poisoned)[-1] == ("show", pages(3, at=ELSEWHERE), True)

    def test_after_contents_have_come_back(self, world: World) -> None:
        attachment = world.attach()
        os.pwrite(world.region.backing.fd, b"kept", 3 * PAGE_SIZE)
        world.carry_out(*world.region.model.mm.mprotect(pages(3), Prot.NONE))
        attachment.poisoned.add(pages(3).start)
        world.carry_out(*world.region.model.mm.mprotect(pages(3), PROT_RW))
        assert os.pread(world.region.backing.fd, 4, 3 * PAGE_SIZE) == b"kept"
        assert ("show", pages(3), False) in calls(attachment)

    def test_not_when_it_becomes_another_kind_of_forbidden(self, world: World, poisoned: LiveAttachment) -> None:
        before = set(poisoned.poisoned)
        _, effects = world.region.model.mm.mmap(pages(0, 16), 16 * PAGE_SIZE, Prot.NONE, fixed=True)
        world.carry_out(*effects)
        assert "show" not in [name for name, *_ in calls(poisoned)]
        assert poisoned.poisoned == before

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_files_bytes_are_read_and_past_its_end_the_mark_stays(
        self, world: World, poisoned: LiveAttachment, tmp_path: Path, *, shared: bool
    ) -> None:
        source = self.source(world, tmp_path / "file", 3 * PAGE_SIZE + 1, shared=shared)
        _, effects = world.region.model.mm.mmap(pages(0, 16), 16 * PAGE_SIZE, fixed=True, source=source)
        world.carry_out(*effects)
        trio.run(refusals.refill, world.region, pages(4, 12), lambda: None)
        assert (made(world), len(poisoned.poisoned)) == ([], 2)
        trio.run(refusals.refill, world.region, pages(0, 16), lambda: None)
        assert made(world) == [3]
        assert os.pread(world.region.backing.fd, 2, 3 * PAGE_SIZE) == b"f\0"
        assert calls(poisoned)[-1] == ("show", pages(3, at=ELSEWHERE), shared)
        assert poisoned.poisoned == {pages(8, at=ELSEWHERE).start}
        world.carry_out(*world.region.model.mm.munmap(pages(100)))
        assert poisoned.poisoned == {pages(8, at=ELSEWHERE).start}
        assert made(world) == [3]

    def test_a_file_that_cannot_be_read_leaves_the_mark(
        self, world: World, poisoned: LiveAttachment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def broken(*_args: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        source = self.source(world, tmp_path / "file", 16 * PAGE_SIZE, shared=True)
        _, effects = world.region.model.mm.mmap(pages(0, 16), 16 * PAGE_SIZE, fixed=True, source=source)
        world.carry_out(*effects)
        monkeypatch.setattr(refusals.files, "read", broken)
        trio.run(refusals.refill, world.region, pages(0, 16), lambda: None)
        assert (made(world), len(poisoned.poisoned)) == ([], 2)
