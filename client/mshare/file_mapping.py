"""Mapping a file so that all who map it alike share one mapping of it: mmap(2) with MAP_SHARED_PT."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE
from types import TracebackType
from typing import Final, Self

from mshare import syscalls as sc
from mshare.api import Mount, offer_of
from mshare.connection import Connection, RestartedError, connect
from mshare.discovery import find_mount
from mshare.region import Region
from mshare.window import RangeInUseError, Window
from msharefs import protocol
from msharefs.file_sharing import Wanted
from msharefs.perms import MAP_SHARED_PT, Prot

_TYPE: Final = 0x0F
_SHARED_TYPES: Final = (0x01, 0x03)
"""MAP_SHARED and MAP_SHARED_VALIDATE."""
_DAEMONS_MATTER: Final = MAP_SHARED_PT | _TYPE | sc.MAP_FIXED_NOREPLACE
_TRIES: Final = 10
"""How often to start over when others come and go, or the address that is offered turns out to be taken."""


class FileMapping:
    """A mapping of a file. Made by ``mshare.mmap``; a context manager that unmaps. Usable from several threads.

    ``shared``: whether it is one with the mappings of all others who map the file alike; otherwise it is an ordinary
    mapping of this process, and ``why`` says for what reason.
    """

    def __init__(self, window: Window, region: Region | None, why: str | None) -> None:
        self._window = window
        self._region = region
        self._lock = threading.RLock()
        self.why = why

    @property
    def address(self) -> int:
        """Where it starts in this process."""
        return self._window.address

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._window.size

    @property
    def buf(self) -> memoryview:
        """The memory, as bytes. Raises ValueError after ``munmap``. A touch past the file's last page is a SIGBUS."""
        return self._window.view

    @property
    def shared(self) -> bool:
        """Whether others who map the file alike share this very mapping."""
        return self._region is not None

    @property
    def closed(self) -> bool:
        """Whether it was unmapped."""
        return not self._window.is_open

    def msync(self) -> None:
        """Have the file hold every store made before the call, whoever made it. Raises OSError, ValueError if closed.

        As msync(2) with MS_SYNC, it returns when the file's disk has them.
        """
        _ = self.buf
        if self._region is not None:
            self._region.msync()
        else:
            sc.msync(self.address, self.size)

    def mprotect(self, prot: int) -> None:
        """Change the protection of all of it, for all who share it; a store against it is a SIGSEGV.

        Nobody else gets more by that than it has mapped the file with. Raises OSError: EACCES (PROT_EXEC, or more than
        the descriptor was opened for; less, too, if that was O_RDONLY), EOPNOTSUPP (PROT_NONE of a file in memory, or
        with the backing ``hugetlb``), EINVAL; BufferError while views are alive that cannot write, and would have to.
        """
        with self._lock:
            _ = self.buf
            more = prot & ~self._window.prot
            if more & PROT_WRITE:
                self._window.check_unseen()
            if self._region is not None:
                self._region.mprotect(0, self.size, prot)
            else:
                _check_prot(prot)
            if more or self._region is None:
                self._window.allow(prot)

    def munmap(self, offset: int = 0, length: int | None = None) -> None:
        """Unmap all of it; a second call does nothing. The last who does so has the file hold every store.

        Raises OSError EINVAL for a part, and BufferError, with nothing changed, while views of ``buf`` are alive.
        """
        if offset or length not in (None, self.size):
            raise OSError(errno.EINVAL, f"a part of a file's mapping cannot be unmapped, only all {self.size:#x} bytes")
        with self._lock:
            if self._region is not None:
                self._region.detach()
            else:
                self._window.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.munmap()

    def __repr__(self) -> str:
        """Say what it is and where."""
        state = "unmapped" if self.closed else f"{self.size:#x} bytes at {self.address:#x}"
        return f"<FileMapping: {state}, {'shared' if self.shared else f'not shared: {self.why}'}>"


def mmap(
    fd: int,
    length: int,
    *,
    addr: int | None = None,
    prot: int = PROT_READ | PROT_WRITE,
    flags: int = MAP_SHARED | MAP_SHARED_PT,
    offset: int = 0,
    backing: str | None = None,
    mount: Mount = None,
) -> FileMapping:
    """Map a file; with MAP_SHARED_PT in ``flags`` together with all who map it alike (compare mmap(2)).

    The first who maps a file so decides on address (the daemon does for ``addr`` None), length, offset, all multiples
    of 2 MiB, and protection. Who asks for the same, and at least for that protection, shares the mapping: one address,
    protections that change for all, and page tables as far as the kernel shares them. Everybody else, and everybody
    where no daemon runs, gets an ordinary mapping, whose ``shared`` is False and whose ``why`` says the reason. Files
    in memory are mapped as they are. For a file of a disk stands a ``backing`` (``thp``, ``4k`` or ``hugetlb``), which
    is written back by msync, by the last munmap, and from time to time. The descriptor may be closed afterwards.

    Raises OSError: EINVAL (neither MAP_SHARED nor MAP_SHARED_VALIDATE, or MAP_FIXED), EACCES (PROT_EXEC, or the file
    was not opened for what is asked), EEXIST (MAP_FIXED_NOREPLACE, and something is there), EBADF, ENODEV, ENOMEM, and,
    with a ``backing`` that cannot be had, ENOSPC, EDQUOT, EOPNOTSUPP.
    """
    _check(flags, prot)
    if length <= 0 or offset < 0 or (addr or 0) < 0:
        raise OSError(errno.EINVAL, f"no mapping has {length} bytes, from offset {offset} on, at {addr or 0}")
    wanted = Wanted(addr, length, offset, Prot(prot))
    why = _why_ordinary(fd, wanted, flags)
    if why is None:
        try:
            link = connect(find_mount(mount))
            link.reach()
        except OSError as error:
            why = f"no daemon: {error.strerror}"
        else:
            found = _share(link, fd, wanted, flags, backing)
            if isinstance(found, FileMapping):
                return found
            why = found
    return _ordinary(fd, wanted, flags, why)


