"""The calls of the series: mshare() and mshare_unlink(), and remove() beside them."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

import attrs

from mshare import syscalls as sc
from mshare.connection import Connection, RestartedError, connect, reply_of
from mshare.discovery import find_mount
from mshare.donation import Donation
from mshare.region import Region, attached_as, check_no_window, close_windows
from mshare.tickets import Name, checked_name, inode_of, opened
from mshare.window import RangeInUseError, Window
from msharefs import protocol
from msharefs.addr import PAGE_SIZE, round_up


@attrs.frozen
class Terms:
    """What a region is made with, beside its name and place; see ``mshare``.

    ``used`` as in ``protocol.Create``. ``sponsor`` is a pidfd of the process that keeps it, if it shall end by itself.
    With ``reserve`` there is memory for what is used of it, or it is not made.
    """

    mode: int
    backing: str | None = None
    empty: bool = False
    used: int | None = None
    sponsor: int | None = None
    reserve: bool = False


_KNOWN_FLAGS: Final = os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_TRIES: Final = 100
"""How often to start over when a region appears or goes while we look, or an address turns out to be taken."""

Mount = str | os.PathLike[str] | None


def mshare(
    name: Name,
    addr: int | None,
    length: int,
    oflags: int,
    mode: int = 0o600,
    *,
    backing: str | None = None,
    empty: bool = False,
    mount: Mount = None,
) -> Region:
    """Create a region, or attach to one: afterwards ``length`` bytes at ``addr`` are the same memory for everybody.

    With O_CREAT in ``oflags`` (and O_EXCL, if it must be new): what this process has mapped in the range becomes the
    region's, contents included, and mappings of files stay that; where nothing is mapped it has holes. With nothing
    mapped at all it starts as read-write memory, or with ``empty`` as one hole. ``mode`` less umask are the permissions
    of its file; ``backing`` is ``thp``, ``4k`` or ``hugetlb``. Without O_CREAT: attach to the region, at its own
    address for ``addr`` None; ``length`` may be 0. O_RDONLY gives a window that cannot write.

    Raises OSError with the errno of the kernel's own calls and the cure in its text: EINVAL (name, alignment, range
    in use, flags, wrong length, a file that cannot be opened again), E2BIG (more files than can be donated at once),
    EEXIST, ENOENT, EACCES, ENAMETOOLONG, ENOSPC, EDQUOT, EOPNOTSUPP.
    """
    return open_region(checked_name(name), addr, length, oflags, Terms(mode, backing, empty), find_mount(mount))


def open_region(text: str, addr: int | None, length: int, oflags: int, terms: Terms, mount: Path) -> Region:
    """The same, with all terms there are. Raises OSError, also ENOMEM for what cannot be reserved."""
    _check_flags(oflags)
    _check_words(addr or 0, length)
    link = connect(mount)
    tries = 0
    while tries < _TRIES:
        region = None
        try:
            if oflags & os.O_CREAT:
                region = _create(link, text, addr, length, oflags, terms)
            return region or _attach(link, text, addr, length, oflags)
        except _Vanished:
            tries += 1
        except BlockingIOError:
            continue  # Its creator is at work; the daemon has made us wait already.
        except RestartedError:
            tries += 1
            if tries == _TRIES:
                raise
    raise OSError(errno.EAGAIN, f"region {text!r} comes and goes, or no address stays free; try again")


def mshare_unlink(name: Name, *, mount: Mount = None) -> None:
    """End this process's access to a region: its windows are unmapped. The last one to do so ends the region itself.

    A region nobody is attached to is ended by anybody with write permission. Raises BufferError while views of ``buf``
    are alive, and OSError: ENOENT, EBUSY (others are attached and we are not), EACCES.
    """
    text = checked_name(name)
    link = connect(find_mount(mount))
    path = link.mount / text
    with opened(path, os.O_RDWR) as ticket:
        windows = attached_as(link.mount, inode_of(path, ticket))
        close_windows(windows)
        try:
            link.call(protocol.Unlink(text), protocol.Done, ticket)
        except OSError as error:
            # A daemon that was restarted since has seen that the windows were gone: our access has ended, as asked.
            if not windows or error.errno not in (errno.EBUSY, errno.EACCES):
                raise


def remove(name: Name, *, mount: Mount = None) -> None:
    """Take a region's name away at once, as unlink(2) does; its memory goes with the last attachment.

    Raises OSError: ENOENT, EACCES, EPERM (the mount is sticky and the region is somebody else's).
    """
    link = connect(find_mount(mount))
    link.call(protocol.Remove(checked_name(name)), protocol.Done)


class _Vanished(Exception):
    """The region went while we looked; with O_CREAT the caller starts over."""


def _create(link: Connection, name: str, addr: int | None, length: int, oflags: int, terms: Terms) -> Region | None:
    """Create a region, or None: one exists already and may be attached to, or another address must be tried."""
    with contextlib.closing(_donation_of(addr, length)) as donation:
        request = protocol.Create(
            name=name,
            addr=addr,
            size=length,
            mode=terms.mode & ~sc.umask(),
            exclusive=bool(oflags & os.O_EXCL),
            empty=terms.empty,
            readonly=oflags & os.O_ACCMODE == os.O_RDONLY,
            backing=terms.backing,
            donated=donation.ranges,
            used=terms.used,
            kept=terms.sponsor is not None,
        )
        sponsor = () if terms.sponsor is None else (terms.sponsor,)
        reply, fds = link.exchange(request, donation.descriptors + sponsor)
        if isinstance(reply, protocol.Exists):
            return None
        try:
            return _enter(link, name, reply, fds, donation if donation.parts else None, reserve=terms.reserve)
        except RangeInUseError:
            if addr is None:
                return None
            raise
        except RestartedError as error:
            if not donation.parts:
                raise
            raise ConnectionResetError(error.errno, error.strerror) from error  # Its files may be another's now.


def _donation_of(addr: int | None, length: int) -> Donation:
    """What this process has mapped where the region is to be; nothing, if the daemon will refuse that place anyway."""
    if addr is None or length <= 0 or (addr | length) % PAGE_SIZE:
        return Donation()
    check_no_window(addr, addr + length)
    return Donation.of(addr, length)


def _attach(link: Connection, name: str, addr: int | None, length: int, oflags: int) -> Region:
    """Attach to a region that exists. Raises _Vanished instead of ENOENT when O_CREAT could make it."""
    try:
        with opened(link.mount / name, oflags & os.O_ACCMODE) as ticket:
            if not ticket:
                raise OSError(errno.EACCES, f"the mode of region {name!r} does not let you open it like that")
            reply, fds = link.exchange(protocol.Attach(addr, length), ticket)
    except FileNotFoundError as error:
        if oflags & os.O_CREAT:
            raise _Vanished from error
        raise
    return _enter(link, name, reply, fds, None)


def _enter(
    link: Connection,
    name: str,
    reply: protocol.Message,
    fds: list[int],
    donation: Donation | None,
    *,
    reserve: bool = False,
) -> Region:
    """Take up an offer: map the backing, or put it in the place of what is donated; be armed before anybody looks."""
    offer = offer_of(reply, fds)
    window = Window(offer)
    try:
        backing, device = fds[0], fds[1] if offer.device else None
        if reserve and offer.page == PAGE_SIZE:  # The daemon has others promised to it.
            sc.allocate(backing, round_up(offer.used or offer.size, PAGE_SIZE))
        if donation is None:
            window.map(backing)
        else:
            donation.hand_over(backing, device, page=offer.page)
        window.make_userfaultfd(device)
        staged = donation.staged if donation else ()
        attachment = window.announce(link, offer, device, staged)
        if donation and staged:
            donation.move_in(backing, device)
        window.open()
        if staged:
            link.call(protocol.Settled(offer.offer), protocol.Done)
    except BaseException:
        _leave(link, offer, window, donation)
        raise
    finally:
        for fd in fds:
            os.close(fd)
    return Region(name, link, window, offer, attachment)


def _leave(link: Connection, offer: protocol.Offer, window: Window, donation: Donation | None) -> None:
    """Give up an offer. Who waits for donated memory goes on waiting until it is what it was.

    The daemon brings what was stored through the region to the files before it answers; until then nobody may store to
    them by any other way.
    """
    if donation is not None:
        donation.complete()
    with contextlib.suppress(OSError):
        link.call(protocol.Abort(offer.offer), protocol.Done)
    if donation is not None:
        window.leave()
        donation.give_back()
    window.discard()


def offer_of(reply: protocol.Message, fds: list[int]) -> protocol.Offer:
    """The offer in a reply. Raises OSError EPROTO, with the descriptors closed, when it is none."""
    if isinstance(reply, protocol.Offer) and len(fds) == (not reply.own) + reply.device:
        return reply
    for fd in fds:
        os.close(fd)
    offer = reply_of(reply, protocol.Offer)
    raise OSError(errno.EPROTO, f"the daemon offered {1 + offer.device} descriptors, and sent {len(fds)}")


def _check_flags(oflags: int) -> None:
    if oflags & ~_KNOWN_FLAGS:
        raise OSError(errno.EINVAL, f"oflags {oflags:#o} has unknown bits; use O_RDONLY or O_RDWR, O_CREAT, O_EXCL")
    if oflags & os.O_ACCMODE not in (os.O_RDONLY, os.O_RDWR):
        raise OSError(
            errno.EINVAL, "a region is opened O_RDONLY or O_RDWR: memory that can only be written has no meaning"
        )


def _check_words(*numbers: int) -> None:
    for number in numbers:
        if not 0 <= number < 1 << 64:
            raise OSError(errno.EINVAL, f"{number:#x} is neither an address nor a length of this machine")
