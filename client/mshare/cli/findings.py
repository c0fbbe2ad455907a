"""What a check of the machine comes to."""

from __future__ import annotations

import enum

import attrs


class Level(enum.StrEnum):
    """``note``: works, but less well, or good to know. ``lack``: mshared cannot run without."""

    OK = "ok"
    NOTE = "note"
    LACK = "lack"


@attrs.frozen
class Finding:
    """What one check found, and what to do about it."""

    name: str
    level: Level
    found: str
    cure: str | None = None
