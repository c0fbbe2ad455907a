"""What the daemon tells of faults: how long they took, which it refused, and each of them to who traces."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon

from mshare import inspect

NOBODY = 65534
PAGE = 4096


@pytest.fixture(scope="module")
def watching(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon that serves every first touch."""
    return start_daemon("--paging=all", "--backing", "4k")


@pytest.fixture
def toucher(watching: Daemon, client: Callable[..., Client], name: str) -> Iterator[Client]:
    """A client with a region of its own there."""
    made = client(watching)
    made.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE)")
    yield made
    made.do("mshare.mshare_unlink(r.name)")


def test_latency_is_that_of_all_faults_served(watching: Daemon, toucher: Client, name: str) -> None:
    """In the statistics, in the text below .regions, and for Prometheus."""
    toucher.do("for page in range(100): r.buf[page * PAGE] = 1")
    stat = inspect.stat(name, watching.mount)
    assert sum(stat.fault_buckets) == stat.faults == 100
    assert 0 < stat.fault_p50_ns <= stat.fault_p99_ns
    assert stat.fault_total_ns > 100 * 1000
    text = (watching.mount / ".regions" / name / "stat").read_text()
    assert f"fault_total_ns {stat.fault_total_ns}\n" in text
    assert f'msharefs_region_fault_seconds_count{{region="{name}"}} 100\n' in (watching.mount / ".metrics").read_text()


def test_a_trace_tells_who_touched_what(watching: Daemon, toucher: Client, name: str) -> None:
    """From the moment it began; what was before nobody has recorded."""
    toucher.do("r.buf[0] = 1")
    with inspect.Trace(name, watching.mount) as trace:
        assert trace.poll() == []
        toucher.do("r.buf[5 * PAGE + 3] = 1; r.buf[9 * PAGE]")
        store, load = trace.poll()
        assert (store.pid, store.tid, store.offset, store.access, store.how) == (
            *(toucher.pid, toucher.pid, 5 * PAGE + 3, "write", "zero"),
        )
        assert (load.offset, load.access) == (9 * PAGE, "read")
        assert store.duration_ns > 0
        assert store.time_ns + store.duration_ns <= load.time_ns
        assert (trace.poll(), trace.lost) == ([], 0)


def test_a_trace_of_more_than_a_packet_holds_is_complete(watching: Daemon, toucher: Client, name: str) -> None:
    with inspect.Trace(name, watching.mount) as trace:
        toucher.do("for page in range(1000): r.buf[page * PAGE] = 1")
        assert [event.offset for event in trace.poll()] == [page * PAGE for page in range(1000)]


def test_files_and_refusals_are_traced_too(watching: Daemon, toucher: Client, name: str) -> None:
    toucher.do(
        """
        file = os.memfd_create("file"); os.truncate(file, PAGE)
        r.mmap(2 * PAGE, prot=3, flags=mmap.MAP_SHARED | 0x10, offset=0, fd=file)
        """
    )
    with inspect.Trace(name, watching.mount) as trace:
        toucher.do("r.buf[7]; r.buf[8] = 1")
        assert [(e.offset, e.how) for e in trace.poll()] == [(7, "file"), (8, "allow")]
        assert toucher.ask(f"fork('r.buf[{PAGE}]')") == -7
        assert [(e.offset, e.how) for e in trace.poll() if e.how == "refuse"] == [(PAGE, "refuse")]


def test_tracing_takes_permission_to_write(
    watching: Daemon, client: Callable[..., Client], toucher: Client, name: str
) -> None:
    """Or being the owner: who may only read would see what others touch."""
    other = client(watching, uid=NOBODY)
    os.chmod(watching.mount / name, 0o644)
    other.do("from mshare import inspect")
    assert other.error_of(f"inspect.Trace({name!r})").errno == errno.EACCES
    os.chmod(watching.mount / name, 0o666)
    assert other.ask(f"inspect.Trace({name!r}).poll()") == []
    os.chown(watching.mount / name, NOBODY, NOBODY)
    os.chmod(watching.mount / name, 0o400)
    assert other.ask(f"inspect.Trace({name!r}).poll()") == []


def test_a_refused_touch_is_told_with_the_mapping_that_lay_there(
    daemon: Daemon, client: Callable[..., Client], name: str
) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.mprotect(MIB, MIB, 1); r.munmap(2 * MIB, MIB)")
    assert c.ask("fork('r.buf[MIB + 8] = 1')") == -11
    assert c.ask("fork('r.buf[2 * MIB + 9]')") == -7
    segv, bus = [refusal for refusal in inspect.refusals(daemon.mount) if refusal.region == name]
    assert (segv.sent, segv.cause, segv.access, segv.offset) == ("SIGSEGV", "protection", "write", (1 << 20) + 8)
    assert (segv.vma_offset, segv.vma_length, segv.prot) == (1 << 20, 1 << 20, 1)
    assert (bus.sent, bus.cause, bus.access, bus.offset) == ("SIGBUS", "hole", "read", (2 << 20) + 9)
    assert (bus.vma_offset, bus.address) == (None, c.ask("r.address") + (2 << 20) + 9)
    assert bus.number > segv.number
    assert bus.time_ns > segv.time_ns


def test_a_system_call_that_fails_is_told_too(daemon: Daemon, client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, empty=True)")
    c.do("reader, writer = os.pipe()")
    assert c.error_of("os.write(writer, r.buf[:1])").errno == errno.EFAULT
    (told,) = [refusal for refusal in inspect.refusals(daemon.mount) if refusal.region == name]
    assert (told.sent, told.pid, told.offset) == ("EFAULT", c.pid, 0)


def test_refusals_are_for_those_who_may_read_the_region(
    daemon: Daemon, client: Callable[..., Client], name: str
) -> None:
    """Also when it is gone."""
    c, other = client(), client(uid=NOBODY)
    c.do(f"os.umask(0); r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o600, empty=True)")
    assert c.ask("fork('r.buf[0]')") == -7
    other.do("from mshare import inspect")
    told = f"[refusal.region for refusal in inspect.refusals() if refusal.region == {name!r}]"
    assert other.ask(told) == []
    os.chmod(daemon.mount / name, 0o644)
    assert other.ask(told) == [name]
    c.do("mshare.mshare_unlink(r.name)")
    assert other.ask(told) == [name]
