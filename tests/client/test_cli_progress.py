"""What is shown while something takes long: at a terminal, after a while, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

STEPS = """
import sys
from mshare.cli import progress
progress.PATIENCE = {patience}
with progress.steps("populating", 8 << 20) as done:
    done(4 << 20)
    if {patience} == 0: await_timer()
print("end")
"""
WAITING = """
import sys
from mshare.cli import progress
progress.PATIENCE = {patience}
with progress.waiting("starting", lambda: "(7 huge pages)"):
    if {patience} == 0: await_timer()
print("end")
"""
AWAIT = """
import threading
def await_timer():
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
"""


def at_a_terminal(code: str, *, term: str = "xterm") -> str:
    """What a program says at a terminal."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", AWAIT + code], stdout=slave, stderr=slave, env=env, timeout=60)
    os.write(slave, b"\0")
    os.close(slave)
    said = b""
    while not said.endswith(b"\0"):
        said += os.read(master, 65536)
    os.close(master)
    assert done.returncode == 0, said
    return said.decode()


@pytest.mark.parametrize(("code", "words"), [(STEPS, "populating"), (WAITING, "starting (7 huge pages)")])
def test_at_a_terminal_it_is_shown_after_a_while(code: str, words: str) -> None:
    assert words in at_a_terminal(code.format(patience=0))
    assert words not in at_a_terminal(code.format(patience=60))
    assert words not in at_a_terminal(code.format(patience=60), term="dumb")


@pytest.mark.parametrize("code", [STEPS, WAITING])
def test_in_a_pipe_nothing_is_shown(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code.format(patience=60)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("end\n", "")
