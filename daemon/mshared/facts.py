"""What only the kernel knows of a region, read when somebody asks."""

from __future__ import annotations

from typing import Final

from mshared import processes
from mshared.live import LiveRegion
from mshared.sparse import resident
from msharefs import dump
from msharefs.region import BackingKind

_PIDS_FOR_HUGE: Final = 4
"""Processes that are looked at for what they have mapped by 2 MiB entries."""


def read_kernel(fd: int, region: LiveRegion, notes: tuple[str, ...]) -> dump.KernelFacts:
    """Read the slow facts, in a worker thread; ``fd`` is the backing file."""
    attachments = list(region.attachments)
    pids = {a.model.pid: a for a in attachments if a.model.pid is not None}
    windows = [(pid, a.model.window) for pid, a in list(pids.items())[:_PIDS_FOR_HUGE]]
    huge = max((processes.huge_mapped_bytes(pid, ar.start, ar.end) for pid, ar in windows), default=0)
    if region.model.backing is BackingKind.HUGETLB:
        huge = resident(fd)
    tables = sum(processes.page_table_bytes(pid) for pid in pids)
    now, before = processes.all_page_table_bytes(), region.page_tables_before
    growth = 0 if before is None else now - before
    return dump.KernelFacts(resident(fd), tables, growth, huge, notes, region.family.copied)
