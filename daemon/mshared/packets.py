"""One end of a connection: packets in, packets out, each with the descriptors that belong to it."""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence
from typing import Final

import trio

from msharefs import protocol

_ANCILLARY: Final = socket.CMSG_SPACE(4 * protocol.MAX_DONATED_FILES)
"""Room for more descriptors than any message has, so that a few too many are told by number."""


class Packets:
    """A SOCK_SEQPACKET socket, which it owns. Used by one task.

    Unlike with trio's own sockets, the loop has its turn once an exchange, not after each half: with ``send``.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = socket.socket(fileno=sock.detach())
        self._sock.settimeout(0)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    async def receive(self) -> tuple[bytes, list[int], bool]:
        """The next packet, its descriptors, and whether all of both came. Without either: the other end hung up."""
        while True:
            try:
                packet, ancillary, flags, _ = self._sock.recvmsg(
                    protocol.MAX_PACKET + 1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
            else:
                return packet, _descriptors(ancillary), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)

    async def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send a packet, and copies of descriptors. Then others have their turn."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            try:
                self._sock.sendmsg([packet], ancillary)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
            else:
                break
        await trio.lowlevel.cancel_shielded_checkpoint()

    def send_now(self, packet: bytes) -> bool:
        """Send a packet, unless that takes waiting, or nobody is there any more; whether it was sent."""
        try:
            self._sock.sendmsg([packet])
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Descriptors in control messages; a part of one, where the last was cut, is none."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
