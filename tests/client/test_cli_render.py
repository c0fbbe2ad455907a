"""How things look: names that are no text, sizes, and tables on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import attrs
import pytest

from mshare.cli import render
from mshare.cli.render import Column
from msharefs.protocol import RegionName
from msharefs.units import parse_size

TABLE = """
import io, sys
sys.stdout.reconfigure(errors="strict")
from mshare.cli import render
render.print_table([render.Column("NAME"), render.Column("SIZE", right=True)], [("[bold]x", "2MiB"), ("é", "10GiB")])
"""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain", "plain"),
        ("two words", "two words"),
        ("größe", "größe"),
        ("\udcff\udc80", r"\xff\x80"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("right-to-left \u202e", r"right-to-left \u202e"),
    ],
)
def test_a_name_can_be_printed_whatever_its_bytes(name: str, shown: str) -> None:
    """No escape sequence of somebody's reaches a terminal, and no line is broken."""
    assert render.printable(name) == shown
    shown.encode("utf-8", "strict")


def test_plain_columns_are_aligned_and_end_where_the_text_ends() -> None:
    columns = [Column("NAME"), Column("SIZE", right=True), Column("OWNER")]
    rows = [("a", "2MiB", "root"), ("longer", "1GiB", "x")]
    assert render.plain_table(columns, rows) == (
        "NAME    SIZE  OWNER\n"
        "a       2MiB  root\n"
        "longer  1GiB  x\n"
    )  # fmt: skip


def test_an_empty_table_is_its_head() -> None:
    assert render.plain_table([Column("NAME"), Column("SIZE")], []) == "NAME  SIZE\n"


def test_sizes_are_one_word_that_can_be_read_back() -> None:
    assert [render.short_size(size) for size in (0, 4096, 2 << 20, 3 << 39)] == ["0B", "4KiB", "2MiB", "1.5TiB"]
    assert parse_size(render.short_size(6 << 20)) == 6 << 20


def test_sizes_stand_in_bytes_and_in_words() -> None:
    assert [render.size_in_both(size) for size in (0, 1023, 2 << 20)] == ["0", "1023", "2097152 (2 MiB)"]


def test_a_user_without_a_name_is_a_number() -> None:
    assert render.user_name(0) == "root"
    assert render.user_name(3_999_999_999) == "3999999999"


def test_json_carries_names_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    """As lone surrogates, which Python turns back into the bytes."""
    region = RegionName("\udcff\n", 1 << 45, 2 << 20, "thp", 0, 0, 0o600, 0)
    render.print_json([region])
    assert json.loads(capsys.readouterr().out) == [attrs.asdict(region)]


def shown_on_terminal(code: str, **env: str) -> str:
    """What a program writes when its standard output is a terminal of 20 columns."""
    master, slave = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    variables |= {"TERM": "xterm", "COLUMNS": "20", **env}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 4096):
            text += chunk
    except OSError:
        pass  # How a terminal ends on Linux.
    finally:
        os.close(master)
        assert process.wait(60) == 0, text
    return text.decode().replace("\r\n", "\n")


def test_a_terminal_gets_a_bold_head() -> None:
    """And names as they are, not as markup of the library that draws the table."""
    text = shown_on_terminal(TABLE)
    assert "\x1b[1m" in text
    assert text.endswith("[bold]x   2MiB\né        10GiB\n")


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_who_wants_no_colours_gets_the_plain_table(env: dict[str, str]) -> None:
    assert shown_on_terminal(TABLE, **env) == "NAME      SIZE\n[bold]x   2MiB\né        10GiB\n"


def test_a_narrow_terminal_does_not_cut_addresses() -> None:
    code = """
from mshare.cli import render
render.print_table([render.Column("ADDRESS"), render.Column("OWNER")], [("0x200000000000", "somebody-else")])
"""
    assert "0x200000000000  somebody-else" in shown_on_terminal(code)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0ns"), (999, "999ns"), (1500, "1.5us"), (36_400, "36us"), (999_600, "1ms"), (2_000_000_000, "2s")],
)
def test_durations_have_two_digits_or_three(nanoseconds: int, text: str) -> None:
    assert render.duration(nanoseconds) == text
