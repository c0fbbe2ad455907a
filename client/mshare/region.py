"""A region as its users hold it."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from mmap import MAP_ANONYMOUS, MAP_SHARED, PROT_READ, PROT_WRITE
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mshare import connection
from mshare import syscalls as sc
from mshare.connection import Connection, RestartedError, collect_maps, reply_of
from mshare.refpages import wire_content
from mshare.tickets import Name, checked_name
from mshare.window import Window
from msharefs import protocol
from msharefs.addr import PAGE_SIZE
from msharefs.perms import Advice, MapFlag
from msharefs.protocol import RegionStat, Vma
from msharefs.refpage import RefPage

_SERVED_ADVICE: Final = {Advice.REMOVE, Advice.NORMAL, Advice.RANDOM, Advice.SEQUENTIAL}
"""What the daemon does all about."""
_OWNERS: Final = 0o700
"""The permissions of a file's owner."""
_NOT_FOR_HUGETLB: Final = {Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.COLLAPSE, Advice.COLD, Advice.PAGEOUT}
"""What means nothing to the kernel for pages that are huge by nature: it would refuse, or split the window."""


class Region:
    """An attached region: a window at ``address``, and the calls that act on what it shows.

    Made by ``mshare.mshare``. Stays attached until ``detach``, ``mshare.mshare_unlink`` or the end of the process,
    whether or not the object is kept. A context manager that detaches. Usable from several threads.
    """

    def __init__(self, name: str, link: Connection, window: Window, offer: protocol.Offer, attachment: int) -> None:
        self._name = name
        self._link = link
        self._window = window
        self._inode = offer.inode
        self._used = offer.used or offer.size
        self._served_advice = _SERVED_ADVICE if offer.page == PAGE_SIZE else _SERVED_ADVICE | _NOT_FOR_HUGETLB
        self._attachment = attachment
        self._pid = os.getpid()
        self._lock = threading.RLock()
        with _attached_lock:
            _attached.append(self)

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._name

    @property
    def address(self) -> int:
        """Where the window starts in this process."""
        return self._window.address

    @property
    def size(self) -> int:
        """Bytes of the region."""
        return self._window.size

    @property
    def used(self) -> int:
        """How many of its bytes are meant to be used: all, but of a ``SharedMemory`` those that were asked for."""
        return self._used

    @property
    def readonly(self) -> bool:
        """Whether it was opened O_RDONLY: the window cannot be written."""
        return self._window.readonly

    @property
    def closed(self) -> bool:
        """Whether it was detached."""
        return not self._window.is_open

    @property
    def buf(self) -> memoryview:
        """The memory, as bytes. Raises ValueError after ``detach``. A touch of a hole is a SIGBUS.

        What keeps an address and no view (PyTorch's ``frombuffer(region.buf)``; not ``frombuffer(memoryview(...))``) is
        not seen by ``detach``, and must not be touched afterwards.
        """
        return self._window.view

    def stat(self) -> RegionStat:
        """What the daemon and the kernel know of the region, sizes in bytes. Raises OSError, ValueError if closed."""
        return self._link.call(protocol.GetStat(self._own_attachment()), protocol.RegionStat)

    def maps(self) -> list[Vma]:
        """The VMAs inside the region, by offset. Raises OSError, ValueError if closed."""
        attachment = self._own_attachment()
        return collect_maps(lambda after: self._link.call(protocol.GetMaps(attachment, after), protocol.Maps))

    def mmap(
        self,
        length: int,
        prot: int = PROT_READ | PROT_WRITE,
        flags: int = MAP_SHARED | MAP_ANONYMOUS,
        *,
        offset: int | None = None,
        fd: int = -1,
        fd_offset: int = 0,
        refpage: RefPage | None = None,
    ) -> int:
        """Map zeroed memory, a file or a reference page inside the region, in every process; its offset (mmap(2)).

        ``offset`` is a hint without MAP_FIXED (which replaces what is there) or MAP_FIXED_NOREPLACE (EEXIST if
        something is). Anonymous memory is shared by the region's processes, with MAP_SHARED and MAP_PRIVATE alike.
        Without MAP_ANONYMOUS the file ``fd`` is shown from ``fd_offset`` on: with MAP_SHARED stores reach it by
        msync, munmap, the last detach and unlink; with MAP_PRIVATE they stay in the region, seen by all its
        processes. With MAP_PRIVATE|MAP_ANONYMOUS|MAP_REFPAGE each page shows ``refpage`` and takes no memory until it
        is touched; stores are seen by all processes.

        Raises OSError: EINVAL, EEXIST, EBADF, ENODEV, ENOMEM (no gap), EACCES (PROT_EXEC, a read-only window, a file
        not opened for what is asked).
        """
        content = wire_content(refpage, flags, fd)
        request = protocol.Mmap(self._own_attachment(), offset, length, prot, flags, fd_offset, content)
        fds = () if flags & MAP_ANONYMOUS or fd < 0 else (fd,)
        placed = self._link.call(request, protocol.Placed, fds).offset
        if flags & MapFlag.POPULATE and prot & (PROT_READ | PROT_WRITE):
            populate = Advice.POPULATE_WRITE if prot & PROT_WRITE else Advice.POPULATE_READ
            with contextlib.suppress(OSError):  # As mmap(2): what cannot be populated is mapped all the same.
                self.madvise(placed, length, populate)
        return placed

    def munmap(self, offset: int, length: int) -> None:
        """Unmap a range, in every process: its memory goes back, a touch is a SIGBUS from now on. Raises OSError."""
        self._link.call(protocol.Munmap(self._own_attachment(), offset, length), protocol.Done)

    def mprotect(self, offset: int, length: int, prot: int) -> None:
        """Change the protection of a range, in every process, when the call returns; against it is a SIGSEGV.

        PROT_NONE keeps the contents for a later mprotect. Raises OSError: EINVAL, ENOMEM (not mapped throughout, or no
        memory), EACCES (PROT_EXEC, or a read-only window).
        """
        self._link.call(protocol.Mprotect(self._own_attachment(), offset, length, prot), protocol.Done)

    def msync(self, offset: int = 0, length: int | None = None) -> None:
        """Have the files that are mapped shared in a range hold every store; by default in the whole region.

        Raises OSError: EINVAL, ENOMEM (not mapped throughout), ENOSPC.
        """
        self._link.call(protocol.Msync(self._own_attachment(), offset, length), protocol.Done)

    def madvise(self, offset: int, length: int, advice: int) -> None:
        """Give advice about a range, with the meaning that madvise(2) has for shared memory.

        REMOVE makes it zeros, or what its reference page says, for everybody, DONTNEED keeps the contents; POPULATE_*,
        COLLAPSE, COLD, PAGEOUT and the like act on this process's mapping and on the memory behind it. COLD and
        PAGEOUT give back the pages of reference pages that were only read. Raises OSError: EINVAL, ENOMEM, EACCES.
        """
        request = protocol.Madvise(self._own_attachment(), offset, length, advice)
        self._link.call(request, protocol.Done)
        if advice not in self._served_advice:
            sc.madvise(self.address + offset, length, advice)

    def fork(self, name: Name, mode: int = 0o600) -> None:
        """Make a region ``name`` with the same mappings and, as of now, the same contents, at once.

        Both are independent from then on: a page is copied when one of them changes it. ``mode`` less umask are the
        permissions of its file. It takes write permission on the mount, and a window that may write, or being the
        region's owner. Raises OSError: EINVAL, EEXIST, EACCES, ENOSPC, EDQUOT, ENOMEM; ValueError if closed.
        """
        known = checked_name(name)
        if mode & ~_OWNERS:
            self._link.call(protocol.Fork(self._own_attachment(), known, mode & ~sc.umask()), protocol.Done)
            return
        # Nobody else gets in anyhow: what the umask keeps from the owner is found out while the daemon is at work.
        masks: list[int] = []
        request = protocol.Fork(self._own_attachment(), known, mode)
        self._link.call(request, protocol.Done, meanwhile=lambda: masks.append(sc.umask()))
        mask = masks[-1] if masks else sc.umask()
        if mode & mask:
            (self._link.mount / known).chmod(mode & ~mask)

    def detach(self) -> None:
        """Unmap the window and end this reference; a second call does nothing.

        Raises BufferError, with nothing changed, while views of ``buf`` are alive.
        """
        with self._lock:
            if self.closed:
                return
            self.end_reference(self.close_window())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        """Say what it is and where."""
        state = "detached" if self.closed else f"{self.size:#x} bytes at {self.address:#x}"
        return f"<Region {self._name!r}: {state}{', read-only' if self.readonly else ''}>"

    def shows(self, mount: Path, inode: int) -> bool:
        """Whether this is a window on the region with that file."""
        return self._link.mount == mount and self._inode == inode

    def keep_from_children(self, *, keep: bool) -> None:
        """Have children forked from now on have no window, or have it again. Raises OSError."""
        self._window.keep_from_children(keep=keep)

    @property
    def link(self) -> Connection:
        """The connection by which the daemon is asked about it."""
        return self._link

    def own_attachment(self) -> int:
        """Number of this process's attachment. Raises OSError, ValueError if closed."""
        return self._own_attachment()

    def become(self, token: str) -> None:
        """In a forked child that was kept from having the window: be the private twin made for it. Raises OSError."""
        try:
            self._become(token)
        except RestartedError:  # Nobody has taken it.
            self._window.discard()
            self._become(token)

    def _become(self, token: str) -> None:
        reply, fds = self._link.exchange(protocol.Take(token, self.address))
        try:
            offer = reply_of(reply, protocol.Offer)
            device = fds[1] if offer.device else None
            self._window.replace(fds[0])
            self._window.make_userfaultfd(device)
            self._attachment = self._window.announce(self._link, offer, device)
            self._window.let_in()
        finally:
            for fd in fds:
                os.close(fd)
        self._inode, self._pid = offer.inode, os.getpid()

    def close_window(self) -> int | None:
        """Unmap without ending the reference, which is returned.

        Raises BufferError, with nothing changed, while views are alive.
        """
        attachment = self._own_attachment_if_served()
        self._window.close()
        with _attached_lock:
            _attached.remove(self)
        return attachment

    def end_reference(self, attachment: int | None) -> None:
        """Tell the daemon, if there is one, that the window is gone."""
        if attachment is not None:
            with contextlib.suppress(OSError):
                self._link.call(protocol.Detach(attachment), protocol.Done)

    def _own_attachment(self) -> int:
        """Number of this process's attachment; a forked child asks for its own at first."""
        with self._lock:
            if self.closed:
                raise ValueError("the region is detached")
            if self._pid != os.getpid():
                reply = self._link.call(protocol.Adopt(self._attachment), protocol.Attached)
                self._attachment, self._pid = reply.attachment, os.getpid()
            return self._attachment

    def _own_attachment_if_served(self) -> int | None:
        """The same, or None when no daemon answers: then there is no reference to end either."""
        try:
            return self._own_attachment()
        except OSError:
            return None

    def after_fork(self) -> None:
        """In a forked child: the parent's lock and userfaultfd mean nothing here.

        Where the kernel reports no forks the window is not armed: ask for that now, or give it up, since a touch of a
        hole would put a page there for everybody.
        """
        self._lock = threading.RLock()
        self._window.drop_userfaultfd()
        if self._link.fork_events:
            return
        try:
            self._window.make_userfaultfd(None)
            request = protocol.Adopt(self._attachment)
            reply = self._link.call(request, protocol.Attached, (self._window.userfaultfd,))
            self._attachment, self._pid = reply.attachment, os.getpid()
        except OSError:
            self._window.discard()


