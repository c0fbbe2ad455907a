"""Commands that look: ls, stat, maps."""

from __future__ import annotations

import stat as file_modes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from mshare import inspect
from mshare.cli import render
from mshare.cli.complete import region_argument
from mshare.cli.place import about_region, served_mount
from mshare.cli.render import Column
from msharefs.perms import Prot
from msharefs.protocol import RegionName, RegionStat, Vma

LS: Final = (
    Column("NAME"),
    Column("ADDRESS", right=True),
    Column("SIZE", right=True),
    Column("BACKING"),
    Column("OWNER"),
    Column("MODE"),
    Column("ATTACHED", right=True),
)
_MAPS: Final = (
    Column("OFFSET", right=True),
    Column("LENGTH", right=True),
    Column("PROT"),
    Column("FAULTS"),
    Column("RESIDENT", right=True),
)


_ORDERS: Final[dict[str, Callable[[RegionName], Any]]] = {
    "name": lambda region: region.name,
    "address": lambda region: region.address,
    "size": lambda region: -region.size,
    "backing": lambda region: region.backing,
    "owner": lambda region: render.user_name(region.uid),
    "attached": lambda region: -region.attached,
}


def parse_columns(text: str) -> list[int]:
    """Which columns of ``ls`` to show, by number, for ``name,size``."""
    titles = [column.title for column in LS]
    wanted = [word.strip().upper() for word in text.split(",")]
    unknown = [word for word in wanted if word not in titles]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(titles)}")
    return [titles.index(word) for word in wanted]


@click.command()
@click.option("--sort", type=click.Choice(list(_ORDERS)), default="name", show_default=True, help="What comes first.")
@click.option("-r", "--reverse", is_flag=True, help="The other way round.")
@click.option("-o", "--output", type=parse_columns, metavar="COLUMNS", help="These columns, in this order: name,size.")
@click.option("-n", "--noheadings", is_flag=True, help="No line of titles.")
@click.option("--files", is_flag=True, help="Files that processes share without a name, instead of regions.")
@render.json_option
@click.pass_obj
def ls(
    mount: Path | None,
    *,
    sort: str,
    reverse: bool,
    output: list[int] | None,
    noheadings: bool,
    files: bool,
    as_json: bool,
) -> None:
    """List the regions of the mount, as lsipc(1) lists what System V has.

    Columns: name, address, size, backing, owner, mode, and how many processes are attached. Numbers sort from the
    largest. Anybody may list; bytes of a name that are no text, and control characters, are shown as escapes.

    --files lists what is mapped with MAP_SHARED_PT. Such a file is called by its device and inode, as in
    /proc/PID/maps; BACKING is `file` where its own pages are mapped. More about it is in the mount, under
    .regions/.files, for those whom MODE lets read.
    """
    listed = inspect.files if files else inspect.regions
    found = sorted(listed(served_mount(mount)), key=_ORDERS[sort], reverse=reverse)
    if as_json:
        render.print_json(found)
        return
    shown = range(len(LS)) if output is None else output
    rows = [[row[index] for index in shown] for row in map(ls_row, found)]
    render.print_table([LS[index] for index in shown], rows, titles=not noheadings)


@click.command()
@region_argument
@render.json_option
@click.pass_obj
def stat(mount: Path | None, name: str, *, as_json: bool) -> None:
    """Tell all about region NAME, which must be readable for you.

    resident: memory in use. faults: those the daemon served. tables: pages of each level of page table.
    table_bytes_private, _shared, _kernel: what page tables would cost with a set for each attached process, what one
    set costs, and what the kernel counts for these processes. table_bytes_growth: how much all page tables of the
    machine have grown since the region was made. leaf_tables, pages: what forks have in common. copied, breaks: what
    they have copied of each other, and how many touches of this region made it necessary. fault_p50, fault_p99: within
    what time the daemon answered half, and 99 of 100, of the faults it served.
    """
    place = served_mount(mount)
    with about_region(name):
        found = inspect.stat(name, place)
    if as_json:
        render.print_json(found)
    else:
        render.print_pairs(_stat_pairs(found))


@click.command()
@region_argument
@render.json_option
@click.pass_obj
def maps(mount: Path | None, name: str, *, as_json: bool) -> None:
    """List what is mapped inside region NAME, which must be readable for you.

    FAULTS says who serves page faults there: the kernel alone (native) or the daemon (paged). What no line covers is
    a hole.
    """
    place = served_mount(mount)
    with about_region(name):
        found = inspect.maps(name, place)
    if as_json:
        render.print_json(found)
    else:
        render.print_table(_MAPS, map(_maps_row, found))


def ls_row(region: RegionName) -> tuple[str, ...]:
    """What stands in a line."""
    return (
        render.printable(region.name),
        f"{region.address:#x}",
        render.short_size(region.size),
        region.backing,
        render.user_name(region.uid),
        _mode_letters(region.mode),
        str(region.attached),
    )


def _maps_row(vma: Vma) -> tuple[str, ...]:
    return (
        f"{vma.offset:#x}",
        render.short_size(vma.length),
        Prot(vma.prot).as_text(),
        "paged" if vma.paged else "native",
        render.short_size(vma.resident),
    )


def _stat_pairs(found: RegionStat) -> Iterator[tuple[str, str]]:
    yield "name", render.printable(found.name)
    yield "address", f"{found.address:#x}"
    yield "size", render.size_in_both(found.size)
    yield "backing", found.backing
    yield "owner", f"{render.user_name(found.uid)} (uid {found.uid}, gid {found.gid})"
    yield "mode", f"{found.mode:04o} ({_mode_letters(found.mode)})"
    yield "attached", str(found.attached)
    yield "resident", render.size_in_both(found.resident)
    yield "huge_bytes", render.size_in_both(found.huge_bytes)
    yield "faults", str(found.faults)
    yield "vmas", str(found.vmas)
    yield "tables", " ".join(f"{level}={count}" for level, count in found.tables.items())
    yield "tables_shared", "yes" if found.tables_shared else "no"
    yield "table_bytes_private", render.size_in_both(found.table_bytes_private)
    yield "table_bytes_shared", render.size_in_both(found.table_bytes_shared)
    yield "table_bytes_kernel", render.size_in_both(found.table_bytes_kernel)
    yield "table_bytes_growth", render.size_in_both(found.table_bytes_growth)
    if found.origin is not None:
        yield "origin", render.printable(found.origin)
    yield "leaf_tables", f"{found.leaf_tables_shared} shared with forks, {found.leaf_tables_private} private"
    yield "pages", f"{found.pages_shared} shared with forks, {found.pages_private} private"
    yield "copied", render.size_in_both(found.copied)
    yield "breaks", str(found.breaks)
    yield "fault_p50", render.duration(found.fault_p50_ns)
    yield "fault_p99", render.duration(found.fault_p99_ns)
    for note in found.notes:
        yield "note", render.printable(note)


def _mode_letters(mode: int) -> str:
    return file_modes.filemode(mode)[1:]
