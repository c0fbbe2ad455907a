"""Facts about this machine and user, each read by a small function. What they mean is for ``doctor`` to say."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import resource
import shutil
import stat
from pathlib import Path
from typing import Final

import attrs

from mshare import inspect, syscalls
from mshare.cli.place import within
from mshare.discovery import find_mount
from msharefs import uffd_abi as abi

_SYS_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_VERSION_QUERY: Final = 1
_DAEMON_MODULES: Final = ("pyfuse3", "trio")
_LIBFUSE: Final = ("libfuse3.so.3", "libfuse3.so.4")
_PATIENCE: Final = 3.0
"""Seconds a daemon may take to answer."""


@attrs.frozen
class Userfaultfd:
    """``device``: "" where it can be used, else why not. ``features``: None where there is no userfaultfd at all."""

    device: str
    features: abi.Feature | None
    sysctl: int | None


@attrs.frozen
class DaemonState:
    """The mount that would be used, and what is wrong with it, or ""; ``hangs``: nothing came back in time."""

    mount: Path | None
    trouble: str = ""
    hangs: bool = False
    regions: int = 0


@attrs.frozen
class Machine:
    """All the facts. Numbers are None where the kernel does not have them."""

    root: bool
    capabilities: int
    kernel: str
    architecture: str
    fuse: str
    fusermount: str
    userfaultfd: Userfaultfd
    thp: bool
    hugetlb_pages: tuple[int, int] | None
    landlock: int
    libfuse: bool
    missing_modules: tuple[str, ...]
    runtime_directory: str | None
    daemon: DaemonState
    open_files: tuple[int, int]
    max_map_count: int | None


def read_machine(mount: Path | None) -> Machine:
    """Look at everything."""
    system = os.uname()
    return Machine(
        root=os.geteuid() == 0,
        capabilities=read_capabilities(),
        kernel=system.release,
        architecture=system.machine,
        fuse=read_device(Path("/dev/fuse")),
        fusermount=read_fusermount(),
        userfaultfd=read_userfaultfd(),
        thp=Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
        hugetlb_pages=read_hugetlb(Path("/sys/kernel/mm/hugepages/hugepages-2048kB")),
        landlock=read_landlock(),
        libfuse=read_libfuse(),
        missing_modules=tuple(name for name in _DAEMON_MODULES if importlib.util.find_spec(name) is None),
        runtime_directory=os.environ.get("XDG_RUNTIME_DIR") or None,
        daemon=read_daemon(mount),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        max_map_count=read_number(Path("/proc/sys/vm/max_map_count")),
    )


def read_number(path: Path) -> int | None:
    """The number in a file of /proc or /sys, or None."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def read_capabilities(status: Path = Path("/proc/self/status")) -> int:
    """The effective capabilities, a bit each (capabilities(7))."""
    for line in status.read_text(errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def read_device(path: Path) -> str:
    """Why a device cannot be opened for reading and writing, or "" if it can."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def read_fusermount(path: str | None = None) -> str:
    """Why ordinary users cannot mount, or "" if they can: fusermount3 must be there and set-uid root."""
    found = shutil.which("fusermount3", path=path)
    if found is None:
        return "not installed"
    status = Path(found).stat()
    return "" if status.st_mode & stat.S_ISUID and status.st_uid == 0 else f"{found} is not set-uid root"


def read_userfaultfd(device: Path = Path("/dev/userfaultfd")) -> Userfaultfd:
    """Open one, by the device if it lets us, else by the system call, and ask what it can."""
    trouble = read_device(device)
    sysctl = read_number(Path("/proc/sys/vm/unprivileged_userfaultfd"))
    try:
        if trouble:
            features = _features(syscalls.userfaultfd(None))
        else:
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                features = _features(syscalls.userfaultfd(fd))
            finally:
                os.close(fd)
    except OSError:
        return Userfaultfd(trouble, None, sysctl)
    return Userfaultfd(trouble, features, sysctl)


def read_hugetlb(pool: Path) -> tuple[int, int] | None:
    """Huge pages of 2 MiB: reserved and free."""
    reserved, free = read_number(pool / "nr_hugepages"), read_number(pool / "free_hugepages")
    return None if reserved is None or free is None else (reserved, free)


def read_landlock() -> int:
    """The ABI of Landlock, 0 where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    answer = libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION_QUERY)
    return max(0, int(answer))


def read_libfuse(names: tuple[str, ...] = _LIBFUSE) -> bool:
    """Whether the library is where the loader finds it."""
    return any(_loads(name) for name in names)


def read_daemon(mount: Path | None) -> DaemonState:
    """Ask the daemon that a command would use; one that hangs must not hang us."""
    place = None
    try:
        place = find_mount(mount)
        regions = within(_PATIENCE, lambda: inspect.regions(place))
    except OSError as error:
        return DaemonState(place, trouble=error.strerror or str(error))
    return DaemonState(place, hangs=regions is None, regions=len(regions or ()))


def _features(fd: int) -> abi.Feature:
    """All that the kernel offers: what UFFDIO_API answers when asked for none. Closes ``fd``."""
    try:
        answer = fcntl.ioctl(fd, abi.UFFDIO_API, abi.API_STRUCT.pack(abi.API_VERSION, 0, 0))
        return abi.Feature(abi.API_STRUCT.unpack(answer)[1])
    finally:
        os.close(fd)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
