"""Opening files whose descriptors cannot truncate, whoever holds them (landlock(7), ABI 3, Linux 6.2).

Landlock binds the right to truncate to the descriptor, at the time of the open. A thread that gave the right up
opens the file; the descriptor may then be passed on: ftruncate on it fails with EACCES, in every process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Final

from mshared import libc

_SYS_CREATE_RULESET: Final = 444
_SYS_RESTRICT_SELF: Final = 446
_PR_SET_NO_NEW_PRIVS: Final = 38
_VERSION_QUERY: Final = 1
_ACCESS_FS_TRUNCATE: Final = (1 << 14).to_bytes(8, "little")
_ABI_WITH_TRUNCATE: Final = 3


def is_available() -> bool:
    """Whether this kernel can bind the right to truncate."""
    try:
        return libc.syscall(_SYS_CREATE_RULESET, None, 0, _VERSION_QUERY) >= _ABI_WITH_TRUNCATE
    except OSError:
        return False


def open_without_truncate(path: str, flags: int) -> int:
    """Open ``path`` such that the descriptor can never shrink or grow the file by ftruncate. Raises OSError."""
    with opener() as open_file:
        return open_file(path, flags)


@contextlib.contextmanager
def opener() -> Iterator[Callable[[str, int], int]]:
    """What opens files in that way, one after the other. Raises OSError.

    Done in a thread of its own, which ends with the context: what a thread gives up it never gets back.
    """
    asked: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
    opened: queue.SimpleQueue[int | OSError] = queue.SimpleQueue()

    def restricted() -> None:
        failure: OSError | None = None
        try:
            _give_up_truncate()
        except OSError as error:
            failure = error
        while (request := asked.get()) is not None:
            try:
                opened.put(failure or os.open(request[0], request[1] | os.O_CLOEXEC))
            except OSError as error:
                opened.put(error)

    def open_file(path: str, flags: int) -> int:
        asked.put((path, flags))
        found = opened.get()
        if isinstance(found, OSError):
            raise found
        return found

    thread = threading.Thread(target=restricted, name="landlocked")
    thread.start()
    try:
        yield open_file
    finally:
        asked.put(None)
        thread.join()


def _give_up_truncate() -> None:
    """Restrict the calling thread, for good."""
    ruleset = libc.syscall(_SYS_CREATE_RULESET, _ACCESS_FS_TRUNCATE, len(_ACCESS_FS_TRUNCATE), 0)
    try:
        libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
