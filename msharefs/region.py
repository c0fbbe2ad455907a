"""A region: a name, a host mm, and the processes attached to it (compare struct mshare_data of the series)."""

from __future__ import annotations

import enum
from typing import NewType

import attrs

from msharefs.addr import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Address, AddrRange, Offset
from msharefs.file_sharing import SharedFile
from msharefs.histogram import LatencyHistogram
from msharefs.host_mm import HostMm
from msharefs.perms import Ownership
from msharefs.vma import Vma

RegionId = NewType("RegionId", int)
"""Number of a region, never given twice by one daemon."""
AttachmentId = NewType("AttachmentId", int)
"""Number of an attachment, never given twice by one daemon."""


class BackingKind(enum.StrEnum):
    """Where a region's pages come from."""

    THP = "thp"
    HUGETLB = "hugetlb"
    SMALL = "4k"

    @property
    def page(self) -> int:
        """Size of a page, of which all that is mapped is made."""
        return PMD_SIZE if self is BackingKind.HUGETLB else PAGE_SIZE

    @property
    def granule(self) -> int:
        """See ``HostMm``."""
        return {BackingKind.THP: PMD_SIZE, BackingKind.HUGETLB: PUD_SIZE, BackingKind.SMALL: PAGE_SIZE}[self]

    @property
    def align(self) -> int:
        """What address and size of a region, and every window on it, are multiples of."""
        return PUD_SIZE if self is BackingKind.HUGETLB else PMD_SIZE


@attrs.frozen
class Unshared:
    """Since when (a date and time for people) the kernel shares the page tables no longer, and why."""

    since: str
    why: str


@attrs.define
class Attachment:
    """One window of one process (compare the guest VMA of the series): one reference to the region.

    ``pid`` is None for a forked child that has not been told apart from its brothers yet. ``own_tables``: it stood
    while stores had to be seen; where its page tables became its own then, they stay so.
    """

    id: AttachmentId
    pid: int | None
    window: AddrRange
    readonly: bool
    forked_from: AttachmentId | None = None
    own_tables: bool = False


@attrs.define
class Region:
    """What one name stands for. Changed by its ``Namespace`` only, between two awaits of the daemon.

    ``unshared`` is set while page tables that the kernel could share cannot be. ``origin`` is the
    name, at that time, of the region that this is a fork of, ``breaks`` how often a touch of a page that relatives have
    in common was served, ``latency`` how long faults took from when the daemon read of them to the answer.
    ``used`` is how many bytes its users are to see. One that is ``transient`` loses its name once nobody is attached
    and it is not ``kept`` any more, which is as long as a certain process lives.
    ``file`` is what processes share by this region where that is a file; it has no name then.
    """

    id: RegionId
    name: str | None
    owner: Ownership
    backing: BackingKind
    mm: HostMm
    ready: bool = False
    faults: int = 0
    unshared: Unshared | None = None
    origin: str | None = None
    breaks: int = 0
    latency: LatencyHistogram = attrs.Factory(LatencyHistogram)
    used: int | None = None
    transient: bool = False
    kept: bool = False
    file: SharedFile | None = None
    attachments: dict[AttachmentId, Attachment] = attrs.Factory(dict)

    @property
    def title(self) -> str:
        """What it is called where it must be called something."""
        return self.name or (str(self.file.key) if self.file else "")

    @property
    def ar(self) -> AddrRange:
        """The region's own addresses."""
        return self.mm.ar

    @property
    def tables_shared(self) -> bool:
        """Whether the kernel shares page tables between its read-write attachments (compare huge_pmd_share)."""
        writers = [each for each in self.attachments.values() if not each.readonly]
        possible = self.backing is BackingKind.HUGETLB and self.unshared is None
        return possible and not (writers and all(each.own_tables for each in writers))

    @property
    def pids(self) -> set[int]:
        """Processes attached, as far as they are told apart."""
        return {a.pid for a in self.attachments.values() if a.pid is not None}

    @property
    def process_count(self) -> int:
        """How many processes are attached; forked children not told apart yet count each."""
        return len(self.pids) + sum(a.pid is None for a in self.attachments.values())

    def count_served(self, vma: Vma | None) -> None:
        """Note a fault that the daemon has served, and in which VMA."""
        self.faults += 1
        if vma is not None:
            vma.count.served += 1

    def to_host(self, attachment: Attachment, addr: Address) -> Address:
        """The host address behind an address in a window (compare find_shared_vma of the series)."""
        return Address(addr - attachment.window.start + self.ar.start)

    def to_guest(self, attachment: Attachment, ar: AddrRange) -> AddrRange:
        """Where ``attachment`` sees the host range ``ar``."""
        return ar.moved(attachment.window.start - self.ar.start)

    def range_at(self, offset: int, length: int) -> AddrRange:
        """The host range at an offset. Raises InvalidArgumentError for a length of 0 or less."""
        return AddrRange.sized(self.ar.start + offset, length)

    def offset_of(self, ar: AddrRange) -> Offset:
        """Where ``ar`` starts in the region and its backing file."""
        return Offset(ar.start - self.ar.start)
