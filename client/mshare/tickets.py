"""A region's file in the mount: opened, it proves to the daemon what its mode allows."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from mshare.connection import DYING, Ticket, wait_for_daemon
from mshare.discovery import is_served, read_info
from msharefs.errors import MshareError
from msharefs.names import check_name

Name = str | bytes
R = TypeVar("R")
_MOST_RESTARTS: Final = 20
"""How often the daemon may go between being there again and being asked."""


@contextlib.contextmanager
def opened(path: Path, access: int) -> Iterator[Ticket]:
    """The opened file of a region, which proves what its mode allows; nothing where it may not be opened like that."""
    held: list[int] = []

    def close() -> None:
        while held:
            os.close(held.pop())

    def again() -> Ticket:
        close()
        with contextlib.suppress(PermissionError):
            held.append(_open(path, access))
        ticket = Ticket(held)
        ticket.again = again
        return ticket

    try:
        first = _served(path, again)
    except OSError as error:
        raise _no_region(path, error) from error
    try:
        yield first
    finally:
        close()


def inode_of(path: Path, ticket: Ticket) -> int:
    """Number of a region's file, which no other region ever has: of the opened one, if it is. Raises OSError."""
    if ticket:
        with contextlib.suppress(OSError):  # Whoever served it is gone.
            return os.fstat(ticket[0]).st_ino
    try:
        return _served(path, path.stat).st_ino
    except OSError as error:
        raise _no_region(path, error) from error


def _served(path: Path, ask: Callable[[], R]) -> R:
    """Ask a file of the mount; again when its daemon was being restarted. Raises OSError."""
    for _ in range(_MOST_RESTARTS):
        try:
            return ask()
        except OSError as error:
            if error.errno not in DYING and is_served(path.parent):
                raise
            if not wait_for_daemon(path.parent):
                break
    return ask()


def _open(path: Path, access: int) -> int:
    """Open a file of the mount. Raises OSError, ENOTCONN where nothing is mounted just now."""
    try:
        return os.open(path, access | os.O_CLOEXEC)
    except FileNotFoundError:
        if is_served(path.parent):
            raise
        raise OSError(errno.ENOTCONN, f"{path.parent} is not served") from None


def _no_region(path: Path, error: OSError) -> OSError:
    """Why a region's file cannot be reached, in better words. Raises OSError when the mount itself is the reason."""
    read_info(path.parent)
    if error.errno == errno.ENOENT:
        return OSError(errno.ENOENT, f"no region is named {path.name!r} in {path.parent}; O_CREAT makes one")
    return error


def checked_name(name: Name) -> str:
    """A region's name as text. Raises OSError as check_name says, TypeError for anything but str and bytes."""
    if not isinstance(name, str | bytes):
        raise TypeError(f"a region's name is str or bytes, not {type(name).__name__}")
    try:
        return check_name(os.fsdecode(name))
    except MshareError as error:
        raise OSError(error.errno, str(error)) from None
