"""A region of this process's own memory whose attachments have userfaultfds that only note what is asked of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from mshared import apply
from mshared.backing import MemfdStore
from mshared.live import LiveAttachment, LiveRegion
from msharefs.addr import PAGE_SIZE, PMD_SIZE, WINDOW_START, Address, AddrRange
from msharefs.effects import Effect
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership
from msharefs.region import BackingKind
from msharefs.vma import Arming

ELSEWHERE = Address(0x5600_0000_0000)
PID, TID = 4321, 4322


class FakeUffd:
    """Notes ioctls, and fails as it is told to: by the name of the call, one errno after the other, 0 for none."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, Iterator[int]] = {}
        self.comes: int | None = None
        """How many bytes a copy brings, if not all."""

    def arm(self, ar: AddrRange, arming: Arming) -> None:
        self._note("arm", ar, arming)

    def write_protect(self, ar: AddrRange, *, protect: bool = True) -> None:
        self._note("protect" if protect else "unprotect", ar)

    def zero(self, ar: AddrRange, *, protected: bool) -> None:
        self._note("zero", ar, protected)

    def copy_from(self, ar: AddrRange, source: int, *, protected: bool = False) -> None:
        assert source
        self._note("copy", ar, protected)

    def copy_some(self, ar: AddrRange, source: int, *, protected: bool) -> int:
        assert source
        self._note("copy", ar, protected)
        return self.comes if self.comes is not None else ar.size

    def wake(self, ar: AddrRange) -> None:
        self._note("wake", ar)

    def poison(self, ar: AddrRange) -> None:
        self._note("poison", ar)

    def unprotect_empty(self, ar: AddrRange) -> None:
        self._note("unprotect empty", ar)

    def show(self, ar: AddrRange, *, protected: bool) -> None:
        self._note("show", ar, protected)

    def mark(self, ar: AddrRange) -> None:
        self._note("mark", ar)

    def hand_over(self, ar: AddrRange, taker: FakeUffd, arming: Arming) -> None:
        self._note("hand over", ar, taker, arming)

    def _note(self, name: str, *args: object) -> None:
        number = next(self.errors.get(name, iter(())), 0)
        if number:
            raise OSError(number, os.strerror(number))
        self.calls.append((name, *args))


class World:
    """A region of this process's own memory, and attachments whose userfaultfds only note."""

    def __init__(self) -> None:
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        model = self.namespace.create("it", None, PMD_SIZE, 0o600, BackingKind.SMALL, Credentials(0, 0))
        backing = MemfdStore().create(model.id, BackingKind.SMALL, PMD_SIZE)
        self.region = LiveRegion(model, backing, None)

    def attach(self, at: Address = WINDOW_START, *, pid: int | None = PID, readonly: bool = False) -> LiveAttachment:
        model = self.namespace.attach(self.region.model, at, pid, readonly=readonly)
        uffd: Any = FakeUffd()
        live = LiveAttachment(model, self.region, uffd, Address(0))
        self.region.attachments.append(live)
        return live

    def carry_out(self, *effects: Effect, read_events: Callable[[], None] = lambda: None) -> None:
        apply.carry_out(self.region, effects, read_events)


def pages(first: int, count: int = 1, *, at: int = WINDOW_START) -> AddrRange:
    return AddrRange.sized(at + first * PAGE_SIZE, count * PAGE_SIZE)


def calls(attachment: LiveAttachment) -> list[tuple[Any, ...]]:
    uffd: Any = attachment.uffd
    return list(uffd.calls)


def fail(attachment: LiveAttachment, call: str, *numbers: int) -> None:
    """Have the next calls of that name end like that; 0: well."""
    fail_for(attachment, call, iter(numbers))


def fail_for(attachment: LiveAttachment, call: str, numbers: Iterator[int]) -> None:
    """The same, by whatever comes; after the last they end well."""
    uffd: Any = attachment.uffd
    uffd.errors[call] = numbers
