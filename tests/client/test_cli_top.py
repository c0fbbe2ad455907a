"""mshare top: regions and processes as they are, once and live."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from mshare.cli.samples import RegionSample, Sample, saved
from mshare.cli.top import ordered, region_row, screen
from msharefs.protocol import RegionStat

NOBODY = 65534
PATIENCE = 60.0
Mshare = Callable[..., Any]

STAT = RegionStat(
    *("it", 32 << 40, 2 << 20, "thp", 0, 0, 0o600, 100, 1 << 30, 0, 1, {"pte": 1}, 100 * 8192, 8192, 8),
    tables_shared=False,
    huge_bytes=0,
)


def region(name: str, **fields: Any) -> RegionSample:
    return attrs.evolve(RegionSample(name, 2 << 20, "thp", 1, 0, 0.0, 0, 0.0, 0, 0, 0, 0), **fields)


def test_json_has_regions_and_their_processes(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE, backing='4k'); r.buf[:PAGE] = bytes(PAGE)")
    told = cli("top", "--json", "--interval", "0.05").json
    (shown,) = [region for region in told["regions"] if region["name"] == name]
    assert (shown["size"], shown["resident"], shown["attached"], shown["backing"]) == (4 << 20, 4096, 1, "4k")
    assert (shown["faults"], shown["faults_per_second"], shown["breaks"]) == (0, 0, 0)
    (process,) = [process for process in told["processes"] if process["region"] == name]
    assert (process["pid"], process["user"], process["writes"]) == (c.pid, "root", True)
    assert process["page_table_bytes"] > 0
    assert process["command"].startswith("python")


def test_faults_a_second_are_those_between_two_looks(daemon: Any, client: Callable[..., Any], name: str) -> None:
    """A hundred in about a tenth of a second; latency is that of these faults."""
    from mshare.cli.samples import Sampler

    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE, empty=True); file = os.memfd_create('file')")
    c.do("os.truncate(file, 4 * MIB); r.mmap(4 * MIB, flags=mmap.MAP_SHARED, fd=file, offset=0); r.buf[0]")
    sampler = Sampler(daemon.mount)
    first = {region.name: region for region in sampler.look().regions}[name]
    assert (first.faults_per_second, first.faults) == (0, 1)
    c.do("r.madvise(0, 4 * MIB, mmap.MADV_RANDOM)")
    c.do("for page in range(200, 300): r.buf[page * PAGE] = 1")
    second = {region.name: region for region in sampler.look().regions}[name]
    assert second.faults is not None
    assert second.faults >= 100
    assert second.faults_per_second is not None
    assert second.faults_per_second > 10
    assert second.fault_p99_ns is not None
    assert second.fault_p50_ns is not None
    assert 0 < second.fault_p50_ns <= second.fault_p99_ns


def test_in_a_pipe_it_prints_once_and_plainly(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
    lines = cli("top", "--interval", "0.05").lines
    assert lines[0].split()[:3] == ["REGION", "BACKING", "ATTACHED"]
    assert any(line.startswith(name) for line in lines)
    assert "PID" in next(line for line in lines if "COMMAND" in line)


def test_of_a_region_that_one_may_not_read_little_is_told(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o600)")
    told = cli("top", "--json", "--interval", "0.05", uid=NOBODY).json
    (shown,) = [region for region in told["regions"] if region["name"] == name]
    assert (shown["attached"], shown["resident"], shown["faults"]) == (1, None, None)
    assert [process for process in told["processes"] if process["region"] == name] == []


def test_regions_are_sorted_by_any_column() -> None:
    few, many = region("a", resident=1, faults_per_second=5.0), region("b", resident=2, attached=7)
    unreadable = RegionSample("c", 1, "4k", 1)
    sample = Sample([unreadable, many, few], [])
    assert [r.name for r in ordered(sample, "name").regions] == ["a", "b", "c"]
    assert [r.name for r in ordered(sample, "faults").regions] == ["a", "b", "c"]
    assert [r.name for r in ordered(sample, "resident").regions] == ["b", "a", "c"]
    assert [r.name for r in ordered(sample, "attached").regions] == ["b", "a", "c"]


def test_tables_saved_are_those_of_small_pages_for_each_process() -> None:
    """1 GiB takes 2 MiB of entries of 8 bytes; here 100 processes have 8 KiB each, or share them."""
    assert saved(STAT) == 100 * (2 << 20) - 100 * 8192
    assert saved(attrs.evolve(STAT, tables_shared=True)) == 100 * (2 << 20) - 8192
    assert saved(attrs.evolve(STAT, resident=0)) == 0


def test_a_row_tells_what_is_not_known_by_a_dash() -> None:
    assert region_row(RegionSample("c", 4096, "4k", 1)) == ("c", "4k", "1", "4KiB", *["-"] * 7)
    assert region_row(region("a", faults=1, fault_p50_ns=36_400, fault_p99_ns=1_240_000))[7:9] == ("36us", "1.2ms")


def test_a_screen_is_never_higher_than_the_terminal() -> None:
    from rich.console import Console

    sample = Sample([region(f"r{number}") for number in range(100)], [])
    console = Console(width=200, height=20)
    assert len(console.render_lines(screen(sample, "name", 20))) <= 20


def test_a_narrow_terminal_cuts_columns_and_wraps_nothing() -> None:
    from rich.console import Console

    sample = Sample([region("a-region-with-a-rather-long-name", resident=5 << 30) for _ in range(8)], [])
    console = Console(width=60, height=20)
    assert len(console.render_lines(screen(sample, "name", 20))) <= 20


class Terminal:
    """``mshare top`` at a terminal of its own."""

    def __init__(self, mount: Any) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, 120))
        self.before = termios.tcgetattr(self.slave)
        env = {**os.environ, "MSHAREFS": str(mount), "TERM": "xterm"}
        env.pop("NO_COLOR", None)
        code = "from mshare.cli import main\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "top", "--interval", "0.1"],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.seen = b""

    def until(self, text: bytes) -> None:
        while text not in self.seen:
            assert select.select([self.master], [], [], PATIENCE)[0], self.seen
            self.seen += os.read(self.master, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Its exit status; the terminal is as it was."""
        for _ in range(int(PATIENCE / 0.05)):
            if self.process.poll() is not None:
                break
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        assert self.process.returncode is not None, self.seen[-2000:]
        assert termios.tcgetattr(self.slave) == self.before
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        assert self.seen.rindex(b"\x1b[?1049l") > self.seen.rindex(b"\x1b[?1049h")
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(daemon: Any) -> Iterator[Terminal]:
    made = Terminal(daemon.mount)
    yield made
    made.close()


def test_live_it_shows_sorts_and_ends_by_q(terminal: Terminal, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
    terminal.until(name.encode())
    terminal.type(b"n")
    terminal.until(b"n name")
    terminal.type(b"q")
    assert terminal.end() == 0


def test_live_it_ends_by_ctrl_c(terminal: Terminal) -> None:
    terminal.until(b"q quit")
    terminal.type(b"\x03")
    assert terminal.end() == 0


def test_live_it_ends_by_sigterm(terminal: Terminal) -> None:
    terminal.until(b"q quit")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
