"""Where stores may go unreported although they are to be reported because of forks."""

from __future__ import annotations

from typing import Final

from msharefs.addr import AddrRange, united

_MOST: Final = 256
_PAGES_A_CALL: Final = 64
"""Pages that can be protected at once in the time that one more system call takes."""


class Storable:
    """Ranges that are to be protected again: stores were allowed, pages made anew, or marks went with their pages.

    Of many ranges it knows no more than that they are many: to protect all at once is faster then. So it is, too,
    before ``clear`` was called once.
    """

    def __init__(self, pages: int) -> None:
        self._most = min(_MOST, pages // _PAGES_A_CALL)
        self._parts: list[AddrRange] | None = None

    def note(self, ar: AddrRange) -> None:
        """Stores to ``ar`` may go unreported from now on."""
        if self._parts is not None:
            self._parts.append(ar)
            if len(self._parts) > self._most:
                self._parts = None

    def parts(self, whole: AddrRange) -> list[AddrRange]:
        """Where they may, in order; in all of ``whole`` if that is not known."""
        return [whole] if self._parts is None else united(sorted(self._parts))

    def forget(self) -> None:
        """Nothing is known, as in the beginning."""
        self._parts = None

    def clear(self) -> None:
        """All stores are reported."""
        self._parts = []
