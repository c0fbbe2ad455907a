"""What passes between the control socket and the service: who asks, what is offered, what is answered."""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Callable
from typing import Final

import attrs
import trio

from mshared.live import LiveRegion
from msharefs import protocol
from msharefs.perms import Credentials

_UCRED: Final = struct.Struct("=iII")
_SO_PEERGROUPS: Final = 59
_MOST_GROUPS: Final = 256
"""What Python lets getsockopt return; whoever has more groups is refused rather than misjudged."""
Tell = Callable[[protocol.Reply], object]
"""Says to the caller, at once, what a request comes to, while it is being carried out. Does not wait."""


@attrs.frozen
class Caller:
    """Who is at the other end of a connection, as the kernel says."""

    pid: int
    who: Credentials

    @classmethod
    def at(cls, sock: trio.socket.SocketType) -> Caller:
        """Who connected (unix(7), SO_PEERCRED and SO_PEERGROUPS). Raises OSError."""
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        groups = array.array("I")
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * groups.itemsize))
        return cls(pid, Credentials(uid, gid, frozenset(groups)))


@attrs.frozen
class Pending:
    """An offer that waits for its ``mapped``: to the creator of a region, or to one that attaches.

    ``token`` is that of the twin that is to be taken; ``unarmed``: see ``LiveAttachment``.
    """

    region: LiveRegion
    readonly: bool
    creator: bool
    donated: tuple[protocol.DonatedRange, ...] = ()
    unarmed: bool = False
    token: str | None = None


@attrs.frozen
class Answer:
    """A reply and the descriptors that go with it; they stay the daemon's. It waits until ``after`` is set.

    ``again``: a packet that follows it, which was lost when it was sent before; then that one waits.
    ``then`` is done once it was sent.
    """

    reply: protocol.Reply
    fds: tuple[int, ...] = ()
    after: trio.Event | None = None
    again: bytes | None = None
    then: Callable[[], None] | None = None
