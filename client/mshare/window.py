"""A window: the stretch of this process's addresses where a region is seen."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys

from mshare import syscalls as sc
from mshare.connection import Connection
from msharefs.addr import PAGE_SIZE
from msharefs.protocol import ANCHOR_PAGES, Attached, Mapped, Offer

ANCHOR_SIZE = ANCHOR_PAGES * PAGE_SIZE


class RangeInUseError(OSError):
    """Something else of this process stands where the window, of ``size`` bytes, should go."""

    def __init__(self, address: int, size: int) -> None:
        super().__init__(errno.EINVAL, f"{address:#x}+{size:#x} is in use in this process; attach at another address")
        self.size = size


class Window:
    """Maps a region's backing, and unmaps it only when nobody looks at it through ``buf`` any more.

    ``prot`` is what this process may do there, as far as the region lets anybody. ``userfaultfd`` is this process's
    copy: while somebody holds one, a thread that waits for a fault to be served goes on waiting when the daemon dies,
    instead of reading zeros. ``anchor`` are pages of address space that nobody
    touches: see ``protocol.Mapped``.
    """

    def __init__(self, offer: Offer, prot: int | None = None) -> None:
        self.address = offer.addr
        self.size = offer.size
        self.readonly = offer.readonly
        self.prot = prot if prot is not None else sc.PROT_READ | (0 if offer.readonly else sc.PROT_WRITE)
        self._kind = sc.MAP_PRIVATE if offer.readonly and not (offer.own or offer.shared) else sc.MAP_SHARED
        self.userfaultfd = -1
        self.anchor = 0
        self._mapped = False
        self._view: memoryview | None = None

    @property
    def is_open(self) -> bool:
        """Whether it can be looked through."""
        return self._view is not None

    @property
    def view(self) -> memoryview:
        """All of it, as unsigned bytes. Raises ValueError when it is closed."""
        if self._view is None:
            raise ValueError("the region is detached")
        return self._view

    def map(self, backing: int, offset: int = 0, more: int = sc.MAP_NORESERVE) -> None:
        """Take the range, which must be free. Nobody can touch it before ``open``. Raises OSError EINVAL.

        MAP_NORESERVE, since the daemon reserves what is mapped: a window would do so for holes, too. ``more`` are other
        flags instead, for a file that is not the daemon's.
        """
        flags = self._kind | more | sc.MAP_FIXED_NOREPLACE
        try:
            got = sc.mmap(self.address, self.size, sc.PROT_NONE, flags, backing, offset)
        except FileExistsError as error:
            raise RangeInUseError(self.address, self.size) from error
        self._mapped = True
        if got != self.address:  # A kernel that does not know MAP_FIXED_NOREPLACE takes the address for a hint.
            sc.munmap(got, self.size)
            self._mapped = False
            raise RangeInUseError(self.address, self.size)

    def keep_from_children(self, *, keep: bool) -> None:
        """Have forked children have no window here (MADV_DONTFORK), or have it again. Raises OSError."""
        advice = sc.MADV_DONTFORK if keep else sc.MADV_DOFORK
        sc.madvise(self.address, self.size, advice)
        sc.madvise(self.anchor, ANCHOR_SIZE, advice)

    def replace(self, backing: int) -> None:
        """In a child that has no window here: have one on something else, closed until ``let_in``. Raises OSError."""
        flags = self._kind | sc.MAP_NORESERVE | sc.MAP_FIXED_NOREPLACE
        sc.mmap(self.address, self.size, sc.PROT_NONE, flags, backing)
        self.anchor = 0
        self.drop_userfaultfd()

    def make_userfaultfd(self, device: int | None) -> None:
        """Have the means by which the daemon sees this window's faults and forks."""
        self.userfaultfd = sc.userfaultfd(device)
        if not self.anchor:
            self.anchor = sc.mmap(None, ANCHOR_SIZE, sc.PROT_NONE, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS)

    def announce(self, link: Connection, offer: Offer, device: int | None, staged: tuple[int, ...] = ()) -> int:
        """Have the daemon arm it, and count it; the number of the attachment. Raises OSError.

        Along with its userfaultfd goes one more, which is the daemon's alone, for what it must refuse.
        """
        request = Mapped(offer.offer, offer.addr, self.anchor, staged)
        second = sc.userfaultfd(device)
        try:
            return link.call(request, Attached, (self.userfaultfd, second)).attachment
        finally:
            os.close(second)

    def open(self) -> None:
        """Let this process in, and have it look. Preconditions: the daemon has armed what must be armed."""
        self.let_in()
        self._look()

    def let_in(self) -> None:
        """Let this process touch it. Preconditions: the daemon has armed what must be armed."""
        sc.mprotect(self.address, self.size, self.prot)
        self._mapped = True

    def take(self) -> None:
        """Be a window on what this process has mapped there already."""
        self._mapped = True
        self._look()

    def allow(self, prot: int) -> None:
        """Let this process do more, or less. Raises OSError, and BufferError while views that may not are alive."""
        more = prot & ~self.prot & sc.PROT_WRITE
        if more:
            self.check_unseen()
        sc.mprotect(self.address, self.size, prot)
        self.prot = prot
        if more:
            self._look()

    def check_unseen(self) -> None:
        """Raise BufferError while views of it are alive, ``view`` aside."""
        if self._view is not None and (has_relatives(self._view) or _is_referred_to(self._view)):
            raise BufferError("views of the region's buf are alive; release them before detaching")

    def _look(self) -> None:
        view = memoryview((ctypes.c_char * self.size).from_address(self.address)).cast("B")
        self._view = view if self.prot & sc.PROT_WRITE else view.toreadonly()

    def close(self) -> None:
        """Unmap. Raises BufferError, with nothing changed, while views of it are alive."""
        if self._view is not None:
            self.check_unseen()
            self._view.release()  # Raises BufferError while an array, say, uses it.
            self._view = None
        self.discard()

    def leave(self) -> None:
        """Have nothing to do any more with what is mapped there; for windows that nobody has looked through."""
        self._view = None
        self._mapped = False

    def discard(self) -> None:
        """Unmap, whoever looks; for windows that were never open."""
        if self._mapped:
            sc.munmap(self.address, self.size)
            self._mapped = False
        if self.anchor:
            sc.munmap(self.anchor, ANCHOR_SIZE)
            self.anchor = 0
        self.drop_userfaultfd()

    def drop_userfaultfd(self) -> None:
        """Close this process's copy."""
        if self.userfaultfd >= 0:
            os.close(self.userfaultfd)
            self.userfaultfd = -1


