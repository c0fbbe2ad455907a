"""What the daemon must know of other processes, read from /proc, and signals to their threads."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mshared import libc
from msharefs.addr import Address
from msharefs.effects import Signal

_SYS_RT_TGSIGQUEUEINFO: Final = 297
_SI_SIGIO: Final = -5
"""Of the codes that a process may give, one whose siginfo has 8 bytes of its own where the fault signals have si_addr:
elsewhere there are a pid and a uid, which the kernel translates for who is in another pid or user namespace."""
_SIGINFO_SIZE: Final = 128
_SIGINFO: Final = struct.Struct("=iii4xQ")
"""si_signo, si_errno, si_code, and si_addr where the fault signals have it."""
_PROC: Final = Path("/proc")
_PAGE_TABLES: Final = b"PageTables:"
_LOOKS: Final = 20


def status_fields(path: Path) -> dict[str, str]:
    """The fields of a /proc/.../status file; empty when the process is gone."""
    try:
        lines = (path / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def parent_of(pid: int) -> int | None:
    """The process that ``pid`` was forked from, while that lives."""
    ppid = status_fields(_PROC / str(pid)).get("PPid")
    return int(ppid) if ppid else None


def children_of(pid: int) -> set[int]:
    """Processes forked by any thread of ``pid`` and still its children; empty when it is gone."""
    found: set[int] = set()
    try:
        for task in (_PROC / str(pid) / "task").iterdir():
            found.update(map(int, (task / "children").read_text().split()))
    except OSError:
        pass
    return found


def all_pids() -> Iterator[int]:
    """Every process there is."""
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def mapping_sizes(pid: int, starts: set[Address]) -> dict[Address, int]:
    """Bytes of those mappings of a process that start exactly at one of ``starts``."""
    found: dict[Address, int] = {}
    try:
        maps = (_PROC / str(pid) / "maps").read_bytes()
    except OSError:
        return found
    for start in starts:
        prefix = b"%08x-" % start
        at = 0 if maps.startswith(prefix) else maps.find(b"\n" + prefix) + 1
        if maps.startswith(prefix, at):
            found[start] = int(maps[at + len(prefix) : maps.index(b" ", at)], 16) - start
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    state = status_fields(_PROC / str(pid)).get("State", "X")
    return state[:1] not in "ZX"


def mapped_inode(pid: int, start: Address) -> int | None:
    """The inode of the file that a process's mapping at ``start`` shows; None when nothing starts there."""
    try:
        maps = (_PROC / str(pid) / "maps").read_bytes()
    except OSError:
        return None
    prefix = b"%08x-" % start
    line = next((line for line in maps.splitlines() if line.startswith(prefix)), None)
    return int(line.split()[4]) if line is not None else None


def page_table_bytes(pid: int) -> int:
    """VmPTE: bytes of page tables the kernel keeps for a process; 0 when it is gone."""
    kilobytes = status_fields(_PROC / str(pid)).get("VmPTE", "0 kB")
    return int(kilobytes.split()[0]) << 10


def all_page_table_bytes() -> int:
    """PageTables of /proc/meminfo: bytes of page tables of the whole machine."""
    text = (_PROC / "meminfo").read_bytes()
    return int(text[text.index(_PAGE_TABLES) + len(_PAGE_TABLES) :].split(maxsplit=1)[0]) << 10


def huge_mapped_bytes(pid: int, start: int, end: int) -> int:
    """Bytes of shared memory between two addresses that a process has mapped by 2 MiB entries."""
    total, inside = 0, False
    try:
        with (_PROC / str(pid) / "smaps").open(errors="replace", newline="\n") as smaps:  # Names may be any bytes.
            for line in smaps:
                first, _, rest = line.partition(" ")
                if "-" in first:
                    inside = start <= int(first.split("-")[0], 16) < end
                elif inside and first == "ShmemPmdMapped:":
                    total += int(rest.split()[0]) << 10
    except OSError:
        pass
    return total


def thread_seen_from_here(pid: int, tid: int) -> int:
    """The id that thread ``tid`` of process ``pid`` has in this pid namespace.

    A userfaultfd names threads as their own pid namespace does (NSpid, innermost last).
    """
    tasks = _PROC / str(pid) / "task"
    fields = status_fields(tasks / str(tid))
    if len(fields.get("NSpid", "").split()) == 1:
        return tid
    try:
        for task in tasks.iterdir():
            if status_fields(task).get("NSpid", "").split()[-1:] == [str(tid)]:
                return int(task.name)
    except OSError:
        pass
    return tid


def process_of_thread(tid: int) -> int | None:
    """The process a thread of this pid namespace belongs to."""
    tgid = status_fields(_PROC / str(tid)).get("Tgid")
    return int(tgid) if tgid else None


def would_miss(pid: int, tid: int, signal: Signal) -> bool:
    """Whether a thread blocks or its process ignores ``signal``, so that sending it would change nothing.

    The first process of a pid namespace ignores all that it has no handler for, but SIGKILL (pid_namespaces(7)).
    """
    fields = status_fields(_PROC / str(pid) / "task" / str(tid))
    bit = 1 << (signal - 1)
    if any(int(fields.get(key, "0"), 16) & bit for key in ("SigBlk", "SigIgn")):
        return True
    is_first = status_fields(_PROC / str(pid)).get("NSpid", "").split()[-1:] == ["1"]
    return is_first and not int(fields.get("SigCgt", "0"), 16) & bit


def in_system_call(pid: int, tid: int) -> bool | None:
    """Whether a thread that waits for a fault took it where the kernel touches memory on its behalf.

    So does a thread that is none of the process's: another process reads its memory, say. None when the thread does
    not sleep, and so does not wait, after several looks. But one that has a signal to take would have left the fault
    by now, had code of its own taken it; the kernel itself tries again without a sleep.
    """
    task = _PROC / str(pid) / "task" / str(tid)
    for _ in range(_LOOKS):
        try:
            first = (task / "syscall").read_text().split()[0]
        except OSError:
            return True
        if first != "running":
            return int(first) >= 0
        os.sched_yield()
    return True if _has_signal(task) else None


def _has_signal(task: Path) -> bool:
    """Whether a thread has a signal to take that it does not block."""
    fields = status_fields(task)
    pending, shared, blocked = (int(fields.get(key, "0"), 16) for key in ("SigPnd", "ShdPnd", "SigBlk"))
    return bool((pending | shared) & ~blocked)


def send_fault_signal(pid: int, tid: int, signal: Signal, addr: Address) -> None:
    """Give a thread the signal of a bad access, with si_addr (rt_tgsigqueueinfo(2)). Raises OSError."""
    info = _SIGINFO.pack(signal, 0, _SI_SIGIO, addr).ljust(_SIGINFO_SIZE, b"\0")
    libc.syscall(_SYS_RT_TGSIGQUEUEINFO, pid, tid, int(signal), info)


def pidfd_open(pid: int) -> int | None:
    """A descriptor that turns readable when the process ends, or None when it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def start_time(pid: int) -> int | None:
    """When a process was started, in ticks since boot: tells it from a later one of the same pid. None: it is gone."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    return int(stat[stat.rindex(b")") + 2 :].split()[19])
