"""A daemon that is killed again and again, and random calls of two processes, of which none may fail for that.

What each comes to is worked out beside: after every death all pages of all regions must be as the calls explain.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
from conftest import PATIENCE, Client, Daemon

_MOST_REGIONS = 4
_AT_A_POINT = 0.75
_MOMENTS = 0.02, 0.7
"""How many deaths are at a point, and when the others are, in seconds after the start."""

_HELPERS = """
import zlib
import mshare.connection
mshare.connection.PATIENCE = 60  # Several die one after the other, before they are ready.
from mmap import *
R = {}
def sums(number, pages):
    "Checksums of whole pages."
    return [zlib.crc32(R[number].buf[page * UNIT : (page + 1) * UNIT]) for page in pages]
def put(number, page, value):
    "Fill a page."
    R[number].buf[page * UNIT : (page + 1) * UNIT] = bytes([value]) * UNIT
"""


class Lives:
    """A daemon that is killed and started again as often as it takes."""

    def __init__(self, daemon: Daemon, seed: int, *options: str) -> None:
        self.daemon = daemon
        self.random = random.Random(seed)
        self._options = options
        self.deaths = 0
        self._zygote = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=daemon.log_file,
            text=True,
        )
        self._pidfd = -1

    def start(self) -> None:
        """The next one; it may be killed before it is ready."""
        at = self.random.choice((self.random.randint(1, 12), self.random.randint(1, 60), self.random.randint(1, 250)))
        at_a_point = self.random.random() < _AT_A_POINT
        self._until = math.inf if at_a_point else time.monotonic() + self.random.uniform(*_MOMENTS)
        arguments = ["--mount", str(self.daemon.mount), "--state-dir", str(self.daemon.state), *self._options]
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        env = {"MSHARED_KILL_AT": str(at)} if at_a_point else {}
        self._zygote.stdin.write(json.dumps([arguments, env]) + "\n")
        self._zygote.stdin.flush()
        self.pid = int(self._zygote.stdout.readline())
        self._pidfd = os.pidfd_open(self.pid)

    def restart_if_dead(self) -> bool:
        """Whether it had died."""
        if time.monotonic() > self._until:
            self.kill()
        if not select.select([self._pidfd], [], [], 0)[0]:
            return False
        os.close(self._pidfd)
        self.deaths += 1
        self.start()
        return True

    def kill(self) -> None:
        """At this moment."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        select.select([self._pidfd], [], [], PATIENCE)

    def close(self) -> None:
        """End it, and what starts it."""
        self.kill()
        os.close(self._pidfd)
        self._zygote.stdin.close()  # type: ignore[union-attr]
        self._zygote.wait(PATIENCE)
        self._zygote.stdout.close()  # type: ignore[union-attr]


@attrs.define(eq=False)
class Model:
    """A region: protection and contents of each page in use that is mapped, and which show a file."""

    number: int
    pages: dict[int, tuple[int, int]]
    files: set[int] = attrs.Factory(set)

    def prot(self, page: int) -> int:
        return self.pages.get(page, (0, 0))[0]


