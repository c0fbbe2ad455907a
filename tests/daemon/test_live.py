"""A region's files: made when first needed, closed together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from mshared import live
from mshared.backing import MemfdStore
from mshared.live import LiveAttachment, LiveRegion
from mshared.sparse import extents
from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership
from msharefs.region import BackingKind


@pytest.fixture
def namespace() -> Namespace:
    return Namespace(Ownership(0, 0, 0o777), Policy())


@pytest.fixture
def new_region(namespace: Namespace) -> Callable[[], LiveRegion]:
    def make() -> LiveRegion:
        model = namespace.create("it", None, PMD_SIZE, 0o600, BackingKind.SMALL, Credentials(0, 0))
        return LiveRegion(model, MemfdStore().create(model.id, BackingKind.SMALL, PMD_SIZE), None)

    return make


@pytest.fixture
def region(new_region: Callable[[], LiveRegion]) -> Iterator[LiveRegion]:
    region = new_region()
    yield region
    region.close()


def page(number: int) -> AddrRange:
    return AddrRange.sized(number * PAGE_SIZE, PAGE_SIZE)


def test_the_stash_is_made_once_and_as_long_as_the_region(
    region: LiveRegion, open_descriptors: Callable[[], int]
) -> None:
    before = open_descriptors()
    assert region.stash() == region.stash()
    assert open_descriptors() == before + 1
    assert os.fstat(region.stash()).st_size == PMD_SIZE
    assert list(extents(region.stash())) == []


def test_punching_makes_no_stash(region: LiveRegion, open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    os.pwrite(region.backing.fd, b"x", 0)
    region.punch(page(0))
    assert list(extents(region.backing.fd)) == []
    assert open_descriptors() == before


def test_punching_reaches_the_stash(region: LiveRegion) -> None:
    os.pwrite(region.stash(), b"x" * 2 * PAGE_SIZE, 0)
    region.punch(page(1))
    assert list(extents(region.stash())) == [page(0)]


def test_pages_are_put_and_no_neighbours(region: LiveRegion) -> None:
    region.put(b"a" * PAGE_SIZE + b"b" * PAGE_SIZE, 4 * PAGE_SIZE)
    assert list(extents(region.backing.fd)) == [AddrRange.sized(4 * PAGE_SIZE, 2 * PAGE_SIZE)]
    assert os.pread(region.backing.fd, 2, 5 * PAGE_SIZE - 1) == b"ab"


def test_what_is_put_replaces_what_is_there(region: LiveRegion) -> None:
    os.pwrite(region.backing.fd, b"old", 0)
    region.put(b"n" * PAGE_SIZE, 0)
    assert os.pread(region.backing.fd, PAGE_SIZE, 0) == b"n" * PAGE_SIZE


def test_the_filler_is_made_once(region: LiveRegion) -> None:
    assert region.filler() is region.filler()


def test_closing_closes_everything(new_region: Callable[[], LiveRegion], open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    region = new_region()
    region.stash()
    region.filler().zero(0)
    region.close()
    assert open_descriptors() == before


def test_lines_of_the_log_start_with_region_and_process(namespace: Namespace, region: LiveRegion) -> None:
    model = namespace.attach(region.model, region.model.ar.start, 4321, readonly=False)
    attachment = LiveAttachment(model, region, None, Address(0))  # type: ignore[arg-type]
    assert str(attachment) == "region it pid 4321"
    namespace.remove(region.model, Credentials(0, 0))
    assert str(attachment) == f"region {region.model.id} pid 4321"


def test_memory_that_counts_before_it_shows_is_found_when_it_does(
    region: LiveRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts a page, then zeroes it, and only then says that it is there."""
    os.pwrite(region.backing.fd, b"x", 0)
    monkeypatch.setattr(live, "resident", lambda _fd: 2 * PAGE_SIZE)
    region.refresh_tables()
    os.pwrite(region.backing.fd, b"y", PAGE_SIZE)
    region.refresh_tables()
    assert region.model.mm.table.resident == 2 * PAGE_SIZE