def has_relatives(view: memoryview) -> bool:
    """Whether other memoryviews look at the same memory: slices and casts share one managed buffer with ``view``.

    A view of raw memory pins nothing: unmapping under one that is alive would crash whoever touches it later.
    """
    (managed,) = gc.get_referents(view)
    others = sys.getrefcount(managed) - _REFERENCES_OF_ONE_VIEW
    if not others:
        return False
    # A view that was released looks at nothing, but refers to the buffer until it is collected.
    return others > sum(isinstance(each, memoryview) and _is_released(each) for each in gc.get_referrers(managed))


def _is_referred_to(view: memoryview) -> bool:
    """Whether somebody refers to the memory past all views of it, as NumPy's ``ndarray(buffer=view)`` does."""
    return sys.getrefcount(view.obj) > _REFERENCES_OF_ITS_OBJECT


def _is_released(view: memoryview) -> bool:
    try:
        _ = view.nbytes
    except ValueError:
        return True
    return False


def _references_of_one_view() -> tuple[int, int]:
    """What sys.getrefcount says in ``has_relatives`` when a view is alone, and in ``_is_referred_to``."""
    view = memoryview(bytearray(1))
    (managed,) = gc.get_referents(view)
    return sys.getrefcount(managed), sys.getrefcount(view.obj)


_REFERENCES_OF_ONE_VIEW, _REFERENCES_OF_ITS_OBJECT = _references_of_one_view()
