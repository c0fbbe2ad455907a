"""Packets and descriptors on a socket, as the daemon receives and sends them."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

from mshared.packets import Packets, _descriptors
from msharefs import protocol

PATIENCE = 60.0


Run = Callable[[Callable[[Packets], Awaitable[None]]], None]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with pair[0], pair[1]:
        yield pair


@pytest.fixture
def peer(pair: tuple[socket.socket, socket.socket]) -> socket.socket:
    """The client's end."""
    return pair[0]


@pytest.fixture
def run(pair: tuple[socket.socket, socket.socket]) -> Run:
    """Have something done with the daemon's end."""

    def go(work: Callable[[Packets], Awaitable[None]]) -> None:
        async def main() -> None:
            packets = Packets(trio.socket.from_stdlib_socket(pair[1]))
            try:
                with trio.fail_after(PATIENCE):
                    await work(packets)
            finally:
                packets.close()

        trio.run(main)

    return go


def send(peer: socket.socket, data: bytes, *fds: int) -> None:
    peer.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


def test_a_packet_comes_with_its_descriptors(run: Run, peer: socket.socket) -> None:
    async def work(packets: Packets) -> None:
        send(peer, b"first")
        send(peer, b"second", peer.fileno(), peer.fileno())
        assert await packets.receive() == (b"first", [], True)
        data, fds, whole = await packets.receive()
        assert (data, len(fds), whole) == (b"second", 2, True)
        for fd in fds:
            assert not os.get_inheritable(fd)
            os.close(fd)

    run(work)


def test_who_has_said_nothing_is_waited_for(run: Run, peer: socket.socket) -> None:
    async def work(packets: Packets) -> None:
        async with trio.open_nursery() as nursery:

            async def say() -> None:
                await trio.testing.wait_all_tasks_blocked()
                send(peer, b"late")

            nursery.start_soon(say)
            assert (await packets.receive())[0] == b"late"

    run(work)


def test_the_end_is_a_packet_of_nothing(run: Run, peer: socket.socket) -> None:
    async def work(packets: Packets) -> None:
        peer.shutdown(socket.SHUT_RDWR)
        assert await packets.receive() == (b"", [], True)

    run(work)


def test_what_was_cut_is_not_whole(run: Run, peer: socket.socket) -> None:
    """Too long, or with more descriptors than there is room for: those that came are there to be closed."""

    async def work(packets: Packets) -> None:
        send(peer, bytes(protocol.MAX_PACKET + 2))
        assert not (await packets.receive())[2]
        send(peer, b"x", *[peer.fileno()] * 20)
        _, fds, whole = await packets.receive()
        assert not whole
        assert fds
        for fd in fds:
            os.close(fd)

    run(work)


def test_what_is_sent_arrives_and_others_have_their_turn(run: Run, peer: socket.socket) -> None:
    async def work(packets: Packets) -> None:
        turns: list[str] = []
        async with trio.open_nursery() as nursery:

            async def other() -> None:
                turns.append("other")

            nursery.start_soon(other)
            await packets.send(b"answer", (peer.fileno(),))
            await packets.send(b"more")  # Of two that are ready at once, either may come first.
            assert turns == ["other"]
        data, fds, _, _ = socket.recv_fds(peer, 100, 4)
        assert (data, len(fds)) == (b"answer", 1)
        os.close(fds[0])

    run(work)


def test_a_full_socket_is_waited_for(run: Run, peer: socket.socket) -> None:
    """A client that does not listen holds its own connection, and nothing is lost."""
    count = 2000

    async def work(packets: Packets) -> None:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                await trio.testing.wait_all_tasks_blocked()
                for number in range(count):
                    assert await trio.to_thread.run_sync(peer.recv, 100) == b"%d" % number

            nursery.start_soon(listen)
            for number in range(count):
                await packets.send(b"%d" % number)

    run(work)


def test_who_has_gone_is_an_error(run: Run, peer: socket.socket) -> None:
    async def work(packets: Packets) -> None:
        peer.close()
        with pytest.raises(OSError, match="Broken pipe"):
            await packets.send(b"answer")

    run(work)


def test_what_can_be_sent_at_once_is(run: Run, peer: socket.socket) -> None:
    async def work(packets: Packets) -> None:
        assert packets.send_now(b"answer")
        assert peer.recv(100) == b"answer"
        sent = 0
        while packets.send_now(b"more"):
            sent += 1
        assert [peer.recv(100) for _ in range(sent)] == [b"more"] * sent
        peer.close()
        assert not packets.send_now(b"answer")

    run(work)


class TestDescriptors:
    """What arrives in control messages."""

    @staticmethod
    def rights(*numbers: int, extra: bytes = b"") -> tuple[int, int, bytes]:
        return (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers).tobytes() + extra)

    def test_none(self) -> None:
        assert _descriptors([]) == []
        assert _descriptors([self.rights()]) == []

    def test_all_of_one_message_and_of_several(self) -> None:
        assert _descriptors([self.rights(3, 4), self.rights(5)]) == [3, 4, 5]

    @pytest.mark.parametrize("extra", [b"\1", b"\1\2", b"\1\2\3"])
    def test_a_part_of_one_is_none(self, extra: bytes) -> None:
        assert _descriptors([self.rights(3, 4, extra=extra)]) == [3, 4]
        assert _descriptors([self.rights(extra=extra)]) == []

    def test_other_control_messages_bring_none(self) -> None:
        credentials = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(12))
        assert _descriptors([credentials, (socket.IPPROTO_IP, socket.SCM_RIGHTS, bytes(4))]) == []
