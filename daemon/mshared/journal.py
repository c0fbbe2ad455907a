"""The file ``state``: what is to outlive the daemon, as records that are appended, and replaced now and then.

A header says what it is, in which version, since which boot of the machine it holds, and who keeps the descriptors that
it names (``mshared.keeper``). Records follow: length, checksum of the contents, checksum of both, contents. What is
appended is there when ``append`` returns, should the process be killed after it; the kernel has it then. A file that
ends in the middle of a record was cut short by such a death: that record was never acted upon, and is dropped. Anything
else that is wrong makes the file unreadable as a whole: it is refused, not guessed at.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from typing import Final

import attrs

from mshared import libc
from mshared.killpoints import point
from msharefs.errors import NoSpaceError

NAME: Final = "state"
VERSION: Final = 1
_MAGIC: Final = b"msharefs state\r\n"
_HEADER: Final = struct.Struct("<16sI32s36sI")
_RECORD: Final = struct.Struct("<III")
_KEEP_SIZE: Final = 1
_STEP: Final = 1 << 20
_MARGIN: Final = 64 << 10
"""Bytes that are promised beyond the end of the file at least, while there is room."""


class StateError(Exception):
    """A state file that cannot be used; the message names it and says how to get rid of it."""


@attrs.frozen
class State:
    """What a file holds: whose keeper, since which boot, and the contents of its records."""

    keeper: str
    boot: str
    records: tuple[bytes, ...]


def boot_id() -> str:
    """The number of this boot of the machine: no descriptor, process or memory outlives it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def load(path: Path) -> State | None:
    """What a state file holds, or None where there is none. Raises StateError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(path, f"cannot be read ({error.strerror})") from error
    keeper, boot = _header(path, data)
    return State(keeper, boot, tuple(_records(path, data)))


def keeper_named(path: Path) -> str | None:
    """Whom a state file names as keeper of its descriptors; None where there is no such file."""
    try:
        with path.open("rb") as file:
            return _header(path, file.read(_HEADER.size))[0]
    except (OSError, StateError):
        return None


def _header(path: Path, data: bytes) -> tuple[str, str]:
    if len(data) < _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
        raise unusable(path, "is no state file of mshared")
    _, version, keeper, boot, checksum = _HEADER.unpack_from(data)
    if checksum != zlib.crc32(data[: _HEADER.size - 4]):
        raise unusable(path, "is corrupt (its header)")
    if version != VERSION:
        raise unusable(path, f"has version {version}, and this mshared knows version {VERSION}")
    return keeper.rstrip(b"\0").decode(), boot.decode()


def _records(path: Path, data: bytes) -> list[bytes]:
    found, at = [], _HEADER.size
    while at + _RECORD.size <= len(data):
        length, checksum, own = _RECORD.unpack_from(data, at)
        if own != zlib.crc32(data[at : at + 8]):
            raise unusable(path, f"is corrupt (byte {at})")
        record = data[at + _RECORD.size : at + _RECORD.size + length]
        if len(record) < length:
            break
        if checksum != zlib.crc32(record):
            raise unusable(path, f"is corrupt (byte {at})")
        found.append(record)
        at += _RECORD.size + length
    if not found:
        raise unusable(path, "is corrupt (nothing is in it)")
    return found


def unusable(path: Path, why: str) -> StateError:
    """Why a state file cannot be used, and the cure."""
    return StateError(
        f"{path} {why}; what it told of regions cannot be had again: stop whoever is attached, and remove the "
        f"directory {path.parent} (unmount what is mounted in it first)"
    )


class Journal:
    """A state file that is being written. ``keeper`` goes into its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keeper = ""
        self._fd = -1
        self._end = 0
        self._promised = 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    @property
    def is_open(self) -> bool:
        """Whether there is a file yet that can be appended to."""
        return self._fd >= 0

    def replace(self, record: bytes) -> None:
        """Have a new file with this one record in the place of the old one, at once. Raises NoSpaceError."""
        header = _HEADER.pack(_MAGIC, VERSION, self.keeper.encode(), boot_id().encode(), 0)[:-4]
        data = header + zlib.crc32(header).to_bytes(4, "little") + _framed(record)
        new = self.path.with_suffix(".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, data, 0)
            point()
            new.rename(self.path)
        except OSError as error:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise _no_room(self.path, error) from error
        self.close()
        self._fd, self._end, self._promised = fd, len(data), len(data)
        point()

    def append(self, record: bytes) -> None:
        """Add a record. Raises NoSpaceError, with nothing added."""
        data = _framed(record)
        point()
        try:
            _write_all(self._fd, data, self._end)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise _no_room(self.path, error) from error
        self._end += len(data)
        point()

    def check_room(self) -> None:
        """Have memory promised for what comes next. Raises NoSpaceError while nothing is decided yet."""
        if self._promised - self._end >= _MARGIN or not self.is_open:
            return
        try:
            libc.call("fallocate64", self._fd, _KEEP_SIZE, self._end, _STEP)
        except OSError as error:
            raise _no_room(self.path, error) from error
        self._promised = self._end + _STEP

    def close(self) -> None:
        """Close it; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _framed(record: bytes) -> bytes:
    head = struct.pack("<II", len(record), zlib.crc32(record))
    return head + zlib.crc32(head).to_bytes(4, "little") + record


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _no_room(path: Path, error: OSError) -> NoSpaceError:
    return NoSpaceError(f"{path} cannot be written ({error.strerror}); make room in {path.parent}")
