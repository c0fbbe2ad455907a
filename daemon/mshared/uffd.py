"""userfaultfd from the daemon's side: one thin method an ioctl, on any client's address space."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import functools
import logging
import math
import mmap
import os
import time
from collections.abc import Callable
from typing import Final

from mshared import libc
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.errors import BadDescriptorError
from msharefs.vma import Arming

log = logging.getLogger(__name__)

_SELDOM: Final = 10.0
"""Seconds between two warnings of the same."""

_MESSAGES: Final = 14
"""Read at once; with more, Python's memory for them comes from elsewhere, and takes longer."""

DEVICE: Final = "/dev/userfaultfd"
WANTED: Final = (
    abi.Feature.THREAD_ID
    | abi.Feature.EXACT_ADDRESS
    | abi.Feature.MISSING_SHMEM
    | abi.Feature.WP_HUGETLBFS_SHMEM
    | abi.Feature.EVENT_REMAP
)
"""Features without which nothing works. What is moved by mremap(2) stays armed, and its move is reported."""
OPTIONAL: Final = abi.Feature.EVENT_FORK | abi.Feature.POISON
"""Reports of forks (needs CAP_SYS_PTRACE), and poison (Linux 6.6)."""


_zeros = mmap.mmap(-1, PMD_SIZE)
"""What nobody ever stores to; it takes no memory."""
_ZEROS: Final = ctypes.addressof(ctypes.c_char.from_buffer(_zeros))


_WP: Final = int(Arming.WP)
_WP_CLEAN: Final = int(Arming.WP_CLEAN)
_FEW: Final = 16
"""Ranges that are armed in as many windows as there are."""


class Outcome(enum.Enum):
    """What an ioctl came to, by name (compare CRIU's and firecracker's handlers)."""

    SERVED = "done"
    EXISTS = "another thread was first: wake"
    RETRY = "an event must be read first"
    GONE = "the process is gone"
    UNMAPPED = "the range is not there any more"


SERVED: Final = Outcome.SERVED
"""What most come to; to look a member of an enum up takes longer than a fault has for it."""

_OUTCOMES: Final = {
    errno.EEXIST: Outcome.EXISTS,
    errno.EAGAIN: Outcome.RETRY,
    errno.ESRCH: Outcome.GONE,
    errno.ENOSPC: Outcome.GONE,
    errno.ENOENT: Outcome.UNMAPPED,
    errno.EINVAL: Outcome.UNMAPPED,
    errno.ENOMEM: Outcome.UNMAPPED,
    errno.EBUSY: Outcome.UNMAPPED,
}


def classify(error: OSError) -> Outcome:
    """The meaning of an errno that an ioctl on a client's range gave; what has none is raised again."""
    outcome = _OUTCOMES.get(error.errno or 0)
    if outcome is None:
        raise error
    return outcome


def attempt(whose: object, ioctl: Callable[[], None]) -> Outcome:
    """Run an ioctl on a client's address space; what it came to. ``whose`` stands in the log."""
    try:
        ioctl()
    except OSError as error:
        return outcome_of(whose, error)
    return Outcome.SERVED


def outcome_of(whose: object, error: OSError) -> Outcome:
    """What an ioctl on a client's address space came to that failed; what is a mistake is raised again."""
    outcome = classify(error)
    if outcome in (Outcome.GONE, Outcome.UNMAPPED):
        log.debug("%s: %s (%s)", whose, outcome.value, error.strerror)
    return outcome


