"""mshare heat: the same picture as letters, colours, SVG and PNG."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare.cli.heat import Picture, as_text, colour_of, letter_of, plain, png, svg
from msharefs.protocol import Heat

Mshare = Callable[..., Any]
NOBODY = 65534

HEAT = Heat(
    cell=4096,
    mapped=(255, 255, 255, 0, 255, 255, 255),
    present=(255, 1, 0, 0, 255, 255, 255),
    dirty=(0, 0, 0, 0, 9, 0, 0),
    shared=(0, 0, 0, 0, 200, 255, 100),
)
PICTURE = Picture("a<b>", 7 * 4096, HEAT, 4)


@pytest.fixture
def mixed(client: Callable[..., Any], name: str) -> str:
    """A region of 512 pages: some present, one of them in the second half, and a hole of 64."""
    client().do(
        f"""
        r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, backing="4k")
        r.buf[:128 * PAGE] = bytes(128 * PAGE)
        r.buf[300 * PAGE] = 1
        r.munmap(448 * PAGE, 64 * PAGE)
        """
    )
    return name


def test_letters_tell_what_is_where(cli: Mshare, mixed: str) -> None:
    """In a pipe a row has 64 pieces, here pages."""
    head, *rows, legend = cli("heat", mixed).lines
    assert head == f"{mixed}: 2MiB, 4KiB a piece, 256KiB a row"
    drawn = [row.split("|")[1] for row in rows]
    assert drawn[:3] == ["#" * 64, "#" * 64, "." * 64]
    assert drawn[4] == "." * (300 - 256) + "#" + "." * (63 - 300 + 256)
    assert drawn[7] == " " * 64
    assert rows[1].split()[0] == "0x40000"
    assert legend.startswith("#")


def test_json_has_the_numbers(cli: Mshare, mixed: str) -> None:
    told = cli("heat", mixed, "--json").json
    assert told["cell"] == 4096
    assert sum(map(bool, told["present"])) == 129
    assert told["mapped"][-1] == 0


@pytest.mark.parametrize(("kind", "first"), [("svg", b"<svg "), ("png", b"\x89PNG\r\n")])
def test_a_picture_goes_to_a_file(cli: Mshare, mixed: str, tmp_path: Path, kind: str, first: bytes) -> None:
    path = tmp_path / f"picture.{kind}"
    assert cli("heat", mixed, "--out", str(path)).lines == []
    assert path.read_bytes().startswith(first)


def test_a_picture_of_another_kind_is_wrong_usage(cli: Mshare, tmp_path: Path) -> None:
    ran = cli("heat", "any", "--out", str(tmp_path / "picture.jpeg"))
    assert ran.status == 2
    assert ".svg or .png" in ran.err


def test_who_may_not_read_sees_nothing(cli: Mshare, mixed: str) -> None:
    assert "its owner can chmod" in cli("heat", mixed, uid=NOBODY).error


def test_what_stands_out_most_is_shown() -> None:
    """Dirty before shared with forks before present; shared, where at least half is."""
    assert "".join(letter_of(HEAT, index) for index in range(7)) == "#+. ds#"
    assert len({colour_of(HEAT, index) for index in range(7)}) == 6


def test_rows_end_where_the_region_does() -> None:
    _, first, second, _ = plain(PICTURE)
    assert (first, second) == ("         0x0 |#+. |", "      0x4000 |ds#|")


def test_at_a_terminal_a_line_has_two_rows() -> None:
    text = as_text(PICTURE)
    title, line, _legend = text.plain.splitlines()
    assert title.startswith("a<b>: 28KiB")
    assert line.count("▀") == 4
    last = [span.style for span in text.spans if span.start == len(title) + 1 + 14 + 3]
    assert [getattr(style, "bgcolor", None) for style in last] == [None]


def test_the_svg_is_well_formed_and_has_every_piece() -> None:
    root = ET.fromstring(svg(PICTURE))
    rects = [rect.attrib for rect in root if rect.tag.endswith("rect")]
    assert sum(int(rect["width"]) // 8 for rect in rects) == 7 + 5
    texts = [text.text for text in root if text.tag.endswith("text")]
    assert texts[0] == "a<b>: 28KiB, 4KiB a piece, 16KiB a row"


def test_the_png_has_the_colours_of_the_pieces() -> None:
    data = png(PICTURE)
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (32, 16)
    pixels = zlib.decompress(chunks[b"IDAT"])
    line = 1 + 32 * 3
    assert len(pixels) == 16 * line
    assert pixels[1:4] == bytes(colour_of(HEAT, 0))
    assert pixels[8 * line + 1 : 8 * line + 4] == bytes(colour_of(HEAT, 4))
    assert pixels[8 * line + 1 + 24 * 3 : 8 * line + 4 + 24 * 3] == b"\xff\xff\xff"
