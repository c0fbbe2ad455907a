"""Effects: which ioctls they become on which attachment, in which order; and who cannot follow harms only itself."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from signal import SIGKILL

import pytest
from fake_kernel import ELSEWHERE, TID, World, calls, fail, fail_for, pages

from mshared import apply
from mshared.live import LiveAttachment
from mshared.sparse import extents
from mshared.uffd import Outcome
from msharefs.addr import PAGE_SIZE, WINDOW_START, Address, AddrRange
from msharefs.effects import Allow, Arm, Deliver, Effect, Punch, Signal, Stash, Unstash, ZeroFill
from msharefs.errors import InternalError
from msharefs.file_sharing import FileKey, SharedFile
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.vma import Arming


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.region.close()


class TestArmNew:
    """A window that nobody has touched yet."""

    def test_it_is_armed_as_the_region_is(self, world: World) -> None:
        mm = world.region.model.mm
        mm.munmap(pages(4, 2))
        mm.mprotect(pages(8, 3), Prot.READ)
        mm.mprotect(pages(20), Prot.NONE)
        attachment = world.attach(ELSEWHERE)
        apply.arm_new(attachment)
        armed = {ar: arming for name, ar, arming in calls(attachment) if arming}
        assert armed == {
            pages(4, 2, at=ELSEWHERE): Arming.MISSING,
            pages(8, 3, at=ELSEWHERE): Arming.WP,
            pages(20, at=ELSEWHERE): Arming.MISSING,
        }

    def test_a_readonly_window_reports_no_stores(self, world: World) -> None:
        """It has none; and the kernel cannot protect what is mapped like that."""
        world.region.model.mm.mprotect(pages(8), Prot.READ)
        attachment = world.attach(readonly=True)
        apply.arm_new(attachment)
        assert {arming for _, _, arming in calls(attachment)} == {Arming.NATIVE}

    def test_what_a_change_under_way_has_armed_is_armed_too(self, world: World) -> None:
        world.region.arming_now.append(Arm(pages(7), Arming.MISSING | Arming.WP))
        attachment = world.attach()
        apply.arm_new(attachment)
        assert calls(attachment)[-1] == ("arm", pages(7), Arming.MISSING | Arming.WP)

    def test_a_window_that_is_not_there_is_an_error(self, world: World) -> None:
        world.region.model.mm.munmap(pages(3))
        attachment = world.attach()
        fail(attachment, "arm", errno.EINVAL)
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            apply.arm_new(attachment)


class TestArm:
    """Arming in every attachment."""

    def test_each_where_its_window_stands(self, world: World) -> None:
        here, there = world.attach(), world.attach(ELSEWHERE)
        world.carry_out(Arm(pages(3, 2), Arming.WP))
        assert calls(here) == [("arm", pages(3, 2), Arming.WP)]
        assert calls(there) == [("arm", pages(3, 2, at=ELSEWHERE), Arming.WP)]

    def test_in_the_order_given(self, world: World) -> None:
        attachment = world.attach()
        world.carry_out(Arm(pages(3), Arming.WP), Arm(pages(1), Arming.MISSING), Arm(pages(3), Arming.NATIVE))
        assert [arming for _, _, arming in calls(attachment)] == [Arming.WP, Arming.MISSING, Arming.NATIVE]

    @pytest.mark.parametrize("number", [errno.ESRCH, errno.ENOENT, errno.EINVAL, errno.ENOMEM])
    def test_who_cannot_follow_harms_nobody_else(self, world: World, number: int) -> None:
        attachments = [world.attach() for _ in range(3)]
        fail(attachments[1], "arm", number)
        world.carry_out(Arm(pages(0), Arming.WP))
        assert [len(calls(attachment)) for attachment in attachments] == [1, 0, 1]

    def test_what_has_no_meaning_is_no_secret(self, world: World) -> None:
        fail(world.attach(), "arm", errno.EPERM)
        with pytest.raises(PermissionError):
            world.carry_out(Arm(pages(0), Arming.WP))

    def test_who_maps_a_file_such_that_it_cannot_be_armed_keeps_nobody_else_from_it(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its window shows what it likes: the descriptor is its own."""
        world.region.model.file = SharedFile(FileKey(0, 1, 2), 0, PROT_RW, resident=True)
        hostile, other = world.attach(), world.attach()
        fail(hostile, "arm", errno.EPERM)
        world.carry_out(Arm(pages(0), Arming.WP))
        assert calls(other) == [("arm", pages(0), Arming.WP)]
        assert "left alone" in caplog.text

    def test_a_fork_under_way_is_seen_to_first_and_then_the_others_are_armed(self, world: World) -> None:
        forking, other = world.attach(), world.attach()
        fail(forking, "arm", errno.EAGAIN, errno.EAGAIN)
        children: list[LiveAttachment] = []

        def read_events() -> None:
            if not children:
                children.append(world.attach(pid=None))
                apply.arm_new(children[0])

        world.carry_out(Arm(pages(2), Arming.WP), read_events=read_events)
        assert calls(forking) == calls(other) == [("arm", pages(2), Arming.WP)]
        assert calls(children[0])[-1] == ("arm", pages(2), Arming.WP)

    def test_a_fork_may_take_its_time(self, world: World) -> None:
        """The thread that forks may not get a processor for long: that is tens of thousands of tries in a row."""
        forking, other = world.attach(), world.attach()
        until = time.monotonic() + 0.5
        fail_for(
            forking, "arm", itertools.takewhile(lambda _: time.monotonic() < until, itertools.repeat(errno.EAGAIN))
        )
        world.carry_out(Arm(pages(2), Arming.WP))
        assert time.monotonic() >= until
        assert calls(forking) == calls(other) == [("arm", pages(2), Arming.WP)]

    def test_whose_fork_never_ends_is_killed_and_the_others_are_armed(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mshared.insisting.PATIENCE", 0.05)
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as hostile:
            stuck, other = world.attach(pid=hostile.pid), world.attach()
            fail_for(stuck, "arm", itertools.repeat(errno.EAGAIN))
            world.carry_out(Arm(pages(2), Arming.WP))
            assert hostile.wait() == -SIGKILL
        assert calls(other) == [("arm", pages(2), Arming.WP)]

    def test_a_child_nobody_knows_whose_fork_never_ends_is_told_of(
        self, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("mshared.insisting.PATIENCE", 0.05)
        fail_for(world.attach(pid=None), "arm", itertools.repeat(errno.EAGAIN))
        world.carry_out(Arm(pages(2), Arming.WP))
        assert "its fork does not end" in caplog.text

    def test_an_attachment_that_ends_meanwhile_is_none_any_more(self, world: World) -> None:
        dying, other = world.attach(), world.attach()
        fail(dying, "arm", errno.EAGAIN, errno.ESRCH)
        world.carry_out(Arm(pages(2), Arming.WP), read_events=lambda: world.region.attachments.remove(dying))
        assert calls(other) == [("arm", pages(2), Arming.WP)]


class TestMemory:
    """What a change does to the files."""

    def write(self, world: World, *numbers: int) -> None:
        for number in numbers:
            os.pwrite(world.region.backing.fd, bytes([number]) * PAGE_SIZE, number * PAGE_SIZE)

    def held(self, fd: int) -> list[int]:
        return [page.start // PAGE_SIZE for ar in extents(fd) for page in ar.pieces(PAGE_SIZE)]

    def test_punching(self, world: World) -> None:
        self.write(world, 1, 2, 3)
        world.carry_out(Punch(pages(2)))
        assert self.held(world.region.backing.fd) == [1, 3]

    def test_stashing_and_back(self, world: World) -> None:
        self.write(world, 1, 2, 3)
        world.carry_out(Stash(pages(2, 5)))
        assert self.held(world.region.backing.fd) == [1]
        assert self.held(world.region.stash()) == [2, 3]
        world.carry_out(Unstash(pages(3)))
        assert self.held(world.region.backing.fd) == [1, 3]
        assert self.held(world.region.stash()) == [2]
        assert os.pread(world.region.backing.fd, 2, 3 * PAGE_SIZE) == b"\3\3"

    def test_what_is_punched_does_not_come_back_from_the_stash(self, world: World) -> None:
        self.write(world, 1, 2, 3)
        world.carry_out(Stash(pages(1, 3)), Punch(pages(2)), Unstash(pages(1, 3)))
        assert self.held(world.region.backing.fd) == [1, 3]

    def test_memory_moves_only_when_events_are_seen_to(self, world: World) -> None:
        """Children that were being forked have copied the old rules: they must be armed before anything moves."""
        self.write(world, 1)
        attachment = world.attach()
        seen: list[tuple[int, list[int]]] = []

        def read_events() -> None:
            seen.append((len(calls(attachment)), self.held(world.region.backing.fd)))

        effects = Arm(pages(1), Arming.MISSING), Stash(pages(1)), Arm(pages(1), Arming.NATIVE)
        world.carry_out(*effects, read_events=read_events)
        assert seen == [(1, [1])]

    def test_faults_wait_while_a_change_is_carried_out(self, world: World) -> None:
        seen: list[tuple[bool, int]] = []
        world.carry_out(
            Arm(pages(1), Arming.MISSING),
            Punch(pages(1)),
            read_events=lambda: seen.append((world.region.changing, len(world.region.arming_now))),
        )
        assert seen == [(True, 1)]
        assert not world.region.changing
        assert world.region.arming_now == []

    def test_and_no_longer_when_it_fails(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_args: object, **_kwargs: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(apply.sparse, "copy_all", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            world.carry_out(Arm(pages(1), Arming.MISSING), Stash(pages(1)))
        assert not world.region.changing
        assert world.region.arming_now == []

    @pytest.mark.parametrize("effect", [Allow(pages(0)), ZeroFill(pages(0)), Deliver(Signal.SIGBUS, WINDOW_START)])
    def test_answers_to_faults_change_no_region(self, world: World, effect: Effect) -> None:
        with pytest.raises(InternalError, match="moves no memory"):
            world.carry_out(effect)


class TestZeroFill:
    """A page of zeros for a thread that waits."""

    def test_the_page_around_the_address(self, world: World) -> None:
        attachment = world.attach(ELSEWHERE)
        addr = Address(ELSEWHERE + 5 * PAGE_SIZE + 77)
        assert apply.answer_fault(attachment, addr, TID, ZeroFill(pages(5))) is Outcome.SERVED
        assert calls(attachment) == [("zero", pages(5, at=ELSEWHERE), False)]

    def test_protected_if_need_be(self, world: World) -> None:
        attachment = world.attach()
        apply.answer_fault(attachment, WINDOW_START, TID, ZeroFill(pages(0), protected=True))
        assert calls(attachment) == [("zero", pages(0), True)]

    def test_somebody_else_was_first(self, world: World) -> None:
        """EEXIST wakes nobody: the thread is woken, and finds the page."""
        attachment = world.attach()
        fail(attachment, "zero", errno.EEXIST)
        assert apply.answer_fault(attachment, WINDOW_START, TID, ZeroFill(pages(0))) is Outcome.EXISTS
        assert calls(attachment) == [("wake", pages(0))]

    @pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOMEM])
    def test_what_its_window_does_not_take_the_file_does(self, world: World, number: int) -> None:
        attachment = world.attach()
        fail(attachment, "zero", number)
        assert apply.answer_fault(attachment, WINDOW_START, TID, ZeroFill(pages(0))) is Outcome.UNMAPPED
        assert calls(attachment) == [("wake", pages(0))]
        assert list(extents(world.region.backing.fd)) == [AddrRange.sized(0, PAGE_SIZE)]

    @pytest.mark.parametrize(("number", "readonly"), [(errno.ENOMEM, False), (errno.EEXIST, False), (0, True)])
    def test_without_memory_it_is_a_sigbus(
        self, world: World, number: int, readonly: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of huge pages the kernel says EEXIST then."""
        attachment = world.attach(readonly=readonly)
        if number:
            fail(attachment, "zero", number)

        def zero(*_: object) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        monkeypatch.setattr(world.region.filler(), "zero", zero)
        asked: list[object] = []
        monkeypatch.setattr(
            apply.refusals, "refuse", lambda *args, access: asked.append((*args, access)) or Outcome.SERVED
        )
        assert apply.answer_fault(attachment, WINDOW_START, TID, ZeroFill(pages(0)), Access.WRITE) is Outcome.SERVED
        assert asked == [(attachment, WINDOW_START, TID, Signal.SIGBUS, Access.WRITE)]
        assert calls(attachment) == []

    @pytest.mark.parametrize(("number", "outcome"), [(errno.EAGAIN, Outcome.RETRY), (errno.ESRCH, Outcome.GONE)])
    def test_what_else_it_may_come_to(self, world: World, number: int, outcome: Outcome) -> None:
        attachment = world.attach()
        fail(attachment, "zero", number)
        assert apply.answer_fault(attachment, WINDOW_START, TID, ZeroFill(pages(0))) is outcome
        assert calls(attachment) == []

    def test_for_a_readonly_window_the_page_is_made_in_the_file(self, world: World) -> None:
        """A private mapping would keep a page of its own, which the region never sees."""
        attachment = world.attach(ELSEWHERE, readonly=True)
        addr = Address(ELSEWHERE + 9 * PAGE_SIZE)
        assert apply.answer_fault(attachment, addr, TID, ZeroFill(pages(9))) is Outcome.SERVED
        assert list(extents(world.region.backing.fd)) == [AddrRange.sized(9 * PAGE_SIZE, PAGE_SIZE)]
        assert calls(attachment) == [("wake", pages(9, at=ELSEWHERE))]


def test_a_store_is_allowed_to_one_page(world: World) -> None:
    attachment = world.attach()
    assert apply.answer_fault(attachment, Address(WINDOW_START + 3), TID, Allow(pages(0))) is Outcome.SERVED
    assert calls(attachment) == [("unprotect", pages(0))]
