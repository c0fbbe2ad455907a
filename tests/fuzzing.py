"""A fuzzer of the control protocol and of the mount: its statements run in a client, as an ordinary user.

It knows the messages by their attrs classes, and remembers what the daemon has told it: offers, attachments, tokens,
descriptors. So it gets as far as real clients do, and does the next thing wrong. Everything comes from one seed.
"""

# ruff: noqa: ARG005 - what can be asked of a filesystem is a list of alike functions

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import random
import select
import socket
import struct
import time
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from mshare import syscalls as sc
from msharefs import protocol

MIB = 1 << 20
HINTS = functools.cache(typing.get_type_hints)
REQUESTS = typing.get_args(protocol.Request)
CHANGES = typing.get_args(protocol.Changing)
NAMES = [
    "fuzz-a",
    "fuzz-b",
    "fuzz-c",
    "fuzz-d",
    "theirs",
    ".",
    "..",
    "",
    "a/b",
    "x" * 256,
    "mshare_info",
    "\udcff",
    "n\n",
]
NUMBERS = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        4095,
        4096,
        4097,
        -4096,
        2 * MIB,
        2 * MIB - 1,
        4 * MIB,
        1 << 30,
        1 << 31,
        (1 << 32) - 1,
        1 << 40,
    ),
    *(
        1 << 46,
        (1 << 47) - 4096,
        1 << 47,
        1 << 62,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 1,
        -(1 << 63),
        1 << 64,
        -(1 << 64),
    ),
]
ADDRESSES = [0x5000_0000_0000 + i * 64 * MIB for i in range(8)]
TREE = [
    "",
    ".regions",
    ".regions/{}",
    ".regions/{}/maps",
    ".regions/{}/stat",
    ".regions/{}/smaps",
    ".metrics",
    "{}",
    "{}",
]


class Unanswered(Exception):
    """The daemon owes an answer."""


