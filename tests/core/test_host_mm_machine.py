"""A host mm against two naive models, page by page: what was asked of it, and what its effects make of the kernel.

``Asked`` is a dict of pages. ``Kernel`` knows nothing but the effects: it carries them out one after another on one
attachment and serves what it may without asking. Whatever happens, the two must agree, at the end of every call and
after every single effect on the way there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from msharefs.addr import PAGE_SIZE, PGDIR_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Allow, Arm, Change, Effect, Punch, Signal, Stash, Unstash, ZeroFill
from msharefs.errors import AccessDeniedError, ExistsError, NoMemoryError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.vma import Arming, Vma

SIZE = 2 * 512 + 5
"""Pages of the region: two tables of them and a bit."""
ALL = frozenset(range(SIZE))
BORDER = 65 * PGDIR_SIZE
"""The first table's pages lie under one entry of the top table, the rest under the next."""

CORNERS = [0, 1, 2, 3, 509, 510, 511, 512, 513, 1021, 1023, 1024, 1025, SIZE - 1]
PAGES = st.sampled_from(CORNERS) | st.integers(0, SIZE - 1)
PROTS = st.sampled_from([Prot.NONE, Prot.READ, Prot.WRITE, PROT_RW])


@st.composite
def spans(draw: st.DrawFn) -> range:
    """Some pages in a row, with an end at a border of tables more often than not."""
    one, other = draw(PAGES), draw(PAGES)
    return range(min(one, other), max(one, other) + 1)


@attrs.frozen
class Kind:
    """Size of the pages, how many of them come together, and how many the region starts beside a border of tables."""

    page: int
    granule: int
    off: int = 0


KINDS = [Kind(PAGE_SIZE, 1), Kind(PAGE_SIZE, 1, 3), Kind(PAGE_SIZE, 512), Kind(PMD_SIZE, 512)]


@attrs.define
class Asked:
    """What the region was asked to be: each mapped page's protection, and what was stored to it last (else zeros).

    Protections are plain numbers here: there are a thousand pages to look at, and an enum takes its time.
    """

    prots: dict[int, int]
    contents: dict[int, int]

    def copy(self) -> Asked:
        return Asked(dict(self.prots), dict(self.contents))

    def readable(self) -> set[int]:
        return {page for page, prot in self.prots.items() if prot & 3}

    def writable(self) -> set[int]:
        return {page for page, prot in self.prots.items() if prot & 2}

    def map(self, span: Iterable[int], prot: Prot) -> None:
        self.unmap(span)
        self.protect(span, prot)

    def protect(self, span: Iterable[int], prot: Prot) -> None:
        self.prots.update(dict.fromkeys(span, int(prot)))

    def unmap(self, span: Iterable[int]) -> None:
        for page in span:
            self.prots.pop(page, None)
            self.contents.pop(page, None)

    def lowest_gap(self, count: int, align: int, first: int) -> range | None:
        """Free pages in a row, counted from above; numbers of pages that start at a multiple of ``align``."""
        free, found = 0, None
        for page in reversed(range(SIZE)):
            free = 0 if page in self.prots else free + 1
            if free >= count and (first + page) % align == 0:
                found = range(page, page + count)
        return found

    def runs(self) -> list[tuple[range, int]]:
        """Mapped pages in a row with the same protection."""
        found: list[tuple[range, int]] = []
        for page in sorted(self.prots):
            if found and found[-1] == (range(found[-1][0].start, page), self.prots[page]):
                found[-1] = (range(found[-1][0].start, page + 1), self.prots[page])
            else:
                found.append((range(page, page + 1), self.prots[page]))
        return found


