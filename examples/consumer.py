"""Consumer: find a region by its name, read what the donor left at the same address, and end the region.

    python examples/consumer.py NAME

Needs a running daemon (``mshared``), and ``donor.py`` to have run before.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

import mshare
from mshare.discovery import find_mount


def main(name: str) -> None:
    """Read where the region lies, attach it there, read the text, unlink."""
    layout = struct.Struct("@LL")  # Two unsigned longs: start and size.
    with (find_mount() / name).open("rb") as file:
        start, size = layout.unpack(file.read(layout.size))
    print(f"consumer {os.getpid()}: {name!r} has {size} bytes at {start:#x}")
    mshare.mshare(name, start, size, os.O_RDWR)
    print(f"consumer {os.getpid()}: reads {ctypes.string_at(start).decode()!r} there")
    mshare.mshare_unlink(name)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "testregion")
