"""Rules that look at a request alone: what may be asked of a host mm at all, and what that means for contents."""

from __future__ import annotations

from typing import Final

from msharefs.addr import PAGE_SIZE, USER_MAX, USER_MIN, AddrRange
from msharefs.effects import Change, Punch, Stash, Unstash
from msharefs.errors import AccessDeniedError, InvalidArgumentError, OffsetTooLargeError
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import FileSource, Source, Vma

_KNOWN: Final = int(PROT_RW | Prot.EXEC)

MAX_FILE_SIZE: Final = (1 << 63) - PAGE_SIZE
"""Where files end at the latest, in whole pages (compare MAX_LFS_FILESIZE)."""


def check_store(source: Source | None, prot: Prot) -> None:
    """A store to a shared mapping must be able to reach the file."""
    if isinstance(source, FileSource) and source.shared and prot.writable and not source.writable:
        raise AccessDeniedError("the file was not opened for writing; open it O_RDWR, or map it MAP_PRIVATE")


def check_end(source: Source | None, size: int) -> None:
    """A file ends where the kernel's offsets do (compare mm/mmap.c:file_mmap_ok)."""
    if isinstance(source, FileSource) and source.offset + size > MAX_FILE_SIZE:
        raise OffsetTooLargeError(f"no file has {size} bytes at {source.offset}: it has {MAX_FILE_SIZE} at most")


def check_prot(prot: Prot) -> None:
    """Regions are data, and protections are known."""
    if int(prot) & ~_KNOWN:
        raise InvalidArgumentError(f"protection {int(prot):#x} has unknown bits")
    if prot.executable:
        raise AccessDeniedError("PROT_EXEC: memory of a region cannot be executed; leave the flag out")


def check_user_range(start: int, size: int, align: int, why: str = "mshared --align") -> AddrRange:
    """The range a region asks for, or InvalidArgumentError saying which rule it breaks."""
    if size <= 0:
        raise InvalidArgumentError(f"length {size}: a region has at least {align} bytes")
    if start % align or size % align:
        raise InvalidArgumentError(f"address {start:#x} and length {size:#x} must be multiples of {align:#x} ({why})")
    if not USER_MIN <= start < start + size <= USER_MAX:
        raise InvalidArgumentError(f"{start:#x}+{size:#x} is not within user addresses {USER_MIN:#x}..{USER_MAX:#x}")
    return AddrRange.sized(start, size)


def moves_of_contents(vma: Vma, prot: Prot) -> list[Change]:
    """What becomes of the contents of ``vma`` when its protection turns to ``prot``.

    What nobody may touch waits in the stash; of a shared file, in the file.
    """
    hides, shows = not prot.accessible, not vma.prot.accessible
    if hides == shows:
        return []
    if vma.reaches_file:
        return [Punch(vma.ar)] if hides else []
    return [Stash(vma.ar) if hides else Unstash(vma.ar)]
