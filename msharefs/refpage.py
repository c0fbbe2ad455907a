"""Reference pages: what the pages of a mapping show that nobody has touched, or has only read."""

from __future__ import annotations

from typing import Self

import attrs

from msharefs.addr import PAGE_SIZE
from msharefs.errors import InvalidArgumentError


@attrs.frozen
class RefPage:
    """A pattern that repeats throughout a page. Equal contents make equal ones, however they were given.

    A value: usable in any number of mappings, regions and processes (it can be pickled), and gone with its last user.
    ``pattern`` is what repeats, a power of two of bytes, and as short as possible.
    """

    pattern: bytes

    @classmethod
    def of(cls, content: bytes, size: int | None = None) -> Self:
        """The reference page that repeats ``content`` up to ``size`` bytes, and these throughout every page.

        Raises InvalidArgumentError unless both lengths are powers of two, of at most a page, and the content fits.
        """
        whole = PAGE_SIZE if size is None else size
        for number, what in ((len(content), "the content"), (whole, "the size")):
            if number <= 0 or number > PAGE_SIZE or number & (number - 1):
                raise InvalidArgumentError(f"{what} of a reference page is a power of two of bytes up to {PAGE_SIZE}")
        if len(content) > whole:
            raise InvalidArgumentError(f"{len(content)} bytes do not fit into a reference page of {whole}")
        while len(content) > 1 and content[: len(content) // 2] == content[len(content) // 2 :]:
            content = content[: len(content) // 2]
        return cls(content)

    def repeated(self, size: int) -> bytes:
        """``size`` bytes of it. Preconditions: a multiple of the pattern's length."""
        return self.pattern * (size // len(self.pattern))

    def __str__(self) -> str:
        """As in ``maps``: the first bytes in hexadecimal."""
        return self.pattern[:_TOLD].hex() + ("..." if len(self.pattern) > _TOLD else "")


_TOLD = 16
"""Bytes that fit into a line."""
