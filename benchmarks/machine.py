"""What the machine is, what it has free, and making it ready to be measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30
_SMALLEST: Final = 64 * MIB
_RESERVE: Final = GIB


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
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def one_line(described: dict[str, str]) -> str:
    """The same in a line, for the foot of a plot."""
    virtual = ", virtual machine" if described["virtual machine"] == "yes" else ""
    hardware = f"{described['cpu']}, {described['cpus']} CPUs, {described['memory']}{virtual}"
    return f"{hardware}; Linux {described['kernel']}; Python {described['python']}"


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


def room() -> int:
    """Bytes that measurements may fill: what is available, less what the machine needs to go on."""
    return max(0, meminfo("MemAvailable") - _RESERVE)


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that a directory lies on."""
    found, longest = "unknown", 0
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        if path.is_relative_to(point) and len(point) >= longest:  # The last of several is mounted on top.
            found, longest = after.split()[0], len(point)
    return found


def fitting_size(wanted: int, share: int = 3) -> int:
    """``wanted`` bytes, or half that, or a quarter, ... that fits /dev/shm and one ``share``-th of available memory.

    Raises RuntimeError where even the smallest does not fit.
    """
    shm = os.statvfs("/dev/shm")
    room = min(meminfo("MemAvailable") // share, shm.f_bavail * shm.f_frsize)
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
