"""Single calls on the memory that is held, each measured."""

from __future__ import annotations

import contextlib
import mmap
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Final

import mshare
from benchmarks import memory
from benchmarks.memory import PAGE, Kind
from benchmarks.work.held import Held
from mshare import syscalls as sc

_PIECE: Final = 2 << 20
_RW: Final = mmap.PROT_READ | mmap.PROT_WRITE
_FIXED: Final = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | sc.MAP_FIXED

Call = tuple[str, Callable[[], object]]
Times = dict[str, list[float]]


class Calls:
    """Durations are in seconds."""

    REQUESTS = ("protect", "region_calls", "kernel_calls", "life_of_names", "life_of_regions")

    def __init__(self, held: Held) -> None:
        self._held = held

    def protect(self) -> dict[str, float]:
        """Make all of the memory read-only, for everybody, then writable again: how long each call took."""
        change = self._held.memory.change
        if change is None:
            raise RuntimeError("nobody can change what is open for everybody")
        return dict(_timed([("r", lambda: change(mmap.PROT_READ)), ("w", lambda: change(_RW))]))

    def region_calls(self, count: int) -> Times:
        """The calls of a region that is there, on 2 MiB or a page of it, all of it present."""
        region = self._region
        with tempfile.TemporaryFile() as file:
            file.truncate(_PIECE)
            at = region.size - _PIECE
            region.mmap(_PIECE, flags=mmap.MAP_SHARED | sc.MAP_FIXED, offset=at, fd=file.fileno())
            calls: list[Call] = [
                ("stat", region.stat),
                ("maps", region.maps),
                ("mprotect, a page", lambda: region.mprotect(0, PAGE, mmap.PROT_READ)),
                ("mprotect, back", lambda: region.mprotect(0, PAGE, _RW)),
                ("munmap, 2 MiB", lambda: region.munmap(_PIECE, _PIECE)),
                ("mmap, 2 MiB", lambda: region.mmap(_PIECE, flags=_FIXED, offset=_PIECE)),
                ("", lambda: _store(region.buf, _PIECE)),
                ("msync, nothing to do", lambda: region.msync(0, _PIECE)),
                ("", lambda: _store(region.buf, at)),
                ("msync, a page of a file", lambda: region.msync(at, _PIECE)),
            ]
            found = _repeated(calls, count)
            region.munmap(at, _PIECE)
        return found

    def kernel_calls(self, count: int) -> Times:
        """The kernel's calls on memory of this process alone, as far as there are the same."""
        view, address = self._held.memory.view, self._held.memory.address
        with tempfile.TemporaryFile() as file:
            file.truncate(_PIECE)
            mapped = mmap.mmap(file.fileno(), _PIECE)
            spare = sc.mmap(None, _PIECE, _RW, sc.MAP_SHARED | sc.MAP_ANONYMOUS)
            fresh = sc.MAP_SHARED | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE
            calls: list[Call] = [
                ("mprotect, a page", lambda: sc.mprotect(address, PAGE, sc.PROT_READ)),
                ("mprotect, back", lambda: sc.mprotect(address, PAGE, _RW)),
                ("munmap, 2 MiB", lambda: sc.munmap(spare, _PIECE)),
                ("mmap, 2 MiB", lambda: sc.mmap(spare, _PIECE, _RW, fresh)),
                ("", lambda: _store(view, 0)),
                ("", lambda: _store(memoryview(mapped), 0)),
                ("msync, a page of a file", mapped.flush),
            ]
            found = _repeated(calls, count)
            sc.munmap(spare, _PIECE)
            mapped.close()
        return found

    def life_of_names(self, kind: str, name: str, size: int, count: int) -> Times:
        """Create memory and take it away, again and again."""
        found: Times = {"create": [], "unlink": []}
        for number in range(count):
            start = time.perf_counter()
            made = memory.create(Kind(kind), f"{name}-{number}", size)
            found["create"].append(time.perf_counter() - start)
            start = time.perf_counter()
            if made.region is not None:
                mshare.mshare_unlink(made.handle)
            else:
                made.detach()
                made.remove()
            found["unlink"].append(time.perf_counter() - start)
        return found

    def life_of_regions(self, kind: str, size: int, counts: list[int], sample: int) -> dict[str, Times]:
        """With as many regions there as ``counts`` says, ascending: create, attach and unlink ``sample`` more."""
        name = f"many-{secrets.token_hex(6)}"
        there: list[memory.Memory] = []
        found: dict[str, Times] = {}
        with contextlib.ExitStack() as stack:
            for count in counts:
                while len(there) < count:
                    there.append(memory.create(Kind(kind), f"{name}-{len(there)}", size))
                    stack.callback(there[-1].remove)
                    there[-1].detach()
                names = self.life_of_names(kind, f"{name}-more", size, sample)
                attached = [_attach_and_detach(kind, there[number % count].handle) for number in range(sample)]
                found[str(count)] = {**names, "attach": attached}
        return found

    @property
    def _region(self) -> mshare.Region:
        region = self._held.memory.region
        if region is None:
            raise RuntimeError("what is open is no region")
        return region


def _attach_and_detach(kind: str, handle: str) -> float:
    start = time.perf_counter()
    opened = memory.attach(Kind(kind), handle)
    seconds = time.perf_counter() - start
    opened.detach()
    return seconds


def _repeated(calls: list[Call], count: int) -> Times:
    """Make the calls in order, ``count`` times: the times of those that have a name."""
    found: Times = {name: [] for name, _ in calls if name}
    for _ in range(count):
        for name, seconds in _timed(calls):
            if name:
                found[name].append(seconds)
    return found


def _timed(calls: list[Call]) -> Iterator[tuple[str, float]]:
    for name, call in calls:
        start = time.perf_counter()
        call()
        yield name, time.perf_counter() - start


def _store(view: memoryview, at: int) -> None:
    view[at] = 1
