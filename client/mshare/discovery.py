"""Finding the mount and its daemon."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

import attrs

from msharefs.mountinfo import msharefs_mounts
from msharefs.names import INFO_NAME

ENVIRONMENT: Final = "MSHAREFS"
HOW_TO_START: Final = "start one with `mshare up`, or `mshared` as root"


@attrs.frozen
class Info:
    """What ``mshare_info`` tells: the alignment, and the other lines by key."""

    mount: Path
    align: int
    fields: dict[str, str]

    @property
    def socket(self) -> Path:
        """Where the daemon listens."""
        return Path(self.fields["socket"])


def find_mount(mount: str | os.PathLike[str] | None = None) -> Path:
    """The mount to use: the one named, else $MSHAREFS, else our own user's, else root's.

    Mounts of other users are not trusted. Raises FileNotFoundError saying how to start a daemon.
    """
    chosen = mount if mount is not None else os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(os.path.abspath(chosen))  # noqa: PTH100 - resolve() would ask a dead mount
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())  # As text, "\r" in a path would end a line.
    found = {m.uid: Path(m.point) for m in msharefs_mounts(text)}
    for uid in (os.geteuid(), 0):
        if uid in found:
            return found[uid]
    raise FileNotFoundError(errno.ENOENT, f"no msharefs is mounted; {HOW_TO_START}")


def is_served(mount: Path) -> bool:
    """Whether a daemon answers at a mount."""
    try:
        read_info(mount)
    except OSError:
        return False
    return True


def read_info(mount: Path) -> Info:
    """What the mount says of itself. Raises OSError when nobody serves it."""
    try:
        text = (mount / INFO_NAME).read_text()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise OSError(error.errno, f"the daemon of {mount} is dead; {HOW_TO_START}") from error
        raise OSError(error.errno, f"{mount} is no msharefs mount ({error.strerror}); {HOW_TO_START}") from error
    first, _, rest = text.partition("\n")
    fields = {key: value for key, _, value in (line.partition(" ") for line in rest.splitlines())}
    if not first.isdecimal() or "socket" not in fields:
        raise OSError(errno.EINVAL, f"{mount} is no msharefs mount ({INFO_NAME} is none of ours); {HOW_TO_START}")
    return Info(mount, int(first), fields)
