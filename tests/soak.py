"""A soak: many processes do all there is to do with regions, for as long as is wanted, and check what they find.

    .venv/bin/python tests/soak.py --seconds 3600 --processes 50

Starts a daemon and a mount of its own, as root, and leaves nothing. Prints what was done, how long it took, how many
faults the daemon served, and what went wrong. Exit status: 0 nothing did, 1 something did.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs
from conftest import Daemon

import mshare
from msharefs.addr import PAGE_SIZE as PAGE

MIB = 1 << 20
REGIONS = 4
SLOT = 16
"""Pages of each shared region that belong to one worker."""
LIFE = 1 / 200
"""How likely a worker is killed rather than going on."""


@attrs.define
class Worker:
    """One process: what it has stored, how often it did what, and how long that took."""

    index: int
    random: random.Random
    took: dict[str, list[float]] = attrs.Factory(lambda: collections.defaultdict(list))
    stored: dict[tuple[int, int], int] = attrs.Factory(dict)
    regions: list[mshare.Region] = attrs.Factory(list)

    def run(self, until: float) -> None:
        """Do things until then. Raises AssertionError when something is not what it should be."""
        self.regions = [mshare.mshare(f"soak-{n}", None, 0, os.O_RDWR) for n in range(REGIONS)]
        for n, region in enumerate(self.regions):
            for page in range(SLOT):
                self.stored[n, page] = self._word(region, page)
        acts = [self.store] * 40 + [self.attach] * 10 + [self.child] * 4 + [self.protect] * 10
        acts += [self.own] * 8 + [self.file] * 8 + [self.twin] * 2 + [self.snapshot] * 2
        while time.monotonic() < until:
            act = self.random.choice(acts)
            start = time.monotonic()
            act()
            self.took[act.__name__].append(time.monotonic() - start)
            if self.random.random() < LIFE:
                os.kill(os.getpid(), signal.SIGKILL)

    def at(self, page: int) -> int:
        """Where its page of that number is, in every shared region."""
        return (self.index * SLOT + page) * PAGE

    def _word(self, region: mshare.Region, page: int) -> int:
        value = int(region.buf[self.at(page) : self.at(page) + 8].cast("Q")[0])
        assert value == 0 or value >> 32 == self.index + 1, f"{value:#x} is none of worker {self.index}'s"
        return value

    def _pick(self) -> tuple[int, int]:
        return self.random.randrange(REGIONS), self.random.randrange(SLOT)

    def store(self) -> None:
        """A new value, and those of before are still there."""
        n, page = self._pick()
        value = (self.index + 1) << 32 | (self.stored[n, page] + 1) & 0xFFFFFFFF
        self.regions[n].buf[self.at(page) : self.at(page) + 8].cast("Q")[0] = value
        self.stored[n, page] = value
        self.check(self.regions)

    def check(self, regions: list[mshare.Region]) -> None:
        """Every word is what was stored last."""
        for (n, page), value in self.stored.items():
            found = self._word(regions[n], page)
            assert found == value, f"region {n} page {page} of {self.index}: {found:#x}, not {value:#x}"

    def attach(self) -> None:
        """Another window shows the same; one for reading now and then."""
        n, page = self._pick()
        flags = self.random.choice([os.O_RDWR, os.O_RDONLY])
        with mshare.mshare(f"soak-{n}", 0x6000_0000_0000, 0, flags) as again:
            assert self._word(again, page) == self.stored[n, page]

    def child(self) -> None:
        """A forked child has the windows, too."""
        self.ends(lambda: self.check(self.regions), 0)

    def protect(self) -> None:
        """A page that may only be read, for everybody, and may be stored to again."""
        n, page = self._pick()
        region, at = self.regions[n], self.at(page)
        region.mprotect(at, PAGE, mmap.PROT_READ)
        assert self._word(region, page) == self.stored[n, page]
        if self.random.random() < 0.2:
            self.ends(lambda: region.buf.__setitem__(at, 1), -signal.SIGSEGV)
        region.mprotect(at, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)

    def own(self) -> None:
        """A region from beginning to end: mapped, unmapped, touched where nothing is."""
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        name = f"own-{self.index}"
        with contextlib.suppress(FileNotFoundError):
            mshare.remove(name)
        with mshare.mshare(name, None, 2 * MIB, flags, backing=self.random.choice(["thp", "4k"])) as region:
            region.buf[:PAGE] = bytes([7]) * PAGE
            region.munmap(PAGE, PAGE)
            assert region.buf[PAGE - 1] == 7
            if self.random.random() < 0.3:
                self.ends(lambda: region.buf[PAGE], -signal.SIGBUS)
            region.mmap(PAGE, offset=PAGE)
            assert region.buf[PAGE] == 0
        mshare.mshare_unlink(name)

    def file(self) -> None:
        """A file in a region gets what is stored, and nothing else."""
        name = f"file-{self.index}"
        with contextlib.suppress(FileNotFoundError):
            mshare.remove(name)
        with tempfile.TemporaryFile() as file:
            file.write(bytes([1]) * PAGE * 8)
            file.flush()
            region = mshare.mshare(name, None, 2 * MIB, os.O_CREAT | os.O_EXCL | os.O_RDWR, empty=True)
            region.mmap(8 * PAGE, offset=0, fd=file.fileno(), flags=mmap.MAP_SHARED)
            page = self.random.randrange(8)
            assert region.buf[page * PAGE] == 1
            region.buf[page * PAGE] = 2
            region.msync()
            assert os.pread(file.fileno(), 2, page * PAGE) == b"\2\1"
            mshare.mshare_unlink(name)

    def twin(self) -> None:
        """A fork has what was there, and keeps it."""
        n, page = self._pick()
        name = f"twin-{self.index}"
        with contextlib.suppress(FileNotFoundError):
            mshare.remove(name)
        before = self.stored[n, page]
        self.regions[n].fork(name)
        self.store()
        with mshare.mshare(name, 0x6000_0000_0000, 0, os.O_RDWR) as twin:
            assert self._word(twin, page) == before
            mshare.remove(name)

    def snapshot(self) -> None:
        """A child with private snapshots sees the instant, whatever is stored meanwhile."""
        pid = mshare.odfork(self.regions[0])
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                for (n, page), value in self.stored.items():
                    assert n or self._word(self.regions[n], page) == value
                status = 0
            os._exit(status)
        self.store()
        assert os.waitpid(pid, 0)[1] == 0, "the snapshot is another"

    def ends(self, work: Callable[[], object], status: int) -> None:
        """A child that does so ends like that."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        found = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert found == status, f"a child ended with {found}, not {status}"


