"""The machine of one's own that documents are tried on: nothing that is done in it shows outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import ROOT
from own_machine import OwnMachine

pytestmark = pytest.mark.usefixtures("_needs_the_kernel")

MARK = "msharefs-test-of-documents"
LONG = "86399.75"


def runs(argument: str) -> bool:
    """Whether there is a process that was started with it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # It has just ended.
            found.append(path.read_bytes())
    return f"sleep\0{argument}\0".encode() in found


def test_nothing_that_is_written_in_it_shows_outside(tmp_path: Path) -> None:
    places = ("/etc", "/run", "/tmp", "/var/log", "/dev/shm")
    with OwnMachine(tmp_path, None) as machine:
        for place in places:
            assert machine.shell(f"touch {place}/{MARK}").returncode == 0
        assert not any((Path(place) / MARK).exists() for place in places)
        assert "Read-only" in machine.shell(f"touch /usr/{MARK}").stderr
        assert "Read-only" in machine.shell(f"touch /root/{MARK}").stderr


def test_what_was_started_and_mounted_in_it_goes_with_it(
    tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    with OwnMachine(tmp_path, None) as machine:
        assert machine.shell(f"mkdir m; mount -t tmpfs {MARK} m; sleep {LONG} > /dev/null 2>&1 &").returncode == 0
        eventually(lambda: runs(LONG))
    assert not runs(LONG)
    assert MARK not in Path("/proc/self/mountinfo").read_text()


def test_it_looks_like_a_checkout_and_its_user_is_root(tmp_path: Path) -> None:
    with OwnMachine(tmp_path, None) as machine:
        assert machine.shell("sudo id -u; ls -d README.md scripts/demo .venv/bin/python; pwd").stdout.splitlines() == [
            "0",
            ".venv/bin/python",
            "README.md",
            "scripts/demo",
            str(tmp_path),
        ]
        assert machine.shell("false; true").returncode == 1
        machine.write("new.py", "print(1)")
        assert machine.run("python", "new.py").stdout == "1\n"
        with pytest.raises(FileExistsError):
            machine.write("README.md", "")
    assert (ROOT / "README.md").read_text()
