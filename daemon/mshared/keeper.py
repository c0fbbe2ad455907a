"""The keeper: a process that has the daemon's descriptors, so that they outlive it.

It is made by clone(2) with CLONE_FILES: both have one table of descriptors. What the daemon opens, is sent, or reads
from a userfaultfd (a forked child's, which exists nowhere else) the keeper has from that very moment on, with nothing
to be sent, and what the daemon closes is closed. If nobody held a userfaultfd any more, who waits for a fault would
wake and see zeros.

It sleeps until the daemon has ended. Then it closes what must not outlive it: connections, so that clients notice; the
mount's device, so that it answers ENOTCONN instead of not at all; and last the lock, for which the next daemon waits.
That one connects to the keeper's socket, has everything sent, writes down under which numbers it has them now and whose
keeper holds them, and lets the old keeper go. Should it be killed before that, the old one is still there to be asked.
A keeper that the state file does not name, or whose socket is gone, ends by itself.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import gc
import json
import os
import secrets
import select
import signal
import socket
import struct
from pathlib import Path
from typing import Final

import attrs

from mshared import journal, libc
from mshared.killpoints import point

_SYS_CLONE: Final = 56
_CLONE_FILES: Final = 0x400
_PR_SET_NAME: Final = 15
_ARGUMENTS: Final = slice(45, 47)
"""Where among the fields of /proc/PID/stat after the name is said where the command line starts and ends."""
_UCRED: Final = struct.Struct("=iII")
_KEPT: Final = ("anon_inode:[userfaultfd]", "anon_inode:[pidfd]", "pidfd:")
_DEVICES: Final = ("/dev/fuse", "/dev/userfaultfd", "/dev/null", "/dev/zero", "/dev/pts/", "/dev/tty", "/dev/console")
_AT_ONCE: Final = 200
"""Descriptors in a packet; the kernel takes 253."""
_MOST_PACKET: Final = 16 << 10
_LOOK_INTERVAL: Final = 5000
"""Milliseconds between two looks whether anybody can still find this keeper."""
_PATIENCE: Final = 10.0
"""Seconds to wait for the other side, which has nothing else to do."""
_TAKEN: Final = b"taken"

_python: Final = ctypes.PyDLL(None, use_errno=True)  # Keeps the interpreter lock: the child must have it, too.


@attrs.frozen
class Keeper:
    """A keeper of this process's. ``name`` is its socket's in the directory; ``watch`` turns readable when it ends."""

    pid: int
    name: str
    watch: int
    _socket: Path
    _listener: socket.socket
    _daemon: int

    def end(self) -> None:
        """Have it end at once: there is nothing to keep."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._socket.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close what watches it, and what it was made with."""
        for fd in (self.watch, self._daemon):
            os.close(fd)
        self._listener.close()


def start(directory: Path, lock: int) -> Keeper:
    """Make a keeper whose socket lies in ``directory``; ``lock`` is what it closes last. Raises OSError."""
    name = f"keeper-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.bind(str(directory / name))
    (directory / name).chmod(0o600)
    listener.listen()
    daemon = os.pidfd_open(os.getpid())
    words = _words()
    pid = _python.syscall(_SYS_CLONE, _CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        try:
            gc.disable()  # What it has of the daemon's objects must never close anything.
            _keep(directory, name, listener, daemon, lock, words)
        finally:
            os._exit(0)
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"clone: {os.strerror(number)}")
    return Keeper(pid, name, os.pidfd_open(pid), directory / name, listener, daemon)


def _keep(directory: Path, name: str, listener: socket.socket, daemon: int, lock: int, words: tuple[int, int]) -> None:
    """Wait for the daemon's end, then for the next daemon.

    Until the daemon has ended nothing is opened here: if this process is killed then, it would stay open there.
    """
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _rename(b"mshared-keeper", *words)
    os.chdir("/")
    ended = select.poll()
    ended.register(daemon, select.POLLIN)
    ended.poll()
    kept = _let_go({listener.fileno(), lock})
    os.close(lock)
    asked = select.poll()
    asked.register(listener, select.POLLIN)
    while journal.keeper_named(directory / journal.NAME) == name and (directory / name).exists():
        if asked.poll(_LOOK_INTERVAL) and _serve(listener, kept):
            return


