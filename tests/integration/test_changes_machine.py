"""Random changes by several real processes, against a model: after each step every process sees every page as it says.

Whether a page can be read is asked of the kernel by write(2) of one byte, which fails with EFAULT; whether it can be
stored to, of a forked child, which dies if it cannot: of one page after the other, since that takes longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

MIB, PAGE = 1 << 20, 4096
SIGBUS, SIGSEGV = 7, 11
SIZE = 4 * MIB
PAGES = [0, 1, 2, 3, 255, 510, 511, 512, 513, 514, 800, 1020, 1022, 1023]
"""The pages that are looked at: those at borders of tables and of the region, and some beside them."""
NOTHING = -1

LOOKING = """
for number in (signal.SIGBUS, signal.SIGSEGV): signal.signal(number, lambda *_: None)
out_end, in_end = os.pipe()
def look_at(page):
    try: os.write(in_end, r.buf[page * PAGE:page * PAGE + 1])
    except OSError as error: assert error.errno == errno.EFAULT, error; return -1
    return os.read(out_end, 1)[0]
def store_same(page):
    value = look_at(page)
    for number in (signal.SIGBUS, signal.SIGSEGV): signal.signal(number, signal.SIG_DFL)
    ctypes.memset(r.address + page * PAGE, value, 1)
def may_store(page): return fork(f'store_same({page})')
"""


@pytest.fixture
def processes(client: Callable[..., Client]) -> list[Client]:
    """Two that change, one of them with its window elsewhere, and one that only reads."""
    several = [client() for _ in range(3)]
    for c in several:
        c.do(LOOKING)
    return several


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """First page and number of pages."""
    one, other = sorted((draw(st.sampled_from(PAGES)), draw(st.sampled_from(PAGES))))
    return one, other - one + 1


class Machine(RuleBasedStateMachine):
    """What each page is: its protection, its contents, and what they are when its memory is given back; or nothing.

    ``clients`` and ``regions`` are set by the test.
    """

    clients: list[Client]
    names: Iterator[str]

    @initialize(backing=st.sampled_from(["thp", "4k"]), empty=st.booleans())
    def create(self, backing: str, empty: bool) -> None:
        name = next(self.names)
        self.steps = 0
        self.pages: dict[int, tuple[int, int, int]] = {} if empty else dict.fromkeys(range(SIZE // PAGE), (3, 0, 0))
        how = f"None, {SIZE}, CREATE, backing={backing!r}, empty={empty}"
        for c, arguments in zip(self.clients, (how, "0x6000_0000_0000, 0, RW", "0x6100_0000_0000, 0, RO"), strict=True):
            c.do(f"name = {name!r}; r = mshare.mshare(name, {arguments})")

    def run(self, who: int, call: str, refused: bool) -> bool:
        """Make a call in one of the two; whether it was to succeed."""
        if refused:
            assert self.clients[who].error_of(call).kind in ("OSError", "PermissionError", "FileExistsError")
        else:
            self.clients[who].do(call)
        return not refused

    @rule(
        who=st.integers(0, 1),
        span=spans(),
        prot=st.sampled_from([0, 1, 3, 3]),
        flag=st.sampled_from([0x10, 0x10, 0x100000]),
        shows=st.sampled_from([0, 0xAA, 0xBB]),
    )
    def mmap(self, who: int, span: tuple[int, int], prot: int, flag: int, shows: int) -> None:
        """Zeros, or a reference page."""
        first, count = span
        taken = flag != 0x10 and any(page in self.pages for page in range(first, first + count))
        what = f"0x400022 | {flag}, refpage=mshare.refpage_create(bytes([{shows}]))" if shows else f"0x21 | {flag}"
        if self.run(who, f"r.mmap({count * PAGE}, {prot}, {what}, offset={first * PAGE})", taken):
            self.pages.update(dict.fromkeys(range(first, first + count), (prot, shows, shows)))

    @rule(who=st.integers(0, 1), span=spans())
    def munmap(self, who: int, span: tuple[int, int]) -> None:
        first, count = span
        self.run(who, f"r.munmap({first * PAGE}, {count * PAGE})", refused=False)
        for page in range(first, first + count):
            self.pages.pop(page, None)

    @rule(who=st.integers(0, 1), span=spans(), prot=st.sampled_from([0, 1, 3]))
    def mprotect(self, who: int, span: tuple[int, int], prot: int) -> None:
        first, count = span
        holes = any(page not in self.pages for page in range(first, first + count))
        if self.run(who, f"r.mprotect({first * PAGE}, {count * PAGE}, {prot})", holes):
            self.pages.update({page: (prot, *self.pages[page][1:]) for page in range(first, first + count)})

    @rule(who=st.integers(0, 1), span=spans())
    def remove(self, who: int, span: tuple[int, int]) -> None:
        first, count = span
        refused = any(self.prot(page) != 3 for page in range(first, first + count))
        if self.run(who, f"r.madvise({first * PAGE}, {count * PAGE}, mmap.MADV_REMOVE)", refused):
            removed = {page: self.pages[page][2] for page in range(first, first + count)}
            self.pages.update({page: (3, shows, shows) for page, shows in removed.items()})

    @rule(who=st.integers(0, 1), span=spans())
    def give_back_what_was_only_read(self, who: int, span: tuple[int, int]) -> None:
        first, count = span
        refused = any(page not in self.pages for page in range(first, first + count))
        self.run(who, f"r.madvise({first * PAGE}, {count * PAGE}, 20)", refused)

    @rule(who=st.integers(0, 1), page=st.sampled_from(PAGES), value=st.integers(1, 255))
    def store(self, who: int, page: int, value: int) -> None:
        if self.prot(page) == 3:
            self.clients[who].do(f"r.buf[{page * PAGE}] = {value}")
            self.pages[page] = (3, value, self.pages[page][2])

    @invariant()
    def everybody_sees_the_same(self) -> None:
        self.steps += 1
        stored_to = PAGES[self.steps % len(PAGES)]
        for c in self.clients:
            c.send(ask=f"([look_at(page) for page in {PAGES}], may_store({stored_to}))")
        for c in self.clients:
            seen, status = c.receive()
            assert seen == [self.pages[page][1] if self.prot(page) else NOTHING for page in PAGES]
            if c is not self.clients[2]:
                assert status in self.expected(stored_to)

    def expected(self, page: int) -> set[int]:
        """What a store may come to. Where a system call has failed on hidden memory, a later touch is a SIGBUS too."""
        if page not in self.pages:
            return {-SIGBUS}
        return {0: {-SIGSEGV, -SIGBUS}, 1: {-SIGSEGV}, 3: {0}}[self.prot(page)]

    def prot(self, page: int) -> int:
        return self.pages[page][0] if page in self.pages else 0

    def teardown(self) -> None:
        for c in self.clients[1:]:
            c.do("r.detach()")
        self.clients[0].do("mshare.mshare_unlink(name)")


@pytest.mark.timeout(600)
def test_random_changes(daemon: Daemon, processes: list[Client], name: str) -> None:
    deep = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
    Machine.clients = processes
    Machine.names = (f"{name}-{number}" for number in range(1 << 30))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=1000 if deep else 25,
            stateful_step_count=40 if deep else 20,
            deadline=None,
            database=None,
            derandomize=os.environ.get("CI") == "true",
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if deep else [Phase.generate],
        ),
    )
    assert daemon.process.poll() is None
