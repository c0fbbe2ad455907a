"""Reference pages as a program makes them (compare refpage_create(2), as it was proposed for Linux)."""

from __future__ import annotations

import errno

from msharefs.addr import PAGE_SIZE
from msharefs.errors import InvalidArgumentError
from msharefs.perms import MAP_REFPAGE
from msharefs.refpage import RefPage


def refpage_create(content: bytes | bytearray | memoryview, size: int | None = None) -> RefPage:
    """A reference page, for ``Region.mmap``: ``content`` repeated to ``size`` bytes (a page), and so on in every page.

    Both lengths are powers of two, of at most 4096 bytes. The content is taken now: what becomes of its buffer later
    changes nothing. What comes back is a value, usable in any number of mappings, regions and processes.

    Raises OSError EINVAL; TypeError for what is not bytes-like.
    """
    view = memoryview(content)
    if view.nbytes > PAGE_SIZE:
        raise OSError(errno.EINVAL, f"the content of a reference page has at most {PAGE_SIZE} bytes, not {view.nbytes}")
    try:
        return RefPage.of(view.tobytes(), size)
    except InvalidArgumentError as error:
        raise OSError(errno.EINVAL, str(error)) from None


def wire_content(refpage: RefPage | None, flags: int, fd: int) -> str | None:
    """What of a reference page is told to the daemon, which sees to the other rules. Raises OSError EINVAL."""
    if refpage is not None and not isinstance(refpage, RefPage):
        raise TypeError("refpage is what mshare.refpage_create() returns")
    if fd != -1 and (refpage is not None or flags & MAP_REFPAGE):
        raise OSError(errno.EINVAL, "a reference page and a file cannot both be mapped; leave fd out")
    return None if refpage is None else refpage.pattern.hex()
