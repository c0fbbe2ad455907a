"""One ioctl at a time, on memory of processes of the tests; threads touch it by C functions, which hold no lock."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mshared import libc, processes, uffd
from mshared.uffd import Outcome, Uffd, classify
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, AddrRange
from msharefs.vma import Arming

RW = 3
C = ctypes.CDLL(None)

Apart = Callable[[Callable[[], object]], None]
Other = Callable[[Callable[[socket.socket], object]], tuple[int, socket.socket]]


class Memory:
    """Shared memory of this process and a userfaultfd for it."""

    def __init__(self, pages: int = 4, features: abi.Feature = uffd.WANTED) -> None:
        self.file = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(self.file, pages * PAGE_SIZE)
        self.ar = AddrRange.sized(libc.map_shared(self.file, pages * PAGE_SIZE), pages * PAGE_SIZE)
        libc.call("mprotect", self.ar.start, self.ar.size, RW)
        self.uffd = uffd.new(None)
        self.uffd.open_api(features)

    def page(self, number: int) -> AddrRange:
        return AddrRange.sized(self.ar.start + number * PAGE_SIZE, PAGE_SIZE)

    def start_store(self, value: int, at: int = 0) -> threading.Thread:
        """A thread that stores a byte."""
        return self._start(C.memset, ctypes.c_void_p(self.ar.start + at), value, ctypes.c_size_t(1))

    def start_load(self, at: int = 0) -> threading.Thread:
        """A thread that looks at a byte."""
        return self._start(C.memchr, ctypes.c_void_p(self.ar.start + at), 0, ctypes.c_size_t(1))

    def byte(self, at: int = 0) -> int:
        """What the file holds, read without the mapping."""
        return os.pread(self.file, 1, at)[0]

    def message(self) -> tuple[int, int, int]:
        """Flags, address and thread of the next fault reported."""
        assert select.select([self.uffd.fd], [], [], 60)[0], "no fault is reported"
        event, flags, addr, tid = abi.PAGEFAULT_STRUCT.unpack(self.uffd.read(1))
        assert event == abi.Event.PAGEFAULT
        return flags, addr, tid

    def _start(self, function: Any, *args: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=args)
        thread.start()
        return thread


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.EEXIST, Outcome.EXISTS),
        (errno.EAGAIN, Outcome.RETRY),
        (errno.ESRCH, Outcome.GONE),
        (errno.ENOSPC, Outcome.GONE),
        (errno.ENOENT, Outcome.UNMAPPED),
        (errno.EINVAL, Outcome.UNMAPPED),
        (errno.ENOMEM, Outcome.UNMAPPED),
        (errno.EBUSY, Outcome.UNMAPPED),
    ],
)
def test_an_errno_has_one_meaning(number: int, outcome: Outcome) -> None:
    assert classify(OSError(number, "words")) is outcome


@pytest.mark.parametrize("number", [errno.EPERM, errno.EFAULT, errno.EIO, errno.EBADF, errno.ENOTTY, 0, None])
def test_an_errno_without_meaning_is_raised_again(number: int | None) -> None:
    error = OSError(number, "words")
    with pytest.raises(OSError, match="words") as raised:
        classify(error)
    assert raised.value is error


def test_a_first_touch_is_reported_where_it_happens_and_ends_in_zeros(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.MISSING)
        thread = memory.start_store(7, PAGE_SIZE + 5)
        assert memory.message() == (abi.FLAG_WRITE, memory.ar.start + PAGE_SIZE + 5, thread.native_id)
        memory.uffd.zero(memory.page(1), protected=False)
        thread.join()
        assert os.pread(memory.file, PAGE_SIZE, PAGE_SIZE) == bytes(5) + b"\7" + bytes(PAGE_SIZE - 6)
        assert memory.uffd.read() == b""

    apart(work)


def test_a_read_takes_as_many_messages_as_asked_for_and_whole_ones_only(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        assert memory.uffd.read() == b""
        memory.uffd.arm(memory.ar, Arming.MISSING)
        threads = [memory.start_load(page * PAGE_SIZE) for page in range(3)]
        first = memory.message()
        rest = b""
        while len(rest) < 2 * abi.MESSAGE_SIZE:
            select.select([memory.uffd.fd], [], [], 60)
            rest += memory.uffd.read()
        found = {first[1], *(abi.PAGEFAULT_STRUCT.unpack_from(rest, at)[2] for at in (0, abi.MESSAGE_SIZE))}
        assert found == {memory.page(page).start for page in range(3)}
        assert memory.uffd.read() == b""
        memory.uffd.arm(memory.ar, Arming.NATIVE)
        for thread in threads:
            thread.join()

    apart(work)


def test_a_store_to_a_protected_page_is_reported_and_waits_until_it_is_protected_no_longer(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        os.pwrite(memory.file, b"\1", 0)
        memory.start_load().join()
        memory.uffd.arm(memory.ar, Arming.WP)
        memory.start_load().join()
        thread = memory.start_store(2)
        assert memory.message()[0] == abi.FLAG_WRITE | abi.FLAG_WP
        assert memory.byte() == 1
        memory.uffd.write_protect(memory.page(0), protect=False)
        thread.join()
        assert memory.byte() == 2

    apart(work)


def test_protecting_holds_for_pages_that_come_later(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.WP)
        thread = memory.start_store(2)
        assert memory.message()[0] & abi.FLAG_WP
        memory.uffd.write_protect(memory.page(0), protect=False)
        thread.join()

    apart(work)


def test_a_protected_zero_page_reports_its_first_store(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP)
        thread = memory.start_store(9)
        assert memory.message()[0] == abi.FLAG_WRITE
        memory.uffd.zero(memory.page(0), protected=True)
        assert memory.message()[0] == abi.FLAG_WRITE | abi.FLAG_WP
        assert memory.byte() == 0
        memory.uffd.write_protect(memory.page(0), protect=False)
        thread.join()
        assert memory.byte() == 9

    apart(work)


def test_an_unprotected_zero_page_takes_stores_though_the_range_reports_them(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP)
        thread = memory.start_load()
        memory.message()
        memory.uffd.zero(memory.page(0), protected=False)
        thread.join()
        memory.start_store(9).join()
        assert memory.byte() == 9

    apart(work)


@pytest.mark.parametrize("before", [Arming.MISSING, Arming.MISSING | Arming.WP])
def test_arming_for_nothing_wakes_who_waits_and_ends_all_reports(apart: Apart, before: Arming) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, before)
        thread = memory.start_store(1)
        memory.message()
        memory.uffd.arm(memory.ar, Arming.NATIVE)
        thread.join()
        memory.start_store(1, PAGE_SIZE).join()
        assert memory.uffd.read() == b""

    apart(work)


def test_arming_for_missing_pages_only_takes_protections_away(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        os.pwrite(memory.file, b"\1", 0)
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP)
        thread = memory.start_store(2)
        memory.message()
        memory.uffd.arm(memory.ar, Arming.MISSING)
        thread.join()
        assert memory.byte() == 2
        thread = memory.start_store(3, PAGE_SIZE)
        assert memory.message()[1] == memory.page(1).start
        memory.uffd.arm(memory.ar, Arming.NATIVE)
        thread.join()

    apart(work)


def test_arming_for_stores_reports_them_on_what_was_armed_for_missing_pages(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        os.pwrite(memory.file, b"\1", 0)
        memory.uffd.arm(memory.ar, Arming.MISSING)
        memory.uffd.arm(memory.ar, Arming.WP)
        memory.start_load(PAGE_SIZE).join()  # Missing pages are the kernel's again.
        thread = memory.start_store(2)
        assert memory.message()[0] & abi.FLAG_WP
        memory.uffd.arm(memory.ar, Arming.NATIVE)
        thread.join()

    apart(work)


def test_arming_for_stores_to_clean_pages_protects_nothing_and_leaves_what_is_protected(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP_CLEAN)
        for number in (0, 1):
            os.pwrite(memory.file, b"\1", number * PAGE_SIZE)
        memory.start_store(2).join()
        memory.uffd.write_protect(memory.page(1))
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP_CLEAN)
        thread = memory.start_store(3, PAGE_SIZE)
        flags, addr, _ = memory.message()
        assert flags & abi.FLAG_WP
        assert addr == memory.page(1).start
        memory.uffd.write_protect(memory.page(1), protect=False)
        thread.join()
        assert (memory.byte(), memory.byte(PAGE_SIZE)) == (2, 3)

    apart(work)


def test_a_copy_brings_what_is_missing_up_to_what_is_there(apart: Apart) -> None:
    def work() -> None:
        memory, source = Memory(), ctypes.create_string_buffer(b"\7" * 4 * PAGE_SIZE)
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP_CLEAN)
        os.pwrite(memory.file, b"\1", 2 * PAGE_SIZE)
        assert memory.uffd.copy_some(memory.ar, ctypes.addressof(source), protected=True) == 2 * PAGE_SIZE
        assert [memory.byte(number * PAGE_SIZE) for number in range(4)] == [7, 7, 1, 0]
        with pytest.raises(FileExistsError):
            memory.uffd.copy_some(memory.page(2), ctypes.addressof(source), protected=True)
        assert memory.uffd.copy_some(memory.page(3), ctypes.addressof(source), protected=False) == PAGE_SIZE
        memory.start_store(9, 3 * PAGE_SIZE).join()
        thread = memory.start_store(9, PAGE_SIZE)
        assert memory.message()[0] & abi.FLAG_WP
        memory.uffd.arm(memory.ar, Arming.NATIVE)
        thread.join()

    apart(work)


def test_neighbours_are_not_armed(apart: Apart) -> None:
    def work() -> None:
        memory = Memory(3)
        memory.uffd.arm(memory.page(1), Arming.MISSING | Arming.WP)
        memory.start_store(1, 0).join()
        memory.start_store(1, 2 * PAGE_SIZE).join()
        assert memory.uffd.read() == b""

    apart(work)


@pytest.mark.parametrize("protected", [False, True])
def test_a_page_that_is_there_already_is_no_reason_to_wake(apart: Apart, protected: bool) -> None:
    """EEXIST leaves the thread waiting; it finds the page when it is woken."""

    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP if protected else Arming.MISSING)
        thread = memory.start_load()
        memory.message()
        os.pwrite(memory.file, b"\4", 0)
        with pytest.raises(FileExistsError) as caught:
            memory.uffd.zero(memory.page(0), protected=protected)
        assert classify(caught.value) is Outcome.EXISTS
        assert thread.is_alive()
        memory.uffd.wake(memory.page(0))
        thread.join()
        assert memory.byte() == 4

    apart(work)


def test_ranges_that_are_not_there_are_told_by_name(apart: Apart) -> None:
    def work() -> None:
        memory = Memory()
        memory.uffd.arm(memory.ar, Arming.MISSING)
        libc.unmap(memory.ar.start, memory.ar.size)
        calls: list[Callable[[], None]] = [
            lambda: memory.uffd.zero(memory.page(0), protected=False),
            lambda: memory.uffd.zero(memory.page(0), protected=True),
            lambda: memory.uffd.write_protect(memory.ar),
            lambda: memory.uffd.arm(memory.ar, Arming.MISSING),
            lambda: memory.uffd.arm(memory.ar, Arming.WP),
            lambda: memory.uffd.arm(memory.ar, Arming.NATIVE),
            lambda: memory.uffd.mark(memory.page(0)),
            lambda: memory.uffd.unmark(memory.page(0)),
        ]
        for call in calls:
            with pytest.raises(OSError, match=r".") as caught:
                call()
            assert classify(caught.value) is Outcome.UNMAPPED

    apart(work)


def test_memory_that_cannot_be_written_is_not_armed_in_silence(apart: Apart) -> None:
    """A shared mapping of a file opened for reading: EPERM, which is nobody's ordinary fate."""

    def work() -> None:
        memory = Memory()
        readonly = os.open(f"/proc/self/fd/{memory.file}", os.O_RDONLY)
        ar = AddrRange.sized(libc.map_shared(readonly, PAGE_SIZE), PAGE_SIZE)
        with pytest.raises(PermissionError) as caught:
            memory.uffd.arm(ar, Arming.MISSING)
        with pytest.raises(PermissionError):
            classify(caught.value)

    apart(work)


