"""The userfaultfd ABI (include/uapi/linux/userfaultfd.h), numbers and layouts only.

Client and daemon both speak it, so it stands here. Headers of older distributions lack the newer numbers; every
ioctl number is asserted against the formula of asm-generic/ioctl.h by the tests.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

API_VERSION: Final = 0xAA

USERFAULTFD_IOC_NEW: Final = 0x0000AA00
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
UFFDIO_CONTINUE: Final = 0xC020AA07
UFFDIO_POISON: Final = 0xC020AA08
UFFDIO_API: Final = 0xC018AA3F

SYS_USERFAULTFD: Final = 323
"""System call number on x86-64."""
UFFD_USER_MODE_ONLY: Final = 1


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*: what the kernel offers and a userfaultfd is opened with."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14


class Mode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults are reported."""

    MISSING = 1
    WP = 2
    MINOR = 4


class Event(enum.IntEnum):
    """UFFD_EVENT_*: the first byte of a message."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14


FLAG_WRITE: Final = 1
"""UFFD_PAGEFAULT_FLAG_WRITE: it was a store."""
FLAG_WP: Final = 2
"""UFFD_PAGEFAULT_FLAG_WP: the page is there and write-protected."""

COPY_MODE_WP: Final = 2
WRITEPROTECT_MODE_WP: Final = 1
WRITEPROTECT_MODE_DONTWAKE: Final = 2
CONTINUE_MODE_WP: Final = 2

API_STRUCT: Final = struct.Struct("=QQQ")
"""struct uffdio_api: api, features, ioctls."""
RANGE_STRUCT: Final = struct.Struct("=QQ")
"""struct uffdio_range: start, len."""
REGISTER_STRUCT: Final = struct.Struct("=QQQQ")
"""struct uffdio_register: start, len, mode, ioctls."""
COPY_STRUCT: Final = struct.Struct("=QQQQq")
"""struct uffdio_copy: dst, src, len, mode, copy."""
FILL_STRUCT: Final = struct.Struct("=QQQq")
"""struct uffdio_zeropage and uffdio_poison: start, len, mode, bytes done."""
WRITEPROTECT_STRUCT: Final = struct.Struct("=QQQ")
"""struct uffdio_writeprotect: start, len, mode."""
MESSAGE_SIZE: Final = 32
PAGEFAULT_STRUCT: Final = struct.Struct("=B7xQQI4x")
"""struct uffd_msg of a page fault: event, flags, address, thread id."""
FORK_STRUCT: Final = struct.Struct("=B7xI20x")
"""struct uffd_msg of a fork: event, the child's userfaultfd."""
REMAP_STRUCT: Final = struct.Struct("=B7xQQQ")
"""struct uffd_msg of a move: event, from, to, length."""
