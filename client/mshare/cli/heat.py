"""mshare heat: a picture of a region by address, in a terminal, in a pipe, and as a file."""

from __future__ import annotations

import itertools
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

import attrs
import click

from mshare import inspect
from mshare.cli import render
from mshare.cli.complete import region_argument
from mshare.cli.place import about_region, served_mount
from msharefs.protocol import Heat, RegionStat

if TYPE_CHECKING:
    from rich.text import Text

Colour = tuple[int, int, int]
_FULL: Final = 255
_LABEL: Final = 14
_MOST_COLUMNS: Final = 64
_ROWS: Final = 32
"""Rows of pieces; a terminal shows two in a line."""
_HOLE: Final[Colour] = (24, 24, 27)
_EMPTY: Final[Colour] = (51, 65, 85)
_PRESENT: Final[Colour] = (34, 197, 94)
_SHARED: Final[Colour] = (168, 85, 247)
_DIRTY: Final[Colour] = (249, 115, 22)
_LEGEND: Final = (
    ("present", _PRESENT, "# all, + some"),
    ("shared with forks", _SHARED, "s"),
    ("dirty", _DIRTY, "d"),
    ("mapped, no page yet", _EMPTY, "."),
    ("hole", _HOLE, "blank"),
)
_PIXELS: Final = 8
"""Width and height of a piece in a picture."""


@attrs.frozen
class Picture:
    """A region's heat in rows of ``columns`` pieces."""

    name: str
    size: int
    heat: Heat
    columns: int

    @property
    def rows(self) -> int:
        """How many rows there are; the last may be shorter."""
        return -(-len(self.heat.mapped) // self.columns)

    def colour(self, row: int, column: int) -> Colour | None:
        """Of one piece, None behind the end."""
        index = row * self.columns + column
        return None if index >= len(self.heat.mapped) else colour_of(self.heat, index)


@click.command()
@region_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a picture instead: FILE.svg or FILE.png.",
)
@render.json_option
@click.pass_obj
def heat(mount: Path | None, name: str, *, out: Path | None, as_json: bool) -> None:
    """Show region NAME, which must be readable for you, as a picture by address.

    Each piece of it is a hole, mapped without a page, present (the brighter, the more of it), shared with forks, or
    dirty: stored to and not in its file yet. At a terminal colours tell, in a pipe letters.
    """
    if out is not None and out.suffix.lower() not in (".svg", ".png"):
        raise click.BadParameter("a picture is a file that ends in .svg or .png", param_hint="'--out'")
    place = served_mount(mount)
    columns = _MOST_COLUMNS
    if render.is_fancy():
        columns = max(8, min(columns, shutil.get_terminal_size().columns - _LABEL))
    with about_region(name):
        found = inspect.stat(name, place)
        picture = take(found, inspect.heat(name, columns * _ROWS, place), columns)
    if as_json:
        render.print_json(picture.heat)
    elif out is not None:
        out.write_bytes(png(picture) if out.suffix.lower() == ".png" else svg(picture).encode())
    elif render.is_fancy():
        from rich.console import Console

        console = Console()
        console.print(as_text(picture), soft_wrap=True)
    else:
        click.echo("\n".join(plain(picture)))


def take(stat: RegionStat, found: Heat, columns: int) -> Picture:
    """The picture of a region."""
    return Picture(stat.name, stat.size, found, columns)


def colour_of(found: Heat, index: int) -> Colour:
    """What stands out most in a piece, the brighter, the more of it."""
    shared = found.shared[index] if _mostly_shared(found, index) else 0
    for part, colour in ((found.dirty[index], _DIRTY), (shared, _SHARED), (found.present[index], _PRESENT)):
        if part:
            strength = 0.35 + 0.65 * part / _FULL
            mixed = [round(low + (high - low) * strength) for low, high in zip(_EMPTY, colour, strict=True)]
            return (mixed[0], mixed[1], mixed[2])
    return _EMPTY if found.mapped[index] else _HOLE


def letter_of(found: Heat, index: int) -> str:
    """The same as a letter."""
    if found.dirty[index]:
        return "d"
    if _mostly_shared(found, index):
        return "s"
    if found.present[index]:
        return "#" if found.present[index] == _FULL else "+"
    return "." if found.mapped[index] else " "


