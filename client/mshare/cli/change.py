"""Commands that change: create, fork, unlink, rm."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final

import click

import mshare
from mshare import syscalls
from mshare.cli import progress, render
from mshare.cli.complete import region_argument
from mshare.cli.place import about_region, served_mount
from msharefs.addr import WINDOW_END, WINDOW_START
from msharefs.errors import InvalidArgumentError
from msharefs.perms import Advice
from msharefs.region import BackingKind
from msharefs.units import parse_size

_POPULATED_AT_ONCE: Final = 64 << 20


def parse_size_option(text: str) -> int:
    """Bytes for ``2M``."""
    try:
        return parse_size(text)
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error)) from error


def parse_address_option(text: str) -> int:
    """The number for ``0x200000000000``, or for the same in decimal."""
    if not re.fullmatch(r"0[xX][0-9a-fA-F]+|[0-9]+", text):
        raise click.BadParameter(f"{text!r} is no address: write it as 0x200000000000 or in decimal")
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def parse_mode_option(text: str) -> int:
    """The number for ``640``."""
    if not re.fullmatch(r"[0-7]{1,4}", text) or int(text, 8) > 0o777:
        raise click.BadParameter(f"{text!r} is not an octal mode from 0 to 777")
    return int(text, 8)


@click.command()
@click.argument("name")
@click.option(
    "--size",
    type=parse_size_option,
    metavar="SIZE",
    required=True,
    help="2M, 1G, 512G: a multiple of the mount's alignment.",
)
@click.option(
    "--addr",
    type=parse_address_option,
    metavar="ADDRESS",
    help="Where it lies, in hex or decimal. [default: the daemon chooses]",
)
@click.option(
    "--backing",
    type=click.Choice([kind.value for kind in BackingKind]),
    help="What holds its memory. [default: the daemon's]",
)
@click.option(
    "--mode",
    type=parse_mode_option,
    metavar="OCTAL",
    default="600",
    show_default=True,
    help="Its permissions, less umask.",
)
@click.option("--empty", is_flag=True, help="Map nothing in it: it starts as one hole.")
@click.option("--populate", is_flag=True, help="Have all its memory now, or fail; not when it is touched.")
@click.option("--excl/--no-excl", default=True, show_default=True, help="Fail if it exists, or take it as it is.")
@click.pass_obj
def create(
    mount: Path | None,
    name: str,
    *,
    size: int,
    addr: int | None,
    backing: str | None,
    mode: int,
    empty: bool,
    populate: bool,
    excl: bool,
) -> None:
    """Create region NAME, attached to nobody, and print its name, address and size.

    It stays until `mshare unlink` or `mshare rm`.
    """
    place = served_mount(mount)
    if addr is not None:
        _refuse_own_memory(addr, size)
    if populate and empty:
        raise click.UsageError("--populate and --empty: a hole has no memory")
    flags = os.O_CREAT | os.O_RDWR | (os.O_EXCL if excl else 0)
    try:
        region = mshare.mshare(name, addr, size, flags, mode, backing=backing, empty=empty, mount=place)
    except FileExistsError as error:
        text = f"region {render.printable(name)!r} exists; `mshare rm` takes it away, --no-excl takes it as it is"
        raise click.ClickException(text) from error
    with region:
        if populate:
            _populate(region, place if excl else None)
        made = region.stat()  # Not the window: an existing region may be seen elsewhere than where it lies.
    click.echo(f"{render.printable(made.name)}  {made.address:#x}  {render.size_in_both(made.size)}")


@click.command()
@region_argument
@click.argument("new")
@click.option(
    "--mode",
    type=parse_mode_option,
    metavar="OCTAL",
    default="600",
    show_default=True,
    help="Its permissions, less umask.",
)
@click.pass_obj
def fork(mount: Path | None, name: str, new: str, *, mode: int) -> None:
    """Make region NEW: region NAME as it is now. Print its name, address and size.

    It is there at once, whatever the size: memory is copied where one of the two changes, and where NEW is read. It
    belongs to you, and stays until `mshare unlink` or `mshare rm`. Needs write permission on the mount and on NAME; if
    that is your own, read permission.
    """
    place = served_mount(mount)
    with about_region(name):
        region = _attached_somewhere(name, place)
    with region:
        origin = region.stat()
        try:
            region.fork(new, mode)
        except FileExistsError as error:
            text = f"region {render.printable(new)!r} exists; `mshare rm` takes it away"
            raise click.ClickException(text) from error
    click.echo(f"{render.printable(new)}  {origin.address:#x}  {render.size_in_both(origin.size)}")


def _attached_somewhere(name: str, place: Path) -> mshare.Region:
    """Attached where the region lies, or above all that the daemon places if we are there ourselves."""
    try:
        return _attached(name, None, place)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return _attached(name, WINDOW_END, place)


def _attached(name: str, addr: int | None, place: Path) -> mshare.Region:
    """For writing, else for reading, which is enough for its owner."""
    try:
        return mshare.mshare(name, addr, 0, os.O_RDWR, mount=place)
    except PermissionError:
        return mshare.mshare(name, addr, 0, os.O_RDONLY, mount=place)


@click.command()
@region_argument
@click.pass_obj
def unlink(mount: Path | None, name: str) -> None:
    """End region NAME: its name, its memory and its mappings. Nobody may be attached to it; see `rm`.

    Needs write permission on the region.
    """
    place = served_mount(mount)
    with about_region(name):
        mshare.mshare_unlink(name, mount=place)


@click.command()
@region_argument
@click.pass_obj
def rm(mount: Path | None, name: str) -> None:
    """Take the name of region NAME away at once; its memory goes when the last attached process lets go of it.

    Needs write permission on the mount; where that is sticky, only the region's owner and root may.
    """
    place = served_mount(mount)
    with about_region(name):
        mshare.remove(name, mount=place)


def _populate(region: mshare.Region, made_in: Path | None) -> None:
    """Touch everything, as madvise(2) does; a region that was made for it is taken away when memory is short."""
    try:
        with progress.steps("populating", region.size) as done:
            for offset in range(0, region.size, _POPULATED_AT_ONCE):
                length = min(_POPULATED_AT_ONCE, region.size - offset)
                region.madvise(offset, length, Advice.POPULATE_WRITE)
                done(length)
    except BaseException as error:
        if made_in is not None:
            mshare.remove(region.name, mount=made_in)
        if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EFAULT):  # EFAULT: in a SIGBUS's place.
            text = "too little memory to populate it; free some, or make it without --populate"
            raise OSError(errno.ENOMEM, text) from error
        raise


def _refuse_own_memory(addr: int, size: int) -> None:
    """Creating a region where something is mapped would donate it: here, this command's own code and data."""
    if found := syscalls.own_mappings(addr, addr + size):
        raise OSError(
            errno.EINVAL,
            f"{addr:#x}+{size:#x} is in use in this process from {found[0].start:#x} on, as in many others; "
            f"choose an address between {WINDOW_START:#x} and {WINDOW_END:#x}, or leave --addr out",
        )
