"""The C library, for system calls that Python has no name for."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> int:
    """Call a function of libc that returns -1 and sets errno on failure; OSError then.

    Integers are passed at full width, so that 64-bit offsets are not cut.
    """
    result: int = getattr(_libc, name)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(number: int, *args: object) -> int:
    """Make a system call by its x86-64 number."""
    return call("syscall", number, *args)
