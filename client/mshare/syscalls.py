"""Mapping memory at chosen addresses: what Python's mmap module has no words for."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import operator
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
SYS_MMAP: Final = 9
SYS_MPROTECT: Final = 10
SYS_IOCTL: Final = 16
SYS_PWRITE64: Final = 18
SYS_MREMAP: Final = 25
_MS_SYNC: Final = 4
_PUNCH: Final = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_PAGEMAP_THERE: Final = 0b110  # Bits 62 and 63: in swap, in memory.
_PAGEMAP_FILES: Final = 0b001  # Bit 61: a page of a file, or of shared memory.
_UMASK_WITHIN: Final = 512
"""Bytes of /proc/self/status in which the umask stands: after the name."""
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

_keeping_the_lock: Final = ctypes.PyDLL(None, use_errno=True)
_keeping_the_lock.syscall.restype = ctypes.c_long


def mmap(addr: int | None, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2); the address. Raises OSError."""
    result = _libc.mmap(addr, length, prot, flags, fd, offset)
    if result == _MAP_FAILED:
        raise _error("mmap")
    return int(result)


def munmap(addr: int, length: int) -> None:
    """munmap(2). Raises OSError."""
    if _libc.munmap(addr, length):
        raise _error("munmap")


def mprotect(addr: int, length: int, prot: int) -> None:
    """mprotect(2). Raises OSError."""
    if _libc.mprotect(addr, length, prot):
        raise _error("mprotect")


def msync(addr: int, length: int) -> None:
    """msync(2) with MS_SYNC. Raises OSError."""
    if _libc.msync(addr, length, _MS_SYNC):
        raise _error("msync")


def madvise(addr: int, length: int, advice: int) -> None:
    """Give advice about memory (madvise(2)). Raises OSError."""
    if _libc.madvise(addr, length, advice):
        raise _error("madvise")


def punch(fd: int, offset: int, length: int) -> None:
    """Give the memory of a part of a file back (FALLOC_FL_PUNCH_HOLE). Raises OSError."""
    if _libc.fallocate(fd, _PUNCH, offset, length):
        raise _error("fallocate")


def allocate(fd: int, length: int) -> None:
    """Have memory for the first ``length`` bytes of a file, as zeros where there was none (fallocate(2)).

    Raises OSError: ENOMEM, with nothing done, when the machine has less than that to give; ENOSPC.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = sum(int(fields[key].split()[0]) << 10 for key in ("MemAvailable", "SwapFree"))
    if length > free:
        raise OSError(errno.ENOMEM, f"{length} bytes are asked for, and this machine has {free} to give; free some")
    while _libc.fallocate(fd, 0, 0, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            text = f"no room for {length} bytes: {os.strerror(number)}; unlink some regions, or raise --max-bytes"
            raise OSError(number, text)


def free_address(length: int, align: int) -> int:
    """A multiple of ``align`` from which on nothing is mapped for ``length`` bytes; for the moment. Raises OSError."""
    found = mmap(None, length + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    munmap(found, length + align)
    return -(-found // align) * align


def filesystem(fd: int) -> int:
    """The magic number of a file's filesystem (statfs(2)). Raises OSError."""
    found = ctypes.create_string_buffer(128)
    if _libc.fstatfs(fd, found):
        raise _error("fstatfs")
    return int.from_bytes(found.raw[:8], "little")


