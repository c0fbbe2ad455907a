"""Forking a process with private snapshots of its regions (compare on-demand-fork, and fork(2) of private memory).

The daemon makes copy-on-write twins of the regions, of one instant for all. Then the process is forked, and the child
puts the twins in the place of the regions, at the same addresses, before it goes on. They end with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable

from mshare.connection import Connection
from mshare.region import Region, attached_regions
from msharefs import protocol

_FAILED = 127
"""Exit status of a child that could not have its snapshots."""
_DEATH_MS = 500
"""Milliseconds within which a process that was killed has closed all its descriptors, once it has closed one."""
_plain_fork: Callable[[], int] = os.fork


def odfork(*regions: Region) -> int:
    """Fork, as os.fork() does; in the child ``regions`` (by default all that are attached) are private snapshots.

    In the parent nothing changes: 0 is returned in the child, its pid in the parent, which waits until the child has
    its snapshots. Regions that are not given stay shared. A child that another thread forks at that very moment has no
    window on the regions at all. Raises OSError in the parent, with no child left.
    """
    chosen = list(dict.fromkeys(regions)) if regions else attached_regions()
    taken: list[tuple[Region, str]] = []
    links: dict[Connection, list[str]] = {}
    try:
        for link, theirs in _by_connection(chosen).items():
            request = protocol.Snapshot(tuple(region.own_attachment() for region in theirs))
            links[link] = list(link.call(request, protocol.Snapshots).tokens)
            taken += zip(theirs, links[link], strict=True)
        protocol.encode(protocol.Take("", 0))  # What the first one takes is not done again by each child.
        return _fork_and_wait(taken)
    except BaseException:
        for link, tokens in links.items():
            _forget(link, tokens)
        raise


def set_odfork_default(enabled: bool) -> None:  # noqa: FBT001 - it is a switch
    """Have os.fork(), and with it multiprocessing's fork context, do what ``odfork()`` does, in this process.

    Compare the ``use_odf`` of on-demand-fork and PR_SET_COW_PTE. Off by default; children inherit it.
    """
    os.fork = odfork if enabled else _plain_fork


def _by_connection(regions: Iterable[Region]) -> dict[Connection, list[Region]]:
    found: dict[Connection, list[Region]] = {}
    for region in regions:
        found.setdefault(region.link, []).append(region)
    return found


def _fork_and_wait(taken: list[tuple[Region, str]]) -> int:
    """Fork; the child takes its snapshots and says so by a pipe."""
    ours, theirs = os.pipe()
    try:
        pid = _fork_without(region for region, _ in taken)
    except OSError:
        os.close(ours)
        os.close(theirs)
        raise
    if not pid:
        os.close(ours)
        _become(taken, theirs)
        return 0
    os.close(theirs)
    try:
        if os.read(ours, 1):
            return pid
    finally:
        os.close(ours)
    os.waitpid(pid, 0)
    raise OSError(errno.EAGAIN, "the child could not have its snapshots, and has ended; its stderr says why")


def _fork_without(regions: Iterable[Region]) -> int:
    """Fork a child that has no windows on some regions: there are no tables to copy, and nothing to detach from."""
    kept: list[Region] = []
    pid = -1
    try:
        for region in regions:
            region.keep_from_children(keep=True)
            kept.append(region)
        pid = _plain_fork()
        return pid
    finally:
        for region in kept if pid else ():
            region.keep_from_children(keep=False)


def _become(taken: list[tuple[Region, str]], pipe: int) -> None:
    """In the child: snapshots take the place of regions. What fails ends the child: it must not touch the regions.

    Without a word, if that is because the parent was killed: then nobody is there to be told that it had a child.
    """
    try:
        for region, token in taken:
            region.become(token)
        os.write(pipe, b"1")
        os.close(pipe)
    except BaseException:
        try:
            if not _nobody_waits(pipe):
                traceback.print_exc()
                sys.stderr.flush()
        finally:
            os._exit(_FAILED)


def _nobody_waits(pipe: int) -> bool:
    """Whether the other end of a pipe was closed, or is just about to be."""
    end = select.poll()
    end.register(pipe, 0)
    return bool(end.poll(_DEATH_MS))


def _forget(link: Connection, tokens: list[str]) -> None:
    with contextlib.suppress(OSError):
        link.call(protocol.Forget(tuple(tokens)), protocol.Done)