def _words() -> tuple[int, int]:
    """The addresses where the words of our command line start and end."""
    stat = Path("/proc/self/stat").read_bytes()
    start, end = map(int, stat[stat.rindex(b")") + 2 :].split()[_ARGUMENTS])
    return start, end


def _rename(name: bytes, start: int, end: int) -> None:
    """Have a name of one's own in ps(1): nobody shall take this process for the daemon."""
    libc.call("prctl", _PR_SET_NAME, name, 0, 0, 0)
    if end - start > len(name):
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, name, len(name))


def _let_go(spared: set[int]) -> list[int]:
    """Close what must not outlive the daemon; what is left, but for ``spared``.

    Kept are userfaultfds, pidfds and files, told by their names: to ask a file would be to ask its filesystem, which
    need not answer.
    """
    kept = []
    for link in list(Path("/proc/self/fd").iterdir()):
        fd = int(link.name)
        if fd in spared:
            continue
        with contextlib.suppress(OSError):
            name = str(link.readlink())
            is_file = name.startswith("/") and not name.startswith(_DEVICES)
            if fd > 2 and (is_file or name.startswith(_KEPT)):
                kept.append(fd)
            else:
                os.close(fd)
    return kept


def _serve(listener: socket.socket, kept: list[int]) -> bool:
    """Send everything to whoever asks, if it is the same user; whether it has been taken."""
    sock, _ = listener.accept()
    with sock, contextlib.suppress(OSError):
        sock.settimeout(_PATIENCE)
        _check_peer(sock)
        for first in range(0, len(kept), _AT_ONCE):
            _send(sock, kept[first : first + _AT_ONCE])
        sock.send(json.dumps([]).encode())
        return sock.recv(len(_TAKEN)) == _TAKEN
    return False


def _check_peer(sock: socket.socket) -> None:
    """Speak with processes of our own user only (unix(7), SO_PEERCRED). Raises ConnectionRefusedError."""
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.geteuid():
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"user {uid} is at the other end")


def _send(sock: socket.socket, fds: list[int]) -> None:
    packet = json.dumps(fds).encode()
    sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


@attrs.frozen
class Predecessor:
    """The keeper of a daemon that has ended. ``fds``: what it holds, from its own numbers to ours."""

    fds: dict[int, int]
    _sock: socket.socket

    def release(self) -> None:
        """Let it go: everything is ours, and that is written down."""
        point()
        with self._sock, contextlib.suppress(OSError):
            self._sock.send(_TAKEN)


def ask(directory: Path, name: str) -> Predecessor | None:
    """Have a keeper send everything; None when it is there no more. Raises OSError when it does not answer."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    fds: dict[int, int] = {}
    try:
        sock.settimeout(_PATIENCE)
        sock.connect(str(directory / name))
        _check_peer(sock)
        while _receive(sock, fds):
            pass
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return Predecessor(fds, sock)


def _receive(sock: socket.socket, fds: dict[int, int]) -> bool:
    """Take one packet of descriptors; whether there may be more. Raises ConnectionResetError."""
    packet, ancillary, _, _ = sock.recvmsg(_MOST_PACKET, socket.CMSG_SPACE(4 * _AT_ONCE), socket.MSG_CMSG_CLOEXEC)
    if not packet:
        raise ConnectionResetError
    ours = array.array("i")
    for _, _, data in ancillary:
        ours.frombytes(data[: len(data) - len(data) % ours.itemsize])
    theirs = json.loads(packet)
    if len(theirs) != len(ours):
        raise OSError(errno.EMFILE, "too few descriptors; raise the limit of open files")
    fds.update(zip(theirs, ours, strict=True))
    return bool(theirs)
