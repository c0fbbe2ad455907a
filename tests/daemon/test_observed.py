"""What is remembered of faults: refusals for those who may read the region, every fault for those who keep asking."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from fake_kernel import ELSEWHERE, PID, TID, World

from mshared import observed
from mshared.observed import MOST_EVENTS, MOST_REFUSALS, TRACE_PATIENCE_NS, Journal, Trace
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE
from msharefs.effects import Allow, Answer, ZeroFill
from msharefs.perms import Access, Credentials, Ownership, Prot
from msharefs.reports import Refusal

ROOT = Credentials(0, 0)
NOW = 1_000_000


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.region.close()


def refuse(world: World, offset: int = 0, *, access: Access | None = Access.WRITE, sent: str = "SIGBUS") -> Refusal:
    """Have a journal note it; what it tells."""
    live = world.region.attachments[0] if world.region.attachments else world.attach(ELSEWHERE)
    world.region.journal.refused(live, live.model.window.start + offset, PID, TID, sent, access)
    return world.region.journal.seen_by(ROOT, 0)[-1]


class TestRefusals:
    def test_tell_who_where_and_what_lay_there(self, world: World) -> None:
        """Addresses are those of the process; where the region would have them, the offset tells."""
        world.region.model.mm.mprotect(world.region.model.ar, Prot.READ)
        told = refuse(world, PAGE_SIZE + 5, sent="SIGSEGV")
        assert (told.region, told.pid, told.tid, told.sent) == ("it", PID, TID, "SIGSEGV")
        assert (told.address, told.offset) == (ELSEWHERE + PAGE_SIZE + 5, PAGE_SIZE + 5)
        assert (told.access, told.cause) == ("write", "protection")
        assert (told.vma_offset, told.vma_length, told.prot, told.file) == (0, world.region.model.ar.size, 1, None)

    def test_of_a_hole_tell_no_mapping(self, world: World) -> None:
        world.region.model.mm.munmap(world.region.model.ar)
        told = refuse(world)
        assert (told.cause, told.vma_offset, told.prot) == ("hole", None, None)

    def test_where_all_is_allowed_memory_was_short(self, world: World) -> None:
        assert refuse(world, access=None).cause == "memory"
        assert refuse(world, access=None).access == "touch"

    def test_outside_the_window_there_is_no_offset(self, world: World) -> None:
        told = refuse(world, world.region.model.ar.size)
        assert (told.cause, told.offset, told.vma_offset) == ("moved", None, None)

    @pytest.mark.parametrize(
        ("uid", "gid", "mode", "seen"),
        [(0, 0, 0, True), (5, 0, 0o600, True), (5, 0, 0o200, False), (6, 9, 0o640, False), (6, 7, 0o640, True)],
    )
    def test_are_for_those_who_may_read_the_region(
        self, world: World, uid: int, gid: int, mode: int, seen: bool
    ) -> None:
        world.region.model.owner = Ownership(5, 7, mode)
        refuse(world)
        assert bool(world.region.journal.seen_by(Credentials(uid, gid), 0)) is seen

    def test_of_one_user_do_not_push_out_those_of_another(self, world: World) -> None:
        refuse(world)
        world.region.model.owner = attrs.evolve(world.region.model.owner, uid=5)
        for _ in range(MOST_REFUSALS + 10):
            refuse(world)
        numbers = [refusal.number for refusal in world.region.journal.seen_by(ROOT, 0)]
        assert numbers == [1, *range(12, MOST_REFUSALS + 12)]

    def test_hold_on_to_no_region_that_has_ended(self, world: World) -> None:
        """Who could read it then may see them; its page tables are not kept for that."""
        refuse(world)
        world.region.model.owner = Ownership(5, 5, 0o600)
        journal, model = world.region.journal, world.region.model
        journal.ended(model)
        assert [entry.of for entries in journal._kept.values() for entry in entries] == [model.owner]
        model.owner = Ownership(6, 6, 0o600)
        assert [len(journal.seen_by(Credentials(uid, uid), 0)) for uid in (5, 6)] == [1, 0]

    def test_are_listed_from_a_number_on(self, world: World) -> None:
        for _ in range(3):
            refuse(world)
        assert [refusal.number for refusal in world.region.journal.seen_by(ROOT, 2)] == [3]

    def test_a_new_journal_is_empty(self) -> None:
        assert Journal().seen_by(ROOT, 0) == []


def serve(world: World, *, flags: int = abi.FLAG_WRITE, since: int | None = None, how: type[Any] = ZeroFill) -> None:
    live = world.region.attachments[0]
    start = time.monotonic_ns() if since is None else since
    observed.served(live, flags, live.model.window.start + 77, TID, start, how)


class TestTrace:
    @pytest.fixture(autouse=True)
    def _attached(self, world: World) -> None:
        world.attach(ELSEWHERE)

    def test_nothing_is_recorded_unless_somebody_asked(self, world: World) -> None:
        serve(world)
        assert world.region.trace is None
        assert sum(world.region.model.latency.buckets()) == 1

    def test_a_fault_is_told_with_how_it_was_answered(self, world: World) -> None:
        world.region.trace = Trace()
        serve(world)
        serve(world, flags=0, how=Allow)
        (first, second), lost = world.region.trace.after(0)
        assert (first.pid, first.tid, first.offset, first.access, first.how) == (PID, TID, 77, "write", "zero")
        assert (second.access, second.how, lost) == ("read", "allow", 0)
        assert first.duration_ns >= 0

    @pytest.mark.parametrize("how", get_args(Answer))
    def test_every_way_to_answer_has_a_word(self, world: World, how: type[Any]) -> None:
        trace = world.region.trace = Trace()
        serve(world, how=how)
        assert trace.after(0)[0][0].how.isalpha()

    def test_who_is_slow_is_told_how_many_are_lost(self, world: World) -> None:
        trace = world.region.trace = Trace()
        for _ in range(MOST_EVENTS + 10):
            serve(world)
        assert trace.after(4)[1] == 6
        assert trace.after(MOST_EVENTS + 10) == ([], 0)

    def test_it_ends_when_nobody_asks_any_more(self, world: World) -> None:
        world.region.trace = Trace()
        serve(world, since=world.region.trace.until + 1)
        assert world.region.trace is None

    def test_it_goes_on_when_somebody_does(self, world: World) -> None:
        trace = world.region.trace = Trace()
        trace.until = 0
        before = time.monotonic_ns()
        trace.after(0)
        assert trace.until >= before + TRACE_PATIENCE_NS


def test_the_protocol_tells_how_long_a_trace_lasts() -> None:
    """As docs/protocol.md has it."""
    text = (Path(__file__).parent.parent.parent / "docs/protocol.md").read_text()
    assert f"at least every {TRACE_PATIENCE_NS // 10**9} seconds, and keeps the last {MOST_EVENTS};" in text
