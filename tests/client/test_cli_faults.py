"""mshare faults, explain and trace: what was refused, why, and every fault as it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare.cli.explain import MEANINGS, name_of
from mshare.cli.faults import chrome_trace, trace_line, why
from msharefs import errors
from msharefs.protocol import Refusal, TraceEvent

NOBODY = 65534
Mshare = Callable[..., Any]
REFUSAL = Refusal(1, 0, "it", 10, 11, 0x2000, 0x1000, "write", "SIGBUS", "hole")
EVENT = TraceEvent(5_000_000_000, 36_000, 10, 11, 0x1000, "write", "zero")


@pytest.fixture
def refused(client: Callable[..., Any], name: str) -> tuple[str, int]:
    """A region, and a process that touched its hole and stored to its read-only part; name and pid of its parent."""
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.mprotect(MIB, MIB, 1); r.munmap(2 * MIB, MIB)")
    assert c.ask("fork('r.buf[2 * MIB + 9]')") == -7
    assert c.ask("fork('r.buf[MIB + 8] = 1')") == -11
    return name, c.pid


def test_what_was_refused_is_listed(cli: Mshare, refused: tuple[str, int]) -> None:
    name, parent = refused
    head, bus, segv = cli("faults", name).lines
    assert head.split() == ["TIME", "REGION", "OFFSET", "ACCESS", "SENT", "PID", "TID", "WHY"]
    assert bus.split()[1:5] == [name, "0x200009", "read", "SIGBUS"]
    assert bus.split()[5] == bus.split()[6] != str(parent)
    assert bus.endswith("a hole: nothing is mapped there")
    assert segv.split()[2:5] == ["0x100008", "write", "SIGSEGV"]
    assert segv.endswith("not allowed: memory r-- at 0x100000-0x200000")
    assert [each["cause"] for each in cli("faults", name, "--json").json] == ["hole", "protection"]
    assert any(name in line for line in cli("faults").lines)


def test_others_see_nothing_of_a_region_they_may_not_read(cli: Mshare, refused: tuple[str, int]) -> None:
    assert cli("faults", "--json", uid=NOBODY).json == []


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("file", "nothing there: file 3 rw- at 0x0-0x2000 ends before, or could not be read"),
        ("memory", "out of memory: file 3 rw- at 0x0-0x2000"),
        ("moved", "the process had moved 0x2000 out of its window"),
    ],
)
def test_each_cause_is_said_in_words(cause: str, words: str) -> None:
    fields = {"vma_offset": 0, "vma_length": 0x2000, "prot": 3, "file": 3}
    assert why(Refusal(1, 0, "it", 10, 11, 0x2000, 0x1000, "write", "SIGBUS", cause, **fields)) == words


def test_a_signal_is_explained_with_the_last_of_them(cli: Mshare, refused: tuple[str, int]) -> None:
    name, _ = refused
    lines = cli("explain", "SIGSEGV").lines
    assert lines[0].startswith("SIGSEGV: ")
    assert lines[2].startswith("Cure: ")
    assert f"{name}, pid " in lines[-1]
    assert "write at offset 0x100008: not allowed: memory r--" in lines[-1]
    told = cli("explain", "segv", "--json").json
    assert told["last"][-1]["offset"] == 0x100008


def test_an_error_is_explained_without_a_daemon_too(mshare: Mshare, tmp_path: Path) -> None:
    assert mshare("explain", "ENOENT", mount=tmp_path).lines[0].startswith("ENOENT: ")


def test_what_is_no_error_of_ours_is_wrong_usage(cli: Mshare) -> None:
    ran = cli("explain", "banana")
    assert ran.status == 2
    assert "SIGBUS, SIGSEGV" in ran.err


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *(("EINVAL", "EINVAL"), ("enoent", "ENOENT"), ("22", "EINVAL"), ("SIGBUS", "SIGBUS"), ("bus", "SIGBUS")),
        *(("-7", "SIGBUS"), ("139", "SIGSEGV"), ("-4000", "-4000"), ("9999", "9999")),
    ],
)
def test_errors_and_signals_go_by_many_names(what: str, name: str) -> None:
    assert name_of(what) == name


def test_every_error_that_the_model_raises_is_explained() -> None:
    """But those that tell of a mistake in the calling program itself, in words of their own."""
    import errno

    plain = {"EBADF", "ENAMETOOLONG", "ENOTSUP", "EOVERFLOW"}
    raised = {errno.errorcode[kind.errno] for kind in errors.MshareError.__subclasses__()}
    assert raised - plain <= set(MEANINGS)


TOUCH = """
stop = threading.Event()
def touch():
    while not stop.is_set():
        r.madvise(0, 4 * MIB, mmap.MADV_REMOVE)
        for page in range(100): r.buf[page * PAGE] = 1