def userfaultfd(device: int | None) -> int:
    """A userfaultfd of this process, by a descriptor of the device or else by the system call, for user mode only."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if device is not None:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    fd = int(_libc.syscall(abi.SYS_USERFAULTFD, flags | abi.UFFD_USER_MODE_ONLY))
    if fd < 0:
        raise _error("userfaultfd")
    return fd


@attrs.frozen
class Step:
    """One system call and the only result with which the next step may follow."""

    expected: int
    number: int
    args: tuple[int | ctypes.Array[ctypes.c_char], ...]


def run_unswitched(steps: list[Step], undo: list[tuple[range, Step]] | None = None) -> int:
    """Make system calls one after the other, letting no other Python thread run in between; how many succeeded.

    Ends at the first that returns something else than expected; ``errno_error`` tells why. What then must be undone is
    in ``undo``, each call with the numbers of successes after which it is made; its results are not looked at. While
    memory is armed that a Python thread may touch, that thread would wait holding the interpreter lock, and whoever is
    to end the wait could never go on. Calls that keep the lock are not enough: the interpreter also switches threads
    between two bytecodes. So none is executed: iterators written in C drive the calls. The caller keeps the collector
    off.
    """
    done: list[None] = []
    results = itertools.starmap(_keeping_the_lock.syscall, [_call(step) for step in steps])
    successes = itertools.takewhile(operator.truth, map(operator.eq, results, [step.expected for step in steps]))
    whens, backwards = [when for when, _ in undo or ()], [_call(step) for _, step in undo or ()]
    chosen = itertools.compress(backwards, map(operator.contains, whens, map(len, itertools.repeat(done))))
    ctypes.set_errno(0)
    every = itertools.chain(map(done.append, successes), itertools.starmap(_keeping_the_lock.syscall, chosen))
    deque(every, maxlen=0)
    return len(done)


def _call(step: Step) -> tuple[object, ...]:
    return (step.number, *map(_word, step.args))


def _word(arg: int | ctypes.Array[ctypes.c_char]) -> ctypes.c_long | ctypes.Array[ctypes.c_char]:
    return ctypes.c_long(arg) if isinstance(arg, int) else arg


def errno_error(what: str) -> OSError:
    """The OSError of the step that failed; EFAULT when it did a part only, as a write of memory that is not there."""
    ctypes.set_errno(ctypes.get_errno() or errno.EFAULT)
    return _error(what)


@attrs.frozen
class Mapping:
    """A line of /proc/self/maps. ``offset`` and ``device`` are of the file, where it shows one."""

    start: int
    end: int
    prot: int
    shared: bool
    inode: int
    path: str
    offset: int = 0
    device: str = ""

    def clipped(self, start: int, end: int) -> Mapping:
        """The part of it between two addresses. Preconditions: there is one."""
        first = max(self.start, start)
        offset = self.offset + first - self.start if self.inode else 0
        return attrs.evolve(self, start=first, end=min(self.end, end), offset=offset)


def own_mappings(start: int, end: int) -> list[Mapping]:
    """This process's mappings with an address in ``start..end``, in order, as the kernel has them, unclipped."""
    found = []
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")[:-1]:  # Paths may hold other line ends.
        fields = line.split(maxsplit=5)
        low, _, high = fields[0].partition("-")
        if int(low, 16) < end and start < int(high, 16):
            prot = sum(bit for bit, letter in zip((1, 2, 4), fields[1], strict=False) if letter != "-")
            path = fields[5] if len(fields) > 5 else ""
            shared, inode, offset, device = fields[1][3] == "s", int(fields[4]), int(fields[2], 16), fields[3]
            found.append(Mapping(int(low, 16), int(high, 16), prot, shared, inode, path, offset, device))
    return found


def may_be_written(mapping: Mapping) -> bool:
    """Whether mprotect(2) could make a mapping writable: one of a file opened for reading stays read-only."""
    if mapping.prot & PROT_WRITE:
        return True
    found = False
    with Path("/proc/self/smaps").open(errors="replace", newline="\n") as smaps:
        for line in smaps:
            found = found or line.startswith(f"{mapping.start:08x}-")
            if found and line.startswith("VmFlags:"):
                return "mw" in line.split()
    return False


def populated(start: int, end: int, *, own: bool = False) -> Iterator[tuple[int, int]]:
    """Runs of pages in ``start..end`` that hold something, in memory or swap (/proc/self/pagemap).

    ``own``: only what is this process's alone, which of a private file mapping are the pages that it has stored to.
    """
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        run: int | None = None
        for chunk in range(start, end, 512 * PAGE_SIZE):
            pages = min(512, (end - chunk) // PAGE_SIZE)
            words = memoryview(os.pread(pagemap.fileno(), 8 * pages, chunk // PAGE_SIZE * 8)).cast("Q")
            for page, word in enumerate(words):
                addr, bits = chunk + page * PAGE_SIZE, word >> 61
                there = bits & _PAGEMAP_THERE and not (own and bits & _PAGEMAP_FILES)
                if there and run is None:
                    run = addr
                elif not there and run is not None:
                    yield run, addr
                    run = None
        if run is not None:
            yield run, end


def thread_count() -> int:
    """How many threads this process has, those of C libraries included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def umask() -> int:
    """The process's umask, read without changing it."""
    with contextlib.suppress(OSError):
        status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            lines = os.read(status, _UMASK_WITHIN).splitlines()
        finally:
            os.close(status)
        for line in lines:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