def _check(flags: int, prot: int) -> None:
    if flags & _TYPE not in _SHARED_TYPES:
        raise OSError(errno.EINVAL, "a mapping is shared with MAP_SHARED or MAP_SHARED_VALIDATE, and with neither not")
    if flags & sc.MAP_FIXED:
        raise OSError(errno.EINVAL, "MAP_FIXED would replace what is there; unmap that, and use MAP_FIXED_NOREPLACE")
    _check_prot(prot)


def _check_prot(prot: int) -> None:
    if prot & ~(PROT_READ | PROT_WRITE | Prot.EXEC):
        raise OSError(errno.EINVAL, f"protection {prot:#x} has unknown bits")
    if prot & Prot.EXEC:
        raise OSError(errno.EACCES, "PROT_EXEC: shared mappings are data; leave the flag out")


def _why_ordinary(fd: int, wanted: Wanted, flags: int) -> str | None:
    """Why the daemon need not be asked, or None. Raises OSError as mmap(2) does for the descriptor."""
    if not flags & MAP_SHARED_PT:
        return "MAP_SHARED_PT is not among the flags"
    if flags & sc.MAP_ANONYMOUS:
        return "there is no file: MAP_ANONYMOUS"
    if fd < 0:
        raise OSError(errno.EBADF, "there is no file: open one, or use MAP_ANONYMOUS")
    opened = fcntl.fcntl(fd, fcntl.F_GETFL)
    if opened & os.O_PATH:
        raise OSError(errno.EBADF, "a descriptor opened with O_PATH cannot be mapped")
    if opened & os.O_ACCMODE == os.O_WRONLY:
        raise OSError(errno.EACCES, "the file was opened for writing only; open it O_RDWR")
    if wanted.prot & PROT_WRITE and opened & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EACCES, "the file was opened for reading only; open it O_RDWR, or map it PROT_READ")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return "the descriptor is not of a regular file"
    return wanted.why_unaligned()


def _ordinary(fd: int, wanted: Wanted, flags: int, why: str) -> FileMapping:
    """Map the file as mmap(2) does. Raises OSError."""
    address = sc.mmap(wanted.addr, wanted.length, wanted.prot, flags & ~MAP_SHARED_PT, fd, wanted.offset)
    window = Window(protocol.Offer(0, 0, address, wanted.length, readonly=False, device=False), wanted.prot)
    window.take()
    return FileMapping(window, None, why)


def _share(link: Connection, fd: int, wanted: Wanted, flags: int, backing: str | None) -> FileMapping | str:
    """The shared mapping, or why there is none. Raises OSError."""
    request = protocol.MapFile(wanted.addr, wanted.length, wanted.offset, wanted.prot, backing)
    taken: set[int] = set()
    for _ in range(_TRIES):
        reply, fds = link.exchange(request, (fd,))
        if isinstance(reply, protocol.Ordinary):
            return reply.why
        offer = offer_of(reply, fds)
        try:
            return _enter(link, offer, fd, fds, wanted, flags)
        except RangeInUseError as error:
            if flags & sc.MAP_FIXED_NOREPLACE and wanted.addr is not None:
                raise FileExistsError(errno.EEXIST, f"something is mapped at {offer.addr:#x}") from error
            if wanted.addr is not None or offer.addr in taken:
                return f"{offer.addr:#x}, where it is shared, is in use in this process"
            taken.add(offer.addr)
        except (FileNotFoundError, RestartedError):
            continue  # The last of the others went meanwhile, or the daemon.
    return "others come and go; try again"


def _enter(link: Connection, offer: protocol.Offer, fd: int, fds: list[int], wanted: Wanted, flags: int) -> FileMapping:
    """Take up an offer: map what is offered, be armed, and look. Closes ``fds``."""
    window, attachment = Window(offer, int(wanted.prot)), None
    device = fds[-1] if offer.device else None
    try:
        if offer.own:
            window.map(fd, wanted.offset, flags & ~_DAEMONS_MATTER)
        else:
            window.map(fds[0])
        window.make_userfaultfd(device)
        attachment = window.announce(link, offer, device)
        window.open()
    except BaseException:
        window.discard()
        with contextlib.suppress(OSError):
            end = protocol.Abort(offer.offer) if attachment is None else protocol.Detach(attachment)
            link.call(end, protocol.Done)
        raise
    finally:
        for each in fds:
            os.close(each)
    return FileMapping(window, Region("", link, window, offer, attachment), None)
