"""The C library, for system calls that Python has no name for."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_MAP_SHARED: Final = 1
_MAP_NORESERVE: Final = 0x4000
_PROT_READ: Final = 1
_PROT_RW: Final = 3
_PUNCH: Final = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_libc: Final = ctypes.CDLL(None, use_errno=True)
_sysinfo: Final = ctypes.create_string_buffer(112)


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


def sysinfo() -> bytes:
    """What sysinfo(2) tells, as it tells it."""
    _libc.sysinfo(_sysinfo)
    return _sysinfo.raw


def map_shared(
    fd: int, size: int, offset: int = 0, *, reserve: bool = True, readable: bool = False, writable: bool = False
) -> int:
    """Map a file shared, anywhere; the address. Raises OSError.

    Inaccessible, unless ``readable`` or ``writable``. Without ``reserve`` hugetlbfs promises no pages.
    """
    _libc.mmap.restype = ctypes.c_void_p
    flags = _MAP_SHARED if reserve else _MAP_SHARED | _MAP_NORESERVE
    prot = _PROT_RW if writable else _PROT_READ if readable else 0
    address = _libc.mmap(None, ctypes.c_size_t(size), prot, flags, fd, ctypes.c_long(offset))
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return int(address)


def unmap(address: int, size: int) -> None:
    """Unmap what ``map_shared`` mapped."""
    call("munmap", address, size)


def store(address: int, data: bytes) -> None:
    """Copy ``data`` to an address of this process. Raises OSError EFAULT where a store of its own would be a SIGBUS."""
    source = ctypes.create_string_buffer(data, len(data))
    here, there = ((ctypes.c_size_t * 2)(at, len(data)) for at in (ctypes.addressof(source), address))
    done = call("process_vm_writev", os.getpid(), here, 1, there, 1, 0)
    if done < len(data):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def punch(fd: int, offset: int, size: int) -> None:
    """FALLOC_FL_PUNCH_HOLE: give the memory of a part of a file back."""
    call("fallocate64", fd, _PUNCH, offset, size)
