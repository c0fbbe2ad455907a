"""Reading /proc/PID/mountinfo (compare proc(5)); the text is given, nothing is opened here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

FSTYPE = "fuse.msharefs"
_OCTAL = re.compile(r"\\([0-7]{3})")


@attrs.frozen
class Mount:
    """One line: its device (major, minor), where it is mounted, what it is, and the uid that mounted it, for FUSE."""

    mount_id: int
    device: tuple[int, int]
    point: str
    fstype: str
    uid: int | None


def parse_mountinfo(text: str) -> Iterator[Mount]:
    """The mounts in ``text``, in order: a later one at the same point hides the earlier."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, described = left.split(" "), right.split(" ")
        owner = re.search(r"(?:^|,)user_id=(\d+)", described[-1])
        major, _, minor = fields[2].partition(":")
        device = (int(major), int(minor))
        yield Mount(int(fields[0]), device, _unescape(fields[4]), described[0], int(owner[1]) if owner else None)


def msharefs_mounts(text: str) -> list[Mount]:
    """Those that are msharefs mounts, in order."""
    return [mount for mount in parse_mountinfo(text) if mount.fstype == FSTYPE]


def _unescape(field: str) -> str:
    """Blanks in paths are written in octal; the bytes may be any, as in os.fsdecode."""
    raw = _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
    return raw.encode("latin-1", "ignore").decode("utf-8", "surrogateescape") if _OCTAL.search(field) else raw
