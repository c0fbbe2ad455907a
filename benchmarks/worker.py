"""What runs in a measured process: one request a line on standard input, one answer a line on standard output.

    python -m benchmarks.worker

Ends at the end of its input, and takes away what it has created: nothing stays when the benchmark is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks import memory
from benchmarks.work.attaching import Attaching
from benchmarks.work.calls import Calls
from benchmarks.work.crowd import Crowd
from benchmarks.work.file_mappings import FileMappings
from benchmarks.work.held import Held
from benchmarks.work.paging import Paging
from benchmarks.work.refpages import RefPages
from benchmarks.work.snapshots import Snapshots


class Worker:
    """Carries out requests, each a method of one of its parts."""

    def __init__(self) -> None:
        self._held = Held()
        self._crowd = Crowd(self._held, self.answer)
        on_held = (Calls(self._held), Paging(self._held), Snapshots(self._held))
        parts = (self._held, self._crowd, Attaching(), FileMappings(), RefPages(), *on_held)
        self._requests: dict[str, Callable[..., Any]] = {
            request: getattr(part, request) for part in parts for request in part.REQUESTS
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked: its result, or what went wrong."""
        call = request.pop("call")
        if call not in self._requests:
            return {"error": f"unknown request {call!r}"}
        try:
            return {"result": self._requests[call](**request)}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{call}: {type(error).__name__}: {error}"}

    def end(self) -> None:
        """Take away what is left of what was started and made here."""
        self._crowd.disperse()
        with contextlib.suppress(OSError, BufferError):
            self._held.remove()


def main() -> None:
    """Answer requests until the input ends, or somebody has no more patience."""
    memory.leave_cleanup_to_us()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    worker = Worker()
    try:
        for line in sys.stdin:
            print(json.dumps(worker.answer(json.loads(line))), flush=True)
    except BrokenPipeError:  # Whoever asked was killed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finally:
        worker.end()


if __name__ == "__main__":
    main()
