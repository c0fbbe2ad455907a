"""What runs in a measured process: one request a line on standard input, one answer a line on standard output.

    python -m benchmarks.worker

Ends at the end of its input, and takes away what it has created: nothing stays when the benchmark is killed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import memory
from benchmarks.memory import Kind, Memory

_WARM: Final = 0.8
_WARM_UPS: Final = 5
REQUESTS: Final = ("create", "attach", "write", "read", "detach", "remove", "attach_often", "attach_at_once", "warm_up")


class Worker:
    """Carries out requests; holds one memory at a time. Durations are in seconds."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._created: Memory | None = None

    def create(self, kind: str, name: str, size: int) -> str:
        """Create memory; its handle."""
        self._memory = self._created = memory.create(Kind(kind), name, size)
        return self._memory.handle

    def attach(self, kind: str, handle: str) -> float:
        """Attach to memory; how long it took."""
        start = time.perf_counter()
        self._memory = memory.attach(Kind(kind), handle)
        return time.perf_counter() - start

    def write(self) -> dict[str, float]:
        """Store into every page: how long it took, and by how many bytes this process's page tables grew."""
        return self._touch(memory.write_pages)

    def read(self) -> dict[str, float]:
        """Load from every page: the same."""
        return self._touch(memory.read_pages)

    def detach(self) -> None:
        """Unmap the memory."""
        if self._memory is not None:
            self._memory.detach()
            self._memory = None

    def remove(self) -> None:
        """Unmap, and take the name away of what this process created."""
        self.detach()
        if self._created is not None:
            self._created.remove()
            self._created = None

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

    def _touch(self, touch: Any) -> dict[str, float]:  # noqa: ANN401 - a function of memory.py
        if self._memory is None:
            raise RuntimeError("no memory is open")
        before = page_table_bytes()
        start = time.perf_counter()
        touch(self._memory.view)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tables": page_table_bytes() - before}


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


def page_table_bytes() -> int:
    """What the kernel uses for the page tables of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) << 10
    return 0


def main() -> None:
    """Answer requests until the input ends."""
    memory.leave_cleanup_to_us()
    worker = Worker()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(_answer(worker, request)), flush=True)
    except BrokenPipeError:  # Whoever asked was killed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finally:
        with contextlib.suppress(OSError):
            worker.remove()


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    call = request.pop("call")
    if call not in REQUESTS:
        return {"error": f"unknown request {call!r}"}
    try:
        return {"result": getattr(worker, call)(**request)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
