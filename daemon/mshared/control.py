"""The control socket: packets and descriptors in, requests to the service, answers out.

One task a connection. Every descriptor that arrives is either taken by the service or closed. A packet that is not of
the protocol gets its ``failed`` and the connection goes on: SOCK_SEQPACKET tells the next one apart. A packet that was
cut short ends it.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, get_args

import attrs
import trio

from mshared import donations
from mshared.answers import Answer, Caller, Pending
from mshared.book import Asked, asked
from mshared.live import LiveRegion
from mshared.packets import Packets
from mshared.pager import AFTER_CHANGE, Pager
from mshared.service import Service
from mshared.shares import Shares
from mshared.tickets import MOST_WAITING, Closer, read_ticket
from msharefs import protocol
from msharefs.errors import BadDescriptorError, MshareError, NotFoundError, ProtocolError

log = logging.getLogger(__name__)

HELLO_PATIENCE: Final = 10.0
"""Seconds a connection may take to say hello."""
BACKLOG: Final = 1024
_SHORT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
_SOON_BACK: Final = (*get_args(protocol.Changing), protocol.Fork, protocol.Attach)
"""Requests after which a client needs something at once: it touches what has changed, or tells of its window."""
_CURE: Final = "free some memory, end regions or processes, or raise its limit of open files (LimitNOFILE, ulimit -n)"


class ControlServer:
    """Serves each connection. ``device`` is the mount's, to know its files by."""

    def __init__(self, service: Service, pager: Pager, mount: Path, device: tuple[int, int]) -> None:
        self._service = service
        self._pager = pager
        self._mount = mount
        self._device = device
        self._shares = Shares(service.lifetimes)

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Accept for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED):
                        raise
                    log.warning("cannot accept: %s; raise the limit of open files", error.strerror)
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(self._serve_one, sock)

    async def _serve_one(self, sock: trio.socket.SocketType) -> None:
        """Serve one connection to its end, whatever happens on it."""
        with sock:
            try:
                caller = Caller.at(sock)
            except OSError as error:
                log.warning("a connection has no credentials: %s", error)
                return
            uid = caller.who.uid
            self._shares.connections[uid] += 1
            try:
                if not self._shares.are_too_many(uid):
                    await self._converse(sock, caller)
            except Exception:
                log.exception("pid %d: connection failed", caller.pid)
            finally:
                self._shares.connections[uid] -= 1

    async def _converse(self, sock: trio.socket.SocketType, caller: Caller) -> None:
        """The same; what came with the connection is closed in the end."""
        async with trio.open_nursery() as nursery:
            closer = Closer(nursery)
            packets = Packets(sock)
            self._pager.add_caller(packets.fileno())
            connection = _Connection(
                self._service, self._pager, self._mount, self._device, packets, caller, closer, self._shares
            )
            try:
                await connection.run()
            except (OSError, _HungUp):
                pass  # The client is gone, in the middle of a word perhaps.
            except Exception:
                log.exception("pid %d: connection failed", caller.pid)
            finally:
                self._pager.remove_caller(packets.fileno())
                packets.close()
                connection.close()
        await closer.until_at_most(0)


class _HungUp(Exception):
    """The connection is at its end."""


