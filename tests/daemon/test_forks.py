"""Telling forked children apart by marks, with marks that are noted and a /proc that is told."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mshared import processes
from mshared.forks import _LAST_LOOK, MOST_MARKS, Forks
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.protocol import ANCHOR_PAGES

ANCHOR = Address(0x7000_0000_0000)
ELSEWHERE = Address(0x7100_0000_0000)
PARENT = 50


class Machine:
    """Processes and the address spaces they run in; what is marked there shows in mapping sizes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spaces: dict[int, Space] = {}
        self.region = SimpleNamespace(attachments=[])
        self.parents: dict[int, int] = {}
        monkeypatch.setattr(processes, "mapping_sizes", self.mapping_sizes)
        monkeypatch.setattr(processes, "children_of", self.children_of)
        monkeypatch.setattr(processes, "all_pids", lambda: iter(self.spaces))

    def mapping_sizes(self, pid: int, starts: set[Address]) -> dict[Address, int]:
        space = self.spaces.get(pid)
        return {} if space is None else {at: size for at, size in space.sizes().items() if at in starts}

    def children_of(self, pid: int) -> set[int]:
        return {child for child, parent in self.parents.items() if parent == pid}

    def fork(self, pid: int, anchor: Address = ANCHOR, parent: int = PARENT) -> Any:
        """A child that runs as ``pid``, as the daemon has it: not told apart yet."""
        space = Space(anchor)
        self.spaces[pid] = space
        self.parents[pid] = parent
        return SimpleNamespace(uffd=space, anchor=anchor, region=self.region, parent_pid=parent, true_pid=pid)

    def attach(self, pid: int, anchor: Address = ANCHOR) -> None:
        """A process known to be attached."""
        self.region.attachments.append(SimpleNamespace(model=SimpleNamespace(pid=pid), anchor=anchor))


class Space:
    """An address space with an anchor whose first page is registered, seen by its userfaultfd."""

    def __init__(self, anchor: Address) -> None:
        self.anchor = anchor
        self.marked = 1
        self.longest = 1
        self.unmarks = 0
        self.is_gone = False

    def mark(self, ar: AddrRange) -> None:
        self._check(ar)
        self.marked = self.longest = 1 + ar.size // PAGE_SIZE

    def unmark(self, ar: AddrRange) -> None:
        self._check(ar)
        assert ar.size == (ANCHOR_PAGES - 1) * PAGE_SIZE
        self.marked = 1
        self.unmarks += 1

    def sizes(self) -> dict[Address, int]:
        return {self.anchor: self.marked * PAGE_SIZE}

    def is_alive(self) -> bool:
        return not self.is_gone

    def _check(self, ar: AddrRange) -> None:
        if self.is_gone:
            raise OSError(errno.ESRCH, "gone")
        assert ar.start == self.anchor + PAGE_SIZE
        assert ar.end <= self.anchor + ANCHOR_PAGES * PAGE_SIZE


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def found() -> dict[int, int]:
    """Which pid each child was found to have, by the one it truly has."""
    return {}


@pytest.fixture
def ended() -> list[int]:
    """The pids of children that ended before they were found."""
    return []


@pytest.fixture
def forks(found: dict[int, int], ended: list[int]) -> Forks:
    def note(child: Any, pid: int) -> None:
        assert child.true_pid not in found
        found[child.true_pid] = pid

    return Forks(note, lambda child: ended.append(child.true_pid))  # type: ignore[attr-defined]


def test_one_child_is_found(machine: Machine, forks: Forks, found: dict[int, int]) -> None:
    forks.add(machine.fork(101))
    forks.look()
    assert found == {101: 101}
    forks.look()
    assert found == {101: 101}


def test_children_with_windows_at_the_same_address_are_told_apart_in_one_round(
    machine: Machine, forks: Forks, found: dict[int, int]
) -> None:
    for pid in (105, 103, 104, 101):
        forks.add(machine.fork(pid))
    forks.look()
    assert found == {pid: pid for pid in (101, 103, 104, 105)}


def test_children_with_windows_elsewhere_need_no_longer_marks(
    machine: Machine, forks: Forks, found: dict[int, int]
) -> None:
    for pid, anchor in ((101, ANCHOR), (102, ELSEWHERE), (103, ANCHOR), (104, ELSEWHERE)):
        forks.add(machine.fork(pid, anchor))
    forks.look()
    assert found == {pid: pid for pid in range(101, 105)}
    assert [machine.spaces[pid].longest for pid in range(101, 105)] == [2, 2, 3, 3]


def test_a_child_that_is_not_among_those_looked_at_stays(machine: Machine, forks: Forks, found: dict[int, int]) -> None:
    forks.add(machine.fork(101))
    forks.add(machine.fork(102))
    forks.look_among([102, 999])
    assert found == {102: 102}
    forks.look_among([101])
    assert found == {101: 101, 102: 102}


