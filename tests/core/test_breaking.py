"""How much of what forks have in common is copied at once."""

from __future__ import annotations

import random
from collections.abc import Iterable

import attrs
import pytest

from msharefs import forking
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.effects import Allow, Bring, Copy, Preserve
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_lineage, check_mm
from msharefs.perms import Access, Advice, Prot
from msharefs.vma import FileId, FileSource

START = 1 << 45
PAGES = 512
BEGUN = (7, 100, 200, 300)
SIZE = 2 * PAGES
"""Pages of the region, all of them present: two leaf tables."""


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(START + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def numbers(ar: AddrRange) -> range:
    return range((ar.start - START) // PAGE_SIZE, (ar.end - START) // PAGE_SIZE)


def region(granule: int = PAGE_SIZE, size: int = SIZE) -> HostMm:
    mm = HostMm(pages(0, size), granule=granule)
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    mm.sync([mm.ar], huge=granule > PAGE_SIZE)
    return mm


def fork(mm: HostMm) -> HostMm:
    for member in mm.lineage.members.values():
        forking.shield(member)
    return forking.fork(mm)


@attrs.define
class Process:
    """One that touches pages of a region: which of them are protected there, or missing, and what was copied for it."""

    mm: HostMm
    protected: set[int] = attrs.Factory(lambda: set(range(SIZE)))
    missing: set[int] = attrs.Factory(set)
    copied: list[list[Copy]] = attrs.Factory(list)

    @classmethod
    def of_twin(cls, mm: HostMm) -> Process:
        return cls(mm, protected=set(), missing=set(numbers(mm.ar)))

    def store(self, number: int, *, alone: bool = False) -> list[int]:
        """Store to a page: what had to be copied for that."""
        return self._touch(number, Access.WRITE, alone=alone)

    def load(self, number: int, *, alone: bool = False) -> list[int]:
        return self._touch(number, Access.READ, alone=alone)

    def _touch(self, number: int, access: Access, *, alone: bool) -> list[int]:
        made: list[Copy] = []
        for _ in range(3):
            protected = number not in self.missing
            if protected and not (access is Access.WRITE and number in self.protected):
                break
            fault = Fault(Address(pages(number, number + 1).start + 100), access, protected, alone)
            effect = self.mm.fault(fault).effect
            if isinstance(effect, Preserve | Bring):
                for copy in effect.copies:
                    forking.copied(self.mm, copy)
                    made.append(copy)
                    if isinstance(effect, Bring):
                        self.missing.difference_update(numbers(copy.ar))
            else:
                assert isinstance(effect, Allow)
                self.protected.difference_update(numbers(effect.ar))
        else:
            raise AssertionError("it asks again and again")
        if made:
            self.copied.append(made)
            for member in self.mm.lineage.members.values():
                check_mm(member)
            check_lineage(self.mm.lineage)
        return [page for copy in made for page in numbers(copy.ar)]

    @property
    def faults(self) -> int:
        """Touches that had something copied."""
        return len(self.copied)

    def each_copied_once(self, wanted: Iterable[int]) -> bool:
        found = [page for copies in self.copied for copy in copies for page in numbers(copy.ar)]
        return sorted(found) == sorted(wanted)


SIDES = pytest.mark.parametrize("side", ["older", "newer"])


def process(side: str, granule: int = PAGE_SIZE) -> Process:
    """One of an origin, or of its twin."""
    mm = region(granule)
    twin = fork(mm)
    return Process(mm) if side == "older" else Process.of_twin(twin)


def begun(side: str, granule: int = PAGE_SIZE) -> Process:
    """One that has touched four pages of the first leaf table."""
    by = process(side, granule)
    for number in BEGUN:
        assert touch(by, number) == [number]
    return by


def touch(by: Process, number: int) -> list[int]:
    return by.load(number) if by.missing else by.store(number)


@SIDES
@pytest.mark.parametrize("granule", [PAGE_SIZE, PMD_SIZE])
class TestOnTheirOwn:
    """Nobody can know yet that more will be wanted."""

    def test_the_first_pages_of_each_leaf_table(self, side: str, granule: int) -> None:
        by = process(side, granule)
        places = [7, PAGES, 8, 9, PAGES + 1, 5, PAGES + 2, PAGES - 1, PAGES + 3]
        assert [touch(by, number) for number in places if number != PAGES - 1] == [
            [number] for number in places if number != PAGES - 1
        ]

    def test_one_for_which_that_was_asked(self, side: str, granule: int) -> None:
        by = begun(side, granule)
        assert (by.load if by.missing else by.store)(8, alone=True) == [8]

    def test_of_what_is_touched_at_random(self, side: str, granule: int) -> None:
        by = process(side, granule)
        for vma in by.mm.vmas:
            by.mm.madvise_reading(vma.ar, Advice.RANDOM)
        assert [touch(by, number) for number in range(7, 20)] == [[number] for number in range(7, 20)]


@SIDES
class TestTogether:
    """What was touched before says what else will be."""

    def test_the_second_of_a_neighbourhood_brings_the_rest(self, side: str) -> None:
        assert touch(begun(side), 12) == [*range(7), *range(8, 16)]

    def test_what_lies_apart_brings_nothing(self, side: str) -> None:
        by = begun(side)
        places = [48, 144, 240, 336, 368, 400, 432, 464]
        assert [touch(by, number) for number in places] == [[number] for number in places]

    def test_what_borders_on_another_brings_its_neighbourhood(self, side: str) -> None:
        up, down = begun(side), begun(side)
        assert [touch(up, number) for number in (31, 32)] == [[31], list(range(32, 48))]
        assert [touch(down, number) for number in (64, 63)] == [[64], list(range(48, 64))]

    def test_the_more_are_touched_the_more_come(self, side: str) -> None:
        by = begun(side)
        for number in (32, 64, 144, 176, 232, 264, 336, 368, 400, 432, 464):
            assert touch(by, number) == [number]
        assert touch(by, 130) == [number for number in range(128, 256) if number not in (144, 176, 200, 232)]

    def test_where_memory_is_huge_the_fifth_brings_all(self, side: str) -> None:
        by = begun(side, PMD_SIZE)
        assert touch(by, 130) == [number for number in range(PAGES) if number not in BEGUN]

    @pytest.mark.parametrize(("granule", "most"), [(PAGE_SIZE, 24), (PMD_SIZE, 5)])
    @pytest.mark.parametrize("order", ["up", "down", "random"])
    def test_all_of_a_leaf_table_takes_few_faults(self, side: str, granule: int, most: int, order: str) -> None:
        by = process(side, granule)
        wanted = list(range(PAGES))
        if order == "random":
            random.Random(1).shuffle(wanted)
        for number in reversed(wanted) if order == "down" else wanted:
            touch(by, number)
        assert by.faults <= most
        assert by.each_copied_once(range(PAGES))

    @pytest.mark.parametrize(("granule", "faults"), [(PAGE_SIZE, [18, *[4] * 11, 2, 1]), (PMD_SIZE, [5, 1, 1])])
    def test_in_order_it_takes_ever_fewer(self, side: str, granule: int, faults: list[int]) -> None:
        mm = region(granule, len(faults) * PAGES)
        twin = fork(mm)
        by = Process(mm, protected=set(numbers(mm.ar))) if side == "older" else Process.of_twin(twin)
        for number in numbers(mm.ar):
            touch(by, number)
        found = [numbers(copies[0].ar).start // PAGES for copies in by.copied]
        assert [found.count(leaf) for leaf in range(len(faults))] == faults
        assert by.each_copied_once(numbers(mm.ar))

    def test_two_that_go_on_in_different_places_do_not_disturb_each_other(self, side: str) -> None:
        mm = region(PMD_SIZE, 8 * PAGES)
        twin = fork(mm)
        by = Process(mm, protected=set(numbers(mm.ar))) if side == "older" else Process.of_twin(twin)
        for number in range(4 * PAGES):
            touch(by, number)
            touch(by, number + 4 * PAGES)
        assert by.faults == 2 * (5 + 3)

    def test_all_at_once_where_that_was_advised(self, side: str) -> None:
        by = process(side)
        by.mm.madvise_reading(pages(3, SIZE), Advice.SEQUENTIAL)
        assert touch(by, 7) == list(range(3, PAGES))

    def test_no_more_than_the_mapping_has(self, side: str) -> None:
        by = process(side)
        by.mm.mprotect(pages(10, 12), Prot.READ)
        by.mm.mprotect(pages(10, 12), Prot.READ | Prot.WRITE)
        by.mm.madvise_reading(pages(10, 12), Advice.SEQUENTIAL)
        assert touch(by, 11) == [10, 11]


class TestStores:
    """Of the older side."""

    @pytest.fixture
    def by(self) -> Process:
        """One that has had a neighbourhood copied."""
        by = begun("older")
        by.store(12)
        return by

    def test_what_has_come_along_may_be_stored_to(self, by: Process) -> None:
        assert by.protected == set(range(16, SIZE)).difference(BEGUN)

    def test_by_other_processes_after_one_touch(self, by: Process) -> None:
        other = Process(by.mm)
        assert other.store(3) == []
        assert other.protected == set(range(16, SIZE))

    def test_and_no_page_beyond_one_that_is_gone(self, by: Process) -> None:
        by.mm.madvise_remove(pages(4, 6))
        other = Process(by.mm)
        other.store(3)
        assert other.protected == set(range(4, SIZE))

    def test_not_in_what_may_only_be_read(self) -> None:
        """Whose pages are preserved, too, before they go."""
        by = process("older")
        by.mm.mprotect(pages(0, 16), Prot.READ)
        for copy in forking.to_preserve(by.mm, pages(0, 16)):
            forking.copied(by.mm, copy)
        check_mm(by.mm)

    def test_the_next_fork_sees_all_of_it_again(self, by: Process) -> None:
        protected = [each.ar for each in forking.shield(by.mm)]
        assert protected == [pages(0, 16), *(pages(number, number + 1) for number in BEGUN[1:])]
        forking.fork(by.mm)
        assert Process(by.mm).store(12) == [12]

    def test_what_was_touched_before_a_fork_says_nothing_after_it(self) -> None:
        by = process("older")
        for number in range(PAGES):
            by.store(number)
        fork(by.mm)
        again = Process(by.mm)
        assert [again.store(number) for number in (7, 100)] == [[7], [100]]


def test_pages_of_a_private_file_come_along_too() -> None:
    mm = region()
    source = FileSource(FileId(1), 0, shared=False, writable=True)
    mm.mmap(pages(0, 16), 16 * PAGE_SIZE, fixed=True, replace=True, source=source)
    mm.filled(pages(0, 10))
    by = Process.of_twin(fork(mm))
    assert [by.load(number) for number in (7, 100, 101, 102)] == [[7], [100], [101], [102]]
    assert by.load(8) == [*range(7), 8, 9]


def test_what_lies_with_several_relatives_comes_from_each() -> None:
    mm = region()
    middle = fork(mm)
    for copy in forking.to_bring(middle, pages(4, 6)):
        forking.copied(middle, copy)
    by = Process.of_twin(fork(middle))
    for number in BEGUN:
        by.load(number)
    by.load(8)
    assert [(copy.source, list(numbers(copy.ar))) for copy in by.copied[-1]] == [
        (mm.store, [0, 1, 2, 3]),
        (middle.store, [4, 5]),
        (mm.store, [6]),
        (mm.store, list(range(8, 16))),
    ]


def test_pages_of_2_mib_come_one_by_one() -> None:
    mm = HostMm(AddrRange.sized(START, 4 * PMD_SIZE), page=PMD_SIZE, granule=PMD_SIZE)
    mm.mmap(mm.ar, mm.ar.size, fixed=True)
    mm.sync([mm.ar], huge=True)
    twin = fork(mm)
    for number in range(3):
        addr = Address(START + number * PMD_SIZE)
        effect = twin.fault(Fault(addr, Access.READ)).effect
        assert effect == Bring((Copy(AddrRange.sized(addr, PMD_SIZE), mm.store, twin.store),))
        forking.copied(twin, effect.copies[0])
