"""What /proc tells of this process and of others, and signals to their threads."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mshared import libc, processes
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address
from msharefs.effects import Signal

Apart = Callable[[Callable[[], object]], None]
Other = Callable[[Callable[[socket.socket], object]], tuple[int, socket.socket]]

CLONE_NEWPID = 0x2000_0000
PR_SET_NAME = 15


def stay(sock: socket.socket) -> None:
    """In another process: say that it runs, and wait."""
    sock.send(b"here")
    sock.recv(1)


def test_the_fields_of_a_status() -> None:
    fields = processes.status_fields(Path("/proc/self"))
    assert fields["Pid"] == str(os.getpid())
    assert fields["Uid"].split()[1] == str(os.geteuid())


@pytest.mark.parametrize("name", [b"a\nPid:\t1", b"a\rPid:\t1", b"a\x0bPid:\t1", b"\xff\xfe", b"a:b:c"])
def test_a_process_cannot_pose_as_another_by_its_name(other_process: Other, name: bytes) -> None:
    def posing(sock: socket.socket) -> None:
        libc.call("prctl", PR_SET_NAME, name, 0, 0, 0)
        stay(sock)

    pid, sock = other_process(posing)
    assert sock.recv(4) == b"here"
    fields = processes.status_fields(Path(f"/proc/{pid}"))
    assert (fields["Pid"], fields["PPid"], fields["Tgid"]) == (str(pid), str(os.getpid()), str(pid))
    assert processes.parent_of(pid) == os.getpid()


def test_of_a_process_that_is_gone_nothing_is_known(gone: int) -> None:
    assert processes.status_fields(Path(f"/proc/{gone}")) == {}
    assert processes.parent_of(gone) is None
    assert processes.children_of(gone) == set()
    assert processes.mapping_sizes(gone, {Address(0)}) == {}
    assert processes.page_table_bytes(gone) == 0
    assert processes.huge_mapped_bytes(gone, 0, 1 << 47) == 0
    assert processes.thread_seen_from_here(gone, gone) == gone
    assert processes.process_of_thread(gone) is None
    assert not processes.would_miss(gone, gone, Signal.SIGBUS)
    assert processes.pidfd_open(gone) is None
    with pytest.raises(ProcessLookupError):
        processes.send_fault_signal(gone, gone, Signal.SIGBUS, Address(0))
    assert gone not in processes.all_pids()


def test_parents_and_children(other_process: Other) -> None:
    pid, sock = other_process(stay)
    assert sock.recv(4) == b"here"
    assert processes.parent_of(pid) == os.getpid()
    assert processes.parent_of(os.getpid()) == os.getppid()
    assert pid in processes.children_of(os.getpid())
    assert processes.children_of(pid) == set()
    assert {pid, os.getpid()} <= set(processes.all_pids())


def test_children_of_any_thread_are_children(other_process: Other) -> None:
    """Each is listed with the thread that forked it, while that lives."""
    found = threading.Event()
    started: list[tuple[int, socket.socket]] = []

    def forking() -> None:
        started.append(other_process(stay))
        started[0][1].recv(4)
        found.wait()

    thread = threading.Thread(target=forking)
    thread.start()
    try:
        while not started:
            thread.join(0.001)
        assert started[0][0] in processes.children_of(os.getpid())
    finally:
        found.set()
        thread.join()


SI_SIGIO = -5
"""A code whose siginfo the kernel does not translate for other namespaces."""


class TestMappings:
    """Sizes by where mappings start."""

    def test_those_that_start_exactly_there(self) -> None:
        fd = os.memfd_create("mapped")
        os.ftruncate(fd, 3 * PAGE_SIZE)
        start = libc.map_shared(fd, 3 * PAGE_SIZE)
        os.close(fd)
        wanted = {Address(at) for at in (start - 1, start, start + 1, start + PAGE_SIZE, start % (1 << 32), start << 4)}
        try:
            assert processes.mapping_sizes(os.getpid(), wanted) == {start: 3 * PAGE_SIZE}
            assert processes.mapping_sizes(os.getpid(), set()) == {}
        finally:
            libc.unmap(start, 3 * PAGE_SIZE)

    def test_the_first_and_the_last_in_the_list(self) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ends = [tuple(int(number, 16) for number in line.split()[0].split("-")) for line in (lines[0], lines[-1])]
        assert processes.mapping_sizes(os.getpid(), {Address(start) for start, _ in ends}) == {
            start: end - start for start, end in ends
        }


class TestPageTables:
    """What the kernel says of page tables and huge pages."""

    def test_a_process_that_runs_has_some(self) -> None:
        assert processes.page_table_bytes(os.getpid()) >= 4 * PAGE_SIZE

    def test_huge_pages_count_where_they_are_mapped(self, tmpfs: Callable[[str], Path]) -> None:
        place = tmpfs("huge=always,size=16M")
        with (place / "file").open("w+b") as file:
            file.truncate(2 * PMD_SIZE)
            start = 0x5300_0000_0000
            libc.call("mmap", start, 2 * PMD_SIZE, 3, 0x100000 | mmap.MAP_SHARED, file.fileno(), 0)
        try:
            ctypes.memset(start, 1, 1)
            assert processes.huge_mapped_bytes(os.getpid(), start, start + 2 * PMD_SIZE) == PMD_SIZE
            ctypes.memset(start + PMD_SIZE, 1, 1)
            assert processes.huge_mapped_bytes(os.getpid(), start, start + 2 * PMD_SIZE) == 2 * PMD_SIZE
            assert processes.huge_mapped_bytes(os.getpid(), start + PMD_SIZE, start + 2 * PMD_SIZE) == 0
            assert processes.huge_mapped_bytes(os.getpid(), 0, start) == 0
        finally:
            libc.unmap(start, 2 * PMD_SIZE)

    @pytest.mark.parametrize("name", [b"\xff\xfe", b"a\rShmemPmdMapped: 77 kB", b"a\nShmemPmdMapped: 77 kB"])
    def test_the_name_of_a_mapped_file_may_be_anything(self, directory: Path, name: bytes) -> None:
        fd = os.open(os.fsencode(directory) + b"/" + name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, PAGE_SIZE)
        start = libc.map_shared(fd, PAGE_SIZE)
        os.close(fd)
        try:
            assert processes.huge_mapped_bytes(os.getpid(), start, start + PAGE_SIZE) == 0
        finally:
            libc.unmap(start, PAGE_SIZE)


class TestThreads:
    """Threads by the ids that a userfaultfd gives them."""

    def test_of_this_pid_namespace(self) -> None:
        assert processes.thread_seen_from_here(os.getpid(), threading.get_native_id()) == threading.get_native_id()
        assert processes.process_of_thread(os.getpid()) == os.getpid()

    def test_other_threads_belong_to_their_process(self) -> None:
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        try:
            assert thread.native_id is not None
            assert processes.process_of_thread(thread.native_id) == os.getpid()
        finally:
            done.set()
            thread.join()

    @pytest.mark.usefixtures("as_root")
    def test_of_a_pid_namespace_further_in(self, other_process: Other) -> None:
        def enter(sock: socket.socket) -> None:
            libc.call("unshare", CLONE_NEWPID)
            if os.fork() == 0:
                assert os.getpid() == 1
                stay(sock)
            os.wait()

        outside, sock = other_process(enter)
        assert sock.recv(4) == b"here"
        (inside,) = processes.children_of(outside)
        assert inside != 1
        assert processes.thread_seen_from_here(inside, 1) == inside
        sock.send(b".")


class TestInSystemCall:
    """Where a thread that waits stands."""

    def test_one_that_sleeps_in_a_call(self, other_process: Other, eventually: Callable[..., None]) -> None:
        pid, sock = other_process(stay)
        assert sock.recv(4) == b"here"
        eventually(lambda: processes.in_system_call(pid, pid) is True)

    def test_one_that_runs_does_not_wait(self, other_process: Other) -> None:
        def run(sock: socket.socket) -> None:
            sock.send(b"here")
            while True:
                pass

        pid, sock = other_process(run)
        assert sock.recv(4) == b"here"
        assert processes.in_system_call(pid, pid) is None

    @pytest.mark.parametrize(
        ("pending", "shared", "blocked", "expected"),
        [(0, 0, 0, None), (1 << 9, 0, 0, True), (0, 1 << 9, 1, True), (1 << 9, 0, 1 << 9, None)],
    )
    def test_one_that_runs_although_it_has_a_signal_to_take_is_in_the_kernel(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        pending: int,
        shared: int,
        blocked: int,
        *,
        expected: bool | None,
    ) -> None:
        """Code of its own would have taken the signal first."""
        task = tmp_path / "7" / "task" / "8"
        task.mkdir(parents=True)
        (task / "syscall").write_text("running\n")
        (task / "status").write_text(f"SigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n")
        monkeypatch.setattr(processes, "_PROC", tmp_path)
        assert processes.in_system_call(7, 8) is expected

    def test_one_that_waits_in_code_of_its_own(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        task = tmp_path / "7" / "task" / "8"
        task.mkdir(parents=True)
        (task / "syscall").write_text("-1 0x7ffc 0x7f3a\n")
        monkeypatch.setattr(processes, "_PROC", tmp_path)
        assert processes.in_system_call(7, 8) is False

    def test_a_thread_of_another_process_is(self, other_process: Other) -> None:
        """It reads the memory of the first by a call, whatever it does now."""
        pid, sock = other_process(stay)
        assert sock.recv(4) == b"here"
        assert processes.in_system_call(pid, os.getpid()) is True


class TestWouldMiss:
    """Signals that a thread would not notice."""

    @pytest.fixture
    def pid(self, other_process: Other) -> int:
        """A process that blocks SIGBUS and handles SIGSEGV, with a thread that ignores nothing."""

        def work(sock: socket.socket) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
            signal.signal(signal.SIGSEGV, lambda *_: None)
            stay(sock)

        pid, sock = other_process(work)
        assert sock.recv(4) == b"here"
        return pid

    def test_blocked(self, pid: int) -> None:
        assert processes.would_miss(pid, pid, Signal.SIGBUS)

    def test_handled(self, pid: int) -> None:
        assert not processes.would_miss(pid, pid, Signal.SIGSEGV)

    def test_ignored(self, other_process: Other) -> None:
        def work(sock: socket.socket) -> None:
            signal.signal(signal.SIGBUS, signal.SIG_IGN)
            stay(sock)

        pid, sock = other_process(work)
        assert sock.recv(4) == b"here"
        assert processes.would_miss(pid, pid, Signal.SIGBUS)
        assert not processes.would_miss(pid, pid, Signal.SIGSEGV)

    def test_each_thread_blocks_for_itself(self, other_process: Other) -> None:
        def work(sock: socket.socket) -> None:
            ready = threading.Event()

            def other() -> None:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
                ready.set()
                sock.recv(1)

            thread = threading.Thread(target=other)
            thread.start()
            ready.wait()
            sock.send(thread.native_id.to_bytes(4, "little"))
            thread.join()

        pid, sock = other_process(work)
        tid = int.from_bytes(sock.recv(4), "little")
        assert processes.would_miss(pid, tid, Signal.SIGSEGV)
        assert not processes.would_miss(pid, pid, Signal.SIGSEGV)


class TestSendFaultSignal:
    """Signals as a bad access gives them."""

    @staticmethod
    def wait_for_signals(sock: socket.socket) -> None:
        """In another process: two threads that report which signal reaches them, and with what."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS, signal.SIGSEGV])

        def wait() -> None:
            sock.send(b"%d " % threading.get_native_id())
            info = signal.sigwaitinfo([signal.SIGBUS, signal.SIGSEGV])
            addr = info.si_pid & 0xFFFF_FFFF | (info.si_uid & 0xFFFF_FFFF) << 32  # si_addr lies in the same place.
            sock.send(b"%d %d %d %d" % (threading.get_native_id(), info.si_signo, info.si_code, addr))

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        sock.recv(1)

    @pytest.mark.parametrize("number", [Signal.SIGBUS, Signal.SIGSEGV])
    @pytest.mark.parametrize("which", [0, 1])
    def test_the_thread_that_is_meant_gets_it_with_the_address(
        self, other_process: Other, number: Signal, which: int
    ) -> None:
        pid, sock = other_process(self.wait_for_signals)
        text = b""
        while text.count(b" ") < 2:
            text += sock.recv(100) or pytest.fail("it ended")
        tids = [int(tid) for tid in text.split()]
        addr = Address(0x7ABC_DEF0_1234)
        processes.send_fault_signal(pid, tids[which], number, addr)
        tid, signo, code, found = map(int, sock.recv(100).split())
        assert (tid, signo, code, found) == (tids[which], number, SI_SIGIO, addr)
        assert select.select([sock], [], [], 0)[0] == []

    def test_a_thread_of_another_process_is_none_of_its_own(self, other_process: Other) -> None:
        pid, sock = other_process(stay)
        assert sock.recv(4) == b"here"
        with pytest.raises(ProcessLookupError):
            processes.send_fault_signal(pid, os.getpid(), Signal.SIGBUS, Address(0))

    def test_who_does_not_expect_it_dies_of_it(self, other_process: Other) -> None:
        def work(sock: socket.socket) -> None:
            faulthandler.disable()
            stay(sock)

        pid, sock = other_process(work)
        assert sock.recv(4) == b"here"
        processes.send_fault_signal(pid, pid, Signal.SIGSEGV, Address(0))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV


def test_a_pidfd_turns_readable_at_the_end(other_process: Other) -> None:
    pid, sock = other_process(stay)
    assert sock.recv(4) == b"here"
    pidfd = processes.pidfd_open(pid)
    assert pidfd is not None
    try:
        assert not os.get_inheritable(pidfd)
        assert select.select([pidfd], [], [], 0)[0] == []
        sock.send(b".")
        assert select.select([pidfd], [], [], 60)[0] == [pidfd]
    finally:
        os.close(pidfd)
