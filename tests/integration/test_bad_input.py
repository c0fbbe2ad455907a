"""What cannot be right: the errno, words that help, nothing changed, nothing leaked, the daemon alive."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon

from msharefs import protocol

pytestmark = pytest.mark.pool

MIB = 1 << 20


@pytest.fixture
def c(client: Callable[..., Client]) -> Client:
    return client()


class TestCalls:
    """Arguments of mshare(), mshare_unlink() and remove()."""

    @pytest.mark.parametrize(
        ("bad", "number"),
        [
            ("", errno.EINVAL),
            (".", errno.EINVAL),
            ("..", errno.EINVAL),
            (".hidden", errno.EINVAL),
            ("a/b", errno.EINVAL),
            ("/a", errno.EINVAL),
            ("a\0b", errno.EINVAL),
            ("mshare_info", errno.EINVAL),
            ("x" * 256, errno.ENAMETOOLONG),
            ("ü" * 128, errno.ENAMETOOLONG),
        ],
    )
    @pytest.mark.parametrize(
        "call",
        [
            "mshare.mshare({}, None, 2 * MIB, CREATE)",
            "mshare.mshare({}, None, 0, RW)",
            "mshare.mshare_unlink({})",
            "mshare.remove({})",
        ],
    )
    def test_names(self, c: Client, bad: str, number: int, call: str) -> None:
        assert c.error_of(call.format(repr(bad))).errno == number

    @pytest.mark.parametrize("bad", ["5", "None", "['a']"])
    def test_names_of_another_type(self, c: Client, bad: str) -> None:
        assert c.error_of(f"mshare.mshare({bad}, None, 2 * MIB, CREATE)").kind == "TypeError"

    @pytest.mark.parametrize(
        "arguments",
        [
            "None, 0, CREATE",
            "None, -2 * MIB, CREATE",
            "None, 2 * MIB + 4096, CREATE",
            "None, 1, CREATE",
            "None, 1 << 47, CREATE",
            "None, 1 << 63, CREATE",
            "None, 1 << 80, CREATE",
            "4096, 2 * MIB, CREATE",
            "0, 2 * MIB, CREATE",
            "-2 * MIB, 2 * MIB, CREATE",
            "0x5000_0000_1000, 2 * MIB, CREATE",
            "0x7fff_ffe0_0000, 2 * MIB, CREATE",
            "0x7fff_ffc0_0000, 8 * MIB, CREATE",
            "0x8000_0000_0000, 2 * MIB, CREATE",
            "1 << 63, 2 * MIB, CREATE",
            "(1 << 64) - 2 * MIB, 4 * MIB, CREATE",
            "1 << 70, 2 * MIB, CREATE",
            "None, 2 * MIB, os.O_CREAT | os.O_WRONLY",
            "None, 2 * MIB, CREATE | os.O_APPEND",
            "None, 2 * MIB, CREATE | os.O_TRUNC",
            "None, 2 * MIB, CREATE | 1 << 40",
            "None, 2 * MIB, CREATE, 0o1777",
            "None, 2 * MIB, CREATE, -1",
            "None, 2 * MIB, CREATE, 0o600, backing='floppy'",
        ],
    )
    def test_ranges_flags_and_modes(self, c: Client, name: str, arguments: str, daemon: Daemon) -> None:
        error = c.error_of(f"mshare.mshare({name!r}, {arguments})")
        assert (error.kind, error.errno) == ("OSError", errno.EINVAL)
        assert len(error.text) > 25
        assert not (daemon.mount / name).exists()

    def test_more_huge_pages_than_there_are_is_told_with_the_way_out(self, c: Client, name: str) -> None:
        error = c.error_of(f"mshare.mshare({name!r}, None, 1 << 40, CREATE, backing='hugetlb')")
        assert (error.errno, "vm.nr_hugepages" in error.text) == (errno.ENOMEM, True)
        assert c.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT

    def test_nothing_there(self, c: Client, name: str) -> None:
        for call in ("mshare.mshare({!r}, None, 0, RW)", "mshare.mshare_unlink({!r})", "mshare.remove({!r})"):
            error = c.error_of(call.format(name))
            assert (error.kind, error.errno) == ("FileNotFoundError", errno.ENOENT)

    @pytest.mark.parametrize("addr", ["4096", "0x5000_0000_1000", "-4096", "0x8000_0000_0000", "1 << 70"])
    def test_attaching_at_an_impossible_address(self, c: Client, name: str, addr: str) -> None:
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
        assert c.error_of(f"mshare.mshare({name!r}, {addr}, 0, RW)").errno == errno.EINVAL
        assert c.ask("r.stat().attached") == 1

    def test_the_stack_cannot_be_donated(self, c: Client, name: str) -> None:
        c.do("stack = next(m for m in sc.own_mappings(0, 1 << 47) if m.path == '[stack]')")
        error = c.error_of(f"mshare.mshare({name!r}, stack.end // (2 * MIB) * 2 * MIB, 2 * MIB, CREATE)")
        assert (error.errno, "[stack]" in error.text) == (errno.EINVAL, True)

    def test_failures_leave_no_descriptor_and_no_mapping(
        self, c: Client, name: str, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.stat()")
        look = "(len(os.listdir('/proc/self/fd')), len(sc.own_mappings(0, 1 << 47)))"
        here, there = c.ask(look), daemon.descriptors()
        for _ in range(20):
            c.error_of(f"mshare.mshare({name!r}, None, 0, RW)")
            c.error_of(f"mshare.mshare({name!r}, 0x6000_0000_0000, 4 * MIB, RW)")
            c.error_of(f"mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
            c.error_of("mshare.mshare('other', None, 2 * MIB, CREATE, backing='floppy')")
        assert c.ask(look) == here
        eventually(lambda: daemon.descriptors() == there)


class Peer:
    """A client that speaks packets, and not always well."""

    def __init__(self, daemon: Daemon) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(60)
        self.sock.connect(str(daemon.socket))

    def exchange(self, packet: bytes, fds: list[int] | None = None) -> protocol.Message | None:
        """Send a packet; the answer, or None when the daemon hangs up."""
        socket.send_fds(self.sock, [packet], fds or [])
        try:
            answer, got, _, _ = socket.recv_fds(self.sock, protocol.MAX_PACKET, 8)
        except ConnectionResetError:
            return None
        for fd in got:
            socket.close(fd)
        return protocol.decode(answer)[0] if answer else None

    def say(self, message: protocol.Message, fds: list[int] | None = None, announced: int | None = None) -> object:
        return self.exchange(protocol.encode(message, len(fds or []) if announced is None else announced), fds)


class TestPackets:
    """The control socket against clients that do not keep to the protocol."""

    @pytest.fixture
    def peer(self, daemon: Daemon) -> Iterator[Peer]:
        peer = Peer(daemon)
        assert isinstance(peer.say(protocol.Hello("a test")), protocol.Welcome)
        yield peer
        peer.sock.close()
        again = Peer(daemon)
        assert isinstance(again.say(protocol.Hello("still there?")), protocol.Welcome)
        again.sock.close()

    def failure(self, answer: object) -> int:
        assert isinstance(answer, protocol.Failed), answer
        assert answer.message
        return answer.errno

    @pytest.mark.parametrize(
        "packet",
        [
            b"x",
            b"MSHR",
            b"XXXX\x01\x00\x00\x00{}",
            b"MSHR\x02\x00\x00\x00{}",
            b"MSHR\x01\x00\x00\x00",
            b"MSHR\x01\x00\x00\x00not json",
            b"MSHR\x01\x00\x00\x00[]",
            b"MSHR\x01\x00\x00\x00{}",
            b'MSHR\x01\x00\x00\x00{"op":"format_disk"}',
            b'MSHR\x01\x00\x00\x00{"op":"detach"}',
            b'MSHR\x01\x00\x00\x00{"op":"detach","attachment":"1"}',
            b'MSHR\x01\x00\x00\x00{"op":"detach","attachment":1,"more":2}',
            b'MSHR\x01\x00\x00\x00{"op":"welcome","server":"","mount":"","fork_events":true}',
            b'MSHR\x01\x00\x00\x00{"op":"hello","client":"twice"}',
            b"MSHR\x01\x00\x00\x00" + b"[" * 60000,
            b"MSHR\x01\x00\x00\x00\xff\xfe",
            b'MSHR\x01\x00\x00\x00{"op":"detach","attachment":' + b"9" * 5000 + b"}",
        ],
    )
    def test_packets_that_are_none(self, peer: Peer, packet: bytes) -> None:
        assert self.failure(peer.exchange(packet)) == errno.EPROTO
        assert isinstance(peer.say(protocol.GetList()), protocol.Listing)

    @pytest.mark.parametrize("length", [protocol.MAX_PACKET + 1, 100_000])
    def test_oversized_packets_end_the_connection(self, peer: Peer, length: int) -> None:
        assert self.failure(peer.exchange(b"MSHR" + bytes(length))) == errno.EPROTO
        assert peer.sock.recv(10) == b""

    @pytest.mark.parametrize(
        "message",
        [
            protocol.Detach(1 << 40),
            protocol.GetStat(1 << 40),
            protocol.GetMaps(1 << 40),
            protocol.Adopt(1 << 40),
            protocol.Abort(7),
            protocol.Unlink("nothing there"),
            protocol.Remove("nothing there"),
        ],
    )
    def test_things_that_are_not_there(self, peer: Peer, message: protocol.Message) -> None:
        assert self.failure(peer.say(message)) == errno.ENOENT

    def test_what_belongs_to_others(self, peer: Peer, c: Client, name: str) -> None:
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
        number = c.ask("r._attachment")
        assert self.failure(peer.say(protocol.Detach(number))) == errno.EPERM
        assert self.failure(peer.say(protocol.GetStat(number))) == errno.EPERM
        assert c.ask("r.stat().attached") == 1

    def test_descriptors_that_do_not_fit(
        self, peer: Peer, daemon: Daemon, name: str, c: Client, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
        before = daemon.descriptors()
        attach = protocol.Attach(None, 0)
        with (daemon.mount / name).open("r+b") as ticket, open("/dev/null", "rb") as null:
            fd = ticket.fileno()
            assert self.failure(peer.say(attach)) == errno.EBADF
            assert self.failure(peer.say(attach, [fd, fd])) == errno.EBADF
            assert self.failure(peer.say(attach, [fd], announced=0)) == errno.EBADF
            assert self.failure(peer.say(attach, [], announced=1)) == errno.EBADF
            assert self.failure(peer.say(attach, [null.fileno()])) == errno.EBADF
            assert self.failure(peer.say(protocol.GetList(), [fd])) == errno.EBADF
            assert self.failure(peer.say(protocol.Unlink(name), [null.fileno()])) == errno.EBADF
            assert self.failure(peer.say(protocol.GetStat(), [null.fileno()])) == errno.EBADF
            assert isinstance(peer.say(protocol.GetStat(), [fd]), protocol.RegionStat)
        eventually(lambda: daemon.descriptors() <= before)

    @pytest.mark.parametrize("opened", ["mshare_info", ".regions", "", ".regions/{name}/maps"])
    def test_other_files_of_the_mount_are_no_tickets(
        self, peer: Peer, daemon: Daemon, name: str, c: Client, opened: str
    ) -> None:
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE)")
        fd = os.open(daemon.mount / opened.format(name=name), os.O_RDONLY)
        try:
            assert self.failure(peer.say(protocol.Attach(None, 0), [fd])) == errno.ENOENT
        finally:
            os.close(fd)

    def test_a_path_is_no_permission(self, peer: Peer, daemon: Daemon, name: str, c: Client) -> None:
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0)")
        for flags in (os.O_PATH, os.O_WRONLY):
            fd = os.open(daemon.mount / name, flags)
            try:
                assert self.failure(peer.say(protocol.Attach(None, 0), [fd])) == errno.EBADF
            finally:
                os.close(fd)

    def test_seventeen_descriptors_end_the_connection(
        self, peer: Peer, daemon: Daemon, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        before = daemon.descriptors()
        assert self.failure(peer.exchange(protocol.encode(protocol.GetList(), 17), [0] * 17)) == errno.EPROTO
        assert peer.sock.recv(10) == b""
        eventually(lambda: daemon.descriptors() < before)

    def test_no_userfaultfd_no_window(self, peer: Peer, daemon: Daemon, name: str) -> None:
        offer = peer.say(protocol.Create(name, None, 2 * MIB, 0o600, exclusive=True, empty=False))
        assert isinstance(offer, protocol.Offer)
        mapped = protocol.Mapped(offer.offer, offer.addr, 0)
        assert self.failure(peer.say(mapped)) == errno.EBADF
        assert self.failure(peer.say(mapped, [0])) == errno.EBADF
        assert not (daemon.mount / name).exists()
        assert isinstance(peer.say(protocol.Abort(offer.offer)), protocol.Done)
        assert self.failure(peer.say(protocol.Abort(offer.offer))) == errno.ENOENT
        offer = peer.say(protocol.Create(name, None, 2 * MIB, 0o600, exclusive=True, empty=False))
        assert isinstance(offer, protocol.Offer)

    def test_donated_ranges_that_make_no_sense(self, peer: Peer, name: str) -> None:
        for ranges in (
            [(0, 4096, 3), (0, 4096, 3)],
            [(4096, 0, 3)],
            [(-4096, 4096, 3)],
            [(2 * MIB, 4096, 3)],
            [(0, 4 * MIB, 3)],
            [(1, 4096, 3)],
            [(0, 4096, 8)],
            [(0, 1 << 63, 3)],
        ):
            donated = tuple(protocol.DonatedRange(*r) for r in ranges)
            request = protocol.Create(name, 0x5000_0000_0000, 2 * MIB, 0o600, True, False, donated=donated)
            assert self.failure(peer.say(request)) in (errno.EINVAL, errno.EPROTO), ranges
        assert isinstance(peer.say(protocol.GetList()), protocol.Listing)

    def test_first_hello(self, daemon: Daemon) -> None:
        peer = Peer(daemon)
        assert self.failure(peer.say(protocol.GetList())) == errno.EPROTO
        assert self.failure(peer.exchange(struct.pack("<4sHH", b"MSHR", 99, 0) + b'{"op":"hello"}')) == errno.EPROTO
        assert isinstance(peer.say(protocol.Hello("at last")), protocol.Welcome)
        peer.sock.close()

    def test_clients_that_say_nothing_hinder_nobody(self, daemon: Daemon, c: Client, name: str) -> None:
        silent = [Peer(daemon) for _ in range(50)]
        for peer in silent[:25]:
            assert isinstance(peer.say(protocol.Hello("and no more")), protocol.Welcome)
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.buf[0] = 1")
        assert c.ask("r.stat().attached") == 1
        for peer in silent:
            peer.sock.close()

    def test_a_client_that_never_reads_hinders_nobody(self, daemon: Daemon, c: Client, name: str) -> None:
        peer = Peer(daemon)
        peer.sock.setblocking(False)
        packet = protocol.encode(protocol.Hello("again and again"))
        with pytest.raises(BlockingIOError):
            list(map(peer.sock.send, itertools.repeat(packet)))
        c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.buf[0] = 1")
        assert c.ask("r.stat().attached") == 1
        peer.sock.close()