def test_nobody_is_taken_for_a_child_by_memory_that_only_lies_there(
    machine: Machine, forks: Forks, found: dict[int, int]
) -> None:
    """The parent has an anchor at the same address, unmarked; and brothers found before are unmarked again."""
    machine.fork(PARENT)
    machine.fork(100)
    forks.add(machine.fork(101))
    forks.look_among([PARENT, 100])
    assert found == {}


def test_marks_are_taken_away_again(machine: Machine, forks: Forks) -> None:
    children = [machine.fork(pid) for pid in (101, 102, 103)]
    for child in children:
        forks.add(child)
    before = [child.uffd.unmarks for child in children]
    forks.look_among([102])
    assert [child.uffd.marked for child in children] == [1, 1, 1]
    assert [child.uffd.unmarks for child in children] == [count + 1 for count in before]


def test_marks_are_taken_away_though_looking_fails(
    machine: Machine, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_pid: int, _starts: set[Address]) -> dict[Address, int]:
        raise ZeroDivisionError("a mistake")

    child = machine.fork(101)
    forks.add(child)
    monkeypatch.setattr(processes, "mapping_sizes", fail)
    with pytest.raises(ZeroDivisionError):
        forks.look()
    assert child.uffd.marked == 1


def test_a_mark_that_the_parent_bore_is_taken_away_at_once(machine: Machine, forks: Forks) -> None:
    """The child copies its parent's mappings: one that forks while it is marked gives the mark on."""
    child = machine.fork(101)
    child.uffd.marked = 7
    forks.add(child)
    assert child.uffd.marked == 1


def test_a_child_that_is_looked_for_no_longer_is_not_found(
    machine: Machine, forks: Forks, found: dict[int, int]
) -> None:
    child, other = machine.fork(101), machine.fork(102)
    forks.add(child)
    forks.add(other)
    forks.discard(child)
    forks.discard(child)
    forks.look_among([101, 102])
    assert found == {102: 102}
    assert child.uffd.longest == 1


def test_a_child_that_is_gone_does_not_hinder_the_others(machine: Machine, forks: Forks, found: dict[int, int]) -> None:
    gone, alive = machine.fork(101), machine.fork(102)
    gone.uffd.is_gone = True
    forks.add(gone)
    forks.add(alive)
    forks.look_among([101, 102])
    assert found == {102: 102}