def test_marks_of_neighbours_show_as_one_mapping(apart: Apart) -> None:
    def work() -> None:
        memory = Memory(8)

        def seen() -> int:
            return processes.mapping_sizes(os.getpid(), {memory.ar.start})[memory.ar.start] // PAGE_SIZE

        memory.uffd.mark(memory.page(0))
        assert seen() == 1
        memory.uffd.mark(AddrRange.sized(memory.page(1).start, 3 * PAGE_SIZE))
        assert seen() == 4
        memory.uffd.unmark(AddrRange.sized(memory.page(1).start, 7 * PAGE_SIZE))
        assert seen() == 1

    apart(work)


@pytest.fixture
def poison() -> abi.Feature:
    """Features with poison among them."""
    probe = uffd.new(None)
    try:
        probe.open_api(uffd.WANTED | abi.Feature.POISON)
    except OSError:
        pytest.skip("no UFFD_FEATURE_POISON: Linux 6.6 has it")
    finally:
        probe.close()
    return uffd.WANTED | abi.Feature.POISON


def test_poison_is_a_sigbus_that_cannot_be_blocked(
    status_of: Callable[[Callable[[], object]], int], poison: abi.Feature
) -> None:
    def work() -> None:
        memory = Memory(features=poison)
        memory.uffd.arm(memory.ar, Arming.MISSING)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
        thread = memory.start_store(1)
        memory.message()
        memory.uffd.poison(memory.page(0))
        thread.join()

    assert status_of(work) == -signal.SIGBUS


