"""A family of forked host mms against naive models: each region is a plain list of what its pages hold, copied at fork.

``Member`` plays one daemon's store and two attachments of the kernel: it knows the effects, fills and stores what
nobody has to be asked for, and never looks at the model. Whatever a relative does, every page shows what its own
model says; no store goes to a page that a relative refers to; nothing is copied twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from msharefs import breaking, clean_pages, forking
from msharefs.addr import PAGE_SIZE, PGDIR_SIZE, PMD_SIZE, TABLE_ENTRIES, Address, AddrRange, united
from msharefs.effects import (
    Allow,
    Arm,
    Bring,
    Change,
    Copy,
    Fill,
    FillPattern,
    Preserve,
    Protect,
    Punch,
    Signal,
    Stash,
    Unstash,
    WriteBack,
    ZeroFill,
)
from msharefs.fault import Fault
from msharefs.frames import StoreNo, store_of
from msharefs.host_mm import HostMm
from msharefs.invariants import check_lineage, check_mm
from msharefs.lineage import Lineage
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.refpage import RefPage
from msharefs.vma import Arming, FileId, FileSource, Source

REFPAGE = RefPage(b"\xaa")
PATTERN = -1_000_000
"""What its pages hold."""
HOLE = 8
"""No protection that a mapping may have."""
SIZE = 2 * 512 + 6
"""Pages of the region: of small ones, two tables of them and a bit."""
ALL = frozenset(range(SIZE))
BORDER = 65 * PGDIR_SIZE
CORNERS = [0, 1, 2, 3, 510, 511, 512, 513, 514, 1023, 1024]
"""Borders of tables and of mappings, and few pages besides, so that much happens to each."""
PAGES = st.sampled_from([*CORNERS * 3, SIZE - 1, 100, 700])
PROTS = st.sampled_from([Prot.NONE, Prot.READ, PROT_RW, PROT_RW])
NUMBERS = st.integers(0, 11)
"""Picks one of the members living; and with each, one of its two processes."""
MOST = 5
"""Members living at a time."""


@st.composite
def spans(draw: st.DrawFn) -> range:
    """Some pages in a row: mostly a few, or a whole table of them, or more."""
    first = draw(PAGES)
    return range(first, min(first + draw(st.sampled_from([1, 1, 2, 2, 3, 4, 512, 600])), SIZE))


@attrs.frozen
class Kind:
    """Size of the pages, and how many of them come together where the kernel fills memory itself."""

    page: int
    granule: int

    @property
    def start(self) -> Address:
        """Small pages of the region start under one entry of the top table and end under the next."""
        return Address(BORDER - 512 * self.page)

    def ar_of(self, span: range) -> AddrRange:
        return AddrRange.sized(self.start + span.start * self.page, len(span) * self.page)

    def pages_of(self, ar: AddrRange) -> range:
        return range((ar.start - self.start) // self.page, (ar.end - self.start) // self.page)

    def slice_of(self, ar: AddrRange) -> slice:
        span = self.pages_of(ar)
        return slice(span.start, span.stop)

    def granule_of(self, page: int) -> range:
        first = page // self.granule * self.granule
        return range(first, min(first + self.granule, SIZE))


KINDS = [Kind(PAGE_SIZE, 1), Kind(PAGE_SIZE, 512), Kind(PMD_SIZE, 512)]


@attrs.define
class Attached:
    """What the kernel reports of one process: first touches, and stores to what is protected; and where it may."""

    missing: set[int] = attrs.Factory(set)
    reporting_stores: set[int] = attrs.Factory(set)
    protected: set[int] = attrs.Factory(set)

    def arm(self, pages: Iterable[int], arming: Arming) -> None:
        span = set(pages)
        for bits, reported in (
            (Arming.MISSING, self.missing),
            (Arming.WP | Arming.WP_CLEAN, self.reporting_stores),
            (Arming.WP, self.protected),
        ):
            if arming & bits:
                reported.update(span)
            elif reported is not self.protected or not arming & Arming.WP_CLEAN:
                reported.difference_update(span)


@attrs.define
class Asked:
    """What a region was asked to be: each page's protection, as a plain number, and what must be read there.

    Of a page that lies in a shared file nothing is said: others change the file.
    """

    prots: list[int]
    contents: list[int | None]

    def copy(self) -> Asked:
        return Asked(self.prots[:], self.contents[:])

    def readable(self) -> set[int]:
        return {page for page, prot in enumerate(self.prots) if prot & 3}

    def writable(self) -> set[int]:
        return {page for page, prot in enumerate(self.prots) if prot & 2}


@attrs.define(eq=False)
class Member:
    """A host mm, what it was asked to be, its store and stash, and two processes."""

    mm: HostMm
    kind: Kind
    asked: Asked
    memory: list[int | None] = attrs.Factory(lambda: [None] * SIZE)
    stash: dict[int, int] = attrs.Factory(dict)
    attached: list[Attached] = attrs.Factory(list)

    def __attrs_post_init__(self) -> None:
        self.attached += [self.newly_attached(), self.newly_attached()]

    def newly_attached(self) -> Attached:
        new = Attached()
        for ar, arming in self.mm.armings():
            new.arm(self.kind.pages_of(ar), arming)
        new.protected.update(self.clean())
        return new

    def clean(self) -> set[int]:
        return {page for run in clean_pages.clean(self.mm, self.mm.ar) for page in self.kind.pages_of(run)}

    def of_refpages(self) -> set[int]:
        return {page for vma in self.mm.vmas if vma.refpage for page in self.kind.pages_of(vma.ar)}

    def present(self) -> set[int]:
        return {page for page, content in enumerate(self.memory) if content is not None}

    def storable(self) -> set[int]:
        """Pages that some process may store to without anybody being asked."""
        present = self.present()
        return set().union(*(ALL - (by.missing - present) - by.protected for by in self.attached))

    def fillable(self) -> set[int]:
        """Pages that hold nothing, and whose first touch the kernel serves by itself in some process, with zeros."""
        present = self.present()
        return set().union(*(ALL - by.missing - present for by in self.attached))

    def fill(self, page: int) -> None:
        for neighbour in self.kind.granule_of(page):
            if self.memory[neighbour] is None:
                self.memory[neighbour] = 0

    def carry_out(self, effect: Change, files: set[int]) -> None:
        pages = self.kind.pages_of(effect.ar)
        match effect:
            case Arm(_, arming):
                for by in self.attached:
                    by.arm(pages, arming)
            case Protect():
                for by in self.attached:
                    assert by.reporting_stores.issuperset(pages)
                    by.protected.update(pages)
            case Punch():
                for page in pages:
                    self.memory[page] = None
                    self.stash.pop(page, None)
                memory = {page for page in self.asked.writable() if self.asked.contents[page] is not None}
                for by in self.attached:  # Where stores to it are allowed, marks may go with the pages.
                    by.protected.difference_update(memory.intersection(pages))
            case Stash():
                assert not self.storable().intersection(pages), "a store during the copy is lost"
                for page in pages:
                    content, self.memory[page] = self.memory[page], None
                    if content is not None:
                        self.stash[page] = content
            case Unstash():
                for page in self.stash.keys() & set(pages):
                    self.memory[page] = self.stash.pop(page)
            case WriteBack(_, file):
                assert not self.storable().intersection(pages), "a store during the copy is lost"
                files.add(file)

    def reported(self, page: int, access: Access, by: Attached) -> Fault | None:
        """What a touch makes the kernel report; None when it is served at once."""
        addr = Address(self.mm.ar.start + page * self.kind.page + 16)
        if page in by.missing and self.memory[page] is None:
            return Fault(addr, access)
        if access is Access.WRITE and page in by.protected:
            return Fault(addr, access, protected=True)
        return None


def in_file(file: int, page: int) -> int:
    """What a file holds that nobody stores to: a number of its own, below those of stores."""
    return -10_000 * file - page - 1


class ForkingMachine(RuleBasedStateMachine):
    """Any calls, any touches, any forks and ends, in any order."""

    @initialize(kind=st.sampled_from(KINDS), levels=st.sampled_from([4, 5]), paging_all=st.booleans())
    def create(self, kind: Kind, levels: int, paging_all: bool) -> None:
        self.kind = kind
        self.lineage = Lineage()
        region = kind.ar_of(range(SIZE))
        granule = kind.granule * kind.page
        mm = HostMm(region, levels=levels, page=kind.page, granule=granule, paging_all=paging_all, lineage=self.lineage)
        first = Member(mm, kind, Asked([HOLE] * SIZE, [0] * SIZE))
        self.members = {mm.store: first}
        self.memories = {mm.store: first.memory}
        """Of those who are gone, too."""
        self.tokens, self.files = itertools.count(1), itertools.count(1)
        self.written: set[int] = set()
        self.map(first, range(SIZE), PROT_RW, None)
        self.map(first, range(2, 4), PROT_RW, self.new_file(shared=True))
        self.map(first, range(510, 512), PROT_RW, self.new_file(shared=False))
        self.map(first, range(512, 515), PROT_RW, REFPAGE)
        self.call(first, range(1024, 1026), None, lambda ar: first.mm.munmap(ar))

    def pick(self, number: int) -> tuple[Member, Attached]:
        """A member, and one of its processes."""
        living = list(self.members.values())
        member = living[number // 2 % len(living)]
        return member, member.attached[number % 2]

    def new_file(self, *, shared: bool) -> FileSource:
        return FileSource(FileId(next(self.files)), 0, shared, writable=True)

    # The calls.

    @rule(number=NUMBERS, span=spans(), prot=PROTS, shows=st.sampled_from(["none", "refpage", "private", "shared"]))
    def mmap(self, number: int, span: range, prot: Prot, shows: str) -> None:
        """Map anew, mostly over something, the first page of which has been stored to."""
        self.touch(number, span.start, Access.WRITE)
        source: Source | None = None
        if shows != "none":
            source = REFPAGE if shows == "refpage" else self.new_file(shared=shows == "shared")
        self.map(self.pick(number)[0], span, prot, source)

    def map(self, member: Member, span: range, prot: Prot, source: Source | None) -> None:
        def call(ar: AddrRange) -> list[Change]:
            return member.mm.mmap(ar, ar.size, prot, fixed=True, replace=True, source=source)[1]

        contents: list[int | None] = [0] * len(span)
        if isinstance(source, RefPage):
            contents = [PATTERN] * len(span)
        elif source is not None:
            contents = [None if source.shared else in_file(source.file, page) for page in range(len(span))]
        self.call(member, span, [int(prot)] * len(span), call, contents)

    @rule(number=NUMBERS, span=spans())
    def munmap(self, number: int, span: range) -> None:
        member = self.pick(number)[0]
        self.call(member, span, None, member.mm.munmap)

    @rule(number=NUMBERS, span=spans(), prot=PROTS)
    def mprotect(self, number: int, span: range, prot: Prot) -> None:
        member = self.pick(number)[0]
        if HOLE in member.asked.prots[span.start : span.stop]:
            return
        self.touch(number, span.start, Access.WRITE)
        if prot & PROT_RW:
            now = member.asked.contents[span.start : span.stop]
            self.call(member, span, [int(prot)] * len(span), lambda ar: member.mm.mprotect(ar, prot), now, keeps=True)
        else:
            self.preserve(forking.to_bring(member.mm, self.kind.ar_of(span)), member)
            now = member.asked.contents[span.start : span.stop]
            self.call(member, span, [int(prot)] * len(span), lambda ar: member.mm.mprotect(ar, prot), now)

    @rule(number=NUMBERS, span=spans())
    def madvise_remove(self, number: int, span: range) -> None:
        member = self.pick(number)[0]
        prots = member.asked.prots[span.start : span.stop]
        if not all(prot & 2 for prot in prots):
            return
        if not any(vma.file for vma in member.mm.vmas.overlapping(self.kind.ar_of(span))):
            of_refpages = member.of_refpages()
            contents: list[int | None] = [PATTERN if page in of_refpages else 0 for page in span]
            self.call(member, span, prots, member.mm.madvise_remove, contents)

    @rule(number=NUMBERS, span=spans())
    def drop_clean_pages(self, number: int, span: range) -> None:
        member = self.pick(number)[0]
        dropped = clean_pages.drop(member.mm, self.kind.ar_of(span))
        for effect in dropped:
            member.carry_out(effect, self.written)

    def call(
        self,
        member: Member,
        span: range,
        prots: list[int] | None,
        call: Callable[[AddrRange], list[Change]],
        contents: list[int | None] | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        """One call, after what has to be done for relatives; then its effects, one after another.

        ``prots`` and ``contents`` are what the pages have afterwards; ``keeps``: they stay where they are.
        """
        ar = self.kind.ar_of(span)
        if not keeps:
            self.preserve(forking.to_preserve(member.mm, ar), member)
            assert forking.to_preserve(member.mm, ar) == []
        before, part = member.asked.copy(), slice(span.start, span.stop)
        member.asked.prots[part] = prots or [HOLE] * len(span)
        member.asked.contents[part] = contents or [0] * len(span)
        for effect in call(ar):
            if isinstance(effect, Punch):
                new = member.storable() - before.writable()
                assert not new.intersection(span), "a store into the new mapping is freed with the old contents"
            member.carry_out(effect, self.written)
            assert member.storable() <= before.writable() | member.asked.writable()

    def preserve(self, copies: Iterable[Copy], asking: Member) -> None:
        """Make the copies that one member asks for; each page once."""
        done: set[int] = set()
        for copy in copies:
            pages = self.kind.pages_of(copy.ar)
            assert done.isdisjoint(pages), "a page is copied twice"
            done.update(pages)
            source, target = self.memories[copy.source], self.memories[copy.target]
            if copy.source in self.members:
                assert not self.members[copy.source].storable().intersection(pages), "a store during the copy is lost"
            for page in pages:
                assert source[page] is not None, "what a relative has was lost"
                assert target[page] is None, "the copy overwrites what is there"
                target[page] = source[page]
            forking.copied(asking.mm, copy)
            check_mm(asking.mm)

    # The processes.

    @rule(number=NUMBERS, page=PAGES, access=st.sampled_from(Access))
    def touch(self, number: int, page: int, access: Access) -> None:
        """A thread touches a page, asks as often as it is told to try again, and gets what the mapping says."""
        member, process = self.pick(number)
        signal = self.run_access(member, page, access, process)
        prot = member.asked.prots[page]
        if prot == HOLE:
            assert signal is Signal.SIGBUS
        elif not access.allowed_by(Prot(prot)):
            assert signal is Signal.SIGSEGV
        else:
            assert signal is None
            if access is Access.WRITE:
                self.store(member, page)

    @rule(
        number=NUMBERS, picks=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(Access)), min_size=1, max_size=3)
    )
    def touch_reference_pages(self, number: int, picks: list[tuple[int, Access]]) -> None:
        """Touches of any page meet these too seldom."""
        member = self.pick(number)[0]
        pages = sorted(member.of_refpages() & set(CORNERS) & member.asked.writable())
        for pick, access in picks if pages else ():
            self.touch(number, pages[pick % len(pages)], access)

    @rule(first=NUMBERS, page=PAGES)
    def all_store(self, first: int, page: int) -> None:
        """A process of every member stores to the same page."""
        for number in range(first, first + 2 * len(self.members), 2):
            self.touch(number, page, Access.WRITE)

    @rule(number=NUMBERS, span=spans())
    def store_unseen(self, number: int, span: range) -> None:
        """Processes store to all they may without being seen."""
        member, _ = self.pick(number)
        for page in member.storable().intersection(span):
            if member.memory[page] is None:
                member.fill(page)
            self.store(member, page)

    def store(self, member: Member, page: int) -> None:
        member.memory[page] = next(self.tokens)
        if member.asked.contents[page] is not None:
            member.asked.contents[page] = member.memory[page]

    def run_access(self, member: Member, page: int, access: Access, by: Attached) -> Signal | None:
        for _ in range(4):
            fault = member.reported(page, access, by)
            if fault is None:
                if member.memory[page] is None:
                    member.fill(page)
                return None
            signal = self.serve(member, fault, by)
            if signal is not None:
                return signal
        raise AssertionError("the thread asks again and again")

    def serve(self, member: Member, fault: Fault, by: Attached) -> Signal | None:
        referred = self.kind.pages_of(AddrRange.page_at(fault.addr, self.kind.page))[0] in self.referred(member)
        resolution = member.mm.fault(fault)
        match resolution.effect:
            case Allow(ar):
                assert not referred
                by.protected.difference_update(self.kind.pages_of(ar))
            case Preserve(copies):
                assert referred
                self.preserve(copies, member)
                assert not self.referred(member).intersection(*(self.kind.pages_of(copy.ar) for copy in copies))
            case Bring(copies):
                self.preserve(copies, member)
            case Fill(ar, file, offset):
                (page,) = self.kind.pages_of(ar)
                if member.mm.table.holes(ar):
                    if member.memory[page] is None:
                        member.memory[page] = in_file(file, offset // self.kind.page)
                    member.mm.filled(ar)
            case FillPattern(ar, _, clean, ahead):
                for page in (page for at in ahead for page in self.kind.pages_of(at) if member.memory[page] is None):
                    member.memory[page] = PATTERN
                    by.protected.discard(page)
                    clean_pages.came(member.mm, self.kind.ar_of(range(page, page + 1)), clean=False)
                for other in member.attached if clean else ():
                    other.protected.update(self.kind.pages_of(ar))
                for page in itertools.takewhile(lambda page: member.memory[page] is None, self.kind.pages_of(ar)):
                    member.memory[page] = PATTERN
                    if not clean:
                        by.protected.discard(page)
                    clean_pages.came(member.mm, self.kind.ar_of(range(page, page + 1)), clean=clean)
            case ZeroFill(ar, protected):
                (page,) = self.kind.pages_of(ar)
                if member.memory[page] is None:
                    member.memory[page] = 0
                    if not protected:
                        by.protected.discard(page)
        return resolution.signal

    @rule(number=NUMBERS, page=PAGES, access=st.sampled_from(Access), protected=st.booleans())
    def late_fault(self, number: int, page: int, access: Access, protected: bool) -> None:
        """A fault is decided after the reason for it is gone."""
        member, by = self.pick(number)
        access = Access.WRITE if protected else access
        if member.memory[page] is not None:
            self.serve(member, Fault(Address(self.kind.start + page * self.kind.page), access, protected), by)

    @rule(number=NUMBERS, huge=st.booleans())
    def sync(self, number: int, huge: bool) -> None:
        """Somebody asks for the tables: after that they hold what the kernel holds, and what relatives have."""
        member = self.pick(number)[0]
        present = [self.kind.ar_of(range(page, page + 1)) for page in sorted(member.present())]
        member.mm.sync(united(present), huge=huge or self.kind.page > PAGE_SIZE)
        own = {
            page
            for run, pte in member.mm.table.runs(member.mm.ar)
            for page in self.kind.pages_of(run)
            if store_of(pte.frame) == member.mm.store
        }
        assert own == member.present()

    @rule(number=NUMBERS)
    def attach_anew(self, number: int) -> None:
        member = self.pick(number)[0]
        new = member.newly_attached()
        old = member.attached[number % 2]
        assert (new.missing, new.reporting_stores) == (old.missing, old.reporting_stores)
        assert new.protected >= old.protected - member.of_refpages()
        member.attached[number % 2] = new

    # The family.

    @rule(number=NUMBERS, huge=st.booleans())
    def fork(self, number: int, huge: bool) -> None:
        if len(self.members) == MOST:
            return
        origin = self.pick(number)[0]
        for member in self.members.values():
            if member is origin or not member.mm.rule.forked & Arming.WP:
                for effect in forking.shield(member.mm):
                    member.carry_out(effect, self.written)
        for effect in origin.mm.write_back(origin.mm.ar):
            origin.carry_out(effect, self.written)
        self.sync(2 * list(self.members.values()).index(origin), huge)
        tables, pages = sum(origin.mm.table.tables), origin.mm.table.resident
        mm = forking.fork(origin.mm)
        assert (sum(origin.mm.table.tables), origin.mm.table.resident) == (tables, pages)
        twin = Member(mm, self.kind, origin.asked.copy(), stash=dict(origin.stash))
        self.members[mm.store] = twin
        self.memories[mm.store] = twin.memory

    @rule(number=NUMBERS, pages=st.lists(PAGES, max_size=20), huge=st.booleans())
    def store_and_fork(self, number: int, pages: list[int], huge: bool) -> None:
        """What was allowed to go unseen before a fork is not any more after it, be it little or much."""
        for page in pages:
            self.touch(number, page, Access.WRITE)
        self.fork(number, huge)

    @rule(number=NUMBERS)
    def leave(self, number: int) -> None:
        """A member ends; of what it leaves behind, all that nobody needs is freed."""
        if len(self.members) == 1:
            return
        member = self.pick(number)[0]
        del self.members[member.mm.store]
        self.lineage.leave(member.mm)
        for store in self.memories.keys() - self.members.keys():
            needed = {page for ar in self.lineage.needed(store) for page in self.kind.pages_of(ar)}
            for page in ALL - needed:
                self.memories[store][page] = None

    @rule()
    def relax(self) -> None:
        """Who is alone, and so in possession of all that it has, is as if it had never been forked."""
        if len(self.members) > 1:
            return
        (member,) = self.members.values()
        if any(pages for _, pages in self.foreign(member)):
            return
        for effect in forking.relax(member.mm):
            member.carry_out(effect, self.written)
        pages = member.asked.writable() - {p for v in member.mm.vmas if v.source for p in self.kind.pages_of(v.ar)}
        if not member.mm.paging_all and self.kind.granule == 1:
            assert pages <= member.storable()

    # What must hold.

    def foreign(self, member: Member) -> Iterator[tuple[StoreNo, set[int]]]:
        """What a member has of others' stores."""
        for run, pte in member.mm.table.runs(member.mm.ar):
            if store_of(pte.frame) != member.mm.store:
                yield store_of(pte.frame), set(self.kind.pages_of(run))

    def referred(self, member: Member) -> set[int]:
        """What relatives have of a member's store."""
        others = [other for other in self.members.values() if other is not member]
        return set().union(*(p for other in others for store, p in self.foreign(other) if store == member.mm.store))

    def shown(self, member: Member) -> list[int | None]:
        """What each page would show, were it touched now."""
        shown: list[int | None] = [0] * SIZE
        shared: set[int] = set()
        for vma in member.mm.vmas:
            pages = self.kind.pages_of(vma.ar)
            if isinstance(vma.source, FileSource):
                first = vma.source.offset // self.kind.page
                shown[pages.start : pages.stop] = [in_file(vma.source.file, first + n) for n in range(len(pages))]
            elif vma.source is not None:
                shown[pages.start : pages.stop] = [PATTERN] * len(pages)
            if vma.reaches_file:
                shared.update(pages)
        for run, pte in member.mm.table.runs(member.mm.ar):
            part = self.kind.slice_of(run)
            shown[part] = self.memories[store_of(pte.frame)][part]
            assert None not in shown[part], "what is installed is not there"
        for page, content in enumerate(member.memory):
            if content is not None:
                shown[page] = content
        for page, content in member.stash.items():
            shown[page] = content
        for page in shared:
            shown[page] = None
        return shown

    @invariant()
    def their_own_checker_agrees(self) -> None:
        for member in self.members.values():
            check_mm(member.mm)
        check_lineage(self.lineage)

    @invariant()
    def every_page_shows_what_the_model_says(self) -> None:
        for member in self.members.values():
            assert self.shown(member) == member.asked.contents

    @invariant()
    def vmas_are_what_was_asked(self) -> None:
        for member in self.members.values():
            prots = [HOLE] * SIZE
            for vma in member.mm.vmas:
                pages = self.kind.pages_of(vma.ar)
                prots[pages.start : pages.stop] = [int(vma.prot)] * len(pages)
            assert prots == member.asked.prots

    @invariant()
    def the_kernel_lets_in_who_may_and_nobody_else(self) -> None:
        for member in self.members.values():
            readable, present = member.asked.readable(), member.present()
            assert present <= readable
            assert member.stash.keys().isdisjoint(readable)
            assert member.storable() <= member.asked.writable()
            assert member.fillable() <= readable

    @invariant()
    def nothing_that_a_relative_has_changes_unseen(self) -> None:
        for member in self.members.values():
            assert not member.storable() & self.referred(member)

    @invariant()
    def zeros_come_only_where_there_are_zeros(self) -> None:
        """Pages that the kernel fills by itself are empty for everybody, and those that come with them too."""
        for member in self.members.values():
            empty = {page for page, content in enumerate(member.asked.contents) if content == 0}
            empty &= member.asked.readable()
            present, taken = member.present(), set().union(*(pages for _, pages in self.foreign(member)))
            assert taken.isdisjoint(present)
            for granule in {self.kind.granule_of(page) for page in member.fillable()}:
                assert empty.issuperset(set(granule) - present)
                assert taken.isdisjoint(granule)

    @invariant()
    def clean_pages_hold_what_their_reference_page_says_and_stores_to_them_are_seen(self) -> None:
        for member in self.members.values():
            clean = member.clean()
            assert clean.isdisjoint(member.storable())
            assert {member.memory[page] for page in clean} <= {PATTERN}

    @invariant()
    def stores_to_shared_files_count(self) -> None:
        for member in self.members.values():
            shared = {p for v in member.mm.vmas if v.reaches_file for p in self.kind.pages_of(v.ar)}
            dirty = {p for run in member.mm.dirty(member.mm.ar) for p in self.kind.pages_of(run)}
            assert member.storable() & shared <= dirty
            assert not any(pages & shared for _, pages in self.foreign(member))


TestForkingMachine = ForkingMachine.TestCase
TestForkingMachine.settings = settings(stateful_step_count=30)


class TestWhereMuchComesWithLittle(ForkingMachine.TestCase):  # type: ignore[misc, valid-type]
    """The same, where the second touch of a leaf table has all of it copied, as many touches would have."""

    settings = settings(stateful_step_count=30)

    def setUp(self) -> None:
        super().setUp()
        patched = mock.patch.multiple(breaking, FIRST=0, SHARE=TABLE_ENTRIES, SHARE_OF_HUGE=TABLE_ENTRIES)
        patched.start()
        self.addCleanup(patched.stop)
