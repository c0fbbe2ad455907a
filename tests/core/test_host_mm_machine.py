"""A host mm against two naive models, page by page: what was asked of it, and what its effects make of the kernel.

``Asked`` is a dict of pages. ``Kernel`` knows nothing but the effects: it carries them out one after another on one
attachment and serves what it may without asking. Whatever happens, the two must agree, at the end of every call and
after every single effect on the way there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from msharefs.addr import PAGE_SIZE, PGDIR_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Arm, Effect, Punch, Signal, Stash, Unstash, ZeroFill
from msharefs.errors import ExistsError, NoMemoryError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.vma import Arming, Vma

SIZE = 2 * 512 + 5
"""Pages of the region: two PMDs and a bit."""
ALL = frozenset(range(SIZE))
BASE = 65 * PGDIR_SIZE - PMD_SIZE
"""The first 2 MiB lie under one entry of the top table, the rest under the next."""

CORNERS = [0, 1, 2, 3, 509, 510, 511, 512, 513, 1021, 1023, 1024, 1025, SIZE - 1]
PAGES = st.sampled_from(CORNERS) | st.integers(0, SIZE - 1)
PROTS = st.sampled_from([Prot.NONE, Prot.READ, Prot.WRITE, PROT_RW])


@st.composite
def spans(draw: st.DrawFn) -> range:
    """Some pages in a row, with an end at a border of tables more often than not."""
    one, other = draw(PAGES), draw(PAGES)
    return range(min(one, other), max(one, other) + 1)


@attrs.define
class Asked:
    """What the region was asked to be: each mapped page's protection, and what was stored to it last (0: zeros)."""

    prots: dict[int, Prot]
    contents: dict[int, int]

    def copy(self) -> Asked:
        return Asked(dict(self.prots), dict(self.contents))

    def readable(self) -> set[int]:
        return {page for page, prot in self.prots.items() if prot & PROT_RW}

    def writable(self) -> set[int]:
        return {page for page, prot in self.prots.items() if prot & Prot.WRITE}

    def map(self, span: Iterable[int], prot: Prot) -> None:
        self.unmap(span)
        self.prots.update(dict.fromkeys(span, prot))

    def unmap(self, span: Iterable[int]) -> None:
        for page in span:
            self.prots.pop(page, None)
            self.contents.pop(page, None)

    def lowest_gap(self, count: int, align: int, first_address: int) -> range | None:
        """Free pages in a row, counted from above."""
        free, found = 0, None
        for page in reversed(range(SIZE)):
            free = 0 if page in self.prots else free + 1
            if free >= count and (first_address + page * PAGE_SIZE) % align == 0:
                found = range(page, page + count)
        return found

    def runs(self) -> list[tuple[range, Prot]]:
        """Mapped pages in a row with the same protection."""
        groups = itertools.groupby(sorted(self.prots), lambda page: self.prots[page])
        found: list[tuple[range, Prot]] = []
        for prot, pages in groups:
            for page in pages:
                if found and found[-1][1] == prot and found[-1][0].stop == page:
                    found[-1] = (range(found[-1][0].start, page + 1), prot)
                else:
                    found.append((range(page, page + 1), prot))
        return found


