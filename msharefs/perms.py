"""Protections, access, mapping flags and file permissions: the numbers of Linux, in types."""

from __future__ import annotations

import enum
from typing import Final

import attrs


class Prot(enum.IntFlag):
    """Protection of a mapping (compare PROT_READ and its like in mman.h)."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4

    @property
    def writable(self) -> bool:
        """Whether it lets stores through."""
        return int.__and__(self, _WRITE) != 0  # On plain integers, as below: an enum's own & takes ten times as long.

    @property
    def accessible(self) -> bool:
        """Whether it lets any access through that a region can have."""
        return int.__and__(self, _ANY) != 0

    @property
    def executable(self) -> bool:
        """Whether it lets anybody execute, which no region does."""
        return int.__and__(self, _EXEC) != 0

    def as_text(self) -> str:
        """``rw-`` and its like, as in /proc/PID/maps."""
        return "".join(letter if self & bit else "-" for letter, bit in zip("rwx", (1, 2, 4), strict=True))


PROT_RW = Prot.READ | Prot.WRITE


_WRITE: Final = int(Prot.WRITE)
_EXEC: Final = int(Prot.EXEC)
_ANY: Final = int(PROT_RW)


class Access(enum.Enum):
    """What the faulting instruction tried."""

    READ = "read"
    WRITE = "write"

    def __init__(self, name: str) -> None:
        self._bits = _WRITE if name == "write" else _ANY

    def allowed_by(self, prot: Prot) -> bool:
        """Whether ``prot`` lets this access through. Write access implies read access, as on x86."""
        return int.__and__(prot, self._bits) != 0  # On plain integers: for every fault.


class MapFlag(enum.IntFlag):
    """Flags of mmap(2) that a region takes."""

    SHARED = 0x01
    PRIVATE = 0x02
    FIXED = 0x10
    ANONYMOUS = 0x20
    NORESERVE = 0x4000
    POPULATE = 0x8000
    FIXED_NOREPLACE = 0x100000


class Advice(enum.IntEnum):
    """Advice of madvise(2) that a region takes."""

    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    DONTNEED = 4
    REMOVE = 9
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    COLD = 20
    PAGEOUT = 21
    POPULATE_READ = 22
    POPULATE_WRITE = 23
    COLLAPSE = 25


MAP_SHARED_PT = 0x200000
"""mmap flag of the series' later form: share page tables with other mappers of the same file."""
MAP_REFPAGE = 0x400000
"""mmap flag of reference pages: clean pages read as a pattern."""


class FileAccess(enum.IntFlag):
    """What a caller wants of an inode (compare MAY_READ, MAY_WRITE, MAY_EXEC in fs.h)."""

    EXEC = 1
    WRITE = 2
    READ = 4


@attrs.frozen
class Credentials:
    """Who asks: the ids the kernel vouched for when the socket was connected."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()

    @property
    def is_root(self) -> bool:
        """Whether file modes do not bind this caller."""
        return self.uid == 0


@attrs.frozen
class Ownership:
    """Owner, group and mode bits of a region or of the mount's root."""

    uid: int
    gid: int
    mode: int

    def allows(self, who: Credentials, want: FileAccess) -> bool:
        """Whether ``who`` may have ``want`` (compare fs/namei.c:generic_permission)."""
        if who.is_root:
            return True
        if who.uid == self.uid:
            bits = self.mode >> 6
        elif self.gid == who.gid or self.gid in who.groups:
            bits = self.mode >> 3
        else:
            bits = self.mode
        return bits & want == want
