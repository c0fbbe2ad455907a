"""What can go wrong, one exception a meaning, each with the errno that the kernel's own call would give."""

from __future__ import annotations

import errno
from typing import ClassVar


class MshareError(Exception):
    """Something a caller asked for cannot be had. The message says what to do about it.

    The client raises it as the OSError of ``errno``, so that ``except FileNotFoundError`` works as expected.
    """

    errno: ClassVar[int] = errno.EIO


class InvalidArgumentError(MshareError):
    """An address, size, name or flag that can never be right."""

    errno = errno.EINVAL


class NameTooLongError(MshareError):
    """A region name of more than 255 bytes."""

    errno = errno.ENAMETOOLONG


class NotFoundError(MshareError):
    """No region of that name."""

    errno = errno.ENOENT


class ExistsError(MshareError):
    """The name is taken and O_EXCL was given, or the range is and MAP_FIXED_NOREPLACE was."""

    errno = errno.EEXIST


class BusyError(MshareError):
    """Others are attached."""

    errno = errno.EBUSY


class AccessDeniedError(MshareError):
    """The mode of the file, or of the mount, does not allow it."""

    errno = errno.EACCES


class NotPermittedError(MshareError):
    """Only the owner, or root, may do that."""

    errno = errno.EPERM


class TryAgainError(MshareError):
    """Not yet: somebody else is still at it."""

    errno = errno.EAGAIN


class NoMemoryError(MshareError):
    """No free range of addresses, or no memory, for what was asked."""

    errno = errno.ENOMEM


class NoSpaceError(MshareError):
    """A limit of the daemon is reached."""

    errno = errno.ENOSPC


class QuotaError(MshareError):
    """A limit of the caller's user is reached."""

    errno = errno.EDQUOT


class NotSupportedError(MshareError):
    """Known, but not on this daemon."""

    errno = errno.EOPNOTSUPP


class OffsetTooLargeError(MshareError):
    """An offset that no file can have."""

    errno = errno.EOVERFLOW


class NoDeviceError(MshareError):
    """A file of a kind that cannot be mapped."""

    errno = errno.ENODEV


class BadDescriptorError(MshareError):
    """A descriptor that is not what the request needs, or too many or too few of them."""

    errno = errno.EBADF


class ProtocolError(MshareError):
    """A packet that is not of the protocol."""

    errno = errno.EPROTO


class InternalError(Exception):
    """A bug in msharefs itself: an invariant does not hold, or a message came at an impossible moment."""
