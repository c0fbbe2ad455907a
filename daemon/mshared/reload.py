"""SIGHUP: go on writing where the log belongs, after something has moved it away, and tell there how things stand.

Everything else that mshared can be told, it is told when it starts.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from mshared.notify import notify, notify_reloading

log = logging.getLogger(__name__)

_STDERR: Final = 2


class LogFile:
    """The file behind stderr, by the name it had when this was made; a pipe, terminal or journal is left alone."""

    def __init__(self) -> None:
        is_file = stat.S_ISREG(os.fstat(_STDERR).st_mode)
        self._path = str(Path(f"/proc/self/fd/{_STDERR}").readlink()) if is_file else None

    def reopen(self) -> None:
        """Go on in a file of that name, which is made if need be. Raises OSError with nothing changed."""
        if self._path is None:
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.path.sameopenfile(1, _STDERR):
                os.dup2(fd, 1)
            os.dup2(fd, _STDERR)
        finally:
            os.close(fd)


async def reload_on_hangup(
    log_file: LogFile,
    overview: Callable[[], str],
    status: str,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Do so whenever SIGHUP comes. ``overview``: how things stand; ``status``: what is said along with READY=1."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            notify_reloading()
            try:
                log_file.reopen()
            except OSError as error:
                log.warning("SIGHUP: cannot reopen the log: %s", error)
            log.info("SIGHUP: %s, %s", overview(), _descriptors())
            notify(f"READY=1\nSTATUS={status}")


def _descriptors() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{sum(1 for _ in Path('/proc/self/fd').iterdir())} of {limit} descriptors open"
