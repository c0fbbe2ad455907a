"""Random forks, stores, changes and ends by two real processes, against a model of which region has what where.

What is looked at a twin fetches, and never asks for again: so each step looks at one page of each region, and only the
end of a run at all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import attrs
import pytest
from conftest import Client, Daemon
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twins import files_of_regions

MIB, PAGE = 1 << 20, 4096
SIZE = 4 * MIB
PAGES = [0, 1, 2, 3, 255, 510, 511, 512, 513, 514, 800, 1020, 1022, 1023]
"""The pages that are looked at and stored to: those at borders of tables and of the region, and some beside them."""
FIXED = 0x10
MOST_REGIONS = 7

FILES = """
import tempfile
file = tempfile.TemporaryFile()
for page in range(1024): file.write(bytes([100 + page % 100]) * PAGE)
file.flush()
R = {}
"""


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """First page and number of pages."""
    one, other = sorted((draw(st.sampled_from(PAGES)), draw(st.sampled_from(PAGES))))
    return one, other - one + 1


@attrs.define(eq=False)
class Model:
    """A region: protection and contents of each page that is mapped."""

    number: int
    pages: dict[int, tuple[int, int]]

    def fork(self, number: int) -> Model:
        return Model(number, dict(self.pages))

    def prot(self, page: int) -> int:
        return self.pages.get(page, (0, 0))[0]


class Machine(RuleBasedStateMachine):
    """The regions of one family. ``clients`` and ``names`` are set by the test."""

    clients: list[Client]
    names: Iterator[str]
    regions = Bundle("regions")

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Model] = []
        self.made = self.steps = 0

    @initialize(target=regions, backing=st.sampled_from(["thp", "4k"]))
    def create(self, backing: str) -> Model:
        self.name = next(self.names)
        self.clients[0].do(f"mshare.mshare({self.name + '-0'!r}, None, {SIZE}, CREATE, backing={backing!r}).detach()")
        return self.enter(Model(0, dict.fromkeys(range(SIZE // PAGE), (3, 0))))

    def enter(self, region: Model) -> Model:
        """Have both processes attached, the second elsewhere."""
        self.made += 1
        self.alive.append(region)
        for c, base in zip(self.clients, (0x5000_0000_0000, 0x6000_0000_0000), strict=True):
            address = base + region.number * SIZE
            c.do(f"R[{region.number}] = mshare.mshare('{self.name}-{region.number}', {address}, 0, RW)")
        return region

    @precondition(lambda self: len(self.alive) < MOST_REGIONS)
    @rule(target=regions, who=st.integers(0, 1), origin=regions)
    def fork(self, who: int, origin: Model) -> Model:
        self.clients[who].do(f"R[{origin.number}].fork('{self.name}-{self.made}')")
        return self.enter(origin.fork(self.made))

    @precondition(lambda self: len(self.alive) > 1)
    @rule(target=regions, region=consumes(regions), two=st.booleans())
    def end(self, region: Model, two: bool) -> object:
        if len(self.alive) == 1:
            return region  # There must be one to go on with.
        self.alive.remove(region)
        for c in self.clients if two else reversed(self.clients):
            c.do(f"mshare.mshare_unlink('{self.name}-{region.number}'); del R[{region.number}]")
        return multiple()

    @rule(who=st.integers(0, 1), region=regions, page=st.sampled_from(PAGES), value=st.integers(1, 99))
    def store(self, who: int, region: Model, page: int, value: int) -> None:
        if region.prot(page) == 3:
            self.clients[who].do(f"R[{region.number}].buf[{page * PAGE}] = {value}")
            region.pages[page] = (3, value)

    @rule(who=st.integers(0, 1), region=regions, span=spans())
    def munmap(self, who: int, region: Model, span: tuple[int, int]) -> None:
        first, count = span
        self.clients[who].do(f"R[{region.number}].munmap({first * PAGE}, {count * PAGE})")
        for page in range(first, first + count):
            region.pages.pop(page, None)

    @rule(who=st.integers(0, 1), region=regions, span=spans(), prot=st.sampled_from([0, 1, 3]))
    def mmap(self, who: int, region: Model, span: tuple[int, int], prot: int) -> None:
        first, count = span
        call = f"mmap({count * PAGE}, {prot}, {0x21 | FIXED}, offset={first * PAGE})"
        self.clients[who].do(f"R[{region.number}].{call}")
        region.pages.update(dict.fromkeys(range(first, first + count), (prot, 0)))

    @rule(who=st.integers(0, 1), region=regions, span=spans(), prot=st.sampled_from([1, 3]))
    def mmap_file(self, who: int, region: Model, span: tuple[int, int], prot: int) -> None:
        first, count = span
        call = f"mmap({count * PAGE}, {prot}, {0x2 | FIXED}, offset={first * PAGE}, fd=file.fileno())"
        self.clients[who].do(f"R[{region.number}].{call}")
        region.pages.update({first + number: (prot, 100 + number % 100) for number in range(count)})

    @rule(who=st.integers(0, 1), region=regions, span=spans(), prot=st.sampled_from([0, 1, 3]))
    def mprotect(self, who: int, region: Model, span: tuple[int, int], prot: int) -> None:
        first, count = span
        if all(page in region.pages for page in range(first, first + count)):
            self.clients[who].do(f"R[{region.number}].mprotect({first * PAGE}, {count * PAGE}, {prot})")
            region.pages.update({page: (prot, region.pages[page][1]) for page in range(first, first + count)})

    @rule(who=st.integers(0, 1), region=regions, span=spans())
    def stat(self, who: int, region: Model, span: tuple[int, int]) -> None:
        """It brings the tables up to date, of which forks are made."""
        del span
        self.clients[who].do(f"R[{region.number}].stat()")

    @invariant()
    def each_has_its_own(self) -> None:
        self.steps += 1
        page = PAGES[self.steps % len(PAGES)]
        for region in self.alive:
            if region.prot(page):
                seen = self.clients[self.steps % 2].ask(f"R[{region.number}].buf[{page * PAGE}]")
                assert seen == region.pages[page][1], (region.number, page)

    def teardown(self) -> None:
        for region in self.alive:
            pages = [page for page in PAGES if region.prot(page)]
            for c in self.clients:
                seen = c.ask(f"[R[{region.number}].buf[page * PAGE] for page in {pages}]")
                assert dict(zip(pages, seen, strict=True)) == {page: region.pages[page][1] for page in pages}
        for region in self.alive:
            for c in self.clients:
                c.do(f"mshare.mshare_unlink('{self.name}-{region.number}')")


@pytest.mark.timeout(600)
def test_random_forks(daemon: Daemon, client: Callable[..., Client], name: str) -> None:
    deep = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
    Machine.clients = [client(), client()]
    for c in Machine.clients:
        c.do(FILES)
    Machine.names = (f"{name}-{number}" for number in range(1 << 30))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=1000 if deep else 25,
            stateful_step_count=60 if deep else 30,
            deadline=None,
            database=None,
            derandomize=os.environ.get("CI") == "true",
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if deep else [Phase.generate],
        ),
    )
    assert daemon.process.poll() is None
    assert files_of_regions(daemon.state) == []