class Uffd:
    """A userfaultfd of some process. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it; threads that wait go on waiting as long as their process holds a copy."""
        os.close(self.fd)

    def open_api(self, features: abi.Feature) -> None:
        """UFFDIO_API. EVENT_FORK needs CAP_SYS_PTRACE of this process. Raises OSError, EINVAL when done already."""
        fcntl.ioctl(self.fd, abi.UFFDIO_API, abi.API_STRUCT.pack(abi.API_VERSION, features, 0))

    def arm(self, ar: AddrRange, arming: Arming) -> None:
        """Have these faults reported from now on; NATIVE ends all reports and wakes who waits.

        A range that was armed with MISSING too goes on reporting that, which does no harm.
        """
        first, then, may_fail = _orders(ar, int(arming))
        fcntl.ioctl(self.fd, *first)
        if then is not None:
            try:
                fcntl.ioctl(self.fd, *then)
            except FileNotFoundError:
                if not may_fail:
                    raise

    def mark(self, ar: AddrRange) -> None:
        """Register memory that nobody touches; neighbours registered alike then show as one mapping."""
        self._register(ar, int(Arming.MISSING))

    def unmark(self, ar: AddrRange) -> None:
        """UFFDIO_UNREGISTER: faults of ``ar`` are the kernel's again."""
        _ioctl(self.fd, abi.UFFDIO_UNREGISTER, abi.RANGE_STRUCT.pack(ar.start, ar.size))

    def hand_over(self, ar: AddrRange, taker: Uffd, arming: Arming) -> None:
        """Have another userfaultfd report these faults of ``ar`` from now on. Wakes nobody.

        What is protected stays so, and for an instant allows stores: nobody has it. That is why WP and MISSING go
        first: a range registered for them is laid bare, and its waiters woken, when it is let go.
        """
        self._register(ar, int(abi.Mode.MINOR))
        self.unmark(ar)
        taker._register(ar, int(arming))
        if arming & Arming.WP:
            with contextlib.suppress(BlockingIOError):  # A fork is under way; protected it is, unless it was stored to.
                taker.write_protect(ar)

    def _register(self, ar: AddrRange, bits: int) -> None:
        fcntl.ioctl(self.fd, *_registering(ar, bits))

    def write_protect(self, ar: AddrRange, *, protect: bool = True) -> None:
        """UFFDIO_WRITEPROTECT: the next store to each page is reported, or no longer (which wakes who waits)."""
        fcntl.ioctl(self.fd, *_protecting(ar, protect=protect))

    def zero(self, ar: AddrRange, *, protected: bool) -> None:
        """Fill one page, small or huge, with zeros and wake who waits for it; ``protected`` keeps it write-protected.

        UFFDIO_ZEROPAGE knows neither huge pages nor protection.
        """
        if protected or ar.size > PAGE_SIZE:
            self.copy_from(ar, _ZEROS, protected=protected)
        else:
            _ioctl(self.fd, abi.UFFDIO_ZEROPAGE, abi.FILL_STRUCT.pack(ar.start, ar.size, 0, 0))

    def copy(self, ar: AddrRange, data: bytes) -> None:
        """Fill ``ar`` with ``data`` and wake who waits for it."""
        self.copy_from(ar, address_of(data))

    def copy_from(self, ar: AddrRange, source: int, *, protected: bool = False) -> None:
        """Fill ``ar`` with what this process has at ``source``; ``protected`` keeps it write-protected."""
        mode = abi.COPY_MODE_WP if protected else 0
        request = bytearray(abi.COPY_STRUCT.pack(ar.start, source, ar.end - ar.start, mode, 0))
        fcntl.ioctl(self.fd, abi.UFFDIO_COPY, request)

    def copy_some(self, ar: AddrRange, source: int, *, protected: bool) -> int:
        """The same, up to the first page that is there already; how many bytes came. Raises OSError if none did."""
        mode = abi.COPY_MODE_WP if protected else 0
        request = bytearray(abi.COPY_STRUCT.pack(ar.start, source, ar.size, mode, 0))
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_COPY, request)
        except BlockingIOError:
            done = int(abi.COPY_STRUCT.unpack(request)[4])
            if done <= 0:
                raise
            return done
        return ar.size

    def continue_all(self, ar: AddrRange) -> int:
        """UFFDIO_CONTINUE: map pages that the file has, up to the first that it lacks; how many bytes that were."""
        request = bytearray(abi.FILL_STRUCT.pack(ar.start, ar.size, 0, 0))
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_CONTINUE, request)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EFAULT):
                raise
        return max(0, int(abi.FILL_STRUCT.unpack(request)[3]))

    def wake(self, ar: AddrRange) -> None:
        """UFFDIO_WAKE: whoever waits in ``ar`` tries again."""
        _ioctl(self.fd, abi.UFFDIO_WAKE, abi.RANGE_STRUCT.pack(ar.start, ar.size))

    def poison(self, ar: AddrRange) -> None:
        """UFFDIO_POISON: the thread gets a SIGBUS that it cannot block, or its system call EFAULT; so do later ones.

        A SIGBUS leaves a line in dmesg. Raises FileExistsError where anything is: a page, a mark, or the mark by which
        a page that is to come is protected.
        """
        _ioctl(self.fd, abi.UFFDIO_POISON, abi.FILL_STRUCT.pack(ar.start, ar.size, 0, 0))

    def unprotect_empty(self, ar: AddrRange) -> None:
        """Take away the marks by which pages that are to come are protected; who waits goes on waiting."""
        mode = abi.WRITEPROTECT_MODE_DONTWAKE
        _ioctl(self.fd, abi.UFFDIO_WRITEPROTECT, abi.WRITEPROTECT_STRUCT.pack(ar.start, ar.size, mode))

    def show(self, ar: AddrRange, *, protected: bool) -> None:
        """Put the page that the file has in the place of a poison mark. Raises FileNotFoundError where it has none.

        Only what is registered for something takes pages.
        """
        mode = abi.CONTINUE_MODE_WP if protected else 0
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_CONTINUE, abi.FILL_STRUCT.pack(ar.start, ar.size, mode, 0))
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise FileNotFoundError(errno.ENOENT, "the file has no page there") from error
            raise

    def is_alive(self) -> bool:
        """Whether its address space still exists: neither ended nor replaced by exec.

        Asks for something impossible (no mapping lies at the top page): ESRCH comes first when the mm is gone.
        """
        top = abi.WRITEPROTECT_STRUCT.pack((1 << 47) - 2 * PAGE_SIZE, PAGE_SIZE, 0)
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_WRITEPROTECT, top)
        except OSError as error:
            return error.errno != errno.ESRCH
        return True

    def read(self, most: int = _MESSAGES) -> bytes:
        """Up to ``most`` whole messages, empty when none waits. A fork's message brings a new descriptor with it."""
        try:
            return os.read(self.fd, most * abi.MESSAGE_SIZE)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            _tell_of_waiting_fork()
            return b""


