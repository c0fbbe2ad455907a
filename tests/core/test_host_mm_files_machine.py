"""Files and reference pages in a host mm against a naive model: dicts of pages for the region, and for what its files
should hold.

``Kernel`` knows nothing but the effects: two attachments, the memory behind them, and the files, which change by
``WriteBack`` alone. Whatever happens, a reader sees the last store, private stores stay in the region, a shared one is
in its file or its page counts as dirty, and what counts as clean holds what its reference page says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from msharefs import clean_pages
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import (
    Allow,
    Arm,
    Change,
    Fill,
    FillPattern,
    Protect,
    Punch,
    Signal,
    Stash,
    Unstash,
    WriteBack,
    ZeroFill,
)
from msharefs.errors import AccessDeniedError, MshareError, NoMemoryError, NotSupportedError
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Advice, Prot
from msharefs.refpage import RefPage
from msharefs.vma import Arming, FileId, FileSource, Source, Vma

SIZE = 13
"""Pages of the region."""
ALL = frozenset(range(SIZE))
PAGES = st.integers(0, SIZE - 1)
PROTS = st.sampled_from([PROT_RW, PROT_RW, Prot.READ, Prot.NONE, Prot.WRITE])

FilePage = tuple[int, int]
"""Number of a file, and of a page in it."""


@st.composite
def spans(draw: st.DrawFn) -> range:
    """Some pages in a row, seldom all of them: something must stay mapped."""
    first = draw(PAGES)
    return range(first, min(first + draw(st.sampled_from([1, 2, 3, 5, SIZE])), SIZE))


@attrs.frozen
class Scale:
    """Where pages lie, by the size of them."""

    page: int

    @property
    def start(self) -> Address:
        """The 8 first pages lie under one of the lowest tables, the rest under the next."""
        return Address((32 << 40) + (512 - 8) * self.page)

    def ar_of(self, span: range) -> AddrRange:
        return AddrRange.sized(self.start + span.start * self.page, len(span) * self.page)

    def pages_of(self, ar: AddrRange) -> range:
        return range((ar.start - self.start) // self.page, (ar.end - self.start) // self.page)


def written_first(where: FilePage) -> int:
    """What a file holds where nobody stored: a number of its own, below those of stores."""
    return -1000 * where[0] - where[1]


def pattern(refpage: RefPage) -> int:
    """What a reference page holds: a number of its own, below those of files."""
    return -1_000_000 - refpage.pattern[0]


@attrs.frozen
class Page:
    """What a page was asked to be, what a reader must see there, and what of which file it shows."""

    prot: Prot
    content: int = 0
    source: Source | None = None
    where: FilePage | None = None

    @property
    def shared(self) -> bool:
        return isinstance(self.source, FileSource) and self.source.shared

    @property
    def removed(self) -> int:
        """What it holds when its memory was given back."""
        return pattern(self.source) if isinstance(self.source, RefPage) else 0


Asked = dict[int, Page]


def readable(asked: Asked) -> set[int]:
    return {number for number, page in asked.items() if page.prot & PROT_RW}


def writable(asked: Asked) -> set[int]:
    return {number for number, page in asked.items() if page.prot & Prot.WRITE}


def anonymous(asked: Asked) -> set[int]:
    return {number for number, page in asked.items() if page.source is None}


def of_refpages(asked: Asked) -> set[int]:
    return {number for number, page in asked.items() if isinstance(page.source, RefPage)}


class Attached:
    """What is armed in one process."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.missing: set[int] = set()
        self.protected: set[int] = set()

    def arm(self, ar: AddrRange, arming: Arming) -> None:
        pages = self.scale.pages_of(ar)
        (self.missing.update if arming & Arming.MISSING else self.missing.difference_update)(pages)
        if arming & Arming.WP:
            self.protected.update(pages)
        elif not arming & Arming.WP_CLEAN:
            self.protected.difference_update(pages)


