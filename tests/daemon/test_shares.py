"""A user's share of the daemon's descriptors: who has one, what counts, what a request needs."""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from mshared.shares import ATTACHMENT, CONNECTION, REGION, Shares
from msharefs import protocol
from msharefs.errors import QuotaError

EVIL, OTHER = 65534, 1
MOST = 200
MMAP = protocol.Mmap(1, 0, 4096, 3, 1)
CREATE = protocol.Create("x", None, 1 << 21, 0o600, exclusive=True, empty=False)


@attrs.define
class World:
    """Regions that are none."""

    found: list[Any] = attrs.Factory(list)

    def regions(self) -> list[Any]:
        return self.found

    def add(self, owner: int, files: int = 0, attached: tuple[int, ...] = (), *, kept: bool = False) -> None:
        model = SimpleNamespace(owner=SimpleNamespace(uid=owner), kept=kept)
        attachments = [SimpleNamespace(uid=uid) for uid in attached]
        self.found.append(SimpleNamespace(model=model, files=range(files), attachments=attachments))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def shares(world: World, monkeypatch: pytest.MonkeyPatch) -> Shares:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * MOST, 2 * MOST))
    return Shares(world)  # type: ignore[arg-type]


def left(shares: Shares, uid: int = EVIL) -> int:
    """How many descriptors a user can leave with the daemon still, by one request."""
    for files in range(MOST + 2):
        try:
            shares.check(uid, MMAP, files)
        except QuotaError:
            return files - 1
    raise AssertionError("there is no limit")


def test_half_of_them_is_a_share(shares: Shares) -> None:
    assert left(shares) == MOST


def test_what_a_user_has_counts_for_that_user_only(shares: Shares, world: World) -> None:
    shares.connections[EVIL] = 2
    world.add(EVIL, files=5, attached=(EVIL, EVIL, OTHER))
    world.add(OTHER, files=50, attached=(EVIL,))
    world.add(EVIL, kept=True)
    assert left(shares) == MOST - 2 * CONNECTION - (REGION + 5) - (REGION + 1) - 3 * ATTACHMENT
    assert left(shares, OTHER) == MOST - (REGION + 50) - ATTACHMENT


@pytest.mark.parametrize(
    ("message", "files", "needs"),
    [
        (protocol.MapFile(None, 1 << 21, 0, 3), 1, REGION + ATTACHMENT + 1),
        (CREATE, 2, REGION + ATTACHMENT + 2),
        (protocol.Fork(1, "y", 0), 0, REGION),
        (protocol.Snapshot((1, 1, 1)), 0, 3 * REGION),
        (protocol.Mapped(1, 0, 0), 2, ATTACHMENT),
        (protocol.Adopt(1), 1, ATTACHMENT),
        (MMAP, 1, 1),
    ],
)
def test_what_requests_need(shares: Shares, world: World, message: Any, files: int, needs: int) -> None:
    """That much can be had, and no more."""
    world.add(EVIL, files=MOST - REGION - needs)
    shares.check(EVIL, message, files)
    world.found.clear()
    world.add(EVIL, files=MOST - REGION - needs + 1)
    with pytest.raises(QuotaError, match="open files"):
        shares.check(EVIL, message, files)


@pytest.mark.parametrize("message", [protocol.Detach(1), protocol.Unlink("x"), protocol.GetList(), MMAP])
def test_what_needs_none_is_never_refused(shares: Shares, world: World, message: Any) -> None:
    """So that whoever has too many can have fewer."""
    world.add(EVIL, files=2 * MOST)
    shares.check(EVIL, message, 0)


def test_connections(shares: Shares) -> None:
    """The one too many is told so, as long as there are not very many of them."""
    shares.connections[EVIL] = MOST // CONNECTION
    shares.check(EVIL, None, 0)
    shares.connections[EVIL] += 1
    with pytest.raises(QuotaError):
        shares.check(EVIL, None, 0)
    assert not shares.are_too_many(EVIL)
    shares.connections[EVIL] = 2 * MOST // CONNECTION + 1
    assert shares.are_too_many(EVIL)
    assert not shares.are_too_many(OTHER)


@pytest.mark.parametrize("uid", [0, 1000])
def test_root_and_the_daemon_s_own_user_may_have_all(world: World, monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 10))
    shares = Shares(world)  # type: ignore[arg-type]
    shares.connections[uid] = 1000
    shares.check(uid, CREATE, 5)
    shares.check(uid, None, 0)
    assert not shares.are_too_many(uid)
