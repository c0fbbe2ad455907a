"""A region and an attachment together with what the kernel holds for them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator

import attrs
import trio

from mshared import hugetlb, processes
from mshared import records as rec
from mshared.backing import Backing
from mshared.book import Book, region_is, set_aside
from mshared.comparing import Digests
from mshared.family import Family
from mshared.files import MappedFile
from mshared.filler import Filler
from mshared.fork_notes import ForkNotes
from mshared.killpoints import point
from mshared.observed import Journal, Trace
from mshared.sparse import new_file, punch, resident
from mshared.uffd import Uffd
from mshared.under_way import Reading, Staged, Unwritten
from msharefs import protocol
from msharefs.addr import PMD_SIZE, Address, AddrRange, united
from msharefs.armings import cut
from msharefs.effects import Arm
from msharefs.perms import PROT_RW
from msharefs.region import Attachment, BackingKind, Region
from msharefs.vma import Arming, FileId, Vma

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class LiveAttachment:
    """An attachment and its userfaultfd. ``anchor``, ``staged``: see ``protocol.Mapped``.

    ``poisoned`` are the pages of its window that were marked such that system calls fail there; ``refused`` those that
    the userfaultfd ``sigbus`` has for the moment, to the same end, and until when on the monotonic clock. ``refusals``
    counts touches that were not allowed. ``distance`` is how far above the region's own addresses the window stands.
    ``uid`` is who attached. ``unarmed``: its window is a shared mapping that cannot write, of memory that is all there:
    nothing needs to be reported of it, and the kernel would report nothing. ``started`` tells its process from a later
    one with the same pid.
    """

    model: Attachment
    region: LiveRegion
    uffd: Uffd
    anchor: Address
    parent_pid: int | None = None
    poisoned: set[Address] = attrs.Factory(set)
    sigbus: Uffd | None = None
    refused: dict[Address, float] = attrs.Factory(dict)
    refusals: int = 0
    staged: list[Staged] = attrs.Factory(list)
    uid: int = 0
    unarmed: bool = False
    started: int | None = None
    distance: int = attrs.field(init=False)

    @distance.default
    def _distance(self) -> int:
        return self.model.window.start - self.region.model.ar.start

    def page_at(self, addr: int) -> AddrRange:
        """The page that holds one of its addresses."""
        return AddrRange.page_at(addr, self.region.model.mm.page)

    def armed(self, arming: Arming) -> Arming:
        """How its window is armed where the region is armed like that.

        A read-only window is a private mapping: no store of its own is ever the region's, nothing has to be protected.
        And of hugetlb memory, what nobody has made would become a page of its own there, so that each is reported.
        """
        if not self.model.readonly:
            return arming
        missing = Arming.MISSING if self.region.model.backing is BackingKind.HUGETLB else Arming.NATIVE
        return arming & ~(Arming.WP | Arming.WP_CLEAN) | missing

    def guest(self, ar: AddrRange) -> AddrRange:
        """Where its process sees the host range ``ar``; most windows stand where the region does."""
        return ar.moved(self.distance) if self.distance else ar

    def host(self, ar: AddrRange) -> AddrRange:
        """The host range behind a range of its process's window."""
        return ar.moved(-self.distance) if self.distance else ar

    def places(self, ar: AddrRange) -> list[AddrRange]:
        """Where it has the host range ``ar``, to be armed there: parts of it may be staged still."""
        if self.unarmed:
            return []
        staged = [each for each in self.staged if each.ar.overlaps(ar)] if self.staged else ()
        if not staged:
            return [self.guest(ar)]
        found = []
        for piece in cut(ar, sorted({border for each in staged for border in (each.ar.start, each.ar.end)})):
            where = next((each for each in staged if each.ar.covers(piece)), None)
            found.append(piece.moved(where.addr - where.ar.start) if where else self.guest(piece))
        return found

    def close(self) -> None:
        """Close its descriptors."""
        self.uffd.close()
        if self.sigbus is not None:
            self.sigbus.close()

    def __str__(self) -> str:
        """How log lines start."""
        return f"region {self.region.model.title or self.region.model.id} pid {self.model.pid}"


