"""What is written down of regions, attachments and answers, record by record, and what a row of records comes to.

A record says how one thing is from then on; several that belong together stand in one entry of the journal, and hold
all or none. Reading them again is pure: no file, descriptor or process is looked at. What records of classes of the
core hold (``Vma``, ``Region``, ``Attachment``, changes) is taken over field by field, whatever fields these have.
"""

from __future__ import annotations

from typing import Any

import attrs

from msharefs.addr import AddrRange
from msharefs.effects import Change, Signal
from msharefs.frames import StoreNo
from msharefs.perms import Ownership
from msharefs.region import Attachment, BackingKind
from msharefs.vma import Arming, FileId, Vma


@attrs.frozen
class Layout:
    """What a host mm is made with, and where it stands in its lineage, which ``family`` numbers."""

    ar: AddrRange
    levels: int
    page: int
    granule: int
    paging_all: bool
    hole_signal: Signal
    forked: Arming
    family: int
    store: StoreNo


@attrs.frozen
class Memory:
    """Descriptors of a region's backing (the daemon's own, and what clients get), and its stash and digests, if any.

    Others as in ``Backing``.
    """

    fd: int
    writable: int
    readonly: int
    stash: int | None = None
    start: int = 0
    path: str | None = None
    mount: str | None = None
    digests: int | None = None


@attrs.frozen
class RegionIs:
    """A region is like this. ``model``: its fields in the core. ``over``: it has ended, relatives need its store.

    ``sponsor`` is a pidfd.
    """

    model: dict[str, Any]
    layout: Layout
    memory: Memory
    created_ns: int
    over: bool = False
    sponsor: int | None = None

    @property
    def id(self) -> int:
        """Number of the region."""
        return int(self.model["id"])

    @property
    def kind(self) -> BackingKind:
        """Where its memory comes from."""
        return BackingKind(self.model["backing"])


@attrs.frozen
class RegionGone:
    """A region is gone, with its memory."""

    region: int


@attrs.frozen
class Mapped:
    """In ``ar`` of a region these VMAs lie, and nothing else. ``cleared``: what was installed there is not any more."""

    region: int
    ar: AddrRange
    vmas: tuple[Vma, ...]
    cleared: bool = False


@attrs.frozen
class FileIs:
    """A file that is mapped into a region. ``path`` is where it was when it was opened, for people."""

    region: int
    file: FileId
    fd: int
    path: str
    magic: int = 0


@attrs.frozen
class FileGone:
    """No mapping shows that file any more."""

    region: int
    file: FileId


@attrs.frozen
class Begun:
    """A change of a region is to be carried out, of which the model knows already."""

    region: int
    effects: tuple[Change, ...]


@attrs.frozen
class Moved:
    """So many steps of that change have moved memory, and are not to be taken again."""

    region: int
    steps: int


@attrs.frozen
class Ended:
    """Of that change no memory is left to be moved."""

    region: int


@attrs.frozen
class Dirty:
    """In ``ar`` of a region those pages were stored to, and not written to their file, and no others."""

    region: int
    ar: AddrRange
    pages: tuple[AddrRange, ...]


@attrs.frozen
class SetAside:
    """Bytes for a file that are in memory no more."""

    region: int
    number: int
    fd: int
    offset: int
    data: bytes
    magic: int


@attrs.frozen
class Written:
    """They have reached the file."""

    region: int
    number: int


@attrs.frozen
class Forked:
    """There is a fork of a region, which had data of its own in ``present`` (host addresses).

    What is not said here is as it is with its origin, and so is what is mapped. ``of`` is its origin's name.
    """

    region: int
    origin: int
    present: tuple[AddrRange, ...]
    store: StoreNo
    memory: Memory
    created_ns: int
    owner: Ownership
    name: str | None = None
    of: str = ""


@attrs.frozen
class Refers:
    """Pages of a region lie in a relative's store: all of them, in order."""

    region: int
    pages: tuple[tuple[AddrRange, StoreNo], ...]


@attrs.frozen
class Inherited:
    """What a relative of ``family`` had in ``ar`` is another one's from now on, for all who referred to it."""

    family: int
    ar: AddrRange
    source: StoreNo
    target: StoreNo


@attrs.frozen
class AttachmentIs:
    """An attachment is like this. ``started`` tells its process from a later one with the same pid.

    ``staged``: host ranges and where they stand; others as in ``LiveAttachment``.
    """

    region: int
    model: Attachment
    anchor: int
    uffd: int
    sigbus: int | None
    parent_pid: int | None
    started: int | None
    staged: tuple[tuple[AddrRange, int], ...] = ()
    poisoned: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    uid: int = 0
    unarmed: bool = False


@attrs.frozen
class AttachmentGone:
    """An attachment is gone."""

    attachment: int


@attrs.frozen
class WasAttached:
    """An attachment was gone when a daemon came; its process may not know yet that the region's files are complete."""

    attachment: int
    region: int


@attrs.frozen
class Poisoned:
    """A page of an attachment is marked such that system calls fail there, or is not any more."""

    attachment: int
    addr: int
    on: bool


@attrs.frozen
class Refused:
    """A page of an attachment is in the hands of its second userfaultfd, or is not any more."""

    attachment: int
    addr: int
    on: bool


@attrs.frozen
class PoisonedForAll:
    """A page of a region is marked such in tables that processes share, or is not any more."""

    region: int
    page: AddrRange
    on: bool


@attrs.frozen
class UntakenIs:
    """A twin waits for the child of a process, which knows its token."""

    token: str
    region: int
    readonly: bool
    uid: int
    gid: int
    groups: tuple[int, ...]
    maker: int
    started: int | None


@attrs.frozen
class UntakenGone:
    """It has been taken, or nobody will."""

    token: str


@attrs.frozen
class Answered:
    """The request of that number in a client's session was carried out, with this reply (a packet).

    ``region`` is the one that it was about, if any: what it has left to be written is to be in files first.
    """

    session: str
    pid: int
    started: int | None
    number: int
    reply: bytes
    region: int | None = None


@attrs.frozen
class SessionGone:
    """Nobody will ask for that answer again."""

    session: str


@attrs.frozen
class Counters:
    """The numbers that the next region and attachment get at least."""

    region: int
    attachment: int


Record = (
    RegionIs
    | RegionGone
    | Mapped
    | FileIs
    | FileGone
    | Begun
    | Moved
    | Ended
    | Dirty
    | SetAside
    | Written
    | Forked
    | Refers
    | Inherited
    | AttachmentIs
    | AttachmentGone
    | WasAttached
    | Poisoned
    | Refused
    | PoisonedForAll
    | UntakenIs
    | UntakenGone
    | Answered
    | SessionGone
    | Counters
)
