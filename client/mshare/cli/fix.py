"""mshare doctor --fix: the commands that would cure a lack, and, asked and as root, running them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click

from mshare.cli import render
from mshare.cli.findings import Finding, Level
from mshare.cli.machine import Machine

Command = tuple[str, ...]
_APT: Final[Command] = ("apt-get", "install", "-y", "--no-install-recommends")
_BUILD: Final = ("libfuse3-dev", "pkg-config", "gcc", "python3-dev")
_NEEDS: Final = {"pyfuse3": "pyfuse3>=3.4,<4", "trio": "trio>=0.27"}


def fix(machine: Machine, findings: Iterable[Finding], *, yes: bool) -> bool:
    """Tell of each lack what would cure it, and do that where it is wanted; whether anything was done.

    Only root is asked; others are shown what to run as root.
    """
    done = False
    for finding in findings:
        if finding.level is Level.OK:
            continue
        click.echo(f"{finding.name}: {render.printable(finding.found)}")
        commands = commands_for(finding, machine)
        if not commands:
            click.echo(f"  by hand: {finding.cure}")
            continue
        for command in commands:
            click.echo(f"  {render.styled(shlex.join(command), bold=True)}")
        if os.geteuid() != 0:
            click.echo("  run that as root")
        elif yes or click.confirm("  run it?", default=False):
            done = run(commands) or done
    return done


def commands_for(finding: Finding, machine: Machine) -> list[Command]:
    """What root would run to cure a lack; nothing where a decision or another machine is needed."""
    packages = shutil.which("apt-get") is not None
    match finding.name:
        case "fuse":
            return [("modprobe", "fuse")]
        case "fusermount3" if packages:
            return [(*_APT, "fuse3")]
        case "userfaultfd" if machine.root and "No such file" in machine.userfaultfd.device:
            minor = _minor_number("userfaultfd")
            return [("mknod", "-m", "600", "/dev/userfaultfd", "c", "10", minor)] if minor else []
        case "daemon" if packages and machine.missing_modules:
            needs = [_NEEDS.get(module, module) for module in machine.missing_modules]
            return [(*_APT, *_BUILD), (sys.executable, "-m", "pip", "install", *needs)]
        case "daemon" if packages:
            return [(*_APT, "libfuse3-3")]
        case "map count":
            return [("sysctl", "-w", "vm.max_map_count=65530")]
        case "mount" if not machine.daemon.hangs:
            chosen = ("--mount", str(machine.daemon.mount)) if machine.daemon.mount else ()
            return [(sys.executable, "-c", "from mshare.cli import main; main()", *chosen, "up")]
    return []


def run(commands: Iterable[Command]) -> bool:
    """Run commands until one fails; whether all went well."""
    for command in commands:
        try:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode  # noqa: S603 - as shown
        except OSError as error:
            click.echo(f"  {command[0]}: {error.strerror}", err=True)
            return False
        if status:
            click.echo(f"  {command[0]} ended with {status}; nothing more is done about this", err=True)
            return False
    return True


def _minor_number(device: str) -> str | None:
    found = re.search(rf"^\s*(\d+)\s+{device}$", Path("/proc/misc").read_text(), re.MULTILINE)
    return found[1] if found else None
