"""The command ``mshare``, run as people run it: as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from mshare.cli import cli as group

PATIENCE = 30.0
READING = ("ls", "stat", "maps", "doctor")
_AS_USER = """
import ctypes, os, sys
from mshare.cli import main
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process started by that user is
main()
"""


@attrs.frozen
class Ran:
    """A command that has ended: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        """Of a command that succeeded, in silence on stderr."""
        assert (self.status, self.err) == (0, "")
        return self.out.splitlines()

    @property
    def error(self) -> str:
        """The one line of a command that failed."""
        assert self.status == 1, self.out
        *before, last = self.err.splitlines()
        assert before == []
        assert last.startswith("Error: ")
        return last.removeprefix("Error: ")


Mshare = Callable[..., Ran]


def command_for(uid: int | None = None) -> list[str]:
    """What to start for the command ``mshare``, as another user if need be."""
    code = "from mshare.cli import main\nmain()" if uid is None else _AS_USER.format(uid=uid)
    return [sys.executable, "-c", code]


@pytest.fixture
def mshare() -> Mshare:
    """Run ``mshare`` with arguments, as another user if need be."""

    def run(
        *arguments: str, mount: Path | None = None, uid: int | None = None, env: Mapping[str, str] | None = None
    ) -> Ran:
        variables = {key: value for key, value in os.environ.items() if key != "MSHAREFS"} | dict(env or {})
        if mount is not None:
            variables["MSHAREFS"] = str(mount)
        done = subprocess.run(
            [*command_for(uid), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=variables,
            timeout=PATIENCE,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def cli(mshare: Mshare, daemon: Any) -> Mshare:
    """The same for the daemon of the test. What only reads runs in this process, where that makes no difference."""

    def run(*arguments: str, uid: int | None = None, env: Mapping[str, str] | None = None) -> Ran:
        if arguments[0] not in READING or uid is not None or env is not None:
            return mshare(*arguments, mount=daemon.mount, uid=uid, env=env)
        result = CliRunner().invoke(group, arguments, env={"MSHAREFS": str(daemon.mount)})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run
