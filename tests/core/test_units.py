"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.errors import InvalidArgumentError
from msharefs.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("2K", 2 << 10),
        ("2M", 2 << 20),
        ("1GiB", 1 << 30),
        ("1gb", 1 << 30),
        ("512g", 512 << 30),
        ("512G", 512 << 30),
        ("3T", 3 << 40),
        ("1P", 1 << 50),
        (" 2 MiB ", 2 << 20),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "M", "-1", "-2M", "+2M", "1.5G", "1e6", "0x1000", "2X", "2MM", "2M 3K", "2 M B", "1_000", "two"],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"not a size: .*write 4096, 2M"):
        parse_size(text)


def test_a_number_too_long_to_be_one_is_refused_too() -> None:
    with pytest.raises(InvalidArgumentError):
        parse_size("9" * 5000)


@pytest.mark.parametrize("text", ["2\N{KELVIN SIGN}", "\N{ARABIC-INDIC DIGIT THREE}M"])
def test_letters_and_digits_are_those_of_ascii(text: str) -> None:
    """Case-insensitive matching would take the Kelvin sign for a K."""
    with pytest.raises(InvalidArgumentError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2 << 20, "2 MiB"),
        (1 << 30, "1 GiB"),
        (512 << 30, "512 GiB"),
        (3 << 40, "3 TiB"),
        (5 << 50, "5 PiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_are_written_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 1023), st.integers(0, 5))
def test_what_is_written_in_whole_units_is_read_back(number: int, power: int) -> None:
    size = number << (10 * power)
    assert parse_size(format_size(size)) == size
