"""Worker processes as the benchmark sees them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

_ROOT: Final = Path(__file__).resolve().parent.parent
_PATIENCE: Final = 240.0
"""Seconds after which a worker that has not answered is taken to hang."""
_FAREWELL: Final = 10.0
"""Seconds for it to end in, when told to."""


class WorkerFailedError(RuntimeError):
    """A worker could not do what it was asked, or died."""


class Worker:
    """A fresh Python process that measures; see ``benchmarks.worker`` for the requests it knows."""

    def __init__(self, mount: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=_ROOT,
            env={**os.environ, "MSHAREFS": str(mount)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends its workers.
        )

    def call(self, call: str, **arguments: object) -> Any:  # noqa: ANN401 - whatever JSON carries
        """Make a request and wait for its result."""
        self.ask(call, **arguments)
        return self.result()

    def ask(self, call: str, **arguments: object) -> None:
        """Make a request; ``result`` fetches what comes of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerFailedError(f"{call}: the worker is dead") from error

    def result(self) -> Any:  # noqa: ANN401 - whatever JSON carries
        """What the last request came to. Raises WorkerFailedError."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
            raise WorkerFailedError(f"no answer in {_PATIENCE:.0f} seconds")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailedError(f"the worker died with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailedError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End it: its input ends, and it takes away what it created. One that does not is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for more in (self._process.terminate, self._process.kill, lambda: None):
            try:
                self._process.wait(_FAREWELL)
                break
            except subprocess.TimeoutExpired:
                more()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
