"""``multiprocessing.shared_memory``, on regions: the standard library's classes, with another kind of block below them.

What differs is how a block ends. The standard library's resource tracker unlinks what a process has used when the
first program that has used it ends, others or not. Here each process that has a block open is a reference, which the
daemon sees end however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import multiprocessing
import os
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import managers, shared_memory
from pathlib import Path
from typing import Any, Final, cast

from mshare import syscalls as sc
from mshare.api import Mount, Terms, open_region, remove
from mshare.connection import when_idle
from mshare.discovery import find_mount, read_info
from mshare.region import Region
from mshare.tickets import checked_name
from mshare.window import RangeInUseError, has_relatives
from msharefs.addr import PMD_SIZE, PUD_SIZE, WINDOW_END, WINDOW_START, round_up

_TRIES: Final = 100
"""How often to look for another address when other threads take those that were free."""


class SharedMemory(shared_memory.SharedMemory):
    """A block of memory that processes share by its name; a drop-in for the standard library's class of that name.

    With ``create`` a new one of ``size`` bytes, which must all be had then: else OSError ENOMEM or ENOSPC, and no
    SIGBUS later. (``reserve=False``: memory is taken as it is touched.) From 2 MiB on it has the daemon's default kind
    of pages, 2 MiB ones with root's daemon, and below that small ones, if ``backing`` says nothing else. Without
    ``create`` one that exists, by its name.

    A block lasts until ``unlink``. With ``track``, said by its creator, it also ends by itself, once no process has it
    open and its creator has ended, or, of a creator that multiprocessing has started, the process that started it.

    ``close`` raises BufferError, with nothing changed, while slices of ``buf`` are in use. A NumPy array that was made
    from ``buf`` itself keeps the memory where it is. Raises ValueError, FileExistsError, FileNotFoundError and other
    OSErrors as the standard library does, and those of ``mshare.mshare``.
    """

    _name: str
    _buf: memoryview | None = None
    _flags: int = os.O_RDWR
    _mode: int = 0o600

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,  # noqa: FBT001, FBT002 - as the standard library has it
        size: int = 0,
        *,
        track: bool = True,
        reserve: bool = True,
        backing: str | None = None,
        mount: Mount = None,
    ) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create and size == 0:
            raise ValueError("'size' must be a positive number different from zero")
        if name is None and not create:
            raise ValueError("'name' can only be None if create=True")
        self._mount = mount
        place = find_mount(mount)
        if not create:
            assert name is not None
            self._name = f"/{name}"
            region = _attach(self._region_name, self._flags & os.O_ACCMODE, place)
        else:
            with _sponsor(track) as sponsor:
                backing = backing or ("4k" if size < PMD_SIZE else None)
                terms = Terms(self._mode, backing, used=size, sponsor=sponsor, reserve=reserve)
                region = self._create(name, terms, place)
        self._size = region.used
        self._buf = _look(region)

    def __del__(self) -> None:
        """Nothing: the memory goes when nobody looks at it any more."""

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, for whoever unpickles it to attach."""
        opened = functools.partial(self.__class__, mount=self._mount) if self._mount else self.__class__
        return opened, (self.name, False, self.size)

    def close(self) -> None:
        """End this object's access; the block stays. Raises BufferError while slices of ``buf`` are in use."""
        view = self._buf
        if view is None:
            return
        if has_relatives(view):
            raise BufferError("cannot close exported pointers exist: slices of buf are in use")
        view.release()
        self._buf = None

    def unlink(self) -> None:
        """Take the name away; the memory goes with its last user. Raises FileNotFoundError, PermissionError."""
        remove(self._region_name, mount=self._mount)

    @property
    def _region_name(self) -> str:
        if "\0" in self._name:
            raise ValueError("embedded null character")
        return self._name.lstrip("/")

    def _create(self, name: str | None, terms: Terms, mount: Path) -> Region:
        assert terms.used is not None
        info = read_info(mount)
        size = round_up(terms.used, max(info.align, PUD_SIZE if terms.backing == "hugetlb" else PMD_SIZE))
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        if size > WINDOW_END - WINDOW_START:
            raise OSError(errno.ENOMEM, f"{size} bytes are more than regions have addresses for")
        while True:
            self._name = f"/{name}" if name is not None else _new_name()
            try:
                return open_region(checked_name(self._region_name), None, size, flags, terms, mount)
            except FileExistsError:
                if name is not None:
                    raise


