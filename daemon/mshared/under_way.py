"""What is under way with a region: mappings that stand elsewhere yet, reading, and bytes that are to be written."""

from __future__ import annotations

import functools

import attrs
import trio

from msharefs.addr import Address, AddrRange
from msharefs.readahead import Readahead


@attrs.frozen
class Staged:
    """The host range ``ar`` stands at ``addr`` in an address space, until it is moved to its place in the window."""

    ar: AddrRange
    addr: Address


@attrs.define
class Reading:
    """What is being read of mapped files off the loop, as host ranges.

    A file whose filesystem does not answer holds the threads that ``limiter`` allows this region, and no other's.
    """

    under_way: list[AddrRange] = attrs.Factory(list)
    readahead: Readahead = attrs.Factory(Readahead)

    @functools.cached_property
    def limiter(self) -> trio.CapacityLimiter:
        """What bounds the threads, made when first needed."""
        return trio.CapacityLimiter(4)


@attrs.frozen
class Unwritten:
    """Bytes for a file, whose descriptor it owns, from ``offset`` on, as far as it reaches."""

    number: int
    fd: int
    offset: int
    data: bytes
    magic: int
