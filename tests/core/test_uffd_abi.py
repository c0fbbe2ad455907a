"""The userfaultfd ABI: every number against the formula of asm-generic/ioctl.h, every layout against the C struct."""

from __future__ import annotations

import ctypes
import struct

import pytest

from msharefs import uffd_abi as abi

NONE, WRITE, READ = 0, 1, 2
UFFDIO = 0xAA


def ioc(direction: int, number: int, size: int) -> int:
    """_IOC() of include/uapi/asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | UFFDIO << 8 | number


class Range(ctypes.Structure):
    """struct uffdio_range."""

    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class Api(ctypes.Structure):
    """struct uffdio_api."""

    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class Register(ctypes.Structure):
    """struct uffdio_register."""

    _fields_ = (("range", Range), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class Copy(ctypes.Structure):
    """struct uffdio_copy."""

    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class Fill(ctypes.Structure):
    """struct uffdio_zeropage, struct uffdio_continue and struct uffdio_poison."""

    _fields_ = (("range", Range), ("mode", ctypes.c_uint64), ("done", ctypes.c_int64))


class WriteProtect(ctypes.Structure):
    """struct uffdio_writeprotect."""

    _fields_ = (("range", Range), ("mode", ctypes.c_uint64))


class PageFault(ctypes.Structure):
    """The member pagefault of struct uffd_msg."""

    _fields_ = (("flags", ctypes.c_uint64), ("address", ctypes.c_uint64), ("ptid", ctypes.c_uint32))


class Fork(ctypes.Structure):
    """The member fork of struct uffd_msg."""

    _fields_ = (("ufd", ctypes.c_uint32),)


class Remap(ctypes.Structure):
    """The member remap of struct uffd_msg."""

    _fields_ = (("from", ctypes.c_uint64), ("to", ctypes.c_uint64), ("len", ctypes.c_uint64))


class Arg(ctypes.Union):
    """The union of struct uffd_msg; ``reserved`` gives it its size."""

    _fields_ = (("pagefault", PageFault), ("fork", Fork), ("remap", Remap), ("reserved", ctypes.c_uint64 * 3))


class Message(ctypes.Structure):
    """struct uffd_msg."""

    _fields_ = (
        ("event", ctypes.c_uint8),
        ("reserved1", ctypes.c_uint8),
        ("reserved2", ctypes.c_uint16),
        ("reserved3", ctypes.c_uint32),
        ("arg", Arg),
    )


IOCTLS = [
    ("USERFAULTFD_IOC_NEW", NONE, 0x00, 0),
    ("UFFDIO_REGISTER", READ | WRITE, 0x00, ctypes.sizeof(Register)),
    ("UFFDIO_UNREGISTER", READ, 0x01, ctypes.sizeof(Range)),
    ("UFFDIO_WAKE", READ, 0x02, ctypes.sizeof(Range)),
    ("UFFDIO_COPY", READ | WRITE, 0x03, ctypes.sizeof(Copy)),
    ("UFFDIO_ZEROPAGE", READ | WRITE, 0x04, ctypes.sizeof(Fill)),
    ("UFFDIO_WRITEPROTECT", READ | WRITE, 0x06, ctypes.sizeof(WriteProtect)),
    ("UFFDIO_CONTINUE", READ | WRITE, 0x07, ctypes.sizeof(Fill)),
    ("UFFDIO_POISON", READ | WRITE, 0x08, ctypes.sizeof(Fill)),
    ("UFFDIO_API", READ | WRITE, 0x3F, ctypes.sizeof(Api)),
]


@pytest.mark.parametrize(("name", "direction", "number", "size"), IOCTLS)
def test_each_ioctl_number_is_that_of_the_formula(name: str, direction: int, number: int, size: int) -> None:
    assert getattr(abi, name) == ioc(direction, number, size)


def test_no_ioctl_number_is_left_unchecked() -> None:
    """A number added to the module must be added above."""
    assert {name for name in vars(abi) if name.startswith(("UFFDIO_", "USERFAULTFD_IOC"))} == {row[0] for row in IOCTLS}


@pytest.mark.parametrize(
    ("layout", "like"),
    [
        (abi.API_STRUCT, Api),
        (abi.RANGE_STRUCT, Range),
        (abi.REGISTER_STRUCT, Register),
        (abi.COPY_STRUCT, Copy),
        (abi.FILL_STRUCT, Fill),
        (abi.WRITEPROTECT_STRUCT, WriteProtect),
        (abi.PAGEFAULT_STRUCT, Message),
        (abi.FORK_STRUCT, Message),
        (abi.REMAP_STRUCT, Message),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_layout_has_the_size_of_the_c_struct(layout: struct.Struct, like: type[ctypes.Structure]) -> None:
    assert layout.size == ctypes.sizeof(like)


def test_results_are_signed() -> None:
    """The kernel writes a negative errno there."""
    raw = bytes(Copy(dst=1, src=2, len=3, mode=4, copy=-11))
    assert abi.COPY_STRUCT.unpack(raw) == (1, 2, 3, 4, -11)
    raw = bytes(Fill(range=Range(1, 2), mode=3, done=-11))
    assert abi.FILL_STRUCT.unpack(raw) == (1, 2, 3, -11)


def test_arguments_are_packed_as_the_kernel_reads_them() -> None:
    assert abi.REGISTER_STRUCT.pack(1, 2, 3, 4) == bytes(Register(range=Range(1, 2), mode=3, ioctls=4))
    assert abi.WRITEPROTECT_STRUCT.pack(1, 2, 3) == bytes(WriteProtect(range=Range(1, 2), mode=3))
    assert abi.API_STRUCT.pack(1, 2, 3) == bytes(Api(1, 2, 3))
    assert abi.RANGE_STRUCT.pack(1, 2) == bytes(Range(1, 2))


def test_messages_are_read_as_the_kernel_writes_them() -> None:
    assert ctypes.sizeof(Message) == abi.MESSAGE_SIZE
    fault = Message(event=abi.Event.PAGEFAULT, arg=Arg(pagefault=PageFault(abi.FLAG_WRITE, 0x7000_1234_5678, 4242)))
    assert abi.PAGEFAULT_STRUCT.unpack(bytes(fault)) == (0x12, 1, 0x7000_1234_5678, 4242)
    fork = Message(event=abi.Event.FORK, arg=Arg(fork=Fork(17)))
    assert abi.FORK_STRUCT.unpack(bytes(fork)) == (0x13, 17)
    moved = Message(event=abi.Event.REMAP, arg=Arg(remap=Remap(0x1000, 0x7000_1234_5000, 0x2000)))
    assert abi.REMAP_STRUCT.unpack(bytes(moved)) == (0x14, 0x1000, 0x7000_1234_5000, 0x2000)


@pytest.mark.parametrize(
    ("feature", "bit"),
    [
        (abi.Feature.PAGEFAULT_FLAG_WP, 0),
        (abi.Feature.EVENT_FORK, 1),
        (abi.Feature.EVENT_REMAP, 2),
        (abi.Feature.MISSING_HUGETLBFS, 4),
        (abi.Feature.MISSING_SHMEM, 5),
        (abi.Feature.THREAD_ID, 8),
        (abi.Feature.EXACT_ADDRESS, 11),
        (abi.Feature.WP_HUGETLBFS_SHMEM, 12),
        (abi.Feature.WP_UNPOPULATED, 13),
        (abi.Feature.POISON, 14),
    ],
)
def test_features_are_the_bits_of_the_header(feature: abi.Feature, bit: int) -> None:
    assert feature == 1 << bit


def test_the_other_numbers_are_those_of_the_header() -> None:
    assert abi.API_VERSION == UFFDIO
    assert (abi.Mode.MISSING, abi.Mode.WP) == (1, 2)
    assert (abi.FLAG_WRITE, abi.FLAG_WP) == (1, 2)
    assert (abi.COPY_MODE_WP, abi.WRITEPROTECT_MODE_WP) == (2, 1)
    assert abi.UFFD_USER_MODE_ONLY == 1
    assert abi.SYS_USERFAULTFD == 323