class Kernel:
    """One attachment's view of the region: what is armed, what memory there is, and what waits in the stash."""

    def __init__(self, start: Address, page: int, granule: int) -> None:
        self.start = start
        self.page = page
        self.granule = granule
        """Pages that come together where the kernel fills memory itself; what the daemon fills comes alone."""
        self.missing: set[int] = set()
        """Pages whose first touch is reported."""
        self.protected: set[int] = set()
        """Pages whose stores are reported, present or not."""
        self.memory: dict[int, int] = {}
        self.stash: dict[int, int] = {}

    def pages_of(self, ar: AddrRange) -> set[int]:
        return set(range((ar.start - self.start) // self.page, (ar.end - self.start) // self.page))

    def readable(self) -> set[int]:
        """Pages that a process may read without anybody being asked."""
        return set(ALL - (self.missing - self.memory.keys()))

    def writable(self) -> set[int]:
        """Pages that a process may store to without anybody being asked."""
        return self.readable() - self.protected

    def fillable(self) -> set[int]:
        """Pages whose first touch the kernel serves by itself, with zeros."""
        return set(ALL - self.missing - self.memory.keys())

    def granule_of(self, page: int) -> range:
        first = page // self.granule * self.granule
        return range(first, min(first + self.granule, SIZE))

    def fill(self, page: int) -> None:
        for neighbour in self.granule_of(page):
            self.memory.setdefault(neighbour, 0)

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
            case Allow(ar):
                self.protected -= self.pages_of(ar)
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
        addr = Address(self.start + page * self.page + 16)
        if page in self.missing and page not in self.memory:
            return Fault(addr, access)
        if access is Access.WRITE and page in self.protected:
            return Fault(addr, access, protected=True)
        return None


class HostMmMachine(RuleBasedStateMachine):
    """Any calls, any touches, in any order."""

    @initialize(
        kind=st.sampled_from(KINDS),
        levels=st.sampled_from([4, 5]),
        paging_all=st.booleans(),
        hole_signal=st.sampled_from(Signal),
        mapped=st.booleans(),
    )
    def create(self, kind: Kind, levels: int, paging_all: bool, hole_signal: Signal, mapped: bool) -> None:
        self.page = kind.page
        ar = AddrRange.sized(BORDER + (kind.off - 512) * kind.page, SIZE * kind.page)
        options: dict[str, Any] = {"levels": levels, "paging_all": paging_all, "hole_signal": hole_signal}
        self.mm = HostMm(ar, page=kind.page, granule=kind.granule * kind.page, **options)
        self.asked = Asked({}, {})
        self.kernel = Kernel(ar.start, kind.page, kind.granule)
        self.unstashed: set[int] = set()
        self.tokens = itertools.count(1)
        if mapped:
            self.mm.mmap(ar, ar.size, fixed=True)
            self.asked.map(ALL, PROT_RW)
        for part, arming in self.mm.armings():
            self.kernel.arm(part, arming)

    def ar(self, span: range) -> AddrRange:
        return AddrRange.sized(self.mm.ar.start + span.start * self.page, len(span) * self.page)

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
        self.mmap_somewhere(self.ar(span), len(span), 1, prot, span if not taken else None)

    @rule(count=st.sampled_from([1, 2, 510, 512, 513]), huge=st.booleans(), prot=PROTS)
    def mmap_anywhere(self, count: int, huge: bool, prot: Prot) -> None:
        self.mmap_somewhere(None, count, 512 if huge else 1, prot, None)

    def mmap_somewhere(self, hint: AddrRange | None, count: int, align: int, prot: Prot, wanted: range | None) -> None:
        span = wanted or self.asked.lowest_gap(count, align, self.mm.ar.start // self.page)
        size, align = count * self.page, align * self.page
        if span is None:
            with pytest.raises(NoMemoryError):
                self.mm.mmap(hint, size, prot, align=align)
            return
        place, effects = self.mm.mmap(hint, size, prot, align=align)
        assert place == self.ar(span)
        self.mapped(span, prot, effects)

    def mapped(self, span: range, prot: Prot, effects: list[Change]) -> None:
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
        self.asked.protect(span, prot)
        self.follow(before, self.mm.mprotect(self.ar(span), prot))

    @rule(span=spans())
    def madvise_remove(self, span: range) -> None:
        if not self.asked.writable().issuperset(span):
            error = AccessDeniedError if self.asked.prots.keys() >= set(span) else NoMemoryError
            with pytest.raises(error):
                self.mm.madvise_remove(self.ar(span))
            return
        before = self.asked.copy()
        for page in span:
            self.asked.contents.pop(page, None)
        self.follow(before, self.mm.madvise_remove(self.ar(span)))

    # The processes.

    @rule(page=PAGES, access=st.sampled_from(Access))
    def touch(self, page: int, access: Access) -> None:
        """A thread touches a page, asks as often as it is told to try again, and gets what the mapping says."""
        signal = self.run_access(page, access)
        prot = self.asked.prots.get(page)
        if prot is None:
            assert signal is self.mm.hole_signal
        elif not prot & (2 if access is Access.WRITE else 3):
            assert signal is Signal.SIGSEGV
        else:
            assert signal is None
            if access is Access.WRITE:
                self.kernel.memory[page] = self.asked.contents[page] = next(self.tokens)

    def run_access(self, page: int, access: Access) -> Signal | None:
        for _ in range(2):
            fault = self.kernel.fault(page, access)
            if fault is None:
                if page not in self.kernel.memory:
                    self.kernel.fill(page)
                return None
            resolution = self.mm.fault(fault)
            self.kernel.carry_out(resolution.effect)
            if resolution.signal is not None:
                return resolution.signal
        assert self.kernel.fault(page, access) is None, "the thread asks again and again"
        return None

    @rule(span=spans())
    def touch_unseen(self, span: range) -> None:
        """Processes touch all they can without being seen."""
        for page in self.kernel.fillable() & set(span):
            self.kernel.fill(page)

    @rule(page=PAGES, access=st.sampled_from(Access))
    def late_fault(self, page: int, access: Access) -> None:
        """A fault is decided after the reason for it is gone."""
        addr = Address(self.mm.ar.start + page * self.page)
        self.kernel.carry_out(self.mm.fault(Fault(addr, access)).effect)

    @rule(huge=st.booleans())
    def sync(self, huge: bool) -> None:
        """Somebody asks for the tables: after that they hold what the kernel holds."""
        present = Asked(dict.fromkeys(self.kernel.memory, 0), {}).runs()
        self.mm.sync((self.ar(span) for span, _ in present), huge=huge or self.page > PAGE_SIZE)
        assert self.installed() == self.kernel.memory.keys()

    # What must hold.

    def follow(self, before: Asked, effects: list[Change]) -> None:
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
            may_see = {before.contents.get(page, 0)} if page in old else set()
            may_see |= {self.asked.contents.get(page, 0)} if page in new else set()
            assert self.kernel.memory.get(page, 0) in may_see
        for granule in {self.kernel.granule_of(page) for page in self.kernel.fillable()}:
            assert old.issuperset(granule) or new.issuperset(granule), "a hole is filled with its neighbours"
            assert not self.kernel.stash.keys() & granule, "zeros come before the contents are back"

    def installed(self) -> set[int]:
        return set().union(*(self.kernel.pages_of(run) for run, _ in self.mm.table.runs(self.mm.ar)))

    @invariant()
    def its_own_checker_agrees(self) -> None:
        check_mm(self.mm)

    @invariant()
    def vmas_are_what_was_asked(self) -> None:
        assert list(self.mm.vmas) == [Vma(self.ar(span), Prot(prot)) for span, prot in self.asked.runs()]

    @invariant()
    def the_kernel_lets_in_who_may_and_nobody_else(self) -> None:
        assert self.kernel.readable() <= self.asked.readable()
        assert self.kernel.writable() <= self.asked.writable()
        assert not self.kernel.protected & self.asked.writable()

    @invariant()
    def the_kernel_asks_no_more_than_it_must(self) -> None:
        if not self.mm.paging_all:
            readable = self.asked.readable()
            paged = {self.kernel.granule_of(page) for page in self.kernel.missing & readable}
            assert not any(readable.issuperset(granule) for granule in paged)

    @invariant()
    def memory_holds_what_was_stored(self) -> None:
        assert self.kernel.memory.keys() <= self.asked.readable()
        assert self.kernel.stash.keys() <= self.asked.prots.keys() - self.asked.readable()
        held = {**self.kernel.memory, **self.kernel.stash}
        assert {page: token for page, token in held.items() if token} == self.asked.contents

    @invariant()
    def a_new_attachment_is_armed_like_the_old(self) -> None:
        other = Kernel(self.mm.ar.start, self.page, self.kernel.granule)
        for ar, arming in self.mm.armings():
            other.arm(ar, arming)
        assert (other.missing, other.protected) == (self.kernel.missing, self.kernel.protected)

    @invariant()
    def what_is_installed_is_there(self) -> None:
        installed = self.installed()
        assert installed <= self.kernel.memory.keys()
        if self.mm.paging_all:
            # Pages that come back from the stash are counted by the next sync only: nobody looks what it holds.
            assert self.kernel.memory.keys() - installed <= self.unstashed


TestHostMmMachine = HostMmMachine.TestCase
