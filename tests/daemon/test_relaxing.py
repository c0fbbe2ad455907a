"""When regions that are alone again become native, with memfds for memory and nobody attached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from mshared import apply, uffd
from mshared.backing import MemfdStore
from mshared.lifetimes import Lifetimes
from mshared.live import LiveRegion
from mshared.pager import Pager
from mshared.relaxing import Relaxing
from msharefs import forking
from msharefs.addr import PMD_SIZE
from msharefs.errors import InternalError
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership
from msharefs.region import BackingKind

ROOT = Credentials(0, 0)
OWNER = Ownership(0, 0, 0o600)


class World:
    """Regions, and who looks at them."""

    def __init__(self) -> None:
        self.pager = Pager()
        self.namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        self.lifetimes = Lifetimes(self.namespace, self.pager, uffd.WANTED, None)
        self.relaxing = Relaxing(self.lifetimes)
        model = self.namespace.create("it", None, PMD_SIZE, 0o600, BackingKind.SMALL, ROOT)
        model.ready = True
        self.origin = self.lifetimes.add_region(model, MemfdStore().create(model.id, BackingKind.SMALL, PMD_SIZE))

    def fork(self) -> LiveRegion:
        forking.shield(self.origin.model.mm)
        mm = forking.fork(self.origin.model.mm)
        model = self.namespace.fork(self.namespace.next_region(), self.origin.model, mm, "twin", OWNER)
        made = MemfdStore().create(model.id, BackingKind.SMALL, PMD_SIZE)
        return self.lifetimes.add_region(model, made, self.origin.family)

    def end(self, region: LiveRegion) -> None:
        self.namespace.abandon(region.model)
        self.lifetimes.forget(region)

    def armed_after(self, looks: int) -> bool:
        """Whether the origin has stores reported after so many looks."""
        for _ in range(looks):
            self.relaxing.look()
        return bool(list(self.origin.model.mm.armings()))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for region in world.lifetimes.regions():
        world.end(region)
    world.pager.close()


def test_one_that_was_alone_at_two_looks_is_relaxed_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.end(world.fork())
    assert world.armed_after(1)
    assert not world.armed_after(1)
    monkeypatch.setattr(forking, "relax", None)
    assert not world.armed_after(3)


def test_one_that_is_forked_between_two_looks_is_not(world: World) -> None:
    world.end(world.fork())
    assert world.armed_after(1)
    twin = world.fork()
    assert world.armed_after(1)
    world.end(twin)
    assert world.armed_after(1)
    assert not world.armed_after(1)


def test_one_with_relatives_is_not(world: World) -> None:
    world.fork()
    assert world.armed_after(3)


def test_one_that_refers_to_what_another_has_left_is_not(world: World) -> None:
    world.origin.backing.write(b"x", 0)
    world.origin.refresh_tables()
    twin = world.fork()
    world.end(world.origin)
    for _ in range(3):
        world.relaxing.look()
    assert twin.model.mm.rule.forked


def test_one_that_is_being_changed_has_to_wait(world: World) -> None:
    world.end(world.fork())

    async def change() -> list[bool]:
        async with world.origin.lock:
            during = world.armed_after(3)
        return [during, world.armed_after(1), world.armed_after(1)]

    assert trio.run(change) == [True, True, False]


def test_one_that_cannot_be_relaxed_keeps_nothing_else_from_going_on(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise InternalError("what nobody expects")

    world.end(world.fork())
    monkeypatch.setattr(apply, "carry_out", fail)
    world.armed_after(3)
    assert "region it: cannot be made native" in caplog.text
    caplog.clear()
