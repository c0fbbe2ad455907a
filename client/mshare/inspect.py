"""Looking at regions from outside, without being attached to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mshare.api import Mount
from mshare.connection import Connection, collect_maps, connect
from mshare.discovery import find_mount
from mshare.tickets import Name, checked_name, opened
from msharefs import protocol
from msharefs.protocol import RegionName, RegionStat, Vma


def regions(mount: Mount = None) -> list[RegionName]:
    """The regions of a mount, by name. Raises OSError."""
    link = connect(find_mount(mount))
    found: list[RegionName] = []
    more = True
    while more:
        reply = link.call(protocol.GetList(after=found[-1].name if found else None), protocol.Listing)
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


@contextmanager
def _opened(name: Name, mount: Mount) -> Iterator[tuple[Connection, tuple[int, ...]]]:
    """The connection to ask over, and the opened file that proves one may."""
    text = checked_name(name)
    link = connect(find_mount(mount))
    with opened(link.mount / text, os.O_RDONLY) as ticket:
        if not ticket:
            path = link.mount / text
            raise OSError(
                errno.EACCES, f"the mode of region {text!r} does not let you read it; its owner can chmod {path}"
            )
        yield link, ticket