class Kernel:
    """One attachment's view of the region: what is armed, what memory there is, and what waits in the stash."""

    def __init__(self, start: Address) -> None:
        self.start = start
        self.missing: set[int] = set()
        """Pages whose first touch is reported."""
        self.protected: set[int] = set()
        """Pages whose stores are reported, present or not."""
        self.memory: dict[int, int] = {}
        self.stash: dict[int, int] = {}

    def pages_of(self, ar: AddrRange) -> set[int]:
        return set(range((ar.start - self.start) // PAGE_SIZE, (ar.end - self.start) // PAGE_SIZE))

    def readable(self) -> set[int]:
        """Pages that a process may read without anybody being asked."""
        return set(ALL - (self.missing - self.memory.keys()))

    def writable(self) -> set[int]:
        """Pages that a process may store to without anybody being asked."""
        return self.readable() - self.protected

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case Arm(ar, arming):
                self.arm(ar, arming)
            case Punch(ar):
                for page in self.pages_of(ar):
                    self.memory.pop(page, None)
                    self.stash.pop(page, None)
            case Stash(ar):
                leaving = self.pages_of(ar) & self.memory.keys()
                self.stash.update({page: self.memory.pop(page) for page in leaving})
            case Unstash(ar):
                coming = self.pages_of(ar) & self.stash.keys()
                self.memory.update({page: self.stash.pop(page) for page in coming})
            case ZeroFill(ar, protected):
                (page,) = self.pages_of(ar)
                if page not in self.memory:
                    self.memory[page] = 0
                    if not protected:
                        self.protected.discard(page)

    def arm(self, ar: AddrRange, arming: Arming) -> None:
        pages = self.pages_of(ar)
        for bit, reported in ((Arming.MISSING, self.missing), (Arming.WP, self.protected)):
            if arming & bit:
                reported |= pages
            else:
                reported -= pages

    def fault(self, page: int, access: Access) -> Fault | None:
        """What a touch makes the kernel report; None when it is served at once."""
        addr = Address(self.start + page * PAGE_SIZE + 16)
        if page in self.missing and page not in self.memory:
            return Fault(addr, access)
        if access is Access.WRITE and page in self.protected:
            return Fault(addr, access, protected=True)
        return None


class HostMmMachine(RuleBasedStateMachine):
    """Any calls, any touches, in any order."""

    @initialize(
        off=st.sampled_from([0, 3 * PAGE_SIZE]),
        levels=st.sampled_from([4, 5]),
        paging_all=st.booleans(),
        hole_signal=st.sampled_from(Signal),
        mapped=st.booleans(),
    )
    def create(self, off: int, levels: int, paging_all: bool, hole_signal: Signal, mapped: bool) -> None:
        ar = AddrRange.sized(BASE + off, SIZE * PAGE_SIZE)
        self.mm = HostMm(ar, levels=levels, paging_all=paging_all, hole_signal=hole_signal)
        self.asked = Asked({}, {})
        self.kernel = Kernel(ar.start)
        self.unstashed: set[int] = set()
        self.tokens = itertools.count(1)
        if mapped:
            self.mm.mmap(ar, ar.size, fixed=True)
            self.asked.map(ALL, PROT_RW)
        for part, arming in self.mm.armings():
            self.kernel.arm(part, arming)

    def ar(self, span: range) -> AddrRange:
        return AddrRange.sized(self.mm.ar.start + span.start * PAGE_SIZE, len(span) * PAGE_SIZE)

    # The calls.

    @rule(span=spans(), prot=PROTS, replace=st.booleans())
    def mmap_fixed(self, span: range, prot: Prot, replace: bool) -> None:
        ar = self.ar(span)
        if not replace and self.asked.prots.keys() & span:
            with pytest.raises(ExistsError):
                self.mm.mmap(ar, ar.size, prot, fixed=True)
            return
        place, effects = self.mm.mmap(ar, ar.size, prot, fixed=True, replace=replace)
        assert place == ar
        self.mapped(span, prot, effects)

    @rule(span=spans(), prot=PROTS)
    def mmap_with_a_hint(self, span: range, prot: Prot) -> None:
        taken = self.asked.prots.keys() & span
        self.mmap_somewhere(self.ar(span), len(span), PAGE_SIZE, prot, span if not taken else None)

    @rule(count=st.sampled_from([1, 2, 510, 512, 513]), huge=st.booleans(), prot=PROTS)
    def mmap_anywhere(self, count: int, huge: bool, prot: Prot) -> None:
        self.mmap_somewhere(None, count, PMD_SIZE if huge else PAGE_SIZE, prot, None)

    def mmap_somewhere(self, hint: AddrRange | None, count: int, align: int, prot: Prot, wanted: range | None) -> None:
        span = wanted or self.asked.lowest_gap(count, align, self.mm.ar.start)
        if span is None:
            with pytest.raises(NoMemoryError):
                self.mm.mmap(hint, count * PAGE_SIZE, prot, align=align)
            return
        place, effects = self.mm.mmap(hint, count * PAGE_SIZE, prot, align=align)
        assert place == self.ar(span)
        self.mapped(span, prot, effects)

    def mapped(self, span: range, prot: Prot, effects: list[Effect]) -> None:
        before = self.asked.copy()
        self.asked.map(span, prot)
        self.follow(before, effects)

    @rule(span=spans())
    def munmap(self, span: range) -> None:
        before = self.asked.copy()
        self.asked.unmap(span)
        self.follow(before, self.mm.munmap(self.ar(span)))

    @rule(span=spans(), prot=PROTS)
    def mprotect(self, span: range, prot: Prot) -> None:
        if not set(span) <= self.asked.prots.keys():
            with pytest.raises(NoMemoryError):
                self.mm.mprotect(self.ar(span), prot)
            return
        before = self.asked.copy()
        self.asked.prots.update(dict.fromkeys(span, prot))
        self.follow(before, self.mm.mprotect(self.ar(span), prot))

    # The processes.

    @rule(page=PAGES, access=st.sampled_from(Access))
    def touch(self, page: int, access: Access) -> None:
        """A thread touches a page, asks as often as it is told to try again, and gets what the mapping says."""
        signal = self.run_access(page, access)
        prot = self.asked.prots.get(page)
        if prot is None:
            assert signal is self.mm.hole_signal
        elif not prot & (Prot.WRITE if access is Access.WRITE else PROT_RW):
            assert signal is Signal.SIGSEGV
        else:
            assert signal is None
            if access is Access.WRITE:
                self.kernel.memory[page] = self.asked.contents[page] = next(self.tokens)

    def run_access(self, page: int, access: Access) -> Signal | None:
        for _ in range(2):
            fault = self.kernel.fault(page, access)
            if fault is None:
                self.kernel.memory.setdefault(page, 0)
                return None
            resolution = self.mm.fault(fault)
            self.kernel.carry_out(resolution.effect)
            if resolution.signal is not None:
                return resolution.signal
        assert self.kernel.fault(page, access) is None, "the thread asks again and again"
        return None

    @rule(span=spans())
    def fill(self, span: range) -> None:
        """Processes touch all they can without being seen."""
        for page in self.kernel.readable() & set(span):
            self.kernel.memory.setdefault(page, 0)

    @rule(page=PAGES, access=st.sampled_from(Access))
    def late_fault(self, page: int, access: Access) -> None:
        """A fault is decided after the reason for it is gone."""
        addr = Address(self.mm.ar.start + page * PAGE_SIZE)
        self.kernel.carry_out(self.mm.fault(Fault(addr, access)).effect)

    @rule(huge=st.booleans())
    def sync_native(self, huge: bool) -> None:
        """Somebody asks for the tables: after that they hold what the kernel holds."""
        present = Asked(dict.fromkeys(self.kernel.memory, PROT_RW), {}).runs()
        self.mm.sync_native((self.ar(span) for span, _ in present), huge=huge)
        if not self.mm.paging_all:
            assert self.installed() == self.kernel.memory.keys()

    # What must hold.

    def follow(self, before: Asked, effects: list[Effect]) -> None:
        """Carry the effects out; on the way, every page follows the old rule or the new one and no store is lost."""
        for effect in effects:
            if isinstance(effect, Punch):
                new = self.kernel.writable() & self.kernel.pages_of(effect.ar) - before.writable()
                assert not new, "a store into the new mapping is freed with the old contents"
            if isinstance(effect, Stash):
                assert not self.kernel.writable() & self.kernel.pages_of(effect.ar), "a store during the copy is lost"
            if isinstance(effect, Unstash):
                self.unstashed |= self.kernel.pages_of(effect.ar)
            self.kernel.carry_out(effect)
            self.check_between(before)

    def check_between(self, before: Asked) -> None:
        old, new, readable = before.readable(), self.asked.readable(), self.kernel.readable()
        assert readable <= old | new
        assert self.kernel.writable() <= before.writable() | self.asked.writable()
        for page in readable & (self.kernel.memory.keys() | before.contents.keys() | self.asked.contents.keys()):
            seen = self.kernel.memory.get(page, 0)
            may_see = [rule.contents.get(page, 0) for rule in (before, self.asked) if page in rule.readable()]
            assert seen in may_see

    def installed(self) -> set[int]:
        return set().union(*(self.kernel.pages_of(run) for run, _ in self.mm.table.runs(self.mm.ar)))

    @invariant()
    def its_own_checker_agrees(self) -> None:
        check_mm(self.mm)

    @invariant()
    def vmas_are_what_was_asked(self) -> None:
        assert list(self.mm.vmas) == [Vma(self.ar(span), prot) for span, prot in self.asked.runs()]

    @invariant()
    def the_kernel_lets_in_who_may_and_nobody_else(self) -> None:
        assert self.kernel.readable() <= self.asked.readable()
        assert self.kernel.writable() <= self.asked.writable()
        assert not self.kernel.protected & self.asked.writable()

    @invariant()
    def the_kernel_asks_no_more_than_it_must(self) -> None:
        if not self.mm.paging_all:
            assert not self.kernel.missing & self.asked.readable()

    @invariant()
    def memory_holds_what_was_stored(self) -> None:
        assert self.kernel.memory.keys() <= self.asked.readable()
        assert self.kernel.stash.keys() <= self.asked.prots.keys() - self.asked.readable()
        held = {**self.kernel.memory, **self.kernel.stash}
        assert {page: token for page, token in held.items() if token} == self.asked.contents

    @invariant()
    def a_new_attachment_is_armed_like_the_old(self) -> None:
        other = Kernel(self.mm.ar.start)
        for ar, arming in self.mm.armings():
            other.arm(ar, arming)
        assert (other.missing, other.protected) == (self.kernel.missing, self.kernel.protected)

    @invariant()
    def what_is_installed_is_there(self) -> None:
        installed = self.installed()
        assert installed <= self.kernel.memory.keys()
        if self.mm.paging_all:
            # Pages that come back from the stash are not counted: nobody looks what it holds.
            assert self.kernel.memory.keys() - installed <= self.unstashed


TestHostMmMachine = HostMmMachine.TestCase
