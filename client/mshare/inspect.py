"""Looking at regions from outside, without being attached to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from mshare.api import Mount
from mshare.connection import Connection, collect_maps, connect
from mshare.discovery import find_mount
from mshare.tickets import Name, checked_name, opened
from msharefs import protocol
from msharefs.protocol import Heat, Refusal, RegionName, RegionStat, TraceEvent, Vma


def regions(mount: Mount = None) -> list[RegionName]:
    """The regions of a mount, by name. Raises OSError."""
    return _listed(mount, files=False)


def files(mount: Mount = None) -> list[RegionName]:
    """The files that processes share without a name (``mshare.mmap``), by device and inode. Raises OSError."""
    return _listed(mount, files=True)


def _listed(mount: Mount, *, files: bool) -> list[RegionName]:
    link = connect(find_mount(mount))
    found: list[RegionName] = []
    more = True
    while more:
        after = found[-1].name if found else None
        reply = link.call(protocol.GetList(after, files), protocol.Listing)
        found += reply.regions
        more = reply.more
    return found


def stat(name: Name, mount: Mount = None) -> RegionStat:
    """What the daemon and the kernel know of a region one may read, sizes in bytes. Raises OSError: ENOENT, EACCES."""
    with _opened(name, mount) as (link, ticket):
        return link.call(protocol.GetStat(), RegionStat, ticket)


def maps(name: Name, mount: Mount = None) -> list[Vma]:
    """The VMAs inside a region one may read, by offset. Raises OSError: ENOENT, EACCES."""
    with _opened(name, mount) as (link, ticket):
        return collect_maps(lambda after: link.call(protocol.GetMaps(after=after), protocol.Maps, ticket))


def heat(name: Name, cells: int, mount: Mount = None) -> Heat:
    """What a region one may read holds where, in at most ``cells`` (2048) pieces. Raises OSError: ENOENT, EACCES."""
    with _opened(name, mount) as (link, ticket):
        return link.call(protocol.GetHeat(cells), Heat, ticket)


def attachments(name: Name, mount: Mount = None) -> list[tuple[int | None, bool]]:
    """The windows on a region one may read: process (None: not known yet), and whether it may write. Raises OSError."""
    with _opened(name, mount) as (link, _):
        lines = (link.mount / ".regions" / checked_name(name) / "attachments").read_text().splitlines()
    return [(int(pid) if pid != "?" else None, way == "rw") for pid, way in (line.split()[:2] for line in lines)]


def refusals(mount: Mount = None) -> list[Refusal]:
    """The last touches that the daemon refused, oldest first, in all regions that one may read. Raises OSError."""
    link = connect(find_mount(mount))
    found: list[Refusal] = []
    more = True
    while more:
        reply = link.call(protocol.GetRefusals(found[-1].number if found else 0), protocol.Refusals)
        found += reply.refusals
        more = reply.more
    return found


class Trace:
    """The faults of a region that the daemon answers from now on; to be polled every few seconds, and closed.

    Takes permission to write the region, or to own it and read it. ``lost`` counts those that came too fast: the daemon
    keeps the last 8192. Raises OSError: ENOENT, EACCES.
    """

    def __init__(self, name: Name, mount: Mount = None) -> None:
        self.lost = 0
        self._name, self._mount = name, mount
        with ExitStack() as stack:
            self._link, self._ticket = stack.enter_context(_opened(name, mount, (os.O_RDWR, os.O_RDONLY)))
            self._last = self._call(None).last
            self._stack = stack.pop_all()

    def poll(self) -> list[TraceEvent]:
        """What there was since the last time, in order."""
        found: list[TraceEvent] = []
        more = True
        while more:
            reply = self._call(self._last)
            found += reply.events
            self.lost += reply.lost
            self._last, more = reply.last, reply.more and len(found) < _MOST_POLLED
        return found

    def close(self) -> None:
        """Ask no more; the daemon notices."""
        self._stack.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, after: int | None) -> protocol.Traced:
        return self._link.call(protocol.GetTrace(after), protocol.Traced, self._ticket)


_MOST_POLLED = 1 << 14
"""Faults of one poll: of a region that has them faster than they are told, the rest is for the next."""


@contextmanager
def _opened(
    name: Name, mount: Mount, ways: tuple[int, ...] = (os.O_RDONLY,)
) -> Iterator[tuple[Connection, tuple[int, ...]]]:
    """The connection to ask over, and the opened file that proves one may."""
    text = checked_name(name)
    link = connect(find_mount(mount))
    with ExitStack() as stack:
        ticket: tuple[int, ...] = ()
        for way in ways:
            ticket = ticket or stack.enter_context(opened(link.mount / text, way))
        if not ticket:
            path = link.mount / text
            raise OSError(
                errno.EACCES, f"the mode of region {text!r} does not let you read it; its owner can chmod {path}"
            )
        yield link, ticket
