"""The C client, compiled, in a process that does what it is told line by line (tests/c/commands.c)."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
_FLAGS = "-std=c11 -O1 -g -Wall -Wextra -Wpedantic -Wshadow -Werror -pthread -fsanitize=undefined -fno-sanitize-recover"


def compiled(directory: Path, *more: str) -> Path:
    """The program, made with more flags. Skips the test where there is no compiler."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (Debian: build-essential)")
    program = directory / "commands"
    sources = [str(ROOT / "client/c/mshare.c"), str(ROOT / "tests/c/commands.c")]
    command = ["cc", *_FLAGS.split(), *more, "-I", str(ROOT / "client/c"), *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


class CClient:
    """A process that runs it. ``ask`` is one command, and its answer."""

    def __init__(self, command: Path | list[str], mount: Path | None, become: Callable[[], None] | None = None) -> None:
        env = {key: value for key, value in os.environ.items() if key != "MSHAREFS"}
        if mount is not None:
            env["MSHAREFS"] = str(mount)
        self.program = command
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, preexec_fn=become, bufsize=0
        )

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(os.fsencode(command) + b"\n")
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            pytest.fail(f"no answer to {command!r}")
        answer = os.fsdecode(self.process.stdout.readline()).removesuffix("\n")
        if not answer:
            assert self.process.stderr is not None
            pytest.fail(f"died of {command!r}: {self.process.wait()} {self.process.stderr.read().decode()}")
        return answer

    def do(self, command: str) -> None:
        """A command that succeeds."""
        assert self.ask(command) == "ok"

    def errno_of(self, command: str) -> int:
        """Of one that fails, and says why."""
        word, number, text = self.ask(command).split(" ", 2)
        assert (word, bool(text)) == ("errno", True)
        return int(number)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> None:
        """End it: with its last line, if it lives still."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait(PATIENCE)
