"""What is known of a fenced block: whether it is a file, what it prints, whether it shows an output or is drawn."""

from __future__ import annotations

import pytest
from documents import Block, blocks, documents


def block(text: str, kind: str = "text") -> Block:
    return Block("a document", kind, text)


def test_documents_are_found_wherever_they_lie_and_none_that_a_command_has_made() -> None:
    found = documents()
    assert {"README.md", "docs/tutorial.md", "docs/howto/systemd.md", "msharefs/README.md"} <= set(found)
    assert not any(document.startswith((".", "docs/_build", "benchmarks/results")) for document in found)


def test_blocks_are_found_in_order_with_what_stands_behind_the_fence() -> None:
    kinds = [each.kind for each in blocks("docs/tutorial.md")]
    assert kinds[:4] == ["sh", "sh", "python", "sh"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("# a.py\nx\n", "a.py"), ("/* a.c */\nx\n", "a.c"), ("x  # a.py\n", None), ("# about a.py\n", None)],
)
def test_a_block_whose_first_line_is_a_name_is_that_file(text: str, name: str | None) -> None:
    assert block(text).file == name


def test_what_is_printed_stands_behind_it() -> None:
    assert block('print(a)  # 1\nb()  # 2\nif c:\n    print("d")  # e f\n').printed == ["1", "e f"]


@pytest.mark.parametrize(
    ("text", "output", "shown"),
    [
        ("a b\n", "a b\n", True),
        ("a b\n", "a b  \n", True),
        ("a b\n", "a  b\n", False),
        ("a b\n", "a b\nc\n", False),
        ("a ... c\n", "a (b) c\n", True),
        ("a ... c\n", "a\n c\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a\n...\nd\n", "a\nb\n", False),
        ("a.b\n", "acb\n", False),
    ],
)
def test_a_block_shows_an_output_line_by_line(text: str, output: str, shown: bool) -> None:
    assert block(text).shows(output) is shown


def test_a_drawing_has_boxes_and_is_no_list_of_commands() -> None:
    assert block(" +---+   +---+\n | a |   | b |\n +---+   +---+\n  from   to\n").is_drawing
    assert not block("mshare ls | grep a\nmshare rm a\nls\n").is_drawing
    assert not block("docker run -v a:b image\n").is_drawing
