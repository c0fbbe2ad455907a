"""What tests of forked regions have in common: the regions of a family, as their processes see them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from conftest import Client

MIB, PAGE = 1 << 20, 4096
SIGBUS, SIGSEGV = 7, 11

HELPERS = """
from mmap import *
_places = iter(range(0x4800_0000_0000, 0x5800_0000_0000, 8 * GIB))
def on(name, flags=RW):
    "A window on a region, where nothing else is."
    return mshare.mshare(name, next(_places), 0, flags)
def mark(r, number, pages):
    "Have a number at the start of each page."
    for page in pages: struct.pack_into('Q', r.buf, page * PAGE, number + page)
def marks(r, pages):
    "What mark() has stored, less the page."
    return [struct.unpack_from('Q', r.buf, page * PAGE)[0] - page for page in pages]
"""


def started(c: Client, name: str, how: str) -> Client:
    """A process on region ``r`` of that name, opened or created."""
    c.do(HELPERS)
    c.do(f"name = {name!r}; r = {how}")
    return c


def touch(c: Client, place: str, store: bool = False) -> int:
    """What a forked child gets from a touch of a byte: 0, or the signal."""
    status: int = -c.ask(f"fork({place + (' = 2' if store else '')!r})")
    return status


def files_of_regions(state: Path) -> list[Path]:
    """The files that a daemon of root's has for the memory of regions; those of no size wait for one."""
    found = []
    for kind in ("thp", "4k", "hugetlb"):
        for file in (state / kind).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if file.is_dir() or file.stat().st_size:
                    found.append(file)
    return sorted(found)


def file_of(client: Client, region: str, state: Path) -> Path:
    """The file that a client's window shows."""
    inode = client.ask(f"""[int(line.split()[4]) for line in open('/proc/self/maps')
                            if line.startswith('%08x-' % {region}.address)][0]""")
    return next(file for file in files_of_regions(state) if file.stat().st_ino == inode)
