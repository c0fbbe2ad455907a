"""Reference pages as values."""

from __future__ import annotations

import pickle

import pytest

from msharefs.addr import PAGE_SIZE
from msharefs.errors import InvalidArgumentError
from msharefs.refpage import RefPage


@pytest.mark.parametrize("content", [b"\xaa", b"\xaa" * 2, b"\xaa" * PAGE_SIZE])
def test_equal_contents_make_equal_ones_however_they_are_given(content: bytes) -> None:
    assert RefPage.of(content) == RefPage(b"\xaa")
    assert hash(RefPage.of(content)) == hash(RefPage(b"\xaa"))


@pytest.mark.parametrize("size", [None, 4, 8, PAGE_SIZE])
def test_content_repeats_throughout_a_page(size: int | None) -> None:
    page = RefPage.of(b"abcd", size)
    assert page.repeated(PAGE_SIZE) == b"abcd" * (PAGE_SIZE // 4)


def test_what_does_not_repeat_is_kept_whole() -> None:
    content = bytes(range(256)) * 15 + bytes(256)
    assert RefPage.of(content).pattern == content


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (b"", None),
        (b"abc", None),
        (bytes(2 * PAGE_SIZE), None),
        (b"ab", 3),
        (b"ab", 0),
        (b"ab", -4),
        (b"ab", 1),
        (b"ab", 2 * PAGE_SIZE),
    ],
)
def test_lengths_are_powers_of_two_up_to_a_page(content: bytes, size: int | None) -> None:
    with pytest.raises(InvalidArgumentError, match="reference page"):
        RefPage.of(content, size)


def test_it_goes_to_other_processes_as_a_value() -> None:
    page = RefPage.of(b"abcd")
    assert pickle.loads(pickle.dumps(page)) == page


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"\xaa", "aa"), (bytes(range(16)), bytes(range(16)).hex()), (bytes(range(32)), bytes(range(16)).hex() + "...")],
)
def test_its_text_is_hexadecimal_and_short(content: bytes, text: str) -> None:
    assert str(RefPage.of(content)) == text
