"""What the machine is, what it has free, and making it ready to be measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30
_SMALLEST: Final = 64 * MIB


def describe() -> dict[str, str]:
    """What a reader of the figures must know, in words."""
    return {
        "cpu": _cpu_model(),
        "cpus": str(os.cpu_count()),
        "memory": f"{meminfo('MemTotal') / GIB:.0f} GiB",
        "kernel": platform.release(),
        "virtual machine": "yes" if "hypervisor" in Path("/proc/cpuinfo").read_text() else "no",
        "python": platform.python_version(),
        "shmem_enabled": _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }


def meminfo(field: str) -> int:
    """Bytes that /proc/meminfo gives for a field."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) << 10
    raise KeyError(field)


def page_tables() -> int:
    """Bytes of all page tables of the machine, counted up to date where we may ask for that."""
    if os.geteuid() == 0:
        Path("/proc/sys/vm/stat_refresh").write_text("1")  # Else each CPU keeps some changes to itself.
    return meminfo("PageTables")


def fitting_size(wanted: int) -> int:
    """``wanted`` bytes, or as large a power of two below as this machine and its /dev/shm have room for.

    Raises RuntimeError where even the smallest does not fit.
    """
    shm = os.statvfs("/dev/shm")
    room = min(meminfo("MemAvailable") // 3, shm.f_bavail * shm.f_frsize)
    size = wanted
    while size > room:
        size //= 2
    if size < _SMALLEST:
        raise RuntimeError(f"only {room // MIB} MiB are free in memory or /dev/shm; this needs {_SMALLEST // MIB}")
    return size


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        return str(error.strerror)
