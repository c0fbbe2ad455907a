"""Putting single pages into a backing file without touching their neighbours.

A write through the file brings a whole huge page where the backing has those, and with it memory for holes beside it. A
page that comes by userfaultfd is small. So the daemon maps the file itself, registers that mapping, never touches it,
and asks for pages there; every process then finds them in the file.
"""

from __future__ import annotations

import errno
import os

from mshared import hugetlb, libc, uffd
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, AddrRange


class Filler:
    """A mapping of one backing file in the daemon, registered MISSING; ``page`` is the size of its pages."""

    def __init__(self, fd: int, size: int, device: int | None, page: int = PAGE_SIZE) -> None:
        self._fd = fd
        self._size = size
        self._page = page
        self._device = device
        self._uffd = uffd.new(device)
        self._uffd.open_api(abi.Feature(0))
        self._start = libc.map_shared(fd, size, reserve=False)
        self._uffd.mark(AddrRange.sized(self._start, size))

    def zero(self, offset: int) -> None:
        """Have a page of zeros at ``offset``, unless there is one already. Raises OSError ENOMEM."""
        try:
            self._uffd.zero(AddrRange.sized(self._start + offset, self._page), protected=False)
        except FileExistsError:
            self._check(offset)

    def copy(self, offset: int, data: bytes) -> bool:
        """Have pages with ``data`` from ``offset`` on; False, perhaps half way, when one is there already.

        Raises OSError ENOMEM.
        """
        return self.copy_from(offset, uffd.address_of(data), len(data))

    def copy_from(self, offset: int, address: int, size: int) -> bool:
        """The same with what this process has at ``address``."""
        try:
            self._uffd.copy_from(AddrRange.sized(self._start + offset, size), address)
        except (FileExistsError, BlockingIOError):  # The second when some were copied before one was met.
            if size == self._page:
                self._check(offset)
            return False
        return True

    def take(self, piece: AddrRange, fd: int) -> bool:
        """Have pages with what another file of the same kind has there; as ``copy``, but nothing is copied twice."""
        source = libc.map_shared(fd, piece.size, piece.start, reserve=False, readable=True)
        try:
            self._uffd.copy_from(piece.moved(self._start), source)
        except (FileExistsError, BlockingIOError):
            if piece.size == self._page:
                self._check(piece.start)
            return False
        finally:
            libc.unmap(source, piece.size)
        return True

    def _check(self, offset: int) -> None:
        """Of a huge page the kernel says that it is there also when none is to be had (hugetlb_mfill_atomic_pte)."""
        page = AddrRange.sized(offset, self._page)
        if self._page > PAGE_SIZE and not hugetlb.present(self._fd, page, self._device):
            raise OSError(errno.ENOMEM, "no huge page is free")

    def close(self) -> None:
        """Unmap and close."""
        libc.unmap(self._start, self._size)
        os.close(self._uffd.fd)
