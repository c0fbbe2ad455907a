"""Reading /proc/PID/mountinfo (compare proc(5)); the text is given, nothing is opened here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

FSTYPE = "fuse.msharefs"
_LINE = re.compile(r"(\d+) \d+ (\d+):(\d+) [^ ]* ([^ ]+) .*? - ([^ ]+) [^ ]* (.*)")
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


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
    # Anybody may mount at a path that holds what Python takes for the end of a line; the kernel escapes "\n" only.
    for line in text.split("\n"):
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        number, major, minor, point, fstype, options = found.groups()
        owner = re.search(r"(?:^|,)user_id=(\d+)", options)
        yield Mount(int(number), (int(major), int(minor)), _unescape(point), fstype, int(owner[1]) if owner else None)


def msharefs_mounts(text: str) -> list[Mount]:
    """Those that are msharefs mounts, in order."""
    likely = "\n".join(line for line in text.split("\n") if f" - {FSTYPE} " in line)
    return [mount for mount in parse_mountinfo(likely) if mount.fstype == FSTYPE]


def _unescape(field: str) -> str:
    """Blanks in paths are written in octal; the bytes may be any, as in os.fsdecode."""
    raw = field.encode("utf-8", "surrogateescape")
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), raw).decode("utf-8", "surrogateescape")