class Fuzzer:
    """One process's conversations with a daemon. ``did`` counts what was done and how it was answered."""

    def __init__(self, mount: str, seed: int) -> None:
        self.mount = Path(mount)
        info = dict(line.split(" ", 1) for line in (self.mount / "mshare_info").read_text().splitlines()[1:])
        self.path = info["socket"]
        self.random = random.Random(seed)
        self.did: Counter[str] = Counter()
        self.socks: list[socket.socket] = []
        self.fds: list[int] = []
        self.known: dict[str, list[Any]] = {"offer": [0], "attachment": [0], "token": [""], "tokens": [""]}
        self.mapped: list[tuple[socket.socket, protocol.Mapped, tuple[int, ...]]] = []
        self.windows: list[tuple[int, int]] = []

    def run(self, seconds: float) -> dict[str, int]:
        """Do things for so long; what, and how often. Raises Unanswered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            action = self.random.choices(
                [self.talk, self.finish, self.connect, self.visit, self.meddle, self.babble, self.leave],
                [60, 15, 3, 15, 6, 3, 1],
            )[0]
            with contextlib.suppress(OSError):
                action()
        return dict(self.did)

    # Conversations.

    def connect(self) -> socket.socket:
        """One more connection, and sometimes one less."""
        if len(self.socks) > 6:
            self.random.choice(self.socks).close()
        self.socks = [sock for sock in self.socks if sock.fileno() >= 0]
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(60)
        sock.connect(self.path)
        self.socks.append(sock)
        if self.random.random() < 0.9:
            self.exchange(sock, protocol.encode(protocol.Hello("fuzz")), [])
        return sock

    def sock(self) -> socket.socket:
        """Any connection."""
        alive = [sock for sock in self.socks if sock.fileno() >= 0]
        return self.random.choice(alive) if alive else self.connect()

    def talk(self) -> None:
        """A request that may be right, with descriptors that may be right."""
        kind = self.random.choice(REQUESTS if self.random.random() < 0.7 else CHANGES)
        message = self.value(kind, "")
        fds = self.descriptors(message)
        announced = len(fds) if self.random.random() < 0.95 else self.random.choice([0, 1, 2, 17, 65535])
        try:
            packet = protocol.encode(message, announced)
        except (ValueError, struct.error):
            return
        if self.random.random() < 0.06:
            packet = self.mutated(packet)
        self.exchange(self.sock(), packet, fds)

    def finish(self) -> None:
        """Say that a window stands which does stand, so that there is an attachment."""
        if not self.mapped:
            self.exchange(self.sock(), protocol.encode(self.create()), [])
            return
        sock, message, fds = self.mapped.pop(self.random.randrange(len(self.mapped)))
        if sock.fileno() >= 0:
            self.exchange(sock, protocol.encode(message, len(fds)), list(fds))
        for fd in fds:  # Whoever keeps one that the daemon has closed waits for ever at the next fork.
            os.close(fd)

    def create(self) -> protocol.Create:
        """A request that is right, most of the time."""
        name, addr = self.random.choice(NAMES[:4]), self.random.choice([None, *ADDRESSES])
        mode = self.random.choice([0o600, 0o666, 0o644])
        return protocol.Create(name, addr, self.random.choice([2, 4]) * MIB, mode, False, self.random.random() < 0.2)

    def babble(self) -> None:
        """Many packets without listening, and perhaps not even to the end."""
        sock = self.connect()
        sock.settimeout(0)
        with contextlib.suppress(OSError):
            for _ in range(self.random.randrange(200)):
                kind = self.random.choice(REQUESTS)
                socket.send_fds(sock, [protocol.encode(self.value(kind, ""))], self.some_fds(2))
                self.did["babbled"] += 1
        if self.random.random() < 0.7:
            sock.close()
        else:
            self.socks.remove(sock)
            self.socks.insert(0, sock)
            sock.close() if self.random.random() < 0.5 else self.drain(sock)

    def drain(self, sock: socket.socket) -> None:
        """Hear all that is owed."""
        sock.settimeout(60)
        while select.select([sock], [], [], 0.05)[0]:
            packet, fds, _, _ = socket.recv_fds(sock, 1 << 17, 32)
            for fd in fds:
                os.close(fd)
            if not packet:
                sock.close()
                return

    def exchange(self, sock: socket.socket, packet: bytes, fds: list[int]) -> None:
        """One request and its one answer, or the end of the connection."""
        try:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sock.sendmsg([packet], ancillary)
            answer, got, flags, _ = socket.recv_fds(sock, 1 << 17, 32)
        except TimeoutError:
            sock.close()
            raise Unanswered(repr(packet[:500])) from None
        except OSError as error:
            sock.close()
            self.did[f"hung up: {errno.errorcode[error.errno or 0]}"] += 1
            return
        if not answer:
            sock.close()
            self.did["hung up"] += 1
            return
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise Unanswered("the answer is cut short")
        self.hear(sock, protocol.decode(answer)[0], got)

    def hear(self, sock: socket.socket, answer: protocol.Message, fds: list[int]) -> None:
        """Remember what is of use."""
        what = errno.errorcode.get(answer.errno, "?") if isinstance(answer, protocol.Failed) else "done"
        if what == "EIO":
            raise Unanswered(f"an internal error: {answer}")
        self.did[f"{type(answer).__name__} {what}"] += 1
        match answer:
            case protocol.Offer():
                self.known["offer"].append(answer.offer)
                self.take_up(sock, answer, fds)
            case protocol.Attached(number):
                self.known["attachment"].append(number)
            case protocol.Snapshots(tokens):
                self.known["token"] += tokens
                self.known["tokens"] += tokens
        self.keep(fds)
        for numbers in self.known.values():
            del numbers[:-12]

    def take_up(self, sock: socket.socket, offer: protocol.Offer, fds: list[int]) -> None:
        """Map what is offered, as a client does, and remember what there would be to say about it."""
        if len(fds) < 1 + offer.device or self.random.random() < 0.2:
            return
        addr = offer.addr
        with contextlib.suppress(OSError):
            flags = (sc.MAP_PRIVATE if offer.readonly else sc.MAP_SHARED) | sc.MAP_NORESERVE | sc.MAP_FIXED_NOREPLACE
            if self.random.random() < 0.1:  # Something else stands there.
                sc.mmap(
                    addr, offer.size, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE | sc.MAP_FIXED_NOREPLACE
                )
            else:
                sc.mmap(addr, offer.size, 1 if offer.readonly else 3, flags, fds[0])
            self.windows.append((addr, offer.size))
            anchor = sc.mmap(None, protocol.ANCHOR_PAGES * 4096, 0, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS)
            device = fds[1] if offer.device else None
            uffds = tuple(sc.userfaultfd(device) for _ in range(self.random.choice([1, 2, 2, 2])))
            self.mapped.append((sock, protocol.Mapped(offer.offer, addr, anchor), uffds))

    # What is said.

    def value(self, kind: Any, name: str) -> Any:
        """Something of a type, and perhaps something that fits a field of that name."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if attrs.has(kind):
            hints = HINTS(kind)
            return kind(**{field.name: self.value(hints[field.name], field.name) for field in attrs.fields(kind)})
        if origin is tuple:
            return tuple(self.value(args[0], name) for _ in range(self.random.choice([0, 0, 1, 1, 2, 3, 40])))
        if args:
            return None if self.random.random() < 0.4 else self.value(args[0], name)
        if name in self.known and self.random.random() < 0.85:
            return self.random.choice(self.known[name][-6:])
        if name == "attachments" and self.random.random() < 0.9:
            return self.random.choice(self.known["attachment"][-6:])
        return {bool: self.boolean, str: self.text, int: self.number}[kind](name)

    def boolean(self, _name: str) -> bool:
        return self.random.random() < 0.5

    def text(self, name: str) -> str:
        if name == "backing":
            return self.random.choice(["thp", "4k", "hugetlb", "floppy"])
        return self.random.choice(NAMES[:5]) if self.random.random() < 0.8 else self.random.choice(NAMES)

    def number(self, name: str) -> int:
        usual = {
            "addr": ADDRESSES,
            "size": [2 * MIB, 4 * MIB],
            "mode": [0o600, 0o666, 0o644, 0o777, 0],
            "offset": [i * 4096 for i in range(1024)],
            "length": [4096, 8192, 2 * MIB, 4 * MIB],
            "prot": [0, 1, 2, 3],
            "flags": [0x21, 0x22, 0x31, 0x32, 1, 2, 0x11, 0x12, 0x100021],
            "advice": [0, 1, 2, 3, 4, 8, 9, 12, 14, 15, 16, 17, 22, 23, 25],
            "descriptor": [0, 1, 2],
            "cells": [1, 64, 1024],
        }
        if name in usual and self.random.random() < 0.85:
            return self.random.choice(usual[name])
        return self.random.choice(NUMBERS) if self.random.random() < 0.9 else self.random.getrandbits(66) - (1 << 65)

    def mutated(self, packet: bytes) -> bytes:
        """The same with something wrong about it."""
        data = bytearray(packet)
        match self.random.randrange(6):
            case 0:
                del data[self.random.randrange(len(data)) :]
            case 1:
                data += bytes(self.random.choice([1, 100, 70_000]))
            case 2:
                data[:8] = struct.pack("<4sHH", b"MSHR", self.random.choice([0, 1, 2]), self.random.randrange(70))
            case 3:
                data = data.replace(b":", self.random.choice([b":[", b":{", b":-", b':"', b"::"]), 1)
            case 4:
                data = data.replace(b'"op"', b'"op":"detach","op"')
            case _:
                for _ in range(self.random.randrange(1, 8)):
                    data[self.random.randrange(len(data))] = self.random.randrange(256)
        return bytes(data)

    # Descriptors.

    def descriptors(self, message: protocol.Message) -> list[int]:
        """Those that a request needs, or any."""
        if self.random.random() < 0.15:
            return self.some_fds(self.random.choice([1, 2, 3, 16, 20]))
        try:
            match message:
                case protocol.Attach() | protocol.Unlink():
                    return [self.ticket()]
                case protocol.GetStat(attachment=None) | protocol.GetMaps(attachment=None):
                    return [self.ticket()]
                case protocol.Mmap(flags=flags) if not flags & 0x20:
                    return [self.file()]
                case protocol.Create(donated=donated):
                    count = len({part.file.descriptor for part in donated if part.file})
                    return [self.file() for _ in range(min(count, 16))]
                case protocol.Mapped():
                    return self.some_fds(2)
        except OSError:
            pass
        return []

    def some_fds(self, count: int) -> list[int]:
        found = [fd for fd in self.fds if is_open(fd)] or [0]
        return [self.random.choice(found) for _ in range(count)]

    def keep(self, fds: list[int]) -> None:
        """Add descriptors to those that may be sent; the oldest go."""
        self.fds += fds
        while len(self.fds) > 40:
            with contextlib.suppress(OSError):
                os.close(self.fds.pop(0))

    def ticket(self) -> int:
        fd = os.open(
            self.mount / self.random.choice(NAMES[:5]), self.random.choice([os.O_RDWR, os.O_RDWR, os.O_RDONLY])
        )
        self.keep([fd])
        return fd

    def file(self) -> int:
        """A file, of a kind that may be mapped or not."""
        match self.random.randrange(7):
            case 0:
                fd = os.open(self.mount / "mshare_info", os.O_RDONLY)
            case 1:
                fd = os.open("/tmp", os.O_RDONLY)
            case 2:
                fd = os.open("/dev/zero", os.O_RDWR)
            case 3:
                fd = os.open("/tmp", os.O_PATH)
            case 4:
                fd = os.open("/etc/passwd", os.O_RDONLY)
            case _:
                fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.truncate(fd, self.random.choice([0, 100, 4096, 3 * MIB]))
        self.keep([fd])
        return fd

    # What it does to itself, and to the mount.

    def meddle(self) -> None:
        """Touch windows in children, take them away, fork, change what is mapped behind the daemon's back."""
        if not self.windows:
            return
        addr, size = self.random.choice(self.windows)
        at = addr + self.random.randrange(0, size, 4096)
        match self.random.randrange(6):
            case 0 | 1 | 2:
                self.in_child(lambda: (ctypes.memset(at, 1, 1), ctypes.string_at(at, 1)))
            case 3:
                self.windows.remove((addr, size))
                sc.munmap(addr, size)
            case 4:
                sc.munmap(at, 4096)
            case _:
                sc.mprotect(at, 4096, self.random.choice([0, 1]))

    def in_child(self, work: Callable[[], object]) -> None:
        """What may block or die; after a moment it is killed."""
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        pidfd = os.pidfd_open(pid)
        select.select([pidfd], [], [], 0.2)
        os.kill(pid, 9)
        os.close(pidfd)
        status = os.waitpid(pid, 0)[1]
        self.did[f"child {os.waitstatus_to_exitcode(status)}"] += 1

    def visit(self) -> None:
        """Something that a filesystem can be asked."""
        path = self.mount / self.random.choice(TREE).format(self.random.choice(NAMES[:6]))
        other = self.mount / self.random.choice(NAMES[:9])
        attempt = self.random.choice(VISITS)
        try:
            attempt(self, path, other)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            if number in (errno.EIO, errno.ENOTCONN, errno.ENOSYS):
                raise Unanswered(f"{VISITS.index(attempt)} {path}: {error}") from error
            self.did[f"visit {errno.errorcode.get(number or 0, 'refused')}"] += 1
        else:
            self.did["visit done"] += 1

    def leave(self) -> None:
        """Begin anew, in the middle of everything."""
        for sock in self.socks:
            sock.close()
        for _, _, uffds in self.mapped:
            self.fds += uffds
        for addr, size in self.windows:
            sc.munmap(addr, size)
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.socks, self.fds, self.windows, self.mapped = [], [], [], []


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def _with_file(
    work: Callable[[Fuzzer, int], object], flags: int = os.O_RDONLY
) -> Callable[[Fuzzer, Path, Path], object]:
    def visit(fuzzer: Fuzzer, path: Path, _other: Path) -> None:
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            work(fuzzer, fd)
        finally:
            os.close(fd)

    return visit