@attrs.define
class Soak:
    """All workers, and what they tell."""

    until: float
    seed: int
    processes: int
    alive: dict[int, tuple[int, int]] = attrs.Factory(dict)
    told: dict[str, list[float]] = attrs.Factory(lambda: collections.defaultdict(list))
    errors: list[str] = attrs.Factory(list)
    killed: int = 0

    def run(self) -> None:
        """Keep so many workers running until the time has come, and hear from the last."""
        for index in range(self.processes):
            self.start(index)
        deadline = self.until + 60
        while self.alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                if time.monotonic() > deadline:
                    self.errors += [f"worker {index} hangs" for index, _ in self.alive.values()]
                    for each in self.alive:
                        os.kill(each, signal.SIGKILL)
                    deadline += 60
                time.sleep(0.02)
            elif pid in self.alive:
                self.ended(*self.alive.pop(pid), os.waitstatus_to_exitcode(status))

    def start(self, index: int) -> None:
        """Have a worker of that number."""
        self.seed += 1
        report = os.memfd_create("report")
        pid = os.fork()
        if pid == 0:
            worker = Worker(index, random.Random(self.seed))
            try:
                worker.run(self.until)
                told: dict[str, object] = dict(worker.took)
            except BaseException:
                told = {"error": traceback.format_exc()}
            os.pwrite(report, json.dumps(told).encode(), 0)
            os._exit(0)
        self.alive[pid] = index, report

    def ended(self, index: int, report: int, status: int) -> None:
        """Hear how it went; one that was to be killed has another after it."""
        with os.fdopen(report, "rb") as file:
            file.seek(0)
            told = json.loads(file.read() or b"{}")
        if status == -signal.SIGKILL:
            self.killed += 1
            if time.monotonic() < self.until:
                self.start(index)
        elif status or "error" in told:
            self.errors.append(f"worker {index}: status {status}: {told.get('error', '')}")
            return
        for act, took in told.items():
            self.told[act] += took


def shared_regions(processes: int) -> None:
    """Those in which every worker has a slot."""
    size = -(-processes * SLOT * PAGE // (2 * MIB)) * 2 * MIB
    for n in range(REGIONS):
        mshare.mshare(f"soak-{n}", None, size, os.O_CREAT | os.O_EXCL | os.O_RDWR).detach()


def soak(seconds: float, processes: int, seed: int) -> int:
    """Run it all; the exit status."""
    directory = Path(tempfile.mkdtemp(prefix="msharefs-soak-"))
    daemon = Daemon(directory)
    try:
        os.environ["MSHAREFS"] = str(daemon.mount)
        shared_regions(processes)
        before = daemon.open_files()  # With this process's connection.
        found = Soak(time.monotonic() + seconds, seed, processes)
        found.run()
        served = sum(map(int, re.findall(r"^msharefs_region_faults_total\S* (\d+)", metrics(daemon), re.MULTILINE)))
        sys.stdout.write(
            f"{processes} processes for {seconds:g} s, seed {seed}; {found.killed} were killed on the way\n"
        )
        sys.stdout.write(f"{'':10}{'times':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}\n")
        for act, took in sorted(found.told.items()):
            took.sort()
            p50, p99 = (took[int(len(took) * share)] * 1000 for share in (0.5, 0.99))
            sys.stdout.write(f"{act:10}{len(took):9}{p50:9.2f}{p99:9.2f}{took[-1] * 1000:9.1f}\n")
        sys.stdout.write(f"faults served in the shared regions: {served}; errors: {len(found.errors)}\n")
        sys.stdout.write("".join(f"{error}\n" for error in found.errors[:5]))
        for name in os.listdir(daemon.mount):
            if not name.startswith(".") and name != "mshare_info":
                mshare.remove(name)
        log = daemon.log()
        left = leaked(daemon, before)
        sys.stdout.write(f"descriptors of the daemon, more than before: {dict(left)}\n")
        bad = bool(found.errors or left) or "Traceback" in log or "ERROR" in log or daemon.stop() != 0
        if bad:
            first = log.find("Traceback")
            sys.stdout.write(log[max(0, first - 500) : first + 4000] if first >= 0 else log[-4000:])
        return int(bad)
    finally:
        daemon.close()


def leaked(daemon: Daemon, before: collections.Counter[str]) -> collections.Counter[str]:
    """What the daemon has open and had not before; who was killed last has a moment to be noticed."""
    deadline = time.monotonic() + 60
    while (left := daemon.open_files() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def metrics(daemon: Daemon) -> str:
    """What Prometheus would be told."""
    return (daemon.mount / ".metrics").read_text()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(soak(**vars(parser.parse_args())))