_told = -math.inf


def _tell_of_waiting_fork() -> None:
    """Warn, but not often: it is tried again at once."""
    global _told
    if time.monotonic() > _told + _SELDOM:
        _told = time.monotonic()
        log.warning("a client waits in fork(), for which no descriptor is left; raise LimitNOFILE, ulimit -n")


Order = tuple[int, bytearray]
"""An ioctl and its request: from what may be changed, Python takes it without a detour. Its answer does not matter."""


def _ioctl(fd: int, number: int, request: bytes) -> None:
    """Run an ioctl whose answer does not matter."""
    fcntl.ioctl(fd, number, bytearray(request))


@functools.lru_cache(maxsize=_FEW)
def _orders(ar: AddrRange, bits: int) -> tuple[Order, Order | None, bool]:
    """What arms ``ar`` like that, and whether the second of it may find nothing: made once for all windows."""
    if not bits:
        request = abi.RANGE_STRUCT.pack(ar.start, ar.size)
        return (abi.UFFDIO_UNREGISTER, bytearray(request)), (abi.UFFDIO_WAKE, bytearray(request)), False
    register = _registering(ar, bits)
    if bits & _WP:
        return register, _protecting(ar, protect=True), False
    if bits & _WP_CLEAN:
        return register, None, False
    # The kernel leaves a range registered for more than asked; what is protected there must not stay so.
    return register, _protecting(ar, protect=False), True


def _registering(ar: AddrRange, bits: int) -> Order:
    """``bits`` of Arming or of Mode, which agree where both have a name."""
    mode = bits & ~_WP_CLEAN | _WP if bits & _WP_CLEAN else bits
    return abi.UFFDIO_REGISTER, bytearray(abi.REGISTER_STRUCT.pack(ar.start, ar.size, mode, 0))


def _protecting(ar: AddrRange, *, protect: bool) -> Order:
    mode = abi.WRITEPROTECT_MODE_WP if protect else 0
    return abi.UFFDIO_WRITEPROTECT, bytearray(abi.WRITEPROTECT_STRUCT.pack(ar.start, ar.size, mode))


def address_of(data: bytes) -> int:
    """Where this process has it, for as long as it lives."""
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert address is not None
    return address


def new(device: int | None) -> Uffd:
    """A userfaultfd of this very process."""
    if device is not None:
        return Uffd(fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK))
    flags = os.O_CLOEXEC | os.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
    return Uffd(libc.syscall(abi.SYS_USERFAULTFD, flags))


def opened(fd: int, features: abi.Feature) -> Uffd:
    """The userfaultfd that somebody sent, ready to be used. Raises BadDescriptorError unless it is a fresh one."""
    if not is_userfaultfd(fd):
        raise BadDescriptorError("the descriptor is no userfaultfd; make one with the device that was offered")
    os.set_blocking(fd, False)
    uffd = Uffd(fd)
    try:
        uffd.open_api(features)
    except OSError as error:
        raise BadDescriptorError(f"the userfaultfd cannot be opened ({error.strerror}); send a new one") from error
    return uffd


def is_userfaultfd(fd: int) -> bool:
    """Whether a descriptor that somebody sent is one."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"  # noqa: PTH115 - a third of the time
    except OSError:
        return False