class Workload:
    """Random calls by two processes, and what must be seen after each.

    ``page`` is the size of pages in bytes, and ``places`` are those of a region that are used, in order, a region being
    ``size`` bytes. ``backings`` are those that regions are made with. Private mappings show ``file``.
    """

    page = 4096
    places: Sequence[int] = (0, 1, 2, 3, 510, 511, 512, 513)
    """The first pages, and those around the border of 2 MiB."""
    size = 4 << 20
    backings: Sequence[str] = ("thp", "4k")
    kinds: Sequence[str] = (
        *["store"] * 6,
        *["mprotect"] * 3,
        *["mmap", "munmap", "remove", "mmap_file", "fork", "fork_process", "end"],
    )

    def __init__(self, lives: Lives, clients: list[Client], name: str, file: Path) -> None:
        self.lives, self.clients, self.name = lives, clients, name
        self.random = lives.random
        self.regions: list[Model] = []
        self.made = 0
        self.history: list[str] = []
        file.write_bytes(b"".join(bytes([100 + page % 100]) * self.page for page in range(self.places[-1] + 1)))
        for c in clients:
            c.do(f"UNIT = {self.page}\n{_HELPERS}\nf = open({str(file)!r}, 'rb'); connect(find_mount()).reach()")

    def run(self, deaths: int) -> None:
        """Until it has died so often."""
        self.lives.daemon.kill()
        self.lives.start()
        checked = 0
        while self.lives.deaths < deaths:
            self.step()
            if self.lives.deaths > checked:
                self.check()
                checked = self.lives.deaths

    def do(self, who: int, code: str) -> None:
        """Have a process carry something out, whatever the daemon dies of meanwhile."""
        self.history.append(f"{self.lives.deaths} {who}: {code}")
        self._wait(self.clients[who], do=code)

    def ask(self, who: int, code: str) -> object:
        return self._wait(self.clients[who], ask=code)

    def _wait(self, c: Client, **request: str) -> object:
        c.send(**request)
        until = time.monotonic() + 3 * PATIENCE
        while not c.answers(0.002):
            self.lives.restart_if_dead()
            assert time.monotonic() < until, f"hangs: {request}, after {self.lives.deaths} deaths\n{c.stacks()}"
        return c.receive()

    def create(self, backing: str) -> None:
        number = self._next()
        how = f"'{self.name}-{number}', {self._address(0, number)}, {self.size}, CREATE, backing={backing!r}"
        self.do(0, f"R[{number}] = mshare.mshare({how})")
        self._attach(1, number)
        self.regions.append(Model(number, dict.fromkeys(self.places, (3, 0))))

    def _next(self) -> int:
        self.made += 1
        return self.made

    def _address(self, who: int, number: int) -> int:
        return (0x5000_0000_0000, 0x6000_0000_0000)[who] + number * self.size

    def _attach(self, who: int, number: int) -> None:
        self.do(who, f"R[{number}] = mshare.mshare('{self.name}-{number}', {self._address(who, number)}, 0, RW)")

    def step(self) -> None:
        if not self.regions:
            self.create(self.random.choice(self.backings))
        region, who = self.random.choice(self.regions), self.random.randrange(2)
        getattr(self, self.random.choice(self.kinds))(region, who)

    def store(self, region: Model, who: int) -> None:
        page, value = self.random.choice(self.places), self.random.randint(1, 255)
        if region.prot(page) == 3:
            self.do(who, f"put({region.number}, {page}, {value})")
            region.pages[page] = (3, value)

    def _span(self) -> tuple[int, int, list[int]]:
        one, other = sorted(self.random.choices(self.places, k=2))
        return one, other - one + 1, [page for page in self.places if one <= page <= other]

    def mprotect(self, region: Model, who: int) -> None:
        first, count, pages = self._span()
        prot = self.random.choice([0, 1, 3])
        if all(page in region.pages for page in pages) and not (first <= 3 and first + count > 4):
            self.do(who, f"R[{region.number}].mprotect({first * self.page}, {count * self.page}, {prot})")
            region.pages.update({page: (prot, region.pages[page][1]) for page in pages})

    def mmap(self, region: Model, who: int) -> None:
        first, count, pages = self._span()
        prot = self.random.choice([1, 3])
        self.do(who, f"R[{region.number}].mmap({count * self.page}, {prot}, 0x31, offset={first * self.page})")
        region.pages.update(dict.fromkeys(pages, (prot, 0)))
        region.files.difference_update(pages)

    def munmap(self, region: Model, who: int) -> None:
        first, count, pages = self._span()
        self.do(who, f"R[{region.number}].munmap({first * self.page}, {count * self.page})")
        for page in pages:
            region.pages.pop(page, None)
        region.files.difference_update(pages)

    def remove(self, region: Model, who: int) -> None:
        page = self.random.choice(self.places)
        if region.prot(page) == 3 and page not in region.files:
            self.do(who, f"R[{region.number}].madvise({page * self.page}, {self.page}, MADV_REMOVE)")
            region.pages[page] = (3, 0)

    def mmap_file(self, region: Model, who: int) -> None:
        first, count, pages = self._span()
        call = f"mmap({count * self.page}, 3, 0x12, offset={first * self.page}, fd=f.fileno())"
        self.do(who, f"R[{region.number}].{call}")
        region.pages.update({page: (3, 100 + (page - first) % 100) for page in pages})
        region.files.update(pages)

    def fork(self, region: Model, who: int) -> None:
        if len(self.regions) < _MOST_REGIONS:
            number = self._next()
            self.do(who, f"R[{region.number}].fork('{self.name}-{number}')")
            for each in (0, 1):
                self._attach(each, number)
            self.regions.append(Model(number, dict(region.pages), set(region.files)))

    def fork_process(self, region: Model, who: int) -> None:
        """A child stores to a page, and ends."""
        page = self.random.choice(self.places)
        if region.prot(page) == 3:
            assert self.ask(who, f"fork('put({region.number}, {page}, 77)')") == 0
            region.pages[page] = (3, 77)

    def end(self, region: Model, who: int) -> None:
        if len(self.regions) > 1:
            self.regions.remove(region)
            for each in (who, 1 - who):
                self.do(each, f"mshare.mshare_unlink('{self.name}-{region.number}'); del R[{region.number}]")

    def check(self) -> None:
        """Every page of every region as a whole, in both processes."""
        for region in self.regions:
            pages = [page for page in self.places if region.prot(page)]
            expected = [zlib.crc32(bytes([region.pages[page][1]]) * self.page) for page in pages]
            for who in (0, 1):
                seen = self.ask(who, f"sums({region.number}, {pages})")
                assert seen == expected, (who, region, self.lives.deaths, self.history[-40:])


@contextlib.contextmanager
def living(daemon: Daemon, *options: str) -> Iterator[Lives]:
    """Its lives, in an order that KILL_SEED repeats. In the end it lives as any daemon does."""
    seed = int(os.environ.get("KILL_SEED", "0")) or random.randrange(1 << 30)
    sys.stdout.write(f"KILL_SEED={seed}\n")  # Shown when it fails.
    lives = Lives(daemon, seed, *options)
    try:
        yield lives
    finally:
        lives.close()
        daemon.restart()
