"""The one connection of this process to a daemon: requests out, replies in."""

from __future__ import annotations

import array
import atexit
import contextlib
import errno
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from mshare.discovery import HOW_TO_START, read_info
from msharefs import protocol
from msharefs.errors import ProtocolError

R = TypeVar("R")
PATIENCE: Final = 5.0
"""Seconds to wait for a daemon that was there before and is not now: it may be being restarted."""
_FIRST_WAIT: Final = 0.005
_LAST_WAIT: Final = 0.1
"""Seconds between two tries, at first and in the end."""
_MOST_LOSSES: Final = 20
"""How often a request may lose its connection."""
_ANCILLARY: Final = socket.CMSG_SPACE(4 * protocol.MAX_DESCRIPTORS)
_IN_CONVERSATION: Final = (protocol.Mapped, protocol.Settled, protocol.Abort)
"""Requests about an offer, which is no longer known to a daemon that was started since."""


DYING: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNRESET, errno.EPIPE)
"""What a mount, or a socket, answers when its daemon has just gone."""


class Ticket(tuple[int, ...]):
    """Descriptors of the mount, which the next daemon does not know: ``again`` opens the file once more."""

    again: Callable[[], Ticket]


class RestartedError(ConnectionResetError):
    """The daemon was restarted in the middle of a conversation, of which nothing has come; it is to start over."""


class Connection:
    """Talks to the daemon of one mount; connects when first needed, and again when the daemon is another one.

    Used from any thread: one request is under way at a time. A forked child has a connection of its own.

    A daemon that was killed has written down which requests it has carried out, and what their answers are. So when a
    connection is lost with a request under way, the next daemon is asked for the answer first: nothing is done twice.
    ``_session`` names the conversation, in which ``_answered`` requests were answered.
    """

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.fork_events = True
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._path: Path | None = None
        """Where the daemon listens, as long as there is a connection to it, or was one when this process was forked."""
        self._session = ""
        self._answered = 0
        self._known = False
        """Whether a daemon was there before, when this process asked, or one that it was forked from."""

    def call(
        self,
        request: protocol.Request,
        expected: type[R],
        fds: tuple[int, ...] = (),
        meanwhile: Callable[[], object] | None = None,
    ) -> R:
        """Make a request whose reply brings no descriptors; the reply. Raises OSError as the daemon says.

        ``meanwhile`` is called while the daemon is at work; more than once, or not at all, if a daemon was restarted.
        """
        reply, received = self.exchange(request, fds, meanwhile)
        _close(received)
        return reply_of(reply, expected)

    def exchange(
        self, request: protocol.Request, fds: tuple[int, ...] = (), meanwhile: Callable[[], object] | None = None
    ) -> tuple[protocol.Message, list[int]]:
        """Make a request; the reply and the descriptors that came, which are the caller's. Raises OSError."""
        with _postponed(), self._lock:
            try:
                reply, received = self._exchange(request, fds, meanwhile)
            except BaseException:
                self._hang_up()  # Half a conversation: the next reply would not be ours.
                self._session = ""  # And nobody shall take the answer for another's.
                raise
            self._answered += 1
        if isinstance(reply, protocol.Failed):
            _close(received)
            raise OSError(reply.errno, reply.message)
        return reply, received

    def reach(self) -> None:
        """Connect, unless that is done. Raises OSError when there is no daemon."""
        with self._lock:
            self._connected(waiting=False)

    def forget(self) -> None:
        """In a forked child: the connection is the parent's, and a thread that is not here may hold the lock."""
        self._lock = threading.Lock()
        self._session = ""
        path = self._path
        self._hang_up()
        self._path = path

    def wait_for_daemon(self) -> bool:
        """Have a daemon again, if there was one before; whether there is one now."""
        with self._lock, contextlib.suppress(OSError):
            if self._known:
                self._hang_up()
                self._connected(waiting=False)
                return True
        return False

    def _exchange(
        self, request: protocol.Request, fds: tuple[int, ...], meanwhile: Callable[[], object] | None
    ) -> tuple[protocol.Message, list[int]]:
        for losses in range(_MOST_LOSSES):
            sock, answered = self._connected(waiting=losses > 0)
            try:
                if losses and not answered:
                    _check_start(request)
                    fds = fds.again() if isinstance(fds, Ticket) else fds
                if not answered:
                    _send(sock, request, fds)
                    if meanwhile is not None:
                        meanwhile()
                reply, received = _receive(sock)
            except RestartedError:
                raise
            except OSError as error:
                if error.errno not in DYING:
                    raise
                self._hang_up()
            else:
                if losses == _MOST_LOSSES - 1 or not _is_of_another(reply, fds):
                    return reply, received
                self._answered += 1
        raise ConnectionResetError(errno.ECONNRESET, "the daemon hangs up again and again; its log may say why")

    def _connected(self, *, waiting: bool) -> tuple[socket.socket, bool]:
        """The connection, and whether the answer to the request that is ``waiting`` comes by it at once."""
        if self._sock is not None:
            return self._sock, False
        until = time.monotonic() + PATIENCE if self._known else 0.0
        wait = _FIRST_WAIT
        while True:
            try:
                self._sock, answered = self._connect(waiting=waiting)
            except OSError as error:
                if error.errno == errno.EPROTONOSUPPORT or time.monotonic() > until:
                    raise
            else:
                self._known = True
                return self._sock, answered
            time.sleep(wait)
            wait = min(2 * wait, _LAST_WAIT)

    def _connect(self, *, waiting: bool) -> tuple[socket.socket, bool]:
        if not self._session:
            self._session, self._answered = os.urandom(16).hex(), 0
        hello = protocol.Hello(f"mshare pid {os.getpid()}", self._session, self._answered, waiting)
        path, self._path = self._path or read_info(self.mount).socket, None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(path))
            _send(sock, hello, ())
            welcome, received = _receive(sock)
            _close(received)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"no daemon answers at {path}: {error.strerror}; {HOW_TO_START}") from error
        except BaseException:
            sock.close()
            raise
        if not isinstance(welcome, protocol.Welcome):
            sock.close()
            number, text = errno.EPROTONOSUPPORT, f"{welcome}"
            if isinstance(welcome, protocol.Failed):
                number, text = welcome.errno, welcome.message
            raise OSError(number, f"the daemon at {path} does not welcome this client: {text}")
        self.fork_events = welcome.fork_events
        self._path = path
        return sock, welcome.known

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._path = None


