"""Donor: give a piece of this process's memory a name, and end. The memory stays.

    python examples/donor.py NAME

Needs a running daemon (``mshared``). ``consumer.py`` is the other half.
"""

from __future__ import annotations

import ctypes
import os
import sys

import mshare
from mshare import syscalls

ADDRESS = 2 << 40
"""2 TiB: any address that is free here, and that whoever attaches has free too."""
LENGTH = 2 << 20
"""Address and length are multiples of what the first line of ``mshare_info`` says: 2 MiB by default."""
TEXT = b"Some random shared text"


def main(name: str) -> None:
    """Map private memory, write a text into it, then make it a region."""
    prot = syscalls.PROT_READ | syscalls.PROT_WRITE
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED_NOREPLACE
    syscalls.mmap(ADDRESS, LENGTH, prot, flags)
    ctypes.memmove(ADDRESS, TEXT, len(TEXT))
    region = mshare.mshare(name, ADDRESS, LENGTH, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
    print(f"donor {os.getpid()}: wrote {TEXT.decode()!r}, donated {region.size} bytes at {region.address:#x}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "testregion")