def _with_ours(function: Callable[..., Any], **names: object) -> Callable[..., Any]:
    """A function of the standard library, for which some of the names that it looks up stand for something else."""
    assert isinstance(function, types.FunctionType)
    scope = function.__globals__ | names
    twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(twin)


class ShareableList(shared_memory.ShareableList[Any]):
    """The standard library's, in an ``mshare.SharedMemory``, which is its ``shm``."""

    __init__ = _with_ours(shared_memory.ShareableList.__init__, SharedMemory=SharedMemory)


_OURS: Final = types.SimpleNamespace(SharedMemory=SharedMemory, ShareableList=ShareableList)
_Tracker: Final[Any] = vars(managers)["_SharedMemoryTracker"]


class _OurTracker(_Tracker):  # type: ignore[misc]  # A base that typeshed does not show.
    destroy_segment = _with_ours(_Tracker.destroy_segment, shared_memory=_OURS)


class _OurServer(managers.SharedMemoryServer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - handed on
        super().__init__(*args, **kwargs)
        self.shared_memory_context: Any = _OurTracker(self.shared_memory_context.shared_memory_context_name, [])


_Block = SharedMemory
_List = ShareableList
_make_block = _with_ours(managers.SharedMemoryManager.SharedMemory, shared_memory=_OURS)
_make_list = _with_ours(managers.SharedMemoryManager.ShareableList, shared_memory=_OURS)


class SharedMemoryManager(managers.SharedMemoryManager):
    """The standard library's; its blocks are ``mshare.SharedMemory`` and go by unlink when it is shut down."""

    _Server = _OurServer

    def SharedMemory(self, size: int) -> _Block:  # noqa: N802 - the standard library's name
        """A new block of ``size`` bytes, which goes when the manager is shut down."""
        return cast(_Block, _make_block(self, size))

    def ShareableList(self, sequence: Iterable[Any] | None) -> _List:  # noqa: N802 - the standard library's name
        """A new list with those items, which goes when the manager is shut down."""
        return cast(_List, _make_list(self, sequence))


def _new_name() -> str:
    return str(vars(shared_memory)["_make_filename"]())


@contextlib.contextmanager
def _sponsor(track: bool) -> Iterator[int | None]:  # noqa: FBT001 - the standard library's word
    """A pidfd of the process with which a new block may end. A worker's block is often for who has started it."""
    if not track:
        yield None
        return
    parent = multiprocessing.parent_process()
    pid = parent.pid if parent is not None and parent.is_alive() else os.getpid()
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _attach(name: str, access: int, mount: Path) -> Region:
    """A window on a region: where the region lies, or where there is room, if this process has that window already."""
    addr = None
    for _ in range(_TRIES):
        try:
            return open_region(checked_name(name), addr, 0, access, Terms(0), mount)
        except RangeInUseError as error:
            size = error.size
            addr = sc.free_address(size, PUD_SIZE if size % PUD_SIZE == 0 else PMD_SIZE)
    raise OSError(f"no address stays free for {name!r}; try again")


def _look(region: Region) -> memoryview:
    """What its users look at; the region is detached when nobody does any more.

    That is not before the view is released: NumPy's ``ndarray(buffer=view)`` refers to the memory behind it.
    """
    memory = (ctypes.c_char * region.used).from_address(region.address)
    weakref.finalize(memory, when_idle, functools.partial(_end, region)).atexit = False
    view = memoryview(memory).cast("B")
    return view.toreadonly() if region.readonly else view


def _end(region: Region) -> None:
    with contextlib.suppress(OSError):
        region.detach()
