"""Many light processes: forked from one that holds no memory, so that each attaches by itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from benchmarks.work.held import Held
from mshare import syscalls as sc

_LARGEST: Final = 1 << 16
_PR_SET_PDEATHSIG: Final = 1
_PROTECTIONS: Final = {b"r": sc.PROT_READ, b"w": sc.PROT_READ | sc.PROT_WRITE}
_libc: Final = ctypes.CDLL(None)

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Crowd:
    """Forked processes that do what the worker is asked to have them do. ``answer`` carries out a request in one.

    A request is a packet of JSON. A packet of one byte is an order to change the protection of the member's own memory;
    the same byte comes back when it has done that.
    """

    REQUESTS = ("gather", "everyone", "order", "disperse")

    def __init__(self, held: Held, answer: Answer) -> None:
        self._held = held
        self._answer = answer
        self._members: dict[int, socket.socket] = {}

    def gather(self, processes: int) -> None:
        """Fork as many more. They end with this process, however it ends."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        gc.collect()
        gc.freeze()  # Else the first collection in each child would copy what it shares with its parent.
        for _ in range(processes):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if not pid:
                self._be_member(theirs)
            theirs.close()
            self._members[pid] = ours

    def everyone(self, request: dict[str, Any], first: int = 0, count: int | None = None) -> dict[str, Any]:
        """Have ``count`` members from ``first`` on do something at once: what each says, seconds until the last."""
        asked = list(self._members.values())[first : None if count is None else first + count]
        packet = json.dumps(request).encode()
        start = time.perf_counter()
        for member in asked:
            member.send(packet)
        packets = [member.recv(_LARGEST) for member in asked]
        seconds = time.perf_counter() - start
        answers = [json.loads(packet) if packet else {"error": "a member died"} for packet in packets]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(asked)} members: {errors[0]}")
        return {"seconds": seconds, "results": [answer["result"] for answer in answers]}

    def order(self, letter: str, count: int) -> float:
        """Tell the first ``count`` members to change their protection, change our own, wait for each reply; seconds."""
        asked, order = list(self._members.values())[:count], letter.encode()
        address, size = self._held.memory.address, len(self._held.memory.view)
        start = time.perf_counter()
        for member in asked:
            member.send(order)
        sc.mprotect(address, size, _PROTECTIONS[order])
        replies = [member.recv(1) for member in asked]
        seconds = time.perf_counter() - start
        if replies.count(order) != len(asked):
            raise RuntimeError("a member did not obey")
        return seconds

    def disperse(self) -> None:
        """End all members."""
        for member in self._members.values():
            with contextlib.suppress(OSError):
                member.shutdown(socket.SHUT_RDWR)
        for pid, member in self._members.items():
            os.waitpid(pid, 0)
            member.close()
        self._members.clear()

    def _be_member(self, sock: socket.socket) -> None:
        """In a new process: serve until the crowd disperses."""
        try:
            gc.disable()
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signal_number, signal.SIG_DFL)
            while packet := sock.recv(_LARGEST):
                sock.send(self._obey(packet) if len(packet) == 1 else self._reply(packet))
        finally:
            os._exit(0)

    def _obey(self, order: bytes) -> bytes:
        memory = self._held.memory
        sc.mprotect(memory.address, len(memory.view), _PROTECTIONS[order])
        return order

    def _reply(self, packet: bytes) -> bytes:
        return json.dumps(self._answer(json.loads(packet))).encode()
