"""What ``*_types.py`` beside this file says of types, mypy agrees with."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(HERE.glob("*_types.py")), ids=lambda path: path.name)
def test_mypy_agrees(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed: scripts/setup installs it")
    monkeypatch.chdir(HERE.parent.parent)
    out, err, status = api.run(["--strict", str(path.relative_to(Path.cwd()))])
    assert status == 0, out + err
