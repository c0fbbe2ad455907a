"""Directories, lock and mounts: what a daemon takes of the filesystem, gives back, or finds there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from mshared import mounts, processes
from msharefs.mountinfo import FSTYPE
from msharefs.region import BackingKind

log = logging.getLogger(__name__)

LOCK: Final = "lock"
NOTE: Final = "directories"
"""Files of the state directory: who serves, and what was made for it."""
_MOUNT_PATIENCE: Final = 3.0
"""Seconds a mount that stands at our place may take to show that somebody serves it."""
_KEEPER_PATIENCE: Final = 20.0
"""Seconds that the keeper of a daemon which has ended may take to let the lock go."""
_LOOK_INTERVAL: Final = 0.005


class StartError(Exception):
    """The daemon cannot start; the message has the cure."""


@attrs.define
class Fate:
    """Whether what is there is to be kept for the next daemon when this one ends."""

    keep: bool = False


class Made:
    """The directories that were made for the daemons of one state directory: the last takes them away, if it can.

    They are noted in a file beside the lock, since a daemon that is killed takes nothing away.
    """

    def __init__(self, note: Path) -> None:
        self._note = note
        self._paths: set[Path] = set()
        with contextlib.suppress(OSError):
            self._paths.update(Path(os.fsdecode(path)) for path in note.read_bytes().split(b"\0") if path)

    @contextlib.contextmanager
    def directory(self, path: Path, *, ours: bool = False) -> Iterator[None]:
        """Have a directory; it goes with us if we made it, or a daemon before us, and so do those above it.

        Unless something is in them. ``ours``: it is for our files alone.
        """
        missing = {each for each in (path, *path.parents) if not os.path.lexists(each)}
        try:
            path.mkdir(mode=0o755, parents=True)
        except FileExistsError:
            missing = {path} if ours and (path / LOCK).exists() else set()  # Left by a daemon that was killed.
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise StartError(f"cannot make {path}: {error.strerror}") from error
            missing = {path}  # A dead mount stands there.
        self._paths |= missing
        try:
            yield
        finally:
            for each in (path, *path.parents):
                if each in self._paths:
                    with contextlib.suppress(OSError):
                        each.rmdir()

    @contextlib.contextmanager
    def noted(self, fate: Fate) -> Iterator[None]:
        """Have the next daemon know of them, should this one not end as it should. Preconditions: we hold the lock."""
        if self._paths:
            try:
                self._note.write_bytes(b"\0".join(sorted(os.fsencode(path) for path in self._paths)))
            except OSError as error:
                raise StartError(f"cannot write {self._note}: {error.strerror}") from error
        try:
            yield
        finally:
            if not fate.keep:
                self._note.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, mount: Path, fate: Fate) -> Iterator[int]:
    """Be the only daemon of this mount; the lock goes with the process, and its keeper, however they end."""
    until = time.monotonic() + _KEEPER_PATIENCE
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            text = f"cannot use {path.parent}: {error.strerror}; give --state-dir a directory of this user"
            raise StartError(text) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alive = _holder_lives(fd)
            os.close(fd)
            if alive or time.monotonic() > until:
                raise StartError(f"another mshared serves {mount}; `mshare down` stops it") from None
            time.sleep(_LOOK_INTERVAL)
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)  # The daemon before us took the file away while we waited for it.
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    try:
        yield fd
    finally:
        if not fate.keep:
            path.unlink(missing_ok=True)
            os.close(fd)


def _holder_lives(fd: int) -> bool:
    """Whether the daemon that has locked a file runs: its keeper has it locked too, until that daemon has ended."""
    text = os.pread(fd, 20, 0)
    return not text.isdigit() or processes.is_running(int(text))


def clear_stale(mount: Path, state_dir: Path, *, memory: bool) -> None:
    """Take away what a daemon that was killed left mounted; its ``memory`` too, if nothing tells what it is.

    Preconditions: we hold the lock.
    """
    for kind in BackingKind if memory else ():
        place = state_dir / kind
        while mounts.mount_at(place) is not None:
            log.warning("taking away %s, left by a daemon that was killed", place)
            mounts.unmount(place)
    found = mounts.mount_at(mount)
    if found is None:
        return
    if found.fstype != FSTYPE:
        log.info("mounting over the %s at %s", found.fstype, mount)
        return
    if _is_served(mount):
        raise StartError(f"another mshared serves {mount}; `mshare down` stops it")
    log.warning("replacing the mount at %s, left by a daemon that was killed", mount)
    mounts.unmount(mount)


def _is_served(mount: Path) -> bool:
    """Whether a mount answers at all. One that hangs counts: somebody must look at it."""
    dead = threading.Event()

    def ask() -> None:
        try:
            mount.stat()
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                dead.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_MOUNT_PATIENCE)
    return not dead.is_set()
