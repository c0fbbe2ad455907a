"""Files that processes map together without a name (MAP_SHARED_PT of the series' later form): who shares with whom."""

from __future__ import annotations

import attrs

from msharefs.addr import PMD_SIZE, AddrRange
from msharefs.perms import Prot
from msharefs.units import format_size


@attrs.frozen(order=True)
class FileKey:
    """What tells a file from all others: the numbers of its device and its inode."""

    major: int
    minor: int
    inode: int

    def __str__(self) -> str:
        """As in /proc/PID/maps, in one word."""
        return f"{self.major:02x}:{self.minor:02x}:{self.inode}"


@attrs.frozen
class Wanted:
    """A mapping of a file that somebody asks for; ``addr`` None: anywhere."""

    addr: int | None
    length: int
    offset: int
    prot: Prot

    def why_unaligned(self) -> str | None:
        """Why nobody could share such a mapping, whatever the file, or None."""
        names = {"address": self.addr or 0, "length": self.length, "offset": self.offset}
        for name, value in names.items():
            if value % PMD_SIZE:
                return f"the {name} {value:#x} is not a multiple of {format_size(PMD_SIZE)}"
        return None


@attrs.define
class SharedFile:
    """The file behind a region without a name (compare the host mm that the series hangs on an address_space).

    ``offset`` is what lies at the region's start. ``mode`` is the protection that the first mapper asked for, or what
    the last mprotect has set: whoever joins must ask for that much. ``resident``: the file lies in memory, and
    processes map it as it is; otherwise a backing stands in for it.
    """

    key: FileKey
    offset: int
    mode: Prot
    resident: bool

    def why_not(self, ar: AddrRange, wanted: Wanted) -> str | None:
        """Why a mapping cannot be had of what others share at ``ar``, or None (compare the fallback of the series)."""
        if wanted.length != ar.size:
            return f"others share {format_size(ar.size)} of the file, not {format_size(wanted.length)}"
        if wanted.offset != self.offset:
            return f"others share the file from offset {self.offset:#x} on, not from {wanted.offset:#x}"
        if wanted.addr not in (None, ar.start):
            return f"others share the file at {ar.start:#x}, not at {wanted.addr or 0:#x}"
        if self.mode & ~wanted.prot:
            return f"others share the file {self.mode.as_text()}, which {wanted.prot.as_text()} does not include"
        return None
