"""How things look: tables for people at a terminal, the same columns plain in a pipe, JSON for programs."""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import click

from msharefs.units import format_size

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

F = TypeVar("F", bound=Callable[..., object])

json_option: Final[Callable[[F], F]] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: sizes in bytes, addresses and modes as plain numbers."
)


@attrs.frozen
class Column:
    """A column of a table; numbers stand at its right edge."""

    title: str
    right: bool = False


def is_fancy() -> bool:
    """Whether to write for a terminal: standard output is one, and nobody asked for less (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, titles: bool = True) -> None:
    """Print a table. Cells are taken as they are: pass what others chose through ``printable``."""
    if is_fancy() and titles:
        _print_rich(columns, rows)
    else:
        text = plain_table(columns, rows)
        click.echo(text if titles else text.partition("\n")[2], nl=False)


def plain_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """The table as aligned text, two blanks between columns and none at the end of a line."""
    lines = [[column.title for column in columns], *map(list, rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        cells = zip(line, widths, columns, strict=True)
        padded = (cell.rjust(width) if column.right else cell.ljust(width) for cell, width, column in cells)
        text += "  ".join(padded).rstrip() + "\n"
    return text


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print keys and values, a pair a line."""
    pairs = list(pairs)
    width = max(len(key) for key, _ in pairs)
    for key, value in pairs:
        click.echo(f"{styled(key.ljust(width), bold=True)}  {value}")


def print_json(value: object) -> None:
    """Print attrs instances, alone or in lists, as JSON. Bytes of a name that are no text become lone surrogates."""
    click.echo(json.dumps(value, indent=2, default=attrs.asdict))


def styled(text: str, **style: Any) -> str:  # noqa: ANN401 - whatever click.style takes
    """The text in colour, where colours are wanted."""
    return click.style(text, **style) if is_fancy() else text


def printable(text: str) -> str:
    """A name as it may be printed anywhere: bytes that are no text, and control characters, as escapes."""
    decoded = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in decoded)


def short_size(size: int) -> str:
    """``2MiB``: one word, which ``--size`` takes back when it is whole."""
    return format_size(size).replace(" ", "")


def size_in_both(size: int) -> str:
    """``2097152 (2 MiB)``."""
    return f"{size} ({format_size(size)})" if size >= 1024 else f"{size}"


def duration(nanoseconds: float) -> str:
    """``36us``: two digits or three, and the unit."""
    value, unit = float(nanoseconds), "ns"
    for larger in ("us", "ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") + unit


def user_name(uid: int) -> str:
    """The user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def rich_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
    """The table as rich draws it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        justify: JustifyMethod = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a name like "[bold]" is no markup.
    return table


def _print_rich(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    from rich.cells import cell_len
    from rich.console import Console

    rows = list(rows)
    titles = [column.title for column in columns]
    needed = sum(max(map(cell_len, cells)) + 2 for cells in zip(titles, *rows, strict=True))
    console = Console()
    console.width = max(console.width, needed)  # Where that is too wide the terminal folds lines, not we addresses.
    console.print(rich_table(columns, rows))
