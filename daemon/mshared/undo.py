"""Undoing what was made of something when the rest of it cannot be."""

from __future__ import annotations

import os
from pathlib import Path


class Undo:
    """Closes and unlinks what was made, unless ``keep`` was called."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self.path: Path | None = None

    def __enter__(self) -> Undo:
        return self

    def open(self, fd: int) -> int:
        """Note a descriptor."""
        self._fds.append(fd)
        return fd

    def keep(self) -> None:
        """Everything worked."""
        self._fds, self.path = [], None

    def __exit__(self, *_exc: object) -> None:
        for fd in self._fds:
            os.close(fd)
        if self.path is not None:
            self.path.unlink(missing_ok=True)
