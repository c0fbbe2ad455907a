"""Every exception a caller may meet has the errno that the kernel's own call would give."""

from __future__ import annotations

import errno

import pytest

from msharefs import errors

EXPECTED = {
    errors.InvalidArgumentError: errno.EINVAL,
    errors.NameTooLongError: errno.ENAMETOOLONG,
    errors.NotFoundError: errno.ENOENT,
    errors.ExistsError: errno.EEXIST,
    errors.BusyError: errno.EBUSY,
    errors.AccessDeniedError: errno.EACCES,
    errors.NotPermittedError: errno.EPERM,
    errors.TryAgainError: errno.EAGAIN,
    errors.NoMemoryError: errno.ENOMEM,
    errors.NoSpaceError: errno.ENOSPC,
    errors.QuotaError: errno.EDQUOT,
    errors.NotSupportedError: errno.EOPNOTSUPP,
    errors.OffsetTooLargeError: errno.EOVERFLOW,
    errors.NoDeviceError: errno.ENODEV,
    errors.BadDescriptorError: errno.EBADF,
    errors.ProtocolError: errno.EPROTO,
}


@pytest.mark.parametrize(("kind", "number"), EXPECTED.items(), ids=lambda value: getattr(value, "__name__", value))
def test_each_meaning_has_its_errno(kind: type[errors.MshareError], number: int) -> None:
    assert kind.errno == number
    assert kind("text").errno == number


def test_no_meaning_is_left_without_an_errno_of_its_own() -> None:
    assert set(errors.MshareError.__subclasses__()) == set(EXPECTED)


def test_a_bug_of_ours_is_no_error_of_the_callers() -> None:
    assert not issubclass(errors.InternalError, errors.MshareError)
