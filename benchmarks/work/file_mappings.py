"""Files that are mapped by many, plainly or as one mapping of all."""

from __future__ import annotations

import os
import time
from typing import Final

import mshare
from benchmarks.work.held import minor_faults
from mshare import syscalls as sc

_POPULATE_READ: Final = 22
"""MADV_POPULATE_READ: take a read fault on every page that is not mapped yet."""
_SHARED_PT: Final = mshare.MAP_SHARED_PT | sc.MAP_SHARED


class FileMappings:
    """Makes a file, and maps it for reading; holds both until its process ends. Durations are in seconds."""

    REQUESTS = ("make_file", "enter_file")

    def __init__(self) -> None:
        self._mapping: mshare.FileMapping | None = None

    def make_file(self, size: int, directory: str | None) -> str:
        """A sparse file without a name, of huge pages if there is no directory; where it can be opened."""
        if directory is None:
            fd = os.memfd_create("benchmark", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        else:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.ftruncate(fd, size)
        return f"/proc/{os.getpid()}/fd/{fd}"

    def enter_file(self, path: str, size: int, backing: str | None, *, plain: bool) -> dict[str, float]:
        """Map a file and have every page of it mapped: how long each took, and how many faults the latter."""
        start = time.perf_counter()
        fd = os.open(path, os.O_RDONLY)
        flags = sc.MAP_SHARED if plain else _SHARED_PT
        self._mapping = mshare.mmap(fd, size, prot=sc.PROT_READ, flags=flags, backing=backing)
        os.close(fd)
        if self._mapping.shared is plain:
            raise RuntimeError(f"it is mapped in the other way: {self._mapping.why}")
        mapped, faults = time.perf_counter(), minor_faults()
        sc.madvise(self._mapping.address, size, _POPULATE_READ)
        end = time.perf_counter()
        return {"map": mapped - start, "touch": end - mapped, "faults": minor_faults() - faults}
