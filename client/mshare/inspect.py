"""Looking at regions from outside, without being attached to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mshare.api import Mount, Name, _checked_name, _ticket
from mshare.connection import Connection, connect
from mshare.discovery import find_mount
from msharefs import protocol
from msharefs.protocol import RegionName, RegionStat, Vma


def regions(mount: Mount = None) -> list[RegionName]:
    """The regions of a mount, by name. Raises OSError."""
    return list(connect(find_mount(mount)).call(protocol.GetList(), protocol.Listing).regions)


def stat(name: Name, mount: Mount = None) -> RegionStat:
    """What the daemon and the kernel know of a region one may read, sizes in bytes. Raises OSError: ENOENT, EACCES."""
    with _opened(name, mount) as (link, ticket):
        return link.call(protocol.GetStat(), RegionStat, ticket)


def maps(name: Name, mount: Mount = None) -> list[Vma]:
    """The VMAs inside a region one may read, by offset. Raises OSError: ENOENT, EACCES."""
    with _opened(name, mount) as (link, ticket):
        return list(link.call(protocol.GetMaps(), protocol.Maps, ticket).vmas)


@contextmanager
def _opened(name: Name, mount: Mount) -> Iterator[tuple[Connection, tuple[int, ...]]]:
    """The connection to ask over, and the opened file that proves one may."""
    text = _checked_name(name)
    link = connect(find_mount(mount))
    with _ticket(link.mount / text, os.O_RDONLY) as ticket:
        if not ticket:
            path = link.mount / text
            raise OSError(
                errno.EACCES, f"the mode of region {text!r} does not let you read it; its owner can chmod {path}"
            )
        yield link, ticket
