"""Mounting, unmounting, and copies of mounts that cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Final

from mshared import libc
from msharefs.mountinfo import Mount, parse_mountinfo

_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MNT_DETACH: Final = 2
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_SYS_OPEN_TREE: Final = 428
_SYS_MOUNT_SETATTR: Final = 442
_OPEN_TREE_CLONE_CLOEXEC: Final = 1 | os.O_CLOEXEC
_MOUNT_ATTR_RDONLY: Final = (1).to_bytes(8, "little") + bytes(24)


def mount_at(path: Path) -> Mount | None:
    """What is mounted at ``path``, the topmost, or None. Asks no filesystem, so a dead one cannot hang it."""
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())  # As text, "\r" in a path would end a line.
    return next((m for m in reversed(list(parse_mountinfo(text))) if m.point == str(path)), None)


def mount_tmpfs(path: Path, options: str) -> None:
    """Mount a fresh tmpfs, for root only."""
    _mount(path, b"tmpfs", options)


def mount_hugetlbfs(path: Path, *, least: int = 0) -> None:
    """Mount a fresh hugetlbfs of 2 MiB pages, for root only. It keeps ``least`` bytes for its files.

    Raises OSError, ENOMEM when the pool has not got that much.
    """
    _mount(path, b"hugetlbfs", "pagesize=2M" + (f",min_size={least}" if least else ""))


def _mount(path: Path, kind: bytes, options: str) -> None:
    data = f"mode=0700,{options}".encode()
    libc.call("mount", b"msharefs", os.fsencode(path), kind, _MS_NOSUID_NODEV_NOEXEC, data)


def unmount(path: Path) -> None:
    """Take the topmost mount at ``path`` away at once, in use or dead, as root or by fusermount3."""
    if os.geteuid() == 0:
        libc.call("umount2", os.fsencode(path), _MNT_DETACH)
    else:
        subprocess.run(["fusermount3", "-uz", "--", path], check=True, capture_output=True)  # noqa: S603, S607


def readonly_copy(path: Path) -> int | None:
    """A descriptor of a read-only copy of the mount at ``path``, mounted nowhere; None where that is not allowed.

    What is opened through it stays read-only for good: /proc/self/fd leads to the same copy, so that even root gets
    EROFS for a second open.
    """
    try:
        tree = libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            return None
        raise
    libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, _MOUNT_ATTR_RDONLY, len(_MOUNT_ATTR_RDONLY))
    return tree
