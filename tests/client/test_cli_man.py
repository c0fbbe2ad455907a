"""Manual pages: from the commands, for man(1)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare.cli import cli as group
from mshare.cli.man import escaped

Mshare = Callable[..., Any]


@pytest.fixture
def pages(cli: Mshare, tmp_path: Path) -> dict[str, str]:
    assert cli("man", "--out", str(tmp_path / "man")).lines == []
    return {path.name: path.read_text() for path in (tmp_path / "man").iterdir()}


def test_there_is_a_page_for_each_command_and_the_daemon(pages: dict[str, str]) -> None:
    assert set(pages) == {"mshare.1", "mshared.8", *(f"mshare-{name}.1" for name in group.commands)}


def test_a_page_says_what_help_says(pages: dict[str, str]) -> None:
    text = pages["mshare-create.1"]
    assert text.startswith('.TH "MSHARE-CREATE" "1"')
    assert "mshare\\-create \\- create region NAME" in text
    for option in ("\\-\\-size SIZE", "\\-\\-populate", "\\-h, \\-\\-help"):
        assert f".TP\n.B {option}\n" in text
    assert ".TP\n.B 2\nWrong usage" in text
    assert "\\-\\-hugetlb\\-pool SIZE" in pages["mshared.8"]
    assert ".B heat\n" in pages["mshare.1"]


def test_one_page_goes_to_standard_output(cli: Mshare, pages: dict[str, str]) -> None:
    assert "\n".join(cli("man", "ls").lines) + "\n" == pages["mshare-ls.1"]
    assert cli("man").lines[0].startswith('.TH "MSHARE"')
    assert cli("man", "nothing").status == 2


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff here to read manual pages")
def test_groff_finds_nothing_wrong(pages: dict[str, str]) -> None:
    groff = ["groff", "-man", "-Tascii", "-P-c", "-P-bou", "-ww"]
    for name, text in pages.items():
        done = subprocess.run(groff, input=text, capture_output=True, text=True, check=True)
        assert done.stderr == "", name
        assert "EXIT STATUS" in done.stdout


def test_roff_takes_no_line_for_a_request() -> None:
    assert escaped(".regions") == "\\&.regions"
    assert escaped("a\\b 'c'") == "a\\eb \\(aqc\\(aq"
