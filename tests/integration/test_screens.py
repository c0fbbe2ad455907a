"""The terminal screens in README.md: a script takes them, from a daemon that really runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = pytest.mark.pool

ROOT = Path(__file__).resolve().parents[2]
SCREENS = ("heat", "ls", "top")


@pytest.mark.usefixtures("_needs_the_kernel")
def test_the_script_takes_every_screen(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.screens", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(SCREENS)
    for path in tmp_path.iterdir():
        text = "".join(ET.parse(path).getroot().itertext())
        assert "mshare" in text
        assert "buffer-pool" in text or path.stem == "heat"


@pytest.mark.parametrize("name", SCREENS)
def test_the_screens_that_are_shown_ask_nobody_for_fonts(name: str) -> None:
    text = (ROOT / "docs" / "screens" / f"{name}.svg").read_text()
    assert re.findall(r"url\(.?https?:", text) == []


def test_the_script_can_be_executed() -> None:
    assert os.access(ROOT / "scripts/screens", os.X_OK)
