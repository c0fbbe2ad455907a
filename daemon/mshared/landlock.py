"""Opening files whose descriptors cannot truncate, whoever holds them (landlock(7), ABI 3, Linux 6.2).

Landlock binds the right to truncate to the descriptor, at the time of the open. A thread that gave the right up
opens the file; the descriptor may then be passed on: ftruncate on it fails with EACCES, in every process.
"""

from __future__ import annotations

import os
import threading
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
    """Open ``path`` such that the descriptor can never shrink or grow the file by ftruncate.

    Done in a thread of its own: what a thread gives up it never gets back. Raises OSError.
    """
    opened: list[int] = []
    failed: list[OSError] = []

    def restricted() -> None:
        try:
            _give_up_truncate()
            opened.append(os.open(path, flags | os.O_CLOEXEC))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=restricted, name="landlocked")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return opened[0]


def _give_up_truncate() -> None:
    """Restrict the calling thread, for good."""
    ruleset = libc.syscall(_SYS_CREATE_RULESET, _ACCESS_FS_TRUNCATE, len(_ACCESS_FS_TRUNCATE), 0)
    try:
        libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
