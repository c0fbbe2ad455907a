"""What the host mm wants done in the kernel. Decided here, carried out by the daemon, in the order given.

Ranges are host addresses (those of the region itself). The order within one list is the safe order, decided
where the list is made: first arm for more, then move or free contents, then arm for less, which wakes. No fault of the
region may be decided between the effects of one change: the model is ahead of the kernel then, and would fill
zeros where contents are still to come.
"""

from __future__ import annotations

import enum

import attrs

from msharefs.addr import Address, AddrRange
from msharefs.frames import StoreNo
from msharefs.refpage import RefPage
from msharefs.vma import Arming, FileId


class Signal(enum.IntEnum):
    """Signals a fault may end in."""

    SIGBUS = 7
    SIGSEGV = 11


@attrs.frozen
class Arm:
    """From now on the kernel reports these faults of ``ar``, in every attachment (UFFDIO_REGISTER, UNREGISTER).

    WP includes protecting what is there (UFFDIO_WRITEPROTECT), so that the first store is reported. With WP_CLEAN what
    is protected stays so, and nothing else is.
    """

    ar: AddrRange
    arming: Arming


@attrs.frozen
class Punch:
    """The memory of ``ar`` goes back to the system and out of every process (FALLOC_FL_PUNCH_HOLE).

    So does what the stash file holds of it. Memory that is promised, and mapped still, may become zeros instead.
    """

    ar: AddrRange


@attrs.frozen
class Stash:
    """The contents of ``ar`` move to the region's stash file, where no process has them."""

    ar: AddrRange


@attrs.frozen
class Unstash:
    """What the stash file holds of ``ar`` comes back."""

    ar: AddrRange


@attrs.frozen
class Copy:
    """What the store ``source`` holds of ``ar`` is put into the store ``target``, which holds nothing there.

    Stores are those of forks of each other; see ``msharefs.lineage``. Where the source holds nothing there are zeros.
    """

    ar: AddrRange
    source: StoreNo
    target: StoreNo


@attrs.frozen
class Preserve:
    """Before the process that waits may go on, the copies are to be made; then the fault is decided again."""

    copies: tuple[Copy, ...]


@attrs.frozen
class Bring:
    """The page that is missing comes from a relative's store, perhaps with others; who waits for it goes on then."""

    copies: tuple[Copy, ...]


@attrs.frozen
class ZeroFill:
    """Zero pages appear in ``ar`` for the process that waits there (UFFDIO_ZEROPAGE), which goes on.

    ``protected``: they stay write-protected there (UFFDIO_COPY_MODE_WP).
    """

    ar: AddrRange
    protected: bool = False


@attrs.frozen
class Allow:
    """The process that waits there may store to ``ar`` from now on (UFFDIO_WRITEPROTECT), and goes on."""

    ar: AddrRange


@attrs.frozen
class Fill:
    """What lies at ``offset`` of a file appears in ``ar``, and who waits there goes on.

    ``there``: the tables say that it has come already, so that it must not be entered again.
    """

    ar: AddrRange
    file: FileId
    offset: int
    there: bool = False


@attrs.frozen
class FillPattern:
    """What a reference page holds appears in ``ar``, whose first page somebody waits for, who goes on.

    ``clean``: as it appears, it is protected in every attachment. The rest of ``ar``, and the pages ``ahead``, come
    along as far as nothing is there; what has come is to be noted (``clean_pages.came``).
    """

    ar: AddrRange
    refpage: RefPage
    clean: bool
    ahead: tuple[AddrRange, ...] = ()


@attrs.frozen
class Protect:
    """The next store to ``ar`` is reported, in every attachment. Preconditions: it is armed with WP, or WP_CLEAN."""

    ar: AddrRange


@attrs.frozen
class WriteBack:
    """What memory holds of ``ar`` goes to a file, from ``offset`` on, as far as the file reaches."""

    ar: AddrRange
    file: FileId
    offset: int


@attrs.frozen
class Deliver:
    """The faulting thread gets ``signal``, with si_addr ``addr`` (a host address)."""

    signal: Signal
    addr: Address


Answer = Allow | Bring | Deliver | Fill | FillPattern | Preserve | ZeroFill
"""What a fault can come to."""
Change = Arm | Protect | Punch | Stash | Unstash | WriteBack
"""What a call can come to."""
Effect = Answer | Change
