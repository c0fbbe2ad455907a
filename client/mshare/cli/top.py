"""mshare top: regions and the processes attached to them, again and again, until q."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mshare.cli import render
from mshare.cli.place import ended_by_sigterm, served_mount
from mshare.cli.render import Column
from mshare.cli.samples import ProcessSample, RegionSample, Sample, Sampler

if TYPE_CHECKING:
    from rich.console import RenderableType

_REGIONS: Final = (
    Column("REGION"),
    Column("BACKING"),
    *(Column(title, right=True) for title in ("ATTACHED", "SIZE", "RESIDENT", "HUGE", "FAULTS/S", "P50", "P99")),
    *(Column(title, right=True) for title in ("TABLES SAVED", "BREAKS")),
)
_PROCESSES: Final = (
    Column("PID", right=True),
    Column("USER"),
    Column("ACCESS"),
    Column("TABLES", right=True),
    Column("REGION"),
    Column("COMMAND"),
)
_KEYS: Final[dict[str, tuple[str, Callable[[RegionSample], Any]]]] = {
    "n": ("name", lambda region: region.name),
    "a": ("attached", lambda region: -region.attached),
    "s": ("size", lambda region: -region.size),
    "r": ("resident", lambda region: -(region.resident or 0)),
    "h": ("huge", lambda region: -(region.huge_share or 0)),
    "f": ("faults", lambda region: (-(region.faults_per_second or 0), -(region.faults or 0))),
    "p": ("p99", lambda region: -(region.fault_p99_ns or 0)),
    "t": ("saved", lambda region: -(region.table_bytes_saved or 0)),
    "b": ("breaks", lambda region: -(region.breaks or 0)),
}
_ORDERS: Final = dict(_KEYS.values())


@click.command()
@click.option("--interval", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds a look.")
@click.option("--sort", type=click.Choice(list(_ORDERS)), default="faults", show_default=True, help="What comes first.")
@click.option("--once", is_flag=True, help="Look twice, an interval apart, print, and end. So it is in a pipe.")
@render.json_option
@click.pass_obj
def top(mount: Path | None, *, interval: float, sort: str, once: bool, as_json: bool) -> None:
    """Show regions and the processes attached to them, live. q ends it, and so does Ctrl-C.

    HUGE: how much of what is resident one process maps by 2 MiB entries. FAULTS/S: those the daemon serves; P50 and
    P99: how long it took for them, from reading of one to the answer. TABLES SAVED: what page tables would take with
    4 KiB pages and a set for each process, less what they take. BREAKS: touches that had a page copied which forks had
    in common. Of regions that you may not read only what `ls` tells is shown, and of their processes nothing.

    Keys: n, a, s, r, h, f, p, t, b sort by name, attached, size, resident, huge, faults, p99, tables saved, breaks.
    With --json, as with --once: one look, and the end.
    """
    sampler = Sampler(served_mount(mount))
    sample = sampler.look()
    if not (once or as_json) and sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _live(sampler, sample, interval, sort)
        return
    time.sleep(interval)
    sample = ordered(sampler.look(), sort)
    if as_json:
        render.print_json(sample)
        return
    render.print_table(_REGIONS, map(region_row, sample.regions))
    if sample.processes:
        click.echo()
        render.print_table(_PROCESSES, map(process_row, sample.processes))


def ordered(sample: Sample, sort: str) -> Sample:
    """The regions in that order, equals by name, and processes by what their page tables take."""
    regions = sorted(sorted(sample.regions, key=lambda region: region.name), key=_ORDERS[sort])
    return Sample(regions, sorted(sample.processes, key=lambda process: (-process.page_table_bytes, process.pid)))


def region_row(region: RegionSample) -> tuple[str, ...]:
    """What stands in a line."""
    first = (
        *(render.printable(region.name), region.backing, str(region.attached)),
        render.short_size(region.size),
    )
    if region.resident is None:
        return (*first, *["-"] * 7)
    served = bool(region.faults)
    return (
        *first,
        render.short_size(region.resident),
        f"{region.huge_share or 0:.0%}",
        f"{region.faults_per_second or 0:.0f}",
        render.duration(region.fault_p50_ns or 0) if served else "-",
        render.duration(region.fault_p99_ns or 0) if served else "-",
        render.short_size(region.table_bytes_saved or 0),
        str(region.breaks),
    )


def process_row(process: ProcessSample) -> tuple[str, ...]:
    """The same of a process."""
    return (
        *(str(process.pid), process.user, "rw" if process.writes else "ro"),
        *(render.short_size(process.page_table_bytes), render.printable(process.region), process.command),
    )


def screen(sample: Sample, sort: str, height: int) -> RenderableType:
    """One screen of ``height`` lines: regions, processes as far as there is room, keys."""
    from rich.console import Group
    from rich.text import Text

    regions, processes = sample.regions, sample.processes
    room = max(1, height - 6)
    shown = regions[: max(1, room - min(len(processes), room // 2))]
    left = max(0, room - len(shown))
    head = Text.assemble(
        ("mshare top", "bold"),
        f"   regions {len(regions)}, processes {len({process.pid for process in processes})}, ",
        f"resident {render.short_size(sum(region.resident or 0 for region in regions))}, ",
        f"page tables saved {render.short_size(sum(region.table_bytes_saved or 0 for region in regions))}",
    )
    keys = Text("sort: ", "dim")
    for key, (name, _) in _KEYS.items():
        keys.append(f"{key} {name}", "bold reverse" if name == sort else "dim").append("  ")
    return Group(
        head,
        Text(),
        render.rich_table(_REGIONS, map(region_row, shown)),
        Text(),
        render.rich_table(_PROCESSES, map(process_row, processes[:left])),
        keys.append("q quit", "dim"),
    )


def _live(sampler: Sampler, sample: Sample, interval: float, sort: str) -> None:
    """Show, look, listen, until q, Ctrl-C or SIGTERM; the terminal is as before then, whatever happens."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys_unbuffered(sys.stdin.fileno()),
        ended_by_sigterm(),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        until = time.monotonic() + interval
        while True:
            live.update(screen(ordered(sample, sort), sort, console.height), refresh=True)
            key = _key(sys.stdin.fileno(), until - time.monotonic())
            if key in ("q", "Q", ""):
                return
            sort = _KEYS[key][0] if key in _KEYS else sort
            if key is None:
                sample = sampler.look()
                until = time.monotonic() + interval


def _key(fd: int, seconds: float) -> str | None:
    """The next key, None when none comes; "" at the end of the terminal."""
    if not select.select([fd], [], [], max(0.0, seconds))[0]:
        return None
    return os.read(fd, 1).decode(errors="replace")


@contextlib.contextmanager
def _keys_unbuffered(fd: int) -> Iterator[None]:
    """Have keys at once, and not shown."""
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
