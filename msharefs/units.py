"""Sizes as people write them: powers of 1024, as in ``2M`` or ``512G``."""

from __future__ import annotations

import re

from msharefs.errors import InvalidArgumentError

_SUFFIXES = ("", "K", "M", "G", "T", "P")
_SIZE = re.compile(r"(\d{1,20})\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes for ``4096``, ``2M``, ``1GiB``, ``512g``.

    Raises InvalidArgumentError for anything else, fractions and negative numbers included.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(f"not a size: {text!r} (write 4096, 2M, 1G or 512G; powers of 1024)")
    return int(match[1]) << (10 * _SUFFIXES.index(match[2].upper()))


def format_size(size: int) -> str:
    """``2 MiB`` for 2097152; one decimal where the size is no whole number of its unit."""
    power = min((max(size, 1).bit_length() - 1) // 10, len(_SUFFIXES) - 1)
    if power == 0:
        return f"{size} B"
    whole, rest = divmod(size, 1 << (10 * power))
    number = f"{whole}" if rest == 0 else f"{size / (1 << (10 * power)):.1f}"
    return f"{number} {_SUFFIXES[power]}iB"
