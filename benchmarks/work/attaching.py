"""Attaching again and again, and in many processes at once; making ready for that."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from typing import Any, Final

import attrs

from benchmarks import memory
from benchmarks.memory import Kind

_WARM: Final = 0.8
_WARM_UPS: Final = 5


class Attaching:
    """Needs no memory to be held. Durations are in seconds."""

    REQUESTS = ("attach_often", "attach_at_once", "warm_up")

    def attach_often(self, kind: str, handle: str, count: int) -> dict[str, list[float]]:
        """Attach and detach in a loop; how long each took."""
        attached, detached = [], []
        for _ in range(count):
            start = time.perf_counter()
            opened = memory.attach(Kind(kind), handle)
            between = time.perf_counter()
            opened.detach()
            detached.append(time.perf_counter() - between)
            attached.append(between - start)
        return {"attach": attached, "detach": detached}

    def attach_at_once(self, kind: str, handle: str, processes: int) -> dict[str, Any]:
        """Let forked processes attach at the same moment: seconds until the last has, seconds each took, errors."""
        with Storm(kind, handle) as storm:
            return storm.run(processes)

    def warm_up(self, size: int) -> None:
        """Touch ``size`` bytes and free them, until that is no longer getting faster.

        The host behind a virtual machine backs memory when it is touched, which takes many times longer than the touch
        itself, and may take it back seconds after it was freed.
        """
        before = float("inf")
        for _ in range(_WARM_UPS):
            seconds = _touch_and_free(size)
            if seconds > _WARM * before:
                break
            before = seconds


@attrs.define
class Storm:
    """Forked processes that wait for one signal, attach, report, and stay attached until all have."""

    kind: str
    handle: str
    _go: tuple[int, int] = attrs.field(factory=os.pipe)
    _end: tuple[int, int] = attrs.field(factory=os.pipe)
    _reports: tuple[int, int] = attrs.field(factory=os.pipe)

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_exc: object) -> None:
        for fd in (*self._go, *self._end, *self._reports):
            with contextlib.suppress(OSError):
                os.close(fd)

    def run(self, processes: int) -> dict[str, Any]:
        """Start them, let them loose, collect what they say."""
        pids = [self._fork() for _ in range(processes)]
        reports = os.fdopen(os.dup(self._reports[0]))
        for _ in pids:
            reports.readline()  # Each says once that it is there.
        start = time.monotonic()
        os.close(self._go[1])
        said = [json.loads(reports.readline()) for _ in pids]
        os.close(self._end[1])
        for pid in pids:
            os.waitpid(pid, 0)
        reports.close()
        ends = [report["end"] for report in said if "end" in report]
        return {
            "seconds": max(ends, default=start) - start,
            "attach": [report["end"] - report["start"] for report in said if "end" in report],
            "errors": [report["error"] for report in said if "error" in report],
        }

    def _fork(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.close(self._go[1])
            os.close(self._end[1])
            self._say({})
            os.read(self._go[0], 1)
            self._say(self._attach())
            os.read(self._end[0], 1)
        finally:
            os._exit(0)

    def _attach(self) -> dict[str, Any]:
        start = time.monotonic()
        try:
            opened = memory.attach(Kind(self.kind), self.handle)
            end = time.monotonic()
            first_byte = opened.view[0]
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"start": start, "end": end} if first_byte == 1 else {"error": f"the first byte is {first_byte}"}

    def _say(self, report: dict[str, Any]) -> None:
        os.write(self._reports[1], json.dumps(report).encode() + b"\n")


def _touch_and_free(size: int) -> float:
    """How long the touching took."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        with contextlib.suppress(OSError):  # A kernel without huge pages has none to ask for.
            mapped.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(mapped) as view:
            start = time.perf_counter()
            memory.write_pages(view)
            return time.perf_counter() - start
