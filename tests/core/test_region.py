"""A region: its attachments, and addresses seen from either side of a window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange
from msharefs.errors import InvalidArgumentError
from msharefs.host_mm import HostMm
from msharefs.perms import Ownership
from msharefs.region import Attachment, AttachmentId, BackingKind, Region, RegionId

BASE = 32 << 40
SIZE = 4 * PMD_SIZE


def region() -> Region:
    owner = Ownership(10, 20, 0o600)
    return Region(RegionId(1), "name", owner, BackingKind.SMALL, HostMm(AddrRange.sized(BASE, SIZE)))


def window(start: int, *, number: int = 1, pid: int | None = 100) -> Attachment:
    return Attachment(AttachmentId(number), pid, AddrRange.sized(start, SIZE), readonly=False)


@pytest.mark.parametrize("start", [BASE, BASE + SIZE, BASE - PMD_SIZE, 1 << 30], ids=hex)
def test_an_address_in_a_window_stands_for_the_same_offset_in_the_region(start: int) -> None:
    guest = Address(start + 5 * PAGE_SIZE + 7)
    assert region().to_host(window(start), guest) == BASE + 5 * PAGE_SIZE + 7


@given(st.integers(16, 1 << 20), st.integers(0, 100), st.integers(1, 100))
def test_to_guest_goes_back_where_to_host_came_from(start: int, first: int, count: int) -> None:
    attachment = window(start * PMD_SIZE)
    host = AddrRange.sized(BASE + first * PAGE_SIZE, count * PAGE_SIZE)
    guest = region().to_guest(attachment, host)
    assert guest == AddrRange.sized(attachment.window.start + first * PAGE_SIZE, host.size)
    assert region().to_host(attachment, guest.start) == host.start


def test_to_guest_of_the_whole_region_is_the_window() -> None:
    attachment = window(1 << 30)
    assert region().to_guest(attachment, region().ar) == attachment.window


def test_offsets_count_from_the_start_of_the_region() -> None:
    ar = region().range_at(3 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert ar == AddrRange.sized(BASE + 3 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert region().offset_of(ar) == 3 * PAGE_SIZE


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_of_nothing_is_refused(length: int) -> None:
    with pytest.raises(InvalidArgumentError):
        region().range_at(0, length)


def test_processes_are_counted_once_and_children_not_told_apart_one_by_one() -> None:
    attached = region()
    for number, pid in enumerate([100, 100, 200, None, None]):
        attached.attachments[AttachmentId(number)] = window(BASE, number=number, pid=pid)
    assert attached.pids == {100, 200}
    assert attached.process_count == 4


def test_a_new_region_is_neither_ready_nor_attached() -> None:
    new = region()
    assert not new.ready
    assert (new.process_count, new.faults) == (0, 0)
    assert new.ar == AddrRange.sized(BASE, SIZE)
