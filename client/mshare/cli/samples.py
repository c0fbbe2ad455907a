"""What mshare top shows: regions and the processes attached to them, and what happened between two looks."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Final

import attrs

from mshare import inspect
from mshare.cli import render
from msharefs.histogram import quantile
from msharefs.protocol import RegionName, RegionStat

_PAGE: Final = 4096
_ENTRY: Final = 8


@attrs.frozen
class RegionSample:
    """A region at one moment. Bytes, nanoseconds, faults a second; None where one may not read the region.

    ``huge_share``: the part, 0 to 1, of what is resident that one process maps by 2 MiB entries. ``fault_p50_ns``,
    ``fault_p99_ns``: of the faults since the last look, or of all where there were none. ``table_bytes_saved``: what
    page tables would take with 4 KiB pages and a set for each process, less what they take.
    """

    name: str
    size: int
    backing: str
    attached: int
    resident: int | None = None
    huge_share: float | None = None
    faults: int | None = None
    faults_per_second: float | None = None
    fault_p50_ns: int | None = None
    fault_p99_ns: int | None = None
    table_bytes_saved: int | None = None
    breaks: int | None = None


@attrs.frozen
class ProcessSample:
    """A process attached to a region: how it may use it, and what the kernel keeps of page tables for it, in bytes."""

    pid: int
    user: str
    command: str
    region: str
    writes: bool
    page_table_bytes: int


@attrs.frozen
class Sample:
    """Everything at one moment."""

    regions: list[RegionSample]
    processes: list[ProcessSample]


class Sampler:
    """Looks again and again; what happens in between is told from the second look on."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self._before: dict[tuple[str, int], tuple[float, RegionStat]] = {}

    def look(self) -> Sample:
        """How it is now. Raises OSError when nobody serves the mount."""
        regions, processes = [], []
        for name in inspect.regions(self._mount):
            try:
                stat = inspect.stat(name.name, self._mount)
                attached = inspect.attachments(name.name, self._mount)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.ENOENT):
                    raise
                if error.errno == errno.EACCES:
                    regions.append(RegionSample(name.name, name.size, name.backing, name.attached))
                continue
            regions.append(self._region(name, stat))
            processes += _processes(name.name, attached)
        return Sample(regions, processes)

    def _region(self, name: RegionName, stat: RegionStat) -> RegionSample:
        now = time.monotonic()
        key = (name.name, name.address)
        then, before = self._before.get(key, (now, stat))
        self._before[key] = (now, stat)
        new = [late - early for late, early in zip_longest(stat.fault_buckets, before.fault_buckets, fillvalue=0)]
        buckets = new if any(count > 0 for count in new) else stat.fault_buckets
        return RegionSample(
            name=name.name,
            size=stat.size,
            backing=stat.backing,
            attached=stat.attached,
            resident=stat.resident,
            huge_share=min(1.0, stat.huge_bytes / stat.resident) if stat.resident else 0.0,
            faults=stat.faults,
            faults_per_second=max(0, stat.faults - before.faults) / (now - then) if now > then else 0.0,
            fault_p50_ns=quantile(buckets, 0.5),
            fault_p99_ns=quantile(buckets, 0.99),
            table_bytes_saved=saved(stat),
            breaks=stat.breaks,
        )


def saved(stat: RegionStat) -> int:
    """Bytes of page tables that ordinary shared memory would take more."""
    ordinary = stat.resident // _PAGE * _ENTRY * stat.attached
    now = stat.table_bytes_shared if stat.tables_shared else stat.table_bytes_private
    return max(0, ordinary - now)


def _processes(region: str, attached: Iterable[tuple[int | None, bool]]) -> list[ProcessSample]:
    found: dict[int, ProcessSample] = {}
    for pid, writes in attached:
        if pid is None:
            continue
        place = Path("/proc") / str(pid)
        try:
            command = (place / "comm").read_text(errors="replace").rstrip("\n")
            status = dict(line.partition(":")[::2] for line in (place / "status").read_text().splitlines())
            tables = int(status.get("VmPTE", "0 kB").split()[0]) << 10
            user = render.user_name(int(status["Uid"].split()[0]))
        except (OSError, KeyError):
            continue  # It has ended.
        writes = writes or (pid in found and found[pid].writes)
        found[pid] = ProcessSample(pid, user, render.printable(command), region, writes, tables)
    return list(found.values())
