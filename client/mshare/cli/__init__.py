"""The command ``mshare``.

One file an aspect: ``show`` looks at regions, ``top`` at what happens in them (``samples``), ``heat`` draws one,
``faults`` and ``explain`` tell what was refused and why, ``change`` makes, forks and ends regions, ``daemon`` starts
and stops mshared, ``units`` has systemd do so, ``doctor`` judges the machine by the facts of ``machine``, ``fix`` cures
it; ``complete`` and ``man`` are for shells and man(1); ``place``, ``render`` and ``progress`` are what all have in
common.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click

from mshare.cli import change, complete, daemon, doctor, explain, faults, heat, man, place, show, top, units
from mshare.discovery import ENVIRONMENT

__all__ = ["cli", "main"]


@click.group(cls=place.TranslatingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="msharefs")
@click.option(
    "--mount",
    type=Path,  # Not click.Path, which would ask the mount at once, hung as it may be.
    envvar=ENVIRONMENT,
    metavar="DIR",
    show_envvar=True,
    help="The mount to use. [default: your own, else root's]",
)
@click.pass_context
def cli(context: click.Context, *, mount: Path | None) -> None:
    """Named, shared pieces of address space: look at them, make and end them, run their daemon.

    SIZE is written as 4096, 2M, 1G or 512G, in powers of 1024. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    context.obj = mount


for command in (
    show.ls,
    show.stat,
    show.maps,
    heat.heat,
    top.top,
    faults.faults,
    faults.trace,
    explain.explain,
    change.create,
    change.fork,
    change.unlink,
    change.rm,
    doctor.doctor,
    daemon.up,
    daemon.down,
    units.install_units,
    complete.completion,
    man.man,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line of this process, and end it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Whatever the locale can print, a name never ends us.
    cli(prog_name="mshare")
