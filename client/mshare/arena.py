"""An allocator for the memory of a region, for structures whose pointers every process can follow."""

from __future__ import annotations

import contextlib
import ctypes
import errno
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar, cast

from mshare.region import Region

T = TypeVar("T", bound=ctypes.Structure | ctypes.Union | ctypes.Array[Any])

_MAGIC: Final = int.from_bytes(b"MSHARENA", "little")
_SMALLEST: Final = 5
_CLASSES: Final = 48
_IN_USE: Final = 0xA110C
_FREE: Final = 0xF4EE


class _Header(ctypes.Structure):
    """What stands at the region's start. ``free[k]`` is the first free block of 2**k bytes; they are chained."""

    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("top", ctypes.c_uint64),
        ("root", ctypes.c_uint64),
        ("free", ctypes.c_uint64 * _CLASSES),
    )


class _Block(ctypes.Structure):
    """What stands before each piece; ``next`` overlaps what is given out."""

    _fields_ = (("state", ctypes.c_uint64), ("order", ctypes.c_uint64), ("next", ctypes.c_uint64))


_BEFORE: Final = _Block.next.offset


class Arena:
    """Gives out pieces of a region by address. All it knows lies in the region: any process can go on with it.

    A region that is new, zeros at its start, becomes an arena. ``lock`` is a context manager that keeps all others out,
    of whatever process: a ``multiprocessing.Lock``, say. Without one there must be no others.

    Limits: pieces are rounded up to a power of two less 16 bytes; what is freed is used again for pieces of the same
    size only, and no memory goes back to the machine; of a process that dies in ``alloc`` or ``free`` the piece may be
    lost. The region must be attached at its own address, since addresses are what it is about. It is plain Python: a
    few microseconds a call.
    """

    def __init__(self, region: Region, lock: AbstractContextManager[Any] | None = None) -> None:
        self._lock = contextlib.nullcontext() if lock is None else lock
        self._end = region.address + region.size
        self._region = region
        self._header = header = _Header.from_address(region.address)
        with self._lock:
            if not header.magic:
                header.magic, header.base = _MAGIC, region.address
                header.top = region.address + _rounded(ctypes.sizeof(_Header))
        if header.magic != _MAGIC:
            raise OSError(errno.EINVAL, f"region {region.name!r} holds something else than an arena")
        if header.base != region.address:
            raise OSError(
                errno.EINVAL, f"addresses in region {region.name!r} hold where it lies at {header.base:#x} only"
            )

    @property
    def root(self) -> int:
        """An address for others to start from, of what all else is reached by; 0 until somebody sets it."""
        return int(self._header.root)

    @root.setter
    def root(self, address: int) -> None:
        self._header.root = address

    def alloc(self, size: int) -> int:
        """The address of ``size`` bytes of zeros, a multiple of 16. Raises OSError ENOMEM."""
        if size < 0:
            raise OSError(errno.EINVAL, f"{size} bytes cannot be had")
        order = max(_SMALLEST, (size + _BEFORE - 1).bit_length())
        with self._lock:
            block = self._reused(order) or self._fresh(order)
            _Block.from_address(block).state = _IN_USE
        ctypes.memset(block + _BEFORE, 0, size)
        return block + _BEFORE

    def free(self, address: int) -> None:
        """Take back what ``alloc`` has given. Raises OSError EINVAL, with nothing changed, for any other address."""
        at, header = address - _BEFORE, self._header
        with self._lock:
            inside = header.base < at <= header.top - (1 << _SMALLEST) and at % 16 == 0
            block = _Block.from_address(at if inside else header.base)
            if not inside or block.state != _IN_USE or not _SMALLEST <= block.order < _CLASSES:
                raise OSError(errno.EINVAL, f"nothing that was given out, and not taken back, begins at {address:#x}")
            block.state, block.next = _FREE, header.free[block.order]
            header.free[block.order] = at

    def new(self, kind: type[T], *args: Any, **fields: Any) -> T:  # noqa: ANN401 - as ctypes has it
        """A structure, union or array of ctypes, in the region; ``free(ctypes.addressof(it))`` ends it."""
        made: Any = kind.from_address(self.alloc(ctypes.sizeof(kind)))
        made.__init__(*args, **fields)  # It is there; this only sets its fields.
        return cast(T, made)

    def _reused(self, order: int) -> int:
        """A free block of that size, or 0."""
        block = int(self._header.free[order]) if order < _CLASSES else 0
        if block:
            self._header.free[order] = _Block.from_address(block).next
        return block

    def _fresh(self, order: int) -> int:
        """A block that nobody has had before."""
        block = int(self._header.top)
        if order >= _CLASSES or block + (1 << order) > self._end:
            left, name = self._end - block, self._region.name
            raise OSError(errno.ENOMEM, f"region {name!r} has {left} bytes left, of which {1 << order} are asked for")
        self._header.top = block + (1 << order)
        _Block.from_address(block).order = order
        return block


def _rounded(size: int) -> int:
    return (size + 15) & ~15