VISITS: list[Callable[[Fuzzer, Path, Path], object]] = [
    _with_file(lambda f, fd: os.pread(fd, f.random.choice([0, 1, 16, 1 << 20]), f.random.choice([0, 1, 1 << 40]))),
    _with_file(lambda _, fd: os.pwrite(fd, b"x", 0), os.O_RDWR),
    _with_file(lambda f, fd: os.ftruncate(fd, 0), os.O_RDWR),
    _with_file(lambda f, fd: os.posix_fallocate(fd, 0, 4096), os.O_RDWR),
    _with_file(lambda f, fd: os.lseek(fd, f.random.choice([0, 1 << 62]), f.random.choice([0, 2, 3, 4]))),
    _with_file(lambda f, fd: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)),
    _with_file(lambda f, fd: os.fsync(fd)),
    _with_file(lambda f, fd: f.keep([os.dup(fd)])),
    _with_file(lambda f, fd: os.sendfile(fd, fd, 0, 100), os.O_RDWR),
    lambda f, p, o: os.open(
        p, f.random.choice([os.O_TRUNC, os.O_CREAT | os.O_RDWR, os.O_DIRECTORY, os.O_WRONLY, 0o20000000])
    ),
    lambda f, p, o: list(os.scandir(p)),
    lambda f, p, o: p.read_bytes(),
    lambda f, p, o: os.chmod(p, f.random.choice([0, 0o600, 0o666, 0o777, 0o6777])),
    lambda f, p, o: os.chown(p, f.random.choice([-1, 0, os.getuid()]), f.random.choice([-1, 0, os.getgid()])),
    lambda f, p, o: os.utime(p),
    lambda f, p, o: os.truncate(p, 0),
    lambda f, p, o: os.rename(p, o),
    lambda f, p, o: os.link(p, o),
    lambda f, p, o: os.symlink(p, o),
    lambda f, p, o: os.mkdir(o),
    lambda f, p, o: os.mkfifo(o),
    lambda f, p, o: os.unlink(p),
    lambda f, p, o: os.rmdir(p),
    lambda f, p, o: os.listxattr(p),
    lambda f, p, o: os.getxattr(
        p, f.random.choice(["user.mshare.start", "user.mshare.attached", "user.x", "system.posix_acl_access"])
    ),
    lambda f, p, o: os.setxattr(p, "user.mshare.size", b"0"),
    lambda f, p, o: os.removexattr(p, "user.mshare.size"),
    lambda f, p, o: os.statvfs(p),
    lambda f, p, o: os.stat(p),
    lambda f, p, o: os.access(p, os.W_OK),
]