def test_only_processes_that_may_be_a_child_are_looked_at(
    machine: Machine, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading maps is what costs: one that is known by the same anchor is none of the others."""
    looked: list[int] = []
    plain = machine.mapping_sizes
    monkeypatch.setattr(processes, "mapping_sizes", lambda pid, starts: (looked.append(pid), plain(pid, starts))[1])
    machine.attach(100)
    machine.attach(102, ELSEWHERE)
    forks.add(machine.fork(101))
    forks.look_among([100, 101, 102])
    assert looked == [101, 102]


def test_one_process_may_be_the_child_of_several_windows(machine: Machine, forks: Forks, found: dict[int, int]) -> None:
    """A fork reports each window of the parent; all of them are the same process's then."""
    children = [machine.fork(pid, anchor) for pid, anchor in ((101, ANCHOR), (102, ELSEWHERE))]
    both = SimpleNamespace(sizes=lambda: children[0].uffd.sizes() | children[1].uffd.sizes())
    machine.spaces = {200: both}  # type: ignore[dict-item]
    for child in children:
        forks.add(child)
    forks.look_among([200])
    assert found == {101: 200, 102: 200}


def test_more_children_than_marks_are_found_in_several_rounds(
    machine: Machine, forks: Forks, found: dict[int, int]
) -> None:
    pids = range(1000, 1000 + ANCHOR_PAGES + 100)
    for pid in pids:
        forks.add(machine.fork(pid))
    forks.look()
    assert len(found) == MOST_MARKS - 1
    forks.look()
    assert found == {pid: pid for pid in pids}


class TestWhereToLook:
    """Among the children of the parents; everywhere only when those do not have them."""

    @pytest.fixture
    def looked(self, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
        found: list[set[int]] = []
        plain = forks.look_among

        def look_among(pids: Iterable[int]) -> None:
            found.append(set(pids))
            plain(found[-1])

        monkeypatch.setattr(forks, "look_among", look_among)
        return found

    def test_children_of_all_parents(self, machine: Machine, forks: Forks, looked: list[set[int]]) -> None:
        machine.fork(999, parent=7)
        forks.add(machine.fork(101, parent=50))
        forks.add(machine.fork(102, parent=60))
        forks.look()
        assert looked == [{101, 102}]

    def test_everywhere_when_asked(self, machine: Machine, forks: Forks, looked: list[set[int]]) -> None:
        machine.fork(999, parent=7)
        forks.add(machine.fork(101))
        forks.look(everywhere=True)
        assert looked == [{101, 999}]

    def test_everywhere_for_the_child_of_one_not_found_yet(
        self, machine: Machine, forks: Forks, looked: list[set[int]]
    ) -> None:
        machine.fork(999, parent=7)
        grandchild = machine.fork(101)
        grandchild.parent_pid = None
        forks.add(grandchild)
        forks.look()
        assert looked == [{101, 999}]

    def test_nowhere_when_nobody_is_missing(
        self, machine: Machine, forks: Forks, looked: list[set[int]], found: dict[int, int]
    ) -> None:
        machine.fork(101)
        forks.look()
        assert looked in ([], [set()])
        assert found == {}


class TestRun:
    """When to look."""

    def run(self, forks: Forks, seconds: float, *steps: tuple[float, Any]) -> list[tuple[float, bool]]:
        """Run for some time, with steps at certain times; when was looked, and whether everywhere."""
        looks: list[tuple[float, bool]] = []
        plain = forks.look

        def note(*, everywhere: bool = False) -> None:
            looks.append((round(trio.current_time() - began, 6), everywhere))
            plain(everywhere=everywhere)

        async def main() -> None:
            nonlocal began
            began = trio.current_time()
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(forks.run)
                    for at, step in steps:
                        await trio.sleep_until(began + at)
                        step()

        began = 0.0
        forks.look = note  # type: ignore[method-assign]
        trio.run(main, clock=MockClock(autojump_threshold=0))
        return looks

    def test_soon_after_a_fork_and_then_no_more(self, machine: Machine, forks: Forks, found: dict[int, int]) -> None:
        looks = self.run(forks, 10, (1, lambda: forks.add(machine.fork(101))))
        assert looks == [(1.005, False)]
        assert found == {101: 101}

    def test_once_for_children_of_the_same_moment(self, machine: Machine, forks: Forks, found: dict[int, int]) -> None:
        steps = [(at, lambda pid=pid: forks.add(machine.fork(pid))) for at, pid in ((1, 101), (1.001, 102))]
        looks = self.run(forks, 10, *steps)
        assert looks == [(1.005, False)]
        assert found == {101: 101, 102: 102}

    def test_everywhere_when_the_parent_has_died(self, machine: Machine, forks: Forks, found: dict[int, int]) -> None:
        child = machine.fork(101)
        machine.parents[101] = 1
        looks = self.run(forks, 60, (1, lambda: forks.add(child)))
        assert [everywhere for _, everywhere in looks] == [False] * (len(looks) - 1) + [True]
        assert looks[-1][0] < 3
        assert found == {101: 101}

    def test_ever_more_seldom_but_never_given_up(self, machine: Machine, forks: Forks) -> None:
        child = machine.fork(101)
        del machine.spaces[101]
        times = [0.0, *(at for at, _ in self.run(forks, 120, (0, lambda: forks.add(child))))]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        expected = itertools.takewhile(lambda gap: gap < _LAST_LOOK, (0.005 * 2**n for n in itertools.count()))
        growing = list(expected)
        assert gaps[: len(growing)] == pytest.approx(growing)
        assert set(gaps[len(growing) :]) == {_LAST_LOOK}

    def test_soon_again_when_another_forks_meanwhile(
        self, machine: Machine, forks: Forks, found: dict[int, int]
    ) -> None:
        lost = machine.fork(101)
        del machine.spaces[101]
        steps = [(0, lambda: forks.add(lost)), (0.2, lambda: forks.add(machine.fork(102)))]
        looks = self.run(forks, 0.5, *steps)
        times = [at for at, _ in looks]
        assert found == {102: 102}
        assert [at for at in times if at > 0.2][:2] == pytest.approx([0.315, 0.32])

    def test_not_for_one_that_has_ended(
        self, machine: Machine, forks: Forks, found: dict[int, int], ended: list[int]
    ) -> None:
        """It leaves nothing in /proc to find. Whoever waits for the end of its memory does not wait for the sweeper."""
        child = machine.fork(101)
        child.uffd.is_gone = True
        looks = self.run(forks, 10, (1, lambda: forks.add(child)))
        assert looks == [(1.005, False)]
        assert (found, ended) == ({}, [101])

    def test_not_for_those_given_up(self, machine: Machine, forks: Forks) -> None:
        child = machine.fork(101)
        del machine.spaces[101]
        looks = self.run(forks, 10, (0, lambda: forks.add(child)), (0.02, lambda: forks.discard(child)))
        assert [at for at, _ in looks] == pytest.approx([0.005, 0.015, 0.035])