thread = threading.Thread(target=touch)
thread.start()
"""


class TestTrace:
    @pytest.fixture
    def traced(self, start_daemon: Callable[..., Any], client: Callable[..., Any], name: str) -> tuple[Any, Any, str]:
        watching = start_daemon("--paging=all", "--backing", "4k")
        c = client(watching)
        c.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE)")
        return watching, c, name

    def test_faults_come_as_lines(self, mshare: Mshare, traced: tuple[Any, Any, str]) -> None:
        """Of a process that touches pages until enough were seen."""
        watching, c, name = traced
        c.do(TOUCH)
        lines = mshare("trace", name, "--count", "5", mount=watching.mount).lines
        assert len(lines) == 5
        _, pid, tid, access, offset, how, took = lines[0].split()
        assert (pid, tid, access, how) == (str(c.pid), str(c.ask("thread.native_id")), "write", "zero")
        assert int(offset, 16) % 4096 == 0
        assert took.endswith("s")
        told = json.loads(mshare("trace", name, "--count", "1", "--json", mount=watching.mount).out)
        assert (told["pid"], told["how"]) == (c.pid, "zero")
        c.do("stop.set(); thread.join()")

    def test_a_file_is_for_trace_viewers(self, mshare: Mshare, traced: tuple[Any, Any, str], tmp_path: Path) -> None:
        watching, _, name = traced
        out = tmp_path / "trace.json"
        assert mshare("trace", name, "--duration", "0", "--out", str(out), mount=watching.mount).lines == []
        assert json.loads(out.read_text())["traceEvents"] == []

    @pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
    def test_the_file_has_the_faults_however_it_ends(
        self,
        traced: tuple[Any, Any, str],
        tmp_path: Path,
        eventually: Callable[[Callable[[], bool]], None],
        end: signal.Signals,
        status: int,
    ) -> None:
        """All that there were until then: there is a file as soon as faults are recorded."""
        watching, c, name = traced
        environment = {**os.environ, "MSHAREFS": str(watching.mount)}
        command = [sys.executable, "-c", "from mshare.cli import main\nmain()", "trace", name, "--out", "t.json"]
        with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            eventually((tmp_path / "t.json").exists)
            c.do("for page in range(100): r.buf[page * PAGE] = 1")
            process.send_signal(end)
            assert process.stderr.read() == b""
        assert process.returncode == status
        *events, named = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        assert {event["args"]["offset"] for event in events} >= {f"{page * 4096:#x}" for page in range(100)}
        assert (named["ph"], named["pid"]) == ("M", c.pid)

    def test_a_file_that_cannot_be_written_is_told_at_once(
        self, mshare: Mshare, traced: tuple[Any, Any, str], tmp_path: Path
    ) -> None:
        watching, _, name = traced
        ran = mshare("trace", name, "--out", str(tmp_path / "missing" / "t.json"), mount=watching.mount)
        assert (ran.status, "No such file or directory" in ran.error) == (1, True)

    def test_it_ends_when_the_region_does(self, traced: tuple[Any, Any, str]) -> None:
        watching, c, name = traced
        c.do(TOUCH)
        environment = {**os.environ, "MSHAREFS": str(watching.mount)}
        command = [sys.executable, "-c", "from mshare.cli import main\nmain()", "trace", name]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert b"write" in process.stdout.readline()
            c.do(f"stop.set(); thread.join(); mshare.mshare_unlink({name!r})")
            _, err = process.communicate()  # It may have much to tell.
        assert (process.returncode, err) == (0, b"")

    def test_who_may_not_write_may_not_trace(self, mshare: Mshare, traced: tuple[Any, Any, str]) -> None:
        watching, _, name = traced
        (watching.mount / name).chmod(0o644)
        assert "takes permission to write it" in mshare("trace", name, mount=watching.mount, uid=NOBODY).error


def test_a_line_tells_who_where_and_how_long() -> None:
    assert trace_line(EVENT, 4_000_000_000).split() == ["1.000000", "10", "11", "write", "0x1000", "zero", "36us"]


def test_chrome_traces_have_complete_events_in_microseconds() -> None:
    """By process and thread, with a name for each process."""
    event, name = chrome_trace([EVENT], "it")["traceEvents"]  # type: ignore[misc]
    assert (event["ph"], event["ts"], event["dur"], event["pid"], event["tid"]) == ("X", 5_000_000.0, 36.0, 10, 11)
    assert event["args"] == {"region": "it", "offset": "0x1000", "access": "write"}
    assert (name["ph"], name["name"], name["pid"]) == ("M", "process_name", 10)


def test_the_explanations_name_only_commands_there_are() -> None:
    import re

    from mshare.cli import cli

    text = " ".join(meaning.means + meaning.cure for meaning in MEANINGS.values())
    assert set(re.findall(r"`mshare (\w+)", text)) <= set(cli.commands)
