"""What may name a region."""

from __future__ import annotations

from typing import Final

from msharefs.errors import InvalidArgumentError, NameTooLongError

INFO_NAME: Final = "mshare_info"
"""The file of the mount that tells of the mount itself."""
NAME_MAX: Final = 255


def check_name(name: str) -> str:
    """Refuse a name no region can have; the name otherwise."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # A lone surrogate that stands for no byte.
        raw = b""
    if len(raw) > NAME_MAX:
        raise NameTooLongError(f"a region's name has at most {NAME_MAX} bytes, this one {len(raw)}")
    unfit = not raw or name.startswith(".") or "/" in name or "\0" in name or name == INFO_NAME
    # Bytes of good UTF-8 may come escaped one by one: the mount would show another name than the one asked for.
    if unfit or raw.decode("utf-8", "surrogateescape") != name:
        raise InvalidArgumentError(
            f"{name!r} cannot name a region: use one path component of 1 to {NAME_MAX} bytes that does not start "
            f"with a dot and is not {INFO_NAME!r}"
        )
    return name
