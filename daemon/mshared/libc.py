"""The C library, for system calls that Python has no name for."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_MAP_SHARED: Final = 1

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


def map_shared(fd: int, size: int) -> int:
    """Map a file shared and inaccessible, anywhere; the address. Raises OSError."""
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(None, ctypes.c_size_t(size), 0, _MAP_SHARED, fd, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return int(address)


def unmap(address: int, size: int) -> None:
    """Unmap what ``map_shared`` mapped."""
    call("munmap", address, size)