class Kernel:
    """Attachments, memory, stash and files; carries out effects, and nothing else changes a file."""

    def __init__(self, scale: Scale, granule: int) -> None:
        self.pages_of = scale.pages_of
        self.page = scale.page
        self.granule = granule
        self.attached = [Attached(scale), Attached(scale)]
        self.memory: dict[int, int] = {}
        self.stash: dict[int, int] = {}
        self.files: dict[FilePage, int] = {}

    def in_file(self, where: FilePage) -> int:
        return self.files.get(where, written_first(where))

    def readable(self, by: Attached) -> set[int]:
        """Pages that a process may read without anybody being asked."""
        return set(ALL - (by.missing - self.memory.keys()))

    def storable(self) -> set[int]:
        """Pages that some process may store to without anybody being asked."""
        return set().union(*(self.readable(by) - by.protected for by in self.attached))

    def fillable(self) -> set[int]:
        """Pages whose first touch the kernel serves by itself, with zeros."""
        return set().union(*(ALL - by.missing - self.memory.keys() for by in self.attached))

    def granule_of(self, page: int) -> range:
        first = page // self.granule * self.granule
        return range(first, min(first + self.granule, SIZE))

    def carry_out(self, effect: Change) -> None:
        match effect:
            case Arm(ar, arming):
                for by in self.attached:
                    by.arm(ar, arming)
            case Protect(ar):
                for by in self.attached:
                    by.protected |= set(self.pages_of(ar))
            case Punch(ar):
                for page in self.pages_of(ar):
                    self.memory.pop(page, None)
                    self.stash.pop(page, None)
            case Stash(ar):
                self.stash.update({page: self.memory.pop(page) for page in self.pages_of(ar) if page in self.memory})
            case Unstash(ar):
                self.memory.update({page: self.stash.pop(page) for page in self.pages_of(ar) if page in self.stash})
            case WriteBack(ar, file, offset):
                for number, page in enumerate(self.pages_of(ar), offset // self.page):
                    self.files[file, number] = self.memory[page]


@attrs.frozen
class Reading:
    """What was read of a file for some pages, and has not arrived yet."""

    ar: AddrRange
    source: FileSource
    data: list[int]


class HostMmFilesMachine(RuleBasedStateMachine):
    """Any calls on anonymous memory and files, any touches by two processes, in any order."""

    @initialize(page=st.sampled_from([PAGE_SIZE, PMD_SIZE]), granule=st.sampled_from([1, 4]), paging_all=st.booleans())
    def create(self, page: int, granule: int, paging_all: bool) -> None:
        scale = Scale(page)
        self.page, self.start, self.ar_of, self.pages_of = scale.page, scale.start, scale.ar_of, scale.pages_of
        region = self.ar_of(range(SIZE))
        self.mm = HostMm(region, page=page, granule=granule * page, paging_all=paging_all)
        self.kernel = Kernel(scale, granule)
        self.kernel.carry_out(Arm(region, Arming.MISSING))
        self.asked: Asked = {}
        self.files: dict[FilePage, int] = {}
        """What files should hold, were every store written at once."""
        self.readings: list[Reading] = []
        self.told_late: set[int] = set()
        self.present: set[int] = set()
        self.numbers, self.tokens = itertools.count(1), itertools.count(1)
        self.mmap_anonymous(range(9, SIZE), PROT_RW)
        for span, shared in ((range(1, 6), True), (range(6, 8), False)):
            self.mmap_file(span, PROT_RW, offset=3, shared=shared, may_write=True)
        self.mmap_refpage(range(8, 10), PROT_RW, 1)

    # The calls.

    @rule(span=spans(), prot=PROTS)
    def mmap_anonymous(self, span: range, prot: Prot) -> None:
        self.mmap(span, {page: Page(prot) for page in span}, prot, None)

    @rule(span=spans(), prot=PROTS, offset=st.integers(0, 9), shared=st.booleans(), may_write=st.booleans())
    def mmap_file(self, span: range, prot: Prot, offset: int, shared: bool, may_write: bool) -> None:
        """Map a file that the region has not seen yet."""
        self.map_source(span, prot, FileSource(FileId(next(self.numbers)), offset * self.page, shared, may_write))

    @rule(span=spans(), prot=PROTS, number=st.integers(1, 2))
    def mmap_refpage(self, span: range, prot: Prot, number: int) -> None:
        refpage = RefPage(bytes([number]))
        self.mmap(span, {page: Page(prot, pattern(refpage), refpage) for page in span}, prot, refpage)

    @rule(count=st.integers(1, 9), at=st.none() | PAGES, data=st.data())
    def mmap_more_of_a_file(self, count: int, at: int | None, data: st.DataObject) -> None:
        """Map what comes behind a part that is mapped, right behind it or elsewhere, unless it is mapped already."""
        shown = [vma for vma in self.mm.vmas if vma.file is not None]
        if not shown:
            return
        vma = data.draw(st.sampled_from(shown))
        source = vma.file_at(vma.ar.end)
        assert source is not None
        first = self.pages_of(vma.ar).stop if at is None else at
        span = range(first, min(first + count, SIZE))
        number = source.offset // self.page
        wanted = {(int(source.file), number + n) for n in range(len(span))}
        if span and not wanted & {page.where for page in self.asked.values()}:
            self.map_source(span, vma.prot, source)

    def map_source(self, span: range, prot: Prot, source: FileSource) -> None:
        new: Asked = {}
        for number, page in enumerate(span):
            at = attrs.evolve(source, offset=source.offset + number * self.page)
            where = (int(at.file), at.offset // self.page)
            new[page] = Page(prot, self.files.get(where, written_first(where)), at, where)
        self.mmap(span, new, prot, source)

    def mmap(self, span: range, new: Asked, prot: Prot, source: Source | None) -> None:
        ar = self.ar_of(span)
        if isinstance(source, FileSource) and source.shared and prot & Prot.WRITE and not source.writable:
            with pytest.raises(AccessDeniedError):
                self.mm.mmap(ar, ar.size, prot, fixed=True, replace=True, source=source)
            return
        before, self.asked = self.asked, {**self.asked, **new}
        self.follow(before, self.mm.mmap(ar, ar.size, prot, fixed=True, replace=True, source=source)[1])

    @rule(span=spans())
    def munmap(self, span: range) -> None:
        before, self.asked = self.asked, {n: page for n, page in self.asked.items() if n not in span}
        self.follow(before, self.mm.munmap(self.ar_of(span)))

    @rule(span=spans(), prot=PROTS)
    def mprotect(self, span: range, prot: Prot) -> None:
        pages = [page for number, page in self.asked.items() if number in span]
        error: type[MshareError] | None = None
        if len(pages) < len(span):
            error = NoMemoryError
        elif prot & Prot.WRITE and any(
            isinstance(p.source, FileSource) and p.shared and not p.source.writable for p in pages
        ):
            error = AccessDeniedError
        if error is not None:
            with pytest.raises(error):
                self.mm.mprotect(self.ar_of(span), prot)
            return
        before, new = self.asked, {page: attrs.evolve(self.asked[page], prot=prot) for page in span}
        self.asked = {**self.asked, **new}
        self.follow(before, self.mm.mprotect(self.ar_of(span), prot))

    @rule(span=spans())
    def madvise_remove(self, span: range) -> None:
        error: type[MshareError] | None = None
        if not self.asked.keys() >= set(span):
            error = NoMemoryError
        elif not writable(self.asked).issuperset(span):
            error = AccessDeniedError
        elif not (anonymous(self.asked) | of_refpages(self.asked)).issuperset(span):
            error = NotSupportedError
        if error is not None:
            with pytest.raises(error):
                self.mm.madvise_remove(self.ar_of(span))
            return
        before, new = (
            self.asked,
            {page: attrs.evolve(self.asked[page], content=self.asked[page].removed) for page in span},
        )
        self.asked = {**self.asked, **new}
        self.follow(before, self.mm.madvise_remove(self.ar_of(span)))

    @rule(span=spans(), advice=st.sampled_from([Advice.NORMAL, Advice.RANDOM, Advice.SEQUENTIAL]))
    def madvise_reading(self, span: range, advice: Advice) -> None:
        if self.asked.keys() >= set(span):
            self.mm.madvise_reading(self.ar_of(span), advice)

    @rule(span=spans())
    def drop_clean_pages(self, span: range) -> None:
        self.follow(self.asked, list(clean_pages.drop(self.mm, self.ar_of(span))))
        assert clean_pages.clean(self.mm, self.ar_of(span)) == []

    @rule(span=spans())
    def write_back(self, span: range) -> None:
        self.follow(self.asked, self.mm.write_back(self.ar_of(span)))
        assert self.mm.dirty(self.ar_of(span)) == []

    @rule(span=spans(), stores=st.lists(st.tuples(PAGES, st.integers(0, 1)), max_size=4))
    def write_back_while_others_store(self, span: range, stores: list[tuple[int, int]]) -> None:
        """As msync does it: protect all at once, then copy run by run, stores between the copies."""
        effects = self.mm.write_back(self.ar_of(span))
        for effect in effects:
            if isinstance(effect, Protect):
                self.kernel.carry_out(effect)
        between = iter(stores)
        for effect in effects:
            if isinstance(effect, WriteBack):
                self.kernel.carry_out(effect)
                for page, process in itertools.islice(between, 1):
                    self.touch(page, Access.WRITE, process)

    # The processes.

    @rule(page=PAGES, access=st.sampled_from(Access), process=st.integers(0, 1))
    def touch(self, page: int, access: Access, process: int) -> None:
        """A thread touches a page, asks as often as it is told to try again, and gets what the mapping says."""
        signal = self.run_access(page, access, self.kernel.attached[process])
        asked = self.asked.get(page)
        if asked is None:
            assert signal is Signal.SIGBUS
        elif not access.allowed_by(asked.prot):
            assert signal is Signal.SIGSEGV
        else:
            assert signal is None
            assert self.kernel.memory[page] == asked.content
            if access is Access.WRITE:
                self.store(page, asked)

    @rule(picks=st.lists(st.tuples(PAGES, st.integers(0, 1)), min_size=1, max_size=4))
    def store_to_files(self, picks: list[tuple[int, int]]) -> None:
        """Touches of any page meet shared files that may be stored to too seldom."""
        pages = sorted(page for page in writable(self.asked) if self.asked[page].shared)
        for pick, process in picks if pages else ():
            self.touch(pages[pick % len(pages)], Access.WRITE, process)

    @rule(picks=st.lists(st.tuples(PAGES, st.sampled_from(Access), st.integers(0, 1)), min_size=1, max_size=4))
    def touch_reference_pages(self, picks: list[tuple[int, Access, int]]) -> None:
        """And these; often one after the other."""
        pages = sorted(writable(self.asked) & of_refpages(self.asked))
        for number, (pick, access, process) in enumerate(picks) if pages else ():
            self.touch(pages[(picks[0][0] + number if pick % 2 else pick) % len(pages)], access, process)

    def store(self, page: int, asked: Page) -> None:
        token = next(self.tokens)
        self.kernel.memory[page] = token
        self.asked = {**self.asked, page: attrs.evolve(asked, content=token)}
        if asked.shared and asked.where is not None:
            self.files[asked.where] = token

    def run_access(self, page: int, access: Access, by: Attached) -> Signal | None:
        for _ in range(3):
            addr = Address(self.start + page * self.page + 16)
            if page in by.missing and page not in self.kernel.memory:
                signal = self.serve(Fault(addr, access), by)
            elif access is Access.WRITE and page in by.protected:
                signal = self.serve(Fault(addr, access, protected=True), by)
            else:
                for neighbour in self.kernel.granule_of(page) if page not in self.kernel.memory else ():
                    self.kernel.memory.setdefault(neighbour, 0)
                return None
            if signal is not None:
                return signal
            while self.readings:
                self.arrive()
        pytest.fail("the thread asks again and again")

    def serve(self, fault: Fault, by: Attached) -> Signal | None:
        resolution = self.mm.fault(fault)
        match resolution.effect:
            case Allow(ar):
                by.protected -= set(self.pages_of(ar))
            case Fill(ar, file, offset):
                vma = self.mm.vmas.find(fault.addr)
                assert vma is not None
                source = vma.file_at(ar.start)
                assert source is not None
                assert (source.file, source.offset) == (file, offset)
                self.read(vma, ar)
            case FillPattern():
                assert self.pages_of(resolution.effect.ar).start == (fault.addr - self.start) // self.page
                self.fill_pattern(resolution.effect, by)
            case ZeroFill(ar, protected):
                (page,) = self.pages_of(ar)
                if page not in self.kernel.memory:
                    self.kernel.memory[page] = 0
                    if not protected:
                        by.protected.discard(page)
        return resolution.signal

    def fill_pattern(self, effect: FillPattern, by: Attached) -> None:
        """Protect in all other processes, then fill page after page, up to one that is there."""
        for other in self.kernel.attached if effect.clean else ():
            if other is not by:
                other.protected.update(self.pages_of(effect.ar))
        for page in itertools.takewhile(lambda page: page not in self.kernel.memory, self.pages_of(effect.ar)):
            self.kernel.memory[page] = pattern(effect.refpage)
            (by.protected.add if effect.clean else by.protected.discard)(page)
            clean_pages.came(self.mm, self.ar_of(range(page, page + 1)), clean=effect.clean)
        for ar in effect.ahead:
            (page,) = self.pages_of(ar)
            assert not effect.clean
            if page not in self.kernel.memory:
                self.kernel.memory[page] = pattern(effect.refpage)
                by.protected.discard(page)
                clean_pages.came(self.mm, ar, clean=False)

    @rule(page=PAGES, process=st.integers(0, 1))
    def late_store(self, page: int, process: int) -> None:
        """A store to a protected page is decided after that has gone, perhaps."""
        if page in of_refpages(self.asked):
            fault = Fault(Address(self.start + page * self.page), Access.WRITE, protected=True)
            self.serve(fault, self.kernel.attached[process])

    @rule(page=PAGES, access=st.sampled_from(Access), process=st.integers(0, 1))
    def late_fault(self, page: int, access: Access, process: int) -> None:
        """A fault is decided after the reason for it is gone; what it has read of a file arrives when it likes."""
        self.serve(Fault(Address(self.start + page * self.page), access), self.kernel.attached[process])

    def read(self, vma: Vma, page: AddrRange) -> None:
        """Read a page and its neighbours, as far as the mapping reaches."""
        piece = AddrRange.page_at(page.start, 2 * self.page).intersect(vma.ar)
        assert piece is not None
        source = vma.file_at(piece.start)
        assert source is not None
        first = source.offset // self.page
        data = [self.kernel.in_file((int(source.file), first + n)) for n in range(piece.size // self.page)]
        self.readings.append(Reading(piece, source, data))

    @rule()
    def arrive(self) -> None:
        """What was read is installed where nothing is, if the mapping still shows it."""
        if not self.readings:
            return
        reading = self.readings.pop(0)
        vma = self.mm.vmas.find(reading.ar.start)
        if vma is None or not vma.ar.covers(reading.ar) or vma.source_at(reading.ar.start) != reading.source:
            return
        if not vma.prot & PROT_RW:
            return
        there = self.installed()
        for page, content in zip(self.pages_of(reading.ar), reading.data, strict=True):
            if page not in there:
                self.kernel.memory.setdefault(page, content)
                self.mm.filled(self.ar_of(range(page, page + 1)))

    @rule(process=st.integers(0, 1))
    def attach_anew(self, process: int) -> None:
        other = Attached(self.kernel.attached[process].scale)
        for ar, arming in self.mm.armings():
            other.arm(ar, arming)
        for run in clean_pages.clean(self.mm, self.mm.ar):
            other.protected.update(self.pages_of(run))
        assert other.missing == self.kernel.attached[process].missing
        self.kernel.attached[process] = other

    @rule(huge=st.booleans(), late=st.booleans())
    def sync(self, huge: bool, late: bool) -> None:
        """Somebody asks for the tables; ``late``: the kernel was asked before other things happened."""
        present = self.present if late else set(self.kernel.memory)
        self.told_late = present - self.kernel.memory.keys()
        dirty, clean = self.mm.dirty(self.mm.ar), clean_pages.clean(self.mm, self.mm.ar)
        self.mm.sync(
            (self.ar_of(range(page, page + 1)) for page in sorted(present)), huge=huge or self.page > PAGE_SIZE
        )
        assert (self.mm.dirty(self.mm.ar), clean_pages.clean(self.mm, self.mm.ar)) == (dirty, clean)
        self.present = set(self.kernel.memory)

    # What must hold.

    def follow(self, before: Asked, effects: list[Change]) -> None:
        """Carry the effects out; on the way, every page follows the old rule or the new one and no store is lost."""
        files = {page.where for page in before.values() if page.shared}
        for effect in effects:
            kept_out = self.pages_of(effect.ar) if isinstance(effect, Stash | WriteBack) else ()
            assert not self.kernel.storable().intersection(kept_out), "a store during the copy is lost"
            if isinstance(effect, Punch):
                new = self.kernel.storable() - writable(before)
                assert not new.intersection(self.pages_of(effect.ar)), (
                    "a store into the new mapping is freed with the old"
                )
                shown = {before[page].where for page in self.pages_of(effect.ar) if page in before} & files
                assert all(self.kernel.in_file(w) == self.files.get(w, written_first(w)) for w in shown if w)
                # A daemon that read pages of a file before they were given back must read them again.
                self.readings = [r for r in self.readings if not r.ar.overlaps(effect.ar)]
            self.kernel.carry_out(effect)
            self.check_between(before)

    def check_between(self, before: Asked) -> None:
        old, new = readable(before), readable(self.asked)
        assert self.kernel.storable() <= writable(before) | writable(self.asked)
        for by in self.kernel.attached:
            seen = self.kernel.readable(by)
            assert seen <= old | new
            for page in seen & self.kernel.memory.keys():
                may_see = {asked[page].content for asked, may in ((before, old), (self.asked, new)) if page in may}
                assert self.kernel.memory[page] in may_see
        for granule in {self.kernel.granule_of(page) for page in self.kernel.fillable()}:
            zeros_before, zeros_now = old & anonymous(before), new & anonymous(self.asked)
            assert zeros_before.issuperset(granule) or zeros_now.issuperset(granule), "zeros come where a file shows"
            assert not self.kernel.stash.keys() & set(granule), "zeros come before the contents are back"

    def installed(self) -> set[int]:
        return {page for run, _ in self.mm.table.runs(self.mm.ar) for page in self.pages_of(run)}

    def dirty(self) -> set[int]:
        return {page for run in self.mm.dirty(self.mm.ar) for page in self.pages_of(run)}

    @invariant()
    def its_own_checker_agrees(self) -> None:
        check_mm(self.mm)

    @invariant()
    def vmas_are_what_was_asked(self) -> None:
        shown = dict(self.pages_of_vmas())
        assert shown == {number: (page.prot, page.source) for number, page in self.asked.items()}
        assert self.mm.files() == {p.source.file for p in self.asked.values() if isinstance(p.source, FileSource)}

    def pages_of_vmas(self) -> Iterator[tuple[int, tuple[Prot, Source | None]]]:
        for vma in self.mm.vmas:
            for page in self.pages_of(vma.ar):
                yield page, (vma.prot, vma.source_at(Address(self.start + page * self.page)))

    @invariant()
    def a_reader_sees_the_last_store(self) -> None:
        """Were each page touched now, it would show what the model says."""
        self.check_between(self.asked)
        held = {**self.kernel.memory, **self.kernel.stash}
        assert held.keys() <= self.asked.keys()
        for number, page in self.asked.items():
            fresh = self.kernel.in_file(page.where) if page.where is not None else page.removed
            assert held.get(number, fresh) == page.content

    @invariant()
    def shared_stores_are_in_the_file_or_dirty(self) -> None:
        """And private ones are in no file."""
        dirty = {self.asked[page].where for page in self.dirty()}
        for where in self.files.keys() | self.kernel.files.keys():
            should = self.files.get(where, written_first(where))
            assert self.kernel.in_file(where) == should or where in dirty

    @invariant()
    def the_first_store_to_a_clean_page_is_seen(self) -> None:
        shared = {number for number, page in self.asked.items() if page.shared}
        assert self.dirty() <= shared & writable(self.asked) & self.kernel.memory.keys()
        assert self.kernel.storable() & shared <= self.dirty()

    @invariant()
    def clean_pages_hold_what_their_reference_page_says_and_stores_to_them_are_seen(self) -> None:
        clean = {page for run in clean_pages.clean(self.mm, self.mm.ar) for page in self.pages_of(run)}
        assert clean <= of_refpages(self.asked) & readable(self.asked)
        assert clean.isdisjoint(self.kernel.storable())
        for page in clean:
            assert self.kernel.memory[page] == self.asked[page].removed

    @invariant()
    def what_is_installed_is_there(self) -> None:
        assert self.installed() - self.kernel.memory.keys() <= self.told_late


TestHostMmFilesMachine = HostMmFilesMachine.TestCase
TestHostMmFilesMachine.settings = settings(max_examples=max(300, settings().max_examples))
