"""What client and daemon say to each other: one class a message. ``msharefs.protocol`` makes packets of them."""

from __future__ import annotations

import attrs

from msharefs.addr import PAGE_SIZE
from msharefs.greeting import Hello as Hello
from msharefs.greeting import Welcome as Welcome
from msharefs.reports import Heat, Refusal, RegionName, RegionStat, TraceEvent, Vma


@attrs.frozen
class DonatedFile:
    """The file that a donated mapping shows from ``offset`` on, by its place among the descriptors sent along."""

    descriptor: int
    offset: int
    shared: bool


@attrs.frozen
class DonatedRange:
    """A mapping of the donor inside the range: offset and length in bytes, protection as PROT_*, perhaps of a file."""

    offset: int
    length: int
    prot: int
    file: DonatedFile | None = None


@attrs.frozen
class Create:
    """Client: make a region. ``mode`` is what umask left; with ``donated`` the rest of the range is a hole.

    ``readonly``: the creator itself wants a window that cannot write. ``used``: how many of the bytes its users are to
    see, None for all. With ``kept`` the region ends by itself, name and all, once nobody is attached and a certain
    process has ended. Descriptors: the files of donated mappings, then a pidfd of that process.
    """

    name: str
    addr: int | None
    size: int
    mode: int
    exclusive: bool
    empty: bool
    readonly: bool = False
    backing: str | None = None
    donated: tuple[DonatedRange, ...] = ()
    used: int | None = None
    kept: bool = False


@attrs.frozen
class Attach:
    """Client: open a region; one descriptor, the opened file of the mount. 0 and None take the region's own."""

    addr: int | None
    length: int


@attrs.frozen
class MapFile:
    """Client: let me share the mapping of a file with whoever maps it alike; one descriptor, the opened file.

    ``offset`` is in the file; None for ``addr`` takes the others' address. ``backing`` is for files of disks.
    """

    addr: int | None
    length: int
    offset: int
    prot: int
    backing: str | None = None


@attrs.frozen
class Ordinary:
    """Daemon: there is nothing to share, for that reason; map the file yourself."""

    why: str


@attrs.frozen
class Exists:
    """Daemon: there is such a region already; attach to it."""


@attrs.frozen
class Offer:
    """Daemon: map this. Descriptors: the backing file and, with ``device``, /dev/userfaultfd.

    Without ``device`` the client makes its userfaultfd by the system call, for user mode only. ``inode`` is that of the
    region's file, ``page`` the size of the region's pages: 2 MiB with ``hugetlb``, where nothing can be written to the
    backing file but by mapping it. ``used``: see ``Create``. ``own``: no backing comes, the client maps the file that
    it asked to share. ``shared``: a window that cannot write is a shared mapping nevertheless, which reports no faults.
    """

    offer: int
    inode: int
    addr: int
    size: int
    readonly: bool
    device: bool
    page: int = PAGE_SIZE
    used: int | None = None
    own: bool = False
    shared: bool = False


@attrs.frozen
class Mapped:
    """Client: the window stands at ``addr``. Descriptors: its userfaultfd, and perhaps a second one.

    The second is for pages that a system call must not store to: it answers by itself, with SIGBUS or EFAULT.

    ``anchor`` is the address of ANCHOR_PAGES pages of private anonymous memory that nobody touches (PROT_NONE): the
    daemon registers the first with the userfaultfd, so that every fork is reported, and others to tell children apart.

    ``staged``: for each donated mapping of a file, in order, the address where the region's memory for it stands until
    the client moves it to its place, which is after this has been answered, and before ``settled``.
    """

    offer: int
    addr: int
    anchor: int
    staged: tuple[int, ...] = ()


@attrs.frozen
class Settled:
    """Client: what was staged stands in its place; others may attach from now on."""

    offer: int


@attrs.frozen
class Abort:
    """Client: the window could not be mapped, or not be filled; forget the offer, and a region that was to be made.

    What was stored to donated files through the region has reached them when this is answered.
    """

    offer: int


@attrs.frozen
class Attached:
    """Daemon: armed, and counted as a reference."""

    attachment: int


@attrs.frozen
class Adopt:
    """Client: a forked child asks for the attachment it inherited from its parent's ``attachment``.

    Where the kernel reports no forks, one descriptor: a userfaultfd of the child's own, made as for ``mapped``.
    """

    attachment: int


@attrs.frozen
class Detach:
    """Client: the window is gone."""

    attachment: int


@attrs.frozen
class Unlink:
    """Client: end my access; the last one ends the region. One descriptor: the opened file, where it may be opened."""

    name: str


@attrs.frozen
class Remove:
    """Client: take the name away at once."""

    name: str


@attrs.frozen
class Fork:
    """Client: make region ``name``, a copy-on-write twin of that behind an attachment, with permissions of its own."""

    attachment: int
    name: str
    mode: int