def test_what_is_to_come_protected_is_poisoned_only_after_that_was_taken_away(
    apart: Apart, poison: abi.Feature
) -> None:
    """Who waits goes on waiting meanwhile."""

    def work() -> None:
        memory = Memory(features=poison)
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP)
        thread = memory.start_load()
        memory.message()
        with pytest.raises(FileExistsError):
            memory.uffd.poison(memory.page(0))
        memory.uffd.unprotect_empty(memory.page(0))
        assert memory.uffd.read(1) == b""
        assert thread.is_alive()
        assert os.fstat(memory.file).st_blocks == 0
        memory.uffd.zero(memory.page(0), protected=True)
        thread.join()

    apart(work)


def test_a_page_takes_the_place_of_poison(apart: Apart, poison: abi.Feature) -> None:
    """Protected as it is to be; where the file has none, the mark stays."""

    def work() -> None:
        memory = Memory(features=poison)
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP)
        for number in (0, 1):
            memory.uffd.unprotect_empty(memory.page(number))
            memory.uffd.poison(memory.page(number))
        os.pwrite(memory.file, b"\7", 0)
        memory.uffd.show(memory.page(0), protected=True)
        memory.start_load().join()
        thread = memory.start_store(9)
        assert memory.message()[0] & abi.FLAG_WP
        assert memory.byte() == 7
        memory.uffd.write_protect(memory.page(0), protect=False)
        thread.join()
        assert memory.byte() == 9
        with pytest.raises(FileNotFoundError):
            memory.uffd.show(memory.page(1), protected=True)
        with pytest.raises(FileExistsError):
            memory.uffd.poison(memory.page(1))

    apart(work)


