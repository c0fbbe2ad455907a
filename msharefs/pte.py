"""Entries of page tables, encoded as x86-64 does: flags in the low 12 bits of a word, the frame number above."""

from __future__ import annotations

import enum
from typing import Final

import attrs

from msharefs.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, FrameNo
from msharefs.perms import Prot

FRAMES_IN_PMD = PMD_SIZE // PAGE_SIZE


class PteFlag(enum.IntFlag):
    """Bits of an entry, where x86-64 has them."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    DIRTY = 1 << 6
    HUGE = 1 << 7
    CLEAN = 1 << 9
    """The first of the bits left to software: what a reference page says is what the page holds."""
    UFFD_WP = 1 << 10


NO_FLAGS = PteFlag(0)


PRESENT: Final = int(PteFlag.PRESENT)
WRITE: Final = int(PteFlag.WRITE)
DIRTY: Final = int(PteFlag.DIRTY)
HUGE: Final = int(PteFlag.HUGE)
"""As plain integers: arithmetic on enum flags takes longer than all else in a fault."""
_FLAGS_OF_PROT: Final = tuple(
    PteFlag.PRESENT | (PteFlag.WRITE if bits & Prot.WRITE else PteFlag.UFFD_WP) for bits in range(8)
)
"""By the protection's bits."""
READ_ONLY: Final = _FLAGS_OF_PROT[Prot.READ]


def pte_flags(prot: Prot) -> PteFlag:
    """The flags of a page in a mapping of ``prot`` (compare vm_get_page_prot): read-only is write-protected."""
    return _FLAGS_OF_PROT[prot]


@attrs.frozen
class Pte:
    """One installed page: its first frame and its flags. With HUGE it maps 2 MiB, else 4 KiB."""

    frame: FrameNo
    flags: PteFlag = PteFlag.PRESENT | PteFlag.WRITE

    @property
    def is_huge(self) -> bool:
        """Whether it maps 2 MiB."""
        return bool(int(self.flags) & HUGE)

    @property
    def size(self) -> int:
        """Bytes it maps."""
        return PMD_SIZE if self.is_huge else PAGE_SIZE

    def pack(self) -> int:
        """The entry's word."""
        return self.frame << PAGE_SHIFT | int(self.flags) | PRESENT

    @classmethod
    def unpack(cls, word: int) -> Pte:
        """The page that ``word`` stands for."""
        return cls(FrameNo(word >> PAGE_SHIFT), PteFlag(word & (PAGE_SIZE - 1)))
