"""The command that installs units for systemd: install-units."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from pathlib import Path
from typing import Final

import click

from mshare.cli.daemon import executable

_NAME: Final = "mshared.service"
_TEMPLATES: Final = Path(__file__).parents[1] / "systemd"
_MARK: Final = "# Installed by `mshare install-units`, which also takes it away: with --uninstall.\n"
_COMMAND: Final = re.compile(r"^ExecStart=.*$", re.MULTILINE)
_PLAIN: Final = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


@click.command("install-units")
@click.option("--user", is_flag=True, help="For your own manager: a daemon that serves you.")
@click.option("--directory", type=Path, metavar="DIR", help="Where units belong. [default: below]")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and where; change nothing.")
@click.option("--uninstall", is_flag=True, help="Take away what was installed.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- MSHARED OPTIONS]")
@click.pass_obj
def install_units(
    mount: Path | None, *, user: bool, directory: Path | None, dry_run: bool, uninstall: bool, options: tuple[str, ...]
) -> None:
    """Have systemd run mshared: write its unit, with the path of the mshared that belongs to this command.

    What follows -- goes to mshared, as in `mshare install-units -- --max-bytes 8G`. Units go to /etc/systemd/system, or
    with --user to $XDG_CONFIG_HOME/systemd/user (by default ~/.config). Running it again brings them up to date; a
    unit of that name that somebody else wrote is left alone.
    """
    place = (directory or default_directory(user=user)) / _NAME
    if uninstall:
        _uninstall(place, user=user, dry_run=dry_run)
        return
    command = [str(executable()), *(["--mount", os.path.abspath(mount)] if mount else []), *options]  # noqa: PTH100
    text = rendered(command, user=user)
    if dry_run:
        click.echo(f"# {place}\n{text}", nl=False)
        return
    _check_ours(place)
    _write(place, text)
    manager = _manager(user=user)
    click.echo(f"{place} is written; `{manager} daemon-reload && {manager} enable --now {_NAME}` starts mshared")


def default_directory(*, user: bool) -> Path:
    """Where the administrator's, or with ``user`` a user's own, units belong (systemd.unit(5))."""
    if not user:
        return Path("/etc/systemd/system")
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "systemd" / "user"


def rendered(command: list[str], *, user: bool) -> str:
    """The unit that runs that command."""
    template = (_TEMPLATES / ("user" if user else "") / _NAME).read_text()
    line = "ExecStart=" + " ".join(quoted(word) for word in command)
    return _MARK + _COMMAND.sub(lambda _: line, template)


def quoted(word: str) -> str:
    """A word as systemd reads it in a command line (systemd.service(5)). Raises OSError EINVAL for what it cannot."""
    if not word.isprintable() or not word.isascii():
        raise OSError(errno.EINVAL, f"{word!r} has characters that a unit's command line cannot have")
    escaped = word.replace("%", "%%").replace("$", "$$")
    if _PLAIN.fullmatch(word):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _uninstall(place: Path, *, user: bool, dry_run: bool) -> None:
    if not place.exists():
        raise FileNotFoundError(errno.ENOENT, f"there is no {place}: nothing to take away")
    _check_ours(place)
    manager = _manager(user=user)
    if dry_run:
        click.echo(f"{place} would be taken away")
        return
    place.unlink()
    click.echo(f"{place} is taken away; `{manager} stop {_NAME}; {manager} daemon-reload` stops mshared if it runs")


def _check_ours(place: Path) -> None:
    """Raises OSError EEXIST where somebody else's unit stands."""
    with contextlib.suppress(FileNotFoundError):
        if not place.read_text(errors="replace").startswith(_MARK):
            raise OSError(errno.EEXIST, f"{place} was not written by this command; move it away first")


def _write(place: Path, text: str) -> None:
    """Write a unit, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    draft = Path(name)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            os.fchmod(fd, 0o644)
        draft.replace(place)
    except BaseException:
        draft.unlink()
        raise


def _manager(*, user: bool) -> str:
    return "systemctl --user" if user else "systemctl"