def test_a_page_that_changes_hands_stays_protected_and_who_waits_goes_on_waiting(apart: Apart) -> None:
    def work() -> None:
        memory, taker = Memory(), uffd.new(None)
        taker.open_api(uffd.WANTED)
        os.pwrite(memory.file, b"\7", 0)
        memory.uffd.arm(memory.ar, Arming.MISSING | Arming.WP)
        thread = memory.start_store(9)
        memory.message()
        giver = memory.uffd
        giver.hand_over(memory.page(0), taker, Arming.WP)
        memory.uffd = taker
        assert not select.select([taker.fd], [], [], 0)[0]
        giver.wake(memory.page(0))
        assert memory.message()[:2] == (abi.FLAG_WRITE | abi.FLAG_WP, memory.ar.start)
        assert memory.byte() == 7
        taker.write_protect(memory.page(0), protect=False)
        thread.join()

    apart(work)


def test_the_api_is_opened_once() -> None:
    mine = uffd.new(None)
    try:
        mine.open_api(uffd.WANTED)
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            mine.open_api(uffd.WANTED)
    finally:
        mine.close()


def test_a_new_one_neither_blocks_nor_survives_an_exec() -> None:
    mine = uffd.new(None)
    assert not os.get_blocking(mine.fd)
    assert not os.get_inheritable(mine.fd)
    mine.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(mine.fd)


def test_the_device_gives_one_too() -> None:
    try:
        device = os.open(uffd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"{uffd.DEVICE}: {error.strerror}")
    mine = uffd.new(device)
    os.close(device)
    assert uffd.is_userfaultfd(mine.fd)
    assert not os.get_blocking(mine.fd)
    assert not os.get_inheritable(mine.fd)
    mine.open_api(uffd.WANTED)
    mine.close()