_attached: list[Region] = []
_attached_lock = threading.RLock()
"""Not a plain one: the collector may end a region while this thread holds it."""


def attached_as(mount: Path, inode: int) -> list[Region]:
    """This process's windows on the region with that inode."""
    with _attached_lock:
        return [region for region in list(_attached) if region.shows(mount, inode)]


def attached_regions() -> list[Region]:
    """This process's windows on regions that have a name; mappings of files have none."""
    with _attached_lock:
        return [region for region in _attached if region.name]


def check_no_window(start: int, end: int) -> None:
    """Refuse to donate what is another region's already. Raises OSError EINVAL."""
    with _attached_lock:
        windows = [each for each in list(_attached) if each.address < end and start < each.address + each.size]
    if windows:
        what = f"a window of region {windows[0].name!r}" if windows[0].name else "a shared mapping of a file"
        raise OSError(errno.EINVAL, f"the range holds {what}; detach it first")


def close_windows(regions: list[Region]) -> None:
    """Unmap all of them without ending their references, which an unlink does.

    Raises BufferError while views of one are alive; those before it are detached then.
    """
    closed: list[tuple[Region, int | None]] = []
    try:
        for region in regions:
            closed.append((region, region.close_window()))  # noqa: PERF401 - what is closed must be known when one fails
    except BufferError:
        for region, attachment in closed:
            region.end_reference(attachment)
        raise


def _in_forked_child() -> None:
    global _attached_lock
    _attached_lock = threading.RLock()
    connection.forget_all()
    for region in _attached:
        region.after_fork()


os.register_at_fork(after_in_child=_in_forked_child)
