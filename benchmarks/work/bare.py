"""What a call costs at the least: a server in Python that has a userfaultfd of each process.

It does nothing but the system calls that arm a window and fill a page, the daemon's own: no model, no names, no
journal. Whoever wants a change sends it a packet and waits for one. What it takes is the floor for every such server
on this machine.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from mshare.discovery import find_mount
from mshared.uffd import DEVICE, WANTED, Uffd
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, AddrRange
from msharefs.vma import Arming

_PR_SET_PDEATHSIG: Final = 1
_ARMINGS: Final = {b"r": Arming.WP, b"w": Arming.NATIVE}
_PATTERN: Final = bytes([0xAA]) * PAGE_SIZE
_libc: Final = ctypes.CDLL(None)


@attrs.frozen
class Window:
    """A shared mapping of a file in this process, whose protection the server of that file changes.

    ``show`` has the server fill pages of a part (offset, bytes) with a pattern as they are touched, one by one.
    """

    view: memoryview
    handle: str
    change: Callable[[int], None]
    show: Callable[[int, int], None]
    detach: Callable[[], None]


def place(kind: str, name: str) -> Path:
    """Where to put a file of that name, among those of regions of that kind."""
    return find_mount().parent / "state" / kind / name


def serve(path: Path, size: int) -> Callable[[], None]:
    """Make a file of that size, and a server for it; what ends both. Those who attach find it by the path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.socket")
    listener.listen(1024)
    with path.open("xb") as file:
        file.truncate(size)
    pid = os.fork()
    if not pid:
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _Server(listener).run()
        finally:
            os._exit(1)
    listener.close()

    def end() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for each in (path, Path(f"{path}.socket")):
            each.unlink(missing_ok=True)

    return end


def attach(handle: str) -> Window:
    """Map the file that a server has made, and let the server have a userfaultfd of this process."""
    with Path(handle).open("rb+") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    view = memoryview(mapped)
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(f"{handle}.socket")
    with Path(DEVICE).open("rb+", buffering=0) as device:
        uffd = fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    socket.send_fds(server, [abi.RANGE_STRUCT.pack(start, len(view))], [uffd])
    os.close(uffd)
    server.recv(1)

    def change(prot: int) -> None:
        server.send(b"w" if prot & mmap.PROT_WRITE else b"r")
        server.recv(1)

    def show(offset: int, size: int) -> None:
        server.send(abi.RANGE_STRUCT.pack(start + offset, size))
        server.recv(1)

    def detach() -> None:
        server.close()
        view.release()
        mapped.close()

    return Window(view, handle, change, show, detach)


class _Server:
    """One process with one loop, as the daemon is."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._epoll = select.epoll()
        self._clients: dict[int, socket.socket] = {}
        self._windows: dict[int, tuple[Uffd, AddrRange]] = {}
        self._uffds: dict[int, Uffd] = {}
        self._epoll.register(listener, select.EPOLLIN)

    def run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._listener.fileno():
                    client, _ = self._listener.accept()
                    self._clients[client.fileno()] = client
                    self._epoll.register(client, select.EPOLLIN)
                elif fd in self._clients:
                    self._answer(fd, self._clients[fd])
                else:
                    self._fill(self._uffds[fd])

    def _answer(self, fd: int, client: socket.socket) -> None:
        packet, fds, _, _ = socket.recv_fds(client, 64, 1)
        if packet in _ARMINGS:
            for uffd, ar in self._windows.values():
                uffd.arm(ar, _ARMINGS[packet])
        elif packet and fds:
            uffd = Uffd(fds[0])
            uffd.open_api(WANTED)
            self._windows[fd] = uffd, AddrRange.sized(*abi.RANGE_STRUCT.unpack(packet))
            self._uffds[uffd.fd] = uffd
            self._epoll.register(uffd.fd, select.EPOLLIN)
        elif packet:
            self._windows[fd][0].arm(AddrRange.sized(*abi.RANGE_STRUCT.unpack(packet)), Arming.MISSING)
        else:
            self._leave(fd)
            return
        client.send(b"x")

    def _leave(self, fd: int) -> None:
        self._epoll.unregister(fd)
        if fd in self._windows:
            uffd, _ = self._windows.pop(fd)
            self._epoll.unregister(uffd.fd)
            self._uffds.pop(uffd.fd).close()
        self._clients.pop(fd).close()

    def _fill(self, uffd: Uffd) -> None:
        for _, _, addr, _ in abi.PAGEFAULT_STRUCT.iter_unpack(uffd.read()):
            uffd.copy(AddrRange.page_at(addr), _PATTERN)