def _mostly_shared(found: Heat, index: int) -> bool:
    return 0 < found.present[index] <= 2 * found.shared[index]


def title(picture: Picture) -> str:
    """The line above a picture."""
    size, cell, row = map(render.short_size, (picture.size, picture.heat.cell, picture.heat.cell * picture.columns))
    return f"{render.printable(picture.name)}: {size}, {cell} a piece, {row} a row"


def plain(picture: Picture) -> Iterator[str]:
    """Lines of letters, a row each, with the offset before it."""
    yield title(picture)
    count = len(picture.heat.mapped)
    for row in range(picture.rows):
        first = row * picture.columns
        pieces = range(first, min(first + picture.columns, count))
        letters = "".join(letter_of(picture.heat, index) for index in pieces)
        yield f"{first * picture.heat.cell:#12x} |{letters}|"
    yield "; ".join(f"{letter}: {what}" for what, _, letter in _LEGEND)


def as_text(picture: Picture) -> Text:
    """Half blocks, two rows a line."""
    from rich.style import Style
    from rich.text import Text

    text = Text(f"{title(picture)}\n")
    for row in range(0, picture.rows, 2):
        text.append(f"{row * picture.columns * picture.heat.cell:#12x}  ", "dim")
        pairs = [(picture.colour(row, column), picture.colour(row + 1, column)) for column in range(picture.columns)]
        for (above, below), group in itertools.groupby(pairs):
            if above is not None:
                style = Style(color=_hex(above), bgcolor=_hex(below) if below else None)
                text.append("▀" * sum(1 for _ in group), style)
        text.append("\n")
    text.append(" " * _LABEL)
    for what, colour, _ in _LEGEND:
        text.append("■ ", _hex(colour))
        text.append(f"{what}  ")
    return text


def svg(picture: Picture) -> str:
    """A picture for browsers and documents."""
    width = picture.columns * _PIXELS
    height = picture.rows * _PIXELS
    left, top, below = 90, 24, 26
    font = 'font-family="monospace" font-size="10" fill="#71717a"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 10}" height="{top + height + below}">',
        f'<text x="{left}" y="14" {font}>{escape(title(picture))}</text>',
    ]
    for row in range(picture.rows):
        y = top + row * _PIXELS
        if row % 4 == 0:
            offset = f"{row * picture.columns * picture.heat.cell:#x}"
            parts.append(f'<text x="{left - 6}" y="{y + _PIXELS}" text-anchor="end" {font}>{offset}</text>')
        for x, count, colour in _runs(picture, row):
            size = f'width="{count * _PIXELS}" height="{_PIXELS}"'
            parts.append(f'<rect x="{left + x * _PIXELS}" y="{y}" {size} fill="{_hex(colour)}"/>')
    x = left
    for what, colour, _ in _LEGEND:
        y = top + height + 10
        parts.append(f'<rect x="{x}" y="{y}" width="{_PIXELS}" height="{_PIXELS}" fill="{_hex(colour)}"/>')
        parts.append(f'<text x="{x + 12}" y="{y + _PIXELS}" {font}>{what}</text>')
        x += 26 + 6 * len(what)
    return "\n".join([*parts, "</svg>\n"])


def png(picture: Picture) -> bytes:
    """The pieces alone, as pixels (PNG: 8 bits a channel, no filter)."""
    lines = []
    for row in range(picture.rows):
        colours = (picture.colour(row, column) or (255, 255, 255) for column in range(picture.columns))
        line = b"".join(bytes(colour) * _PIXELS for colour in colours)
        lines += [b"\0" + line] * _PIXELS
    header = struct.pack(">IIBBBBB", picture.columns * _PIXELS, picture.rows * _PIXELS, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _runs(picture: Picture, row: int) -> Iterator[tuple[int, int, Colour]]:
    """Neighbours of the same colour: where they begin, and how many they are."""
    at = 0
    for colour, group in itertools.groupby(picture.colour(row, column) for column in range(picture.columns)):
        count = sum(1 for _ in group)
        if colour is not None:
            yield at, count, colour
        at += count


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
