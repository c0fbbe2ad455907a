"""Userfaultfds that a daemon which was killed had not written down, and those that nobody has kept.

Which address space a userfaultfd belongs to the kernel does not say. But every window has an anchor, whose first page
is registered with the window's userfaultfd: only that one may register it again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from mshared import libc, processes
from mshared.forks import MOST_MARKS, marks_of
from mshared.live import LiveAttachment
from mshared.uffd import Uffd, is_userfaultfd
from msharefs.addr import PAGE_SIZE, Address, AddrRange

log = logging.getLogger(__name__)

_SYS_PIDFD_GETFD: Final = 438
_PATIENCE: Final = 1.0
_LOOK_INTERVAL: Final = 0.002
"""Seconds for a child to be there once all is read, and between two looks for it."""


def has_anchor(uffd: Uffd, anchor: AddrRange) -> bool:
    """Whether an anchor's first page is, or can be, registered with a userfaultfd."""
    try:
        uffd.mark(anchor)
    except OSError:
        return False
    return True


def from_process(pid: int, anchor: AddrRange) -> int | None:
    """A process's own copy of the userfaultfd with that anchor (pidfd_getfd(2)), or None."""
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if str(link.readlink()) == "anon_inode:[userfaultfd]":
                    fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(link.name), 0)
                    if has_anchor(Uffd(fd), anchor):
                        return fd
                    os.close(fd)
        finally:
            os.close(pidfd)
    return None


def children(
    fds: Iterable[int], attachments: Iterable[LiveAttachment], read_events: Callable[[], None]
) -> Iterator[tuple[int, LiveAttachment]]:
    """Of unknown descriptors those that are forked children's, with the attachment of a parent, or a sibling.

    Others, which the daemon had just been sent when it ended, have no anchor yet: their process will send new ones.
    The child of a process with several windows is not there yet, and its parent waits in fork(2), until all events of
    that fork are read: so they are.
    """
    known: dict[Address, list[LiveAttachment]] = {}
    for attachment in attachments:
        known.setdefault(attachment.anchor, []).append(attachment)
    pages = [AddrRange.sized(anchor, PAGE_SIZE) for anchor in known]
    waiting = [fd for fd in fds if is_userfaultfd(fd) and _has_any(Uffd(fd), pages)]
    until = time.monotonic() + _PATIENCE
    while waiting:
        read_events()
        for fd in list(waiting):
            found = next(_identified(Uffd(fd), known), None)
            if found is not None:
                log.info("%s: pid %d was forked when the daemon ended", *found)
                yield fd, found[0]
            if found is not None or not Uffd(fd).is_alive():
                waiting.remove(fd)
        if time.monotonic() > until:
            yield from ((fd, relative) for fd in waiting if (relative := _only_relative(Uffd(fd), known)) is not None)
            return
        time.sleep(_LOOK_INTERVAL)


def _only_relative(uffd: Uffd, known: dict[Address, list[LiveAttachment]]) -> LiveAttachment | None:
    """Whose child it must be, although no process shows it, since nobody else has such an anchor."""
    for anchor, relatives in known.items():
        if _has_any(uffd, [AddrRange.sized(anchor, PAGE_SIZE)]):
            if len({(each.region.model.id, each.model.window) for each in relatives}) == 1:
                log.info("%s: an unknown process was forked when the daemon ended", relatives[0])
                return relatives[0]
            log.error("%s: a forked process cannot be told from others; its holes are memory now", relatives[0])
    return None


def _has_any(uffd: Uffd, anchors: Iterable[AddrRange]) -> bool:
    """Whether it is registered with one of these pages already."""
    return any(_is_registered(uffd, page) and has_anchor(uffd, page) for page in anchors)


def _identified(uffd: Uffd, known: dict[Address, list[LiveAttachment]]) -> Iterator[tuple[LiveAttachment, int]]:
    """Relatives of the attachment that a userfaultfd is for, and its process."""
    for anchor, relatives in known.items():
        page = AddrRange.sized(anchor, PAGE_SIZE)
        if not _is_registered(uffd, page) or not has_anchor(uffd, page):
            continue
        pid = _process_of(uffd, anchor)
        if pid is None:
            continue
        for each in relatives:
            shown = processes.mapped_inode(pid, each.model.window.start)
            if shown == os.fstat(each.region.backing.fd).st_ino:
                yield each, pid


def _is_registered(uffd: Uffd, page: AddrRange) -> bool:
    """Whether a page of its address space is registered with any userfaultfd: only there zeros can be put.

    While a process is being forked itself the kernel does not say; it has to be seen to, for its fork to end.
    """
    try:
        uffd.zero(page, protected=False)
    except (FileExistsError, BlockingIOError):
        return True
    except OSError:
        return False
    return True


def _process_of(uffd: Uffd, anchor: Address) -> int | None:
    """The process of a userfaultfd with that anchor, which is marked meanwhile."""
    marks = AddrRange.sized(anchor + PAGE_SIZE, MOST_MARKS * PAGE_SIZE)
    if not has_anchor(uffd, marks):
        return None
    try:
        for pid in processes.all_pids():
            if marks_of(pid, {anchor})[anchor] == MOST_MARKS:
                return pid
    finally:
        with contextlib.suppress(OSError):
            uffd.unmark(marks)
    return None