@attrs.define(eq=False)
class LiveRegion:
    """A region and its files: those of its memory, and in ``files`` those that are mapped into it.

    ``settled`` is set once its creator is attached, or has failed. ``closed`` when it is gone, which sets ``gone``.
    ``lock`` is held by a change from its first await to its end.
    ``moves`` counts how often memory was moved or went. ``changing`` while a change is carried out: faults wait,
    since the model is ahead of the memory; ``arming_now`` is what it has armed so far. ``created_ns`` is the wall
    clock's time, for people; ``page_tables_before`` the bytes of all page tables then, None where not counted yet.
    ``ended``: the namespace has let it go, and it closes when its files have every store. ``unwritten`` is what a
    change has left to be written to files; ``written`` is not set while the files of a region that nobody is attached
    to are brought up to date. ``family`` are its forks, and those that it is a fork of.
    ``digests``: see ``mshared.comparing``. ``journal`` takes what was refused, ``trace`` every fault while somebody
    asks for them. ``sponsor`` is a pidfd of the process that keeps it, if one does.
    ``book`` is where it is written down, once somebody is attached: before that nobody but its creator knows of it.
    ``change`` is one for which memory is still to be moved, and ``steps`` how often it was. ``writing`` is what files
    are just being brought up to date with.
    """

    model: Region
    backing: Backing
    uffd_device: int | None
    family: Family = attrs.Factory(Family)
    attachments: list[LiveAttachment] = attrs.Factory(list)
    settled: trio.Event = attrs.Factory(trio.Event)
    created_ns: int = attrs.Factory(time.time_ns)
    page_tables_before: int | None = None
    files: dict[FileId, MappedFile] = attrs.Factory(dict)
    closed: bool = False
    gone: trio.Event = attrs.Factory(trio.Event)
    lock: trio.Lock = attrs.Factory(trio.Lock)
    moves: int = 0
    changing: bool = False
    arming_now: list[Arm] = attrs.Factory(list)
    ended: bool = False
    unwritten: list[Unwritten] = attrs.Factory(list)
    written: trio.Event = attrs.Factory(trio.Event)
    book: Book = attrs.Factory(Book)
    change: rec.Begun | None = None
    steps: int = 0
    writing: list[AddrRange] = attrs.Factory(list)
    reading: Reading = attrs.Factory(Reading)
    poisoned: set[AddrRange] = attrs.Factory(set)
    journal: Journal = attrs.Factory(Journal)
    trace: Trace | None = None
    sponsor: int | None = None
    fork_notes: ForkNotes = attrs.Factory(ForkNotes)
    _refreshed: tuple[int, int] | None = None
    """Changes of the tables, and bytes of the backing, when the tables were brought up to date."""
    digests: Digests | None = None
    _stash: int | None = None
    _filler: Filler | None = None
    _file_ids: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))
    _piece_ids: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    def __attrs_post_init__(self) -> None:
        """There is nothing to write yet. Of a fork, the machine's page tables are counted when there is time."""
        self.written.set()
        self.family.join(self)
        if self.model.origin is None:
            self.page_tables_before = processes.all_page_table_bytes()

    def remember(self, ar: AddrRange, marks: bytes, start: Address) -> None:
        """Remember pages of the host range ``ar`` by the digests of what was read from ``start`` on, if they are."""
        if self.digests is not None and marks:
            self.digests.note(ar.moved(-self.model.ar.start), marks, start - self.model.ar.start)

    @property
    def has_stores(self) -> bool:
        """Whether there may be something that a file does not hold yet."""
        compared = self.digests is not None and self.digests.writers
        return compared or bool(self.unwritten) or bool(self.model.mm.dirty(self.model.ar))

    @property
    def shows_own_file(self) -> bool:
        """Whether its memory is a file of its users, which the daemon must not change."""
        return self.model.file is not None and self.model.file.resident

    def filler(self) -> Filler:
        """What puts single pages into the backing; made when first needed."""
        if self._filler is None:
            self._filler = Filler(self.backing.fd, self.model.ar.size, self.uffd_device, self.model.mm.page)
        return self._filler

    def punch(self, ar: AddrRange) -> None:
        """Give the memory of a range of offsets back, stashed or not; what is mapped there stays promised."""
        if self.backing.kind is BackingKind.HUGETLB:
            start = self.model.ar.start
            for vma in self.model.mm.vmas.overlapping(ar.moved(start)):
                self._drop(vma.clipped(ar.moved(start)))
            for hole in self.model.mm.vmas.holes(ar.moved(start)):
                self.backing.punch(hole.moved(-start))
        else:
            self.backing.punch(ar)
        if self._stash is not None:
            punch(self._stash, ar)

    def _drop(self, vma: Vma) -> None:
        """Have nothing left of what was in the place of a mapping. What may be touched meanwhile stays, as zeros."""
        for part in self.held(vma.ar.moved(-self.model.ar.start)):
            if vma.source is None and vma.prot & PROT_RW:
                hugetlb.zero(self.backing.fd, part)
            else:
                self.empty(part)

    def empty(self, part: AddrRange) -> None:
        """Take pages that are there, and that nobody may touch, out of the backing; they stay promised if possible."""
        lost = self.backing.empty(part)
        if lost:
            name = self.model.name or self.model.id
            log.warning("region %s: others took %d huge pages that it was promised; %s", name, lost, hugetlb.CURE)

    def put(self, data: bytes, offset: int) -> None:
        """Put whole pages into the backing, and no neighbour of theirs; what is there is written over."""
        if self.model.backing is not BackingKind.HUGETLB and len(data) % self.model.mm.granule == 0:
            self.backing.write(data, offset)
            return
        size = self.model.mm.page
        for at in range(0, len(data), size):
            page = data[at : at + size]
            if not self.filler().copy(offset + at, page):
                self.backing.write(page, offset + at)

    def put_new(self, data: bytes, offset: int) -> None:
        """Put whole pages into the backing, and no neighbour of theirs; what is there stays."""
        size = self.model.mm.page
        if not self.filler().copy(offset, data):
            for at in range(0, len(data), size):
                self.filler().copy(offset + at, data[at : at + size])

    def empty_all(self, parts: Iterable[AddrRange]) -> None:
        """The same for several ranges."""
        for part in parts:
            self.empty(part)
            point()

    def put_new_of(self, source: Backing, piece: AddrRange) -> None:
        """Put what another backing has in a range of offsets into this one; what is there stays."""
        if piece.size == PMD_SIZE and self.filler().take(piece, source.fd):
            return
        self.put_new(source.read(piece.size, piece.start), piece.start)

    def add_file(self, fd: int, magic: int | None = None) -> FileId:
        """Keep an opened file that is to be mapped; for ``magic`` see ``MappedFile``."""
        number = FileId(next(self._file_ids))
        self.files[number] = MappedFile(fd, magic)
        return number

    def restore_file(self, number: FileId, fd: int, magic: int) -> None:
        """Have a file again that was mapped before."""
        self.files[number] = MappedFile(fd, magic)
        self._file_ids = itertools.count(max(self.files) + 1)

    @property
    def recorded(self) -> bool:
        """Whether the next daemon will know of it."""
        return self.model.id in self.book.regions

    def note(self, *records: rec.Record, reply: protocol.Reply | None = None) -> None:
        """Write something down about this region, if anybody knows of it."""
        if self.recorded and not self.closed:
            self.book.commit(*records, reply=reply, region=self.model.id)

    def set_aside(self, file: FileId, offset: int, data: bytes) -> rec.SetAside:
        """Keep bytes that are to be written to a file, whatever becomes of its mapping; the record of it."""
        copy = self.files[file].copy_of(self.files[file].fd)
        piece = Unwritten(next(self._piece_ids), copy.fd, offset, data, copy.magic)
        self.unwritten.append(piece)
        return set_aside(self, piece)

    def restore_aside(self, piece: Unwritten) -> None:
        """Have such bytes again."""
        self.unwritten.append(piece)
        self._piece_ids = itertools.count(piece.number + 1)

    def take_files(self, files: dict[FileId, MappedFile]) -> None:
        """Have the files that are mapped."""
        self.files = files
        self._file_ids = itertools.count(max(files, default=0) + 1)

    def drop_unused_files(self) -> None:
        """Close the files that no mapping shows any more."""
        for number in self.files.keys() - self.model.mm.files() if self.files else ():
            self.note(rec.FileGone(self.model.id, number))
            self.files.pop(number).close()

    def held(self, ar: AddrRange) -> list[AddrRange]:
        """Where the backing holds data in a range of offsets, in order."""
        return self.backing.held(ar, self.uffd_device)

    def mapped(self) -> list[AddrRange]:
        """Where the backing may hold what is of interest, as offsets: of huge pages it takes its time to tell."""
        start, whole = self.model.ar.start, AddrRange.sized(0, self.model.ar.size)
        huge = self.backing.kind is BackingKind.HUGETLB
        return united(vma.ar.moved(-start) for vma in self.model.mm.vmas) if huge else [whole]

    def held_where_mapped(self, fd: int, mapped: list[AddrRange]) -> list[AddrRange]:
        """Where it holds data there, in order; ``fd`` is a duplicate of its descriptor, for a worker thread."""
        return [part for area in mapped for part in self.backing.held_by(fd, area, self.uffd_device)]

    def refresh_tables(self) -> None:
        """Bring the tables up to date with what the kernel has filled by itself.

        It only adds, and what is punched is taken out of the tables: while these have not changed and the backing has
        as much memory as it had, it has the same. But memory counts before it shows, while the kernel zeroes it.
        """
        mm, size = self.model.mm, resident(self.backing.fd)
        if self._refreshed != (mm.table.changes, size):
            present = self.held_where_mapped(self.backing.fd, self.mapped())
            mm.sync((part.moved(mm.ar.start) for part in present), huge=self.backing.kind is not BackingKind.SMALL)
            all_shows = sum(part.size for part in present) == size
            self._refreshed = (mm.table.changes, size) if all_shows else None

    def reserve(self, ar: AddrRange, *, hidden: bool = False) -> None:
        """Have memory promised for what is mapped in the host range ``ar``. Raises NoMemoryError.

        ``hidden``: only for what nobody may touch.
        """
        for vma in self.model.mm.vmas.overlapping(ar):
            if hidden and vma.prot.accessible:
                continue
            self.backing.reserve(vma.clipped(ar).ar.moved(-self.model.ar.start))

    async def prepare_to_punch(self, ar: AddrRange) -> None:
        """Have pages for all that is mapped in ``ar``, where punching gives back no promise that nobody has used."""
        if self.backing.kind is not BackingKind.HUGETLB:
            return
        for vma in filter(self._shows_zeros, self.model.mm.vmas.overlapping(ar)):
            part = vma.clipped(ar).ar.moved(-self.model.ar.start)
            with self.backing.duplicate() as fd:
                await trio.to_thread.run_sync(hugetlb.use_promises, fd, part, limiter=self.reading.limiter)

    def out_of_sight(self, ar: AddrRange) -> list[AddrRange]:
        """What is mapped in ``ar`` where a page of zeros would be seen, and wrong, before it is unmapped."""
        return [vma.clipped(ar).ar for vma in self.model.mm.vmas.overlapping(ar) if not self._shows_zeros(vma)]

    def _shows_zeros(self, vma: Vma) -> bool:
        """Whether a page that nobody has made is zeros to whoever touches it."""
        return vma.source is None and bool(vma.prot & PROT_RW) and not self.model.mm.rule.forked & Arming.MISSING

    def give_back(self, ar: AddrRange) -> None:
        """Give back the promises of what was mapped in ``ar`` and is a hole now."""
        if self.backing.kind is BackingKind.HUGETLB:
            for page in ar.moved(-self.model.ar.start).pieces(self.model.mm.page):
                hugetlb.use_promises(self.backing.fd, page)
                self.backing.punch(page)

    def stash(self) -> int:
        """The file where contents wait that no process may touch; made when first needed."""
        if self._stash is None:
            self._stash = new_file(f"msharefs-stash-{self.model.id}", self.model.ar.size)
            self.note(region_is(self))
        return self._stash

    @property
    def stash_fd(self) -> int | None:
        """The same, if it was made."""
        return self._stash

    def restore_stash(self, fd: int | None) -> None:
        """Have one that was made before."""
        self._stash = fd

    def close(self) -> None:
        """Close the files. Preconditions: nobody is attached."""
        self.closed = True
        self.gone.set()
        self.journal.ended(self.model)
        stash, self._stash = self._stash, None
        if self.recorded:
            self.book.commit(region_is(self))  # Before the number of any descriptor stands for something else.
        if stash is not None:
            os.close(stash)
        if self.digests is not None:
            self.digests.close()
        for file in self.files.values():
            file.close()
        self.files.clear()
        if self._filler is not None:
            self._filler.close()
            self._filler = None
        self.family.leave(self)
