"""The connection to FUSE: made, read without ever blocking, and ended."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pyfuse3

log = logging.getLogger(__name__)


def initialize(fs: pyfuse3.Operations, mount: Path, *, everybody: bool) -> set[int]:
    """Mount; the descriptors by which requests come. Raises RuntimeError.

    With ``everybody`` other users may use it too, as far as modes allow.
    """
    options = {*pyfuse3.default_options, "fsname=msharefs", "subtype=msharefs", "default_permissions"}
    if everybody:
        options.add("allow_other")
    before = set(_connections())
    pyfuse3.init(fs, str(mount), options)
    made = set(_connections()) - before
    for fd in made:
        os.set_blocking(fd, False)
    return made


async def serve() -> None:
    """Serve requests until cancelled.

    Who waits for the connection to turn readable may find nothing there to be read: the kernel takes back what a
    process has asked that is killed. A read that blocks would stop the loop until somebody asks again, and pyfuse3 has
    no other name for one that does not block than an error, upon which its loop begins anew here.
    """
    # pyfuse3 has no public place for this.
    loop = pyfuse3._session_loop  # type: ignore[attr-defined]  # noqa: SLF001
    pyfuse3._session_loop = partial(_go_on_reading, loop)  # type: ignore[attr-defined]  # noqa: SLF001
    await pyfuse3.main()


async def _go_on_reading(loop: Callable[..., Awaitable[None]], *args: object) -> None:
    """Read and answer requests, as long as pyfuse3's own ``loop`` does."""
    while True:
        try:
            return await loop(*args)
        except BlockingIOError:
            log.debug("fuse: a request was taken back")


def _connections() -> Iterator[int]:
    """The descriptors of FUSE's connections in this process."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()) == "/dev/fuse":
                yield int(link.name)


def shut_down() -> None:
    """Unmount."""
    pyfuse3.close(unmount=True)