def _is_of_another(reply: protocol.Message, fds: tuple[int, ...]) -> bool:
    """Whether a ticket was refused: it may have been opened before this daemon was there, and found out only now."""
    return isinstance(fds, Ticket) and isinstance(reply, protocol.Failed) and reply.errno == errno.EBADF


def _check_start(request: protocol.Request) -> None:
    """Whether a request can be made again of a daemon that knows of nothing before. Raises RestartedError."""
    if isinstance(request, _IN_CONVERSATION):
        raise RestartedError(errno.ECONNRESET, "the daemon was restarted meanwhile; nothing has changed, try again")


def reply_of(reply: protocol.Message, expected: type[R]) -> R:
    """The reply as what it should be. Raises OSError EPROTO when it is something else."""
    if not isinstance(reply, expected):
        raise OSError(errno.EPROTO, f"the daemon answered {type(reply).__name__} instead of {expected.__name__}")
    return reply


def collect_maps(ask: Callable[[int | None], protocol.Maps]) -> list[protocol.Vma]:
    """The VMAs of a region, however many packets they take; ``ask`` is told after which offset to go on."""
    found: list[protocol.Vma] = []
    more = True
    while more:
        reply = ask(found[-1].offset if found else None)
        found += reply.vmas
        more = reply.more
    return found


_connections: dict[Path, Connection] = {}
_connections_lock = threading.Lock()


def connect(mount: Path) -> Connection:
    """This process's connection to the daemon of ``mount``; nothing is sent before the first request."""
    with _connections_lock:
        return _connections.setdefault(mount, Connection(mount))


def wait_for_daemon(mount: Path) -> bool:
    """Have the daemon of ``mount`` again, if this process has had one there; whether there is one now."""
    return connect(mount).wait_for_daemon()


@atexit.register
def _hang_up_all() -> None:
    for connection in _connections.values():
        connection.forget()


def forget_all() -> None:
    """In a forked child: every connection is the parent's."""
    global _connections_lock
    _connections_lock = threading.Lock()
    for connection in _connections.values():
        connection.forget()


class _Postponed(threading.local):
    """What the collector has come upon while this thread was in the middle of an exchange, and how deep it is in."""

    def __init__(self) -> None:
        self.depth = 0
        self.work: deque[Callable[[], object]] = deque()


_this_thread = _Postponed()


def when_idle(work: Callable[[], object]) -> None:
    """Do it now; or, where the collector calls in the middle of an exchange of this thread, right after that."""
    _this_thread.work.append(work)
    _catch_up()


@contextlib.contextmanager
def _postponed() -> Iterator[None]:
    _this_thread.depth += 1
    try:
        yield
    finally:
        _this_thread.depth -= 1
        _catch_up()


def _catch_up() -> None:
    while _this_thread.work and not _this_thread.depth:
        _this_thread.work.popleft()()


def _send(sock: socket.socket, request: protocol.Request, fds: tuple[int, ...]) -> None:
    packet = protocol.encode(request, len(fds))
    if len(packet) > protocol.MAX_PACKET:
        raise OSError(errno.E2BIG, "the request takes more than 64 KiB; donate fewer mappings at once")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], ancillary)


def _receive(sock: socket.socket) -> tuple[protocol.Message, list[int]]:
    packet, ancillary, flags, _ = sock.recvmsg(protocol.MAX_PACKET, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    try:
        return _checked(packet, len(fds), flags), list(fds)
    except BaseException:
        _close(fds)
        raise


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _checked(packet: bytes, received: int, flags: int) -> protocol.Message:
    """The message in a packet. Raises OSError when the daemon hung up, or something of it is missing."""
    if not packet:
        raise ConnectionResetError(errno.ECONNRESET, "the daemon hung up")
    try:
        message, announced = protocol.decode(packet)
    except ProtocolError as error:
        raise OSError(error.errno, str(error)) from error
    if announced != received or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise OSError(errno.EMFILE, f"{announced} descriptors were sent, {received} came; raise `ulimit -n`")
    return message