@attrs.frozen
class Snapshot:
    """Client: make private twins of the regions behind some attachments, all of one instant, for a child to take."""

    attachments: tuple[int, ...]


@attrs.frozen
class Snapshots:
    """Daemon: here they are, in the same order. Those that are not taken go with this connection, or by ``forget``."""

    tokens: tuple[str, ...]


@attrs.frozen
class Forget:
    """Client: nobody will take these twins."""

    tokens: tuple[str, ...]


@attrs.frozen
class Take:
    """Client: offer me the twin with this token, for a window at ``addr``. Nobody can ask for it a second time."""

    token: str
    addr: int


@attrs.frozen
class GetStat:
    """Client: tell about a region; by attachment, or by one descriptor of the opened file."""

    attachment: int | None = None


@attrs.frozen
class GetMaps:
    """Client: list the VMAs; by attachment, or by one descriptor of the opened file. ``after``: from that offset on."""

    attachment: int | None = None
    after: int | None = None


@attrs.frozen
class Mmap:
    """Client: map memory inside the region; protection and flags as in mmap(2), ``offset`` None for any gap.

    Without MAP_ANONYMOUS one descriptor, the opened file, which is shown from ``file_offset`` on. With MAP_REFPAGE the
    content of a reference page, in hexadecimal.
    """

    attachment: int
    offset: int | None
    length: int
    prot: int
    flags: int
    file_offset: int = 0
    refpage: str | None = None


@attrs.frozen
class Placed:
    """Daemon: mapped, at this offset, in every process."""

    offset: int


@attrs.frozen
class Munmap:
    """Client: unmap a range inside the region, for everybody."""

    attachment: int
    offset: int
    length: int


@attrs.frozen
class Mprotect:
    """Client: change the protection of a range inside the region, for everybody; as in mprotect(2)."""

    attachment: int
    offset: int
    length: int
    prot: int


@attrs.frozen
class Madvise:
    """Client: advice about a range inside the region (madvise(2)); what one process may do alone it does itself."""

    attachment: int
    offset: int
    length: int
    advice: int


@attrs.frozen
class Msync:
    """Client: have what was stored to shared files in a range reach them. ``length`` None: all from ``offset`` on."""

    attachment: int
    offset: int
    length: int | None


@attrs.frozen
class GetList:
    """Client: list the regions of the mount. ``after``: those whose names come later.

    ``files``: instead of them the files that processes share without a name, each called as in /proc/PID/maps.
    """

    after: str | None = None
    files: bool = False


@attrs.frozen
class GetRefusals:
    """Client: list the last touches that were refused, in regions that I may read. ``after``: from that number on."""

    after: int = 0


@attrs.frozen
class GetHeat:
    """Client: tell what a region holds where, in at most ``cells`` (2048) pieces. One descriptor: its file."""

    cells: int


@attrs.frozen
class GetTrace:
    """Client: list the faults of a region after that number; None: none yet, but start. One descriptor: its file.

    The file must be opened for writing too, or the region be the caller's. Faults are recorded as long as somebody asks
    every few seconds, so and so many.
    """

    after: int | None = None


@attrs.frozen
class Done:
    """Daemon: it is done."""


@attrs.frozen
class Failed:
    """Daemon: it is not done, and nothing has changed. ``errno`` as the kernel's own call would give."""

    errno: int
    message: str


@attrs.frozen
class Maps:
    """Daemon: the VMAs of a region, by offset; ``more`` when not all fit into a packet."""

    vmas: tuple[Vma, ...]
    more: bool = False


@attrs.frozen
class Listing:
    """Daemon: the regions of the mount, or the files, by name; ``more`` when not all fit into a packet."""

    regions: tuple[RegionName, ...]
    more: bool = False


@attrs.frozen
class Refusals:
    """Daemon: what was refused, by number; ``more`` when not all fit into a packet."""

    refusals: tuple[Refusal, ...]
    more: bool = False


@attrs.frozen
class Traced:
    """Daemon: faults up to number ``last``, after ``lost`` that came too fast; ``more`` when there are others."""

    events: tuple[TraceEvent, ...]
    last: int
    lost: int = 0
    more: bool = False


Attaching = Hello | Create | Attach | MapFile | Mapped | Settled | Abort | Adopt | Detach | Unlink | Remove
Forking = Fork | Snapshot | Forget | Take
Changing = Mmap | Munmap | Mprotect | Madvise | Msync
Looking = GetStat | GetMaps | GetList | GetHeat | GetRefusals | GetTrace
Request = Attaching | Forking | Changing | Looking
Told = RegionStat | Maps | Listing | Heat | Refusals | Traced
Offering = Exists | Ordinary | Offer
Reply = Welcome | Snapshots | Offering | Attached | Done | Failed | Placed | Told
Message = Request | Reply
