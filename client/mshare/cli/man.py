"""mshare man: manual pages, made from the commands themselves so that both say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Final

import click

from mshare.discovery import ENVIRONMENT

EXIT_STATUS: Final = (
    (0, "It is done."),
    (1, "It failed; standard error says why, in one line, and what to do."),
    (2, "Wrong usage: nothing was tried."),
    (143, "top and trace: ended by SIGTERM, and all that was to be written is. Ctrl-C ends them with 0."),
)
_VARIABLES: Final = (
    (ENVIRONMENT, "The mount to use where --mount does not say."),
    ("NO_COLOR", "If set and not empty, no colours, and tables as in a pipe."),
    ("XDG_RUNTIME_DIR", "Where a user's own mount is, in mshare; root's is /run/mshare."),
)
_PARAGRAPH: Final = re.compile(r"\n\s*\n")
_CODE: Final = re.compile(r"`([^`]+)`")


@click.command()
@click.argument("command", required=False)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write all pages into this directory.")
@click.pass_context
def man(context: click.Context, command: str | None, *, out: Path | None) -> None:
    """Print the manual page of mshare, or of one of its commands; `mshare man ls | man -l -` shows it.

    With --out, all pages: mshare.1, mshare-ls.1 and so on, and mshared.8 where the daemon is installed. A directory
    that man(1) finds is /usr/local/share/man/man1.
    """
    pages = dict(all_pages(context.find_root().command))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (out / name).write_text(text)
        return
    name = f"mshare-{command}.1" if command else "mshare.1"
    if command == "mshared":
        name = "mshared.8"
    if name not in pages:
        raise click.BadParameter(f"there is no command {command!r}", param_hint="COMMAND")
    click.echo(pages[name], nl=False)


def all_pages(root: click.Command) -> Iterator[tuple[str, str]]:
    """File names and texts of all pages."""
    assert isinstance(root, click.Group)
    names = sorted(root.commands)
    yield "mshare.1", page(root, "mshare", 1, [f"mshare-{name}(1)" for name in names])
    for name in names:
        yield f"mshare-{name}.1", page(root.commands[name], f"mshare {name}", 1, ["mshare(1)"])
    for found in entry_points(group="console_scripts", name="mshared"):
        try:
            daemon = found.load()
        except ImportError:
            continue  # Installed without what the daemon needs.
        if isinstance(daemon, click.Command):
            yield "mshared.8", page(daemon, "mshared", 8, ["mshare(1)", "mshare-up(1)"])


def page(command: click.Command, name: str, section: int, see: list[str]) -> str:
    """One page, in roff (man(7))."""
    context = click.Context(command, info_name=name, help_option_names=["-h", "--help"])
    title, dashed = name.replace(" ", "-").upper(), name.replace(" ", "-")
    paragraphs = [" ".join(text.split()) for text in _PARAGRAPH.split(command.help or "")]
    first = paragraphs[0].split(". ")[0].rstrip(".")
    short = first[:1].lower() + first[1:]
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f'.TH "{title}" "{section}" "" "msharefs {version("msharefs")}" "msharefs"',
        f".SH NAME\n{escaped(dashed)} \\- {escaped(short)}",
        f".SH SYNOPSIS\n.B {escaped(name)}\n{escaped(usage)}",
        ".SH DESCRIPTION",
        "\n.PP\n".join(_text(paragraph) for paragraph in paragraphs),
    ]
    if isinstance(command, click.Group):
        parts.append(".SH COMMANDS")
        commands = [(name, command.commands[name]) for name in command.list_commands(context)]
        parts += (f".TP\n.B {escaped(name)}\n{_text(each.get_short_help_str(200))}" for name, each in commands)
    options = [each.get_help_record(context) for each in command.get_params(context) if isinstance(each, click.Option)]
    parts.append(".SH OPTIONS")
    parts += [f".TP\n.B {escaped(record[0])}\n{_text(record[1])}" for record in options if record is not None]
    parts.append(".SH EXIT STATUS")
    parts += [f".TP\n.B {code}\n{_text(text)}" for code, text in EXIT_STATUS]
    parts.append(".SH ENVIRONMENT")
    parts += [f".TP\n.B {variable}\n{_text(text)}" for variable, text in _VARIABLES]
    parts.append(".SH SEE ALSO\n" + ",\n".join(escaped(other) for other in see))
    return "\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that roff prints as it is."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\\&" + safe if safe.startswith((".", "\\(aq")) else safe


def _text(text: str) -> str:
    """A paragraph; what stands in backticks is bold."""
    return escaped(_CODE.sub(lambda found: f"\0{found[1]}\1", text)).replace("\0", "\\fB").replace("\1", "\\fR")