class _Connection:
    """One client's connection: its credentials, and the offers that wait for an answer."""

    def __init__(
        self,
        service: Service,
        pager: Pager,
        mount: Path,
        device: tuple[int, int],
        packets: Packets,
        caller: Caller,
        closer: Closer,
        shares: Shares,
    ) -> None:
        self._service = service
        self._pager = pager
        self._mount = mount
        self._device = device
        self._packets = packets
        self._closer = closer
        self._shares = shares
        self._offers: dict[int, Pending] = {}
        self._next_offer = 1
        self._greeted = False
        self._asked = Asked("", caller.pid, None, 0)
        self._owing = False
        """Whether a request was carried out and its answer not sent: the client may ask for that."""
        self._answered = False
        """Whether the answer was sent already, before everything was done."""
        self._soon_back = False
        self._tokens: set[str] = set()
        self.caller = caller

    async def run(self) -> None:
        """Hello, then requests, until the client hangs up."""
        with trio.move_on_after(HELLO_PATIENCE) as patience:
            while not self._greeted:
                await self._exchange(self._hello)
        if patience.cancelled_caught:
            log.info("pid %d: said nothing for %d s, hung up", self.caller.pid, HELLO_PATIENCE)
            return
        while True:
            await self._exchange(self._answer)

    def close(self) -> None:
        """Forget what was offered and never taken, and whoever is gone."""
        for pending in self._offers.values():
            self._service.give_up(pending)
        self._offers.clear()
        if self._tokens:
            self._service.forget(self._tokens)
        if not self._owing:
            self._service.book.end_session(self._asked.session)

    async def _exchange(self, answer: Callable[[protocol.Message, list[int]], Awaitable[Answer]]) -> None:
        """One request, one reply."""
        packet, fds = await self._receive()
        if self._greeted:
            self._asked = self._asked.next()
            asked.set(self._asked)
        try:
            reply = await self._guarded(answer, packet, fds)
        finally:
            self._closer.close(fds)
        if not self._answered:
            self._owing = True
            if reply.again is not None:
                await self._send(reply)
            if reply.after is not None:
                await reply.after.wait()
            await (self._send(reply) if reply.again is None else self._packets.send(reply.again))
            self._owing = False
        if reply.then is not None:
            reply.then()
        if self._soon_back:
            self._pager.linger(AFTER_CHANGE)
        if self._answered:
            self._answered = False
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def _guarded(
        self, answer: Callable[[protocol.Message, list[int]], Awaitable[Answer]], packet: bytes, fds: list[int]
    ) -> Answer:
        """The answer, or what went wrong in words; what nobody expected is EIO and a traceback in the log."""
        try:
            message, announced = protocol.decode(packet)
            _expect(fds, announced)
            self._soon_back = isinstance(message, _SOON_BACK)
            return await answer(message, fds)
        except MshareError as error:
            return Answer(protocol.Failed(error.errno, str(error)))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _SHORT:
                log.warning("pid %d: request failed: %s", self.caller.pid, error)
                return Answer(protocol.Failed(error.errno, f"mshared is short of something: {error.strerror}; {_CURE}"))
            log.exception("pid %d: request failed", self.caller.pid)
            return Answer(protocol.Failed(errno.EIO, "internal error of mshared; its log has the details"))

    async def _hello(self, message: protocol.Message, fds: list[int]) -> Answer:
        """Answer the first message."""
        if not isinstance(message, protocol.Hello):
            raise ProtocolError("the first message must be hello")
        _expect(fds, 0)
        self._shares.check(self.caller.who.uid, None, 0)
        self._greeted = True
        self._asked, again, written = self._service.book.resume(message, self.caller.pid)
        welcome = protocol.Welcome("mshared", str(self._mount), self._service.lifetimes.fork_events, again is not None)
        return Answer(welcome, again=again, after=written)

    async def _answer(self, message: protocol.Message, fds: list[int]) -> Answer:
        """Answer any other message; descriptors that are used up are taken out of ``fds``."""
        service, caller = self._service, self.caller
        self._shares.check(caller.who.uid, message, len(fds))
        match message:
            case protocol.Create():
                return await self._created(message, fds)
            case protocol.Attach():
                _expect(fds, 1)
                return self._offered(*await service.attach(caller, message, fds[0], self._device))
            case protocol.MapFile():
                return await self._file_mapped(message, fds)
            case protocol.Mapped():
                _expect(fds, 1, 2)
                answer = service.mapped(caller, message, self._offer(message.offer), fds)
                if not message.staged:
                    del self._offers[message.offer]
                return answer
            case protocol.Settled():
                _expect(fds, 0)
                answer = service.settled(caller, self._offer(message.offer))
                del self._offers[message.offer]
                return answer
            case protocol.Abort():
                _expect(fds, 0)
                pending = self._offer(message.offer)
                service.give_up(pending)
                del self._offers[message.offer]
                return Answer(protocol.Done(), after=pending.region.written)
            case protocol.Adopt():
                return self._adopted(message, fds)
            case protocol.Detach():
                _expect(fds, 0)
                return service.detach(caller, message)
            case protocol.Unlink():
                _expect(fds, 0, 1)
                return service.names.unlink(caller, message, read_ticket(fds[0], self._device) if fds else None)
            case protocol.Remove():
                _expect(fds, 0)
                return service.names.remove(caller, message)
            case protocol.Mmap():
                _expect(fds, 0, 1)
                return await service.change(caller, message, fds[0] if fds else None)
            case protocol.Munmap() | protocol.Mprotect() | protocol.Madvise() | protocol.Msync():
                _expect(fds, 0)
                return await service.change(caller, message, None)
            case protocol.Fork() | protocol.Snapshot() | protocol.Forget() | protocol.Take():
                _expect(fds, 0)
                return await self._forking(message)
            case (
                protocol.GetStat()
                | protocol.GetMaps()
                | protocol.GetList()
                | protocol.GetHeat()
                | protocol.GetRefusals()
                | protocol.GetTrace()
            ):
                return await self._told(message, fds)
            case _:
                raise ProtocolError(f"{type(message).__name__} is nothing a client may say here")

    async def _told(self, message: protocol.Looking, fds: list[int]) -> Answer:
        service, views = self._service, self._service.views
        match message:
            case protocol.GetStat():
                return Answer(await views.stat(self._region(message.attachment, fds)))
            case protocol.GetMaps():
                return await views.maps(self._region(message.attachment, fds), message)
            case protocol.GetHeat():
                return await views.heat(self._region(None, fds), message)
            case protocol.GetTrace():
                _expect(fds, 1)
                return views.trace(service.traced_region(self.caller, read_ticket(fds[0], self._device)), message)
        _expect(fds, 0)
        if isinstance(message, protocol.GetList):
            return views.listing(message)
        return views.refusals(self.caller, message)

    async def _created(self, message: protocol.Create, fds: list[int]) -> Answer:
        donated = len({part.file.descriptor for part in message.donated if part.file})
        _expect(fds, donated + message.kept)
        files = await donations.open_files(fds[:donated])
        sponsor, fds[donated:] = fds[donated:], []
        try:
            answer, pending = self._service.create(self.caller, message, files, sponsor)
        finally:
            donations.close_files(files)
            fds += sponsor
        return answer if pending is None else self._offered(answer, pending)

    async def _file_mapped(self, message: protocol.MapFile, fds: list[int]) -> Answer:
        _expect(fds, 1)
        answer, pending = await self._service.map_file(self.caller, message, fds[0])
        return answer if pending is None else self._offered(answer, pending)

    async def _forking(self, message: protocol.Forking) -> Answer:
        service, caller = self._service, self.caller
        match message:
            case protocol.Fork():
                return await service.fork(caller, message, self._tell)
            case protocol.Snapshot():
                answer, tokens = await service.snapshot(caller, message, self._tell)
                self._tokens.update(tokens)
                return answer
            case protocol.Take():
                return self._offered(*service.take(caller, message))
            case protocol.Forget():
                made = service.snapshots.made_by(caller.pid)
                service.forget(made.intersection(message.tokens))
                self._tokens.difference_update(message.tokens)
                return Answer(protocol.Done())

    def _adopted(self, message: protocol.Adopt, fds: list[int]) -> Answer:
        _expect(fds, 0, 1)
        answer = self._service.adopt(self.caller, message, fds[0] if fds else None)
        if fds and not self._service.lifetimes.fork_events:
            fds.pop()
        return answer

    def _offered(self, answer: Answer, pending: Pending) -> Answer:
        number = self._next_offer
        self._next_offer += 1
        self._offers[number] = pending
        assert isinstance(answer.reply, protocol.Offer)
        return attrs.evolve(answer, reply=attrs.evolve(answer.reply, offer=number))

    def _offer(self, number: int) -> Pending:
        pending = self._offers.get(number)
        if pending is None:
            raise NotFoundError(f"there is no offer {number} on this connection")
        return pending

    def _region(self, attachment: int | None, fds: list[int]) -> LiveRegion:
        if attachment is not None:
            _expect(fds, 0)
            return self._service.own_region(self.caller, attachment)
        _expect(fds, 1)
        return self._service.ticket_region(read_ticket(fds[0], self._device))

    async def _receive(self) -> tuple[bytes, list[int]]:
        """The next packet with its descriptors. Raises _HungUp at the end of the connection."""
        await self._closer.until_at_most(MOST_WAITING)
        packet, fds, whole = await self._packets.receive()
        if not packet and not fds:
            raise _HungUp
        if not whole:
            self._closer.close(fds)
            error = ProtocolError("a packet of more than 64 KiB, or with more than 16 descriptors; hanging up")
            await self._send(Answer(protocol.Failed(error.errno, str(error))))
            raise _HungUp
        return packet, fds

    def _tell(self, reply: protocol.Reply) -> None:
        """Answer now, if that is possible without waiting; else it is done as always."""
        self._answered = self._packets.send_now(protocol.encode(reply))

    async def _send(self, answer: Answer) -> None:
        await self._packets.send(protocol.encode(answer.reply, len(answer.fds)), answer.fds)


def _expect(fds: list[int], *counts: int) -> None:
    if len(fds) not in counts:
        raise BadDescriptorError(f"{len(fds)} descriptors came, {' or '.join(map(str, counts))} were expected")


def listen(path: Path) -> socket.socket:
    """A listening SOCK_SEQPACKET socket at ``path`` that anybody may connect to; the mount's modes protect regions."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