def send_own_uffd(sock: socket.socket, features: abi.Feature = uffd.WANTED) -> None:
    """In another process: memory, its userfaultfd sent away, and then what is asked for."""
    memory = Memory(features=features)
    memory.uffd.arm(memory.ar, Arming.MISSING)
    socket.send_fds(sock, [memory.ar.start.to_bytes(8, "little")], [memory.uffd.fd])
    match sock.recv(10):
        case b"exec":
            os.dup2(sock.fileno(), 0)
            os.dup2(sock.fileno(), 1)
            os.execv("/bin/sh", ["sh", "-c", "echo here; read _"])
        case b"fork":
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            sock.send(b"forked")
            sock.recv(1)


class Theirs:
    """The userfaultfd of another process, and what it does when told."""

    def __init__(self, other: Other, features: abi.Feature = uffd.WANTED) -> None:
        self.pid, self.sock = other(lambda sock: send_own_uffd(sock, features))
        start, (fd,), _, _ = socket.recv_fds(self.sock, 8, 1)
        self.uffd = Uffd(fd)
        self.page = AddrRange.sized(int.from_bytes(start, "little"), PAGE_SIZE)


@pytest.fixture
def theirs(other_process: Other) -> Iterator[Theirs]:
    found = Theirs(other_process)
    yield found
    found.uffd.close()


class TestIsAlive:
    """Whether the address space still exists, asked of the userfaultfd."""

    def test_our_own_is(self) -> None:
        mine = uffd.new(None)
        mine.open_api(uffd.WANTED)
        assert mine.is_alive()
        mine.close()

    def test_that_of_a_process_that_ended_is_not(self, theirs: Theirs) -> None:
        assert theirs.uffd.is_alive()
        os.kill(theirs.pid, signal.SIGKILL)
        os.waitpid(theirs.pid, 0)
        assert not theirs.uffd.is_alive()

    def test_that_of_a_process_that_called_exec_is_not(self, theirs: Theirs) -> None:
        theirs.sock.send(b"exec")
        assert theirs.sock.recv(5) == b"here\n"
        assert not theirs.uffd.is_alive()

    def test_ioctls_on_a_dead_one_say_that_it_is_gone(self, theirs: Theirs) -> None:
        os.kill(theirs.pid, signal.SIGKILL)
        os.waitpid(theirs.pid, 0)
        calls: list[Callable[[], None]] = [
            lambda: theirs.uffd.zero(theirs.page, protected=False),
            lambda: theirs.uffd.zero(theirs.page, protected=True),
            lambda: theirs.uffd.write_protect(theirs.page),
        ]
        for call in calls:
            with pytest.raises(OSError, match=r".") as caught:
                call()
            assert classify(caught.value) is Outcome.GONE
        assert theirs.uffd.read() == b""


def test_a_fork_comes_first(other_process: Other, as_root: None) -> None:
    """A fork waits for its message to be read, and all else for the fork; the message brings the child's descriptor."""
    theirs = Theirs(other_process, uffd.WANTED | abi.Feature.EVENT_FORK)
    theirs.sock.send(b"fork")
    assert select.select([theirs.uffd.fd], [], [], 60)[0]
    with pytest.raises(BlockingIOError) as caught:
        theirs.uffd.zero(theirs.page, protected=False)
    assert classify(caught.value) is Outcome.RETRY
    event, fd = abi.FORK_STRUCT.unpack(theirs.uffd.read())
    assert event == abi.Event.FORK
    assert uffd.is_userfaultfd(fd)
    os.close(fd)
    assert theirs.sock.recv(10) == b"forked"
    theirs.uffd.zero(theirs.page, protected=False)
    theirs.uffd.close()


def test_only_a_userfaultfd_is_one(tmp_path: Path) -> None:
    (tmp_path / "anon_inode:[userfaultfd]").touch()
    mine = uffd.new(None)
    fds = [
        os.open(tmp_path / "anon_inode:[userfaultfd]", os.O_RDONLY),
        os.memfd_create("anon_inode:[userfaultfd]"),
        os.eventfd(0),
        os.pidfd_open(os.getpid()),
        *os.pipe(),
    ]
    try:
        assert uffd.is_userfaultfd(mine.fd)
        assert [fd for fd in fds if uffd.is_userfaultfd(fd)] == []
    finally:
        mine.close()
        for fd in fds:
            os.close(fd)
    assert not uffd.is_userfaultfd(mine.fd)
    assert not uffd.is_userfaultfd(-1)
