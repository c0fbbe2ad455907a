"""Commands about faults: faults lists what was refused, trace shows all of a region as they come."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import click

from mshare import inspect
from mshare.cli import render
from mshare.cli.complete import complete_region, region_argument
from mshare.cli.place import about_region, ended_by_sigterm, served_mount
from mshare.cli.render import Column
from msharefs.perms import Prot
from msharefs.protocol import Refusal, TraceEvent

_FAULTS: Final = (
    *(Column("TIME"), Column("REGION"), Column("OFFSET", right=True), Column("ACCESS"), Column("SENT")),
    *(Column("PID", right=True), Column("TID", right=True), Column("WHY")),
)
_POLL: Final = 0.05
"""Seconds between two looks; the daemon keeps 8192 faults meanwhile."""


@click.command()
@click.argument("name", required=False, shell_complete=complete_region)
@render.json_option
@click.pass_obj
def faults(mount: Path | None, name: str | None, *, as_json: bool) -> None:
    """List the last touches that the daemon refused, of region NAME or of all regions that you may read.

    OFFSET is that in the region. SENT: SIGBUS or SIGSEGV to the thread, EFAULT where a system call was made to fail,
    SIGKILL where that was not possible. Kept are the last 256 of all regions of an owner. `mshare explain SIGBUS` says
    what to do.
    """
    found = refused(served_mount(mount), name)
    if as_json:
        render.print_json(found)
    else:
        render.print_table(_FAULTS, map(fault_row, found))


def refused(place: Path, name: str | None = None) -> list[Refusal]:
    """The last refusals, of one region or of all."""
    return [refusal for refusal in inspect.refusals(place) if name is None or refusal.region == name]


def fault_row(refusal: Refusal) -> tuple[str, ...]:
    """What stands in a line."""
    return (
        time.strftime("%H:%M:%S", time.localtime(refusal.time_ns / 1e9)),
        render.printable(refusal.region) or "-",
        "-" if refusal.offset is None else f"{refusal.offset:#x}",
        refusal.access,
        refusal.sent,
        str(refusal.pid),
        str(refusal.tid),
        why(refusal),
    )


def why(refusal: Refusal) -> str:
    """The reason, with the mapping that lay there."""
    if refusal.cause == "moved":
        return f"the process had moved {refusal.address:#x} out of its window"
    if refusal.cause == "hole" or refusal.vma_offset is None or refusal.vma_length is None:
        return "a hole: nothing is mapped there"
    ends = f"{refusal.vma_offset:#x}-{refusal.vma_offset + refusal.vma_length:#x}"
    kind = "memory" if refusal.file is None else f"file {refusal.file}"
    what = f"{kind} {Prot(refusal.prot or 0).as_text()} at {ends}"
    return {
        "protection": f"not allowed: {what}",
        "file": f"nothing there: {what} ends before, or could not be read",
        "memory": f"out of memory: {what}",
    }[refusal.cause]


@click.command()
@region_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write Chrome trace JSON, at the end.",
)
@click.option("--duration", type=click.FloatRange(min=0), metavar="SECONDS", help="End by itself after that time.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N faults.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each fault.")
@click.pass_obj
def trace(
    mount: Path | None,
    name: str,
    *,
    out: Path | None,
    duration: float | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Show the faults of region NAME that the daemon serves, as they come, until Ctrl-C or until the region is gone.

    A line has the time since the start in seconds, the process and its thread, read or write, the offset in the region,
    how it was answered, and how long that took. How: zero (a fresh page), file, pattern (of a reference page), copy (of
    a page that forks share), allow (a store may go on), refuse (see `mshare faults`). Memory that the kernel serves
    alone shows nothing, unless the daemon runs with --paging=all.

    With --out, a file for chrome://tracing or https://ui.perfetto.dev, and no lines. Needs write permission on the
    region, or read permission on your own. Nothing is recorded while nobody traces; who is too slow loses faults, and
    is told how many.
    """
    place = served_mount(mount)
    with ExitStack() as stack:
        with about_region(name):
            source = stack.enter_context(inspect.Trace(name, place))
        stack.callback(_tell_lost, source)
        stack.enter_context(ended_by_sigterm())
        stack.enter_context(suppress(KeyboardInterrupt))
        kept = None if out is None else stack.enter_context(_written(out, name, source, count))
        start = time.monotonic_ns()
        for number, event in enumerate(_events(source, duration), 1):
            if kept is not None:
                kept.append(event)
            else:
                click.echo(_json_line(event) if as_json else trace_line(event, start))
            if number == count:
                break


def _tell_lost(source: inspect.Trace) -> None:
    if source.lost:
        click.echo(f"{source.lost} faults came too fast and are lost", err=True)


@contextmanager
def _written(out: Path, name: str, source: inspect.Trace, count: int | None) -> Iterator[list[TraceEvent]]:
    """Faults that a file has in the end, however that comes. One that cannot be written is an error at once."""
    kept: list[TraceEvent] = []
    with out.open("w") as file:
        try:
            yield kept
        finally:
            with suppress(OSError):
                kept += source.poll()
            json.dump(chrome_trace(kept[:count], render.printable(name)), file)


def _events(source: inspect.Trace, duration: float | None) -> Iterator[TraceEvent]:
    """Faults as they come, until time is up or the region is gone."""
    until = None if duration is None else time.monotonic() + duration
    while True:
        last = until is not None and time.monotonic() >= until
        try:
            yield from source.poll()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNRESET, errno.ENOTCONN):
                return
            raise
        if last:
            return
        time.sleep(_POLL)


def trace_line(event: TraceEvent, start: int) -> str:
    """A fault as people read it."""
    return (
        f"{(event.time_ns - start) / 1e9:10.6f}  {event.pid or '?':>7} {event.tid:>7}  {event.access:<5} "
        f"{event.offset:#14x}  {event.how:<6} {render.duration(event.duration_ns):>6}"
    )


def chrome_trace(events: Iterable[TraceEvent], name: str) -> dict[str, object]:
    """The events in the Trace Event Format: complete events, by process and thread, in microseconds."""
    events = list(events)
    told: list[dict[str, object]] = [
        {
            "name": event.how,
            "cat": event.access,
            "ph": "X",
            "ts": event.time_ns / 1000,
            "dur": event.duration_ns / 1000,
            "pid": event.pid,
            "tid": event.tid,
            "args": {"region": name, "offset": f"{event.offset:#x}", "access": event.access},
        }
        for event in events
    ]
    told += (
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": _command(pid)}}
        for pid in sorted({event.pid for event in events})
    )
    return {"traceEvents": told, "displayTimeUnit": "ns"}


def _json_line(event: TraceEvent) -> str:
    return json.dumps(attrs.asdict(event))


def _command(pid: int) -> str:
    """What a process is called; its number, when it has ended."""
    try:
        return render.printable(Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n"))
    except OSError:
        return str(pid)
