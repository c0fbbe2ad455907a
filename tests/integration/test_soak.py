"""The soak for a while: two minutes where CI is set; MSHAREFS_SOAK_SECONDS sets another time. See tests/soak.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = os.environ.get("MSHAREFS_SOAK_SECONDS", "120" if os.environ.get("CI") else "10")
SOAK = Path(__file__).parents[1] / "soak.py"


@pytest.mark.usefixtures("_needs_the_kernel")
@pytest.mark.timeout(2 * float(SECONDS) + 300)
def test_fifty_processes_find_what_they_stored() -> None:
    done = subprocess.run([sys.executable, SOAK, "--seconds", SECONDS], capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "errors: 0" in done.stdout
