"""Arenas on plain memory: what is given out is apart, aligned, zeroed, and used again."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mshare.arena import Arena

SIZE = 1 << 20


@attrs.frozen
class Memory:
    """As much of a region as an arena wants to know."""

    address: int
    size: int
    name: str = "it"


class Pair(ctypes.Structure):
    """Two numbers."""

    _fields_ = (("first", ctypes.c_uint64), ("second", ctypes.c_double))


@pytest.fixture
def region() -> Iterator[Any]:
    memory = mmap.mmap(-1, SIZE)
    first = ctypes.c_char.from_buffer(memory)
    yield Memory(ctypes.addressof(first), SIZE)
    del first
    memory.close()


def fill(address: int, size: int, byte: int = 0xFF) -> None:
    ctypes.memset(address, byte, size)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
def test_pieces_are_apart_aligned_and_zeros_whatever_came_before(steps: list[tuple[bool, int]]) -> None:
    """What each holds stays what was stored, while others are given out, stored to and taken back."""
    memory = mmap.mmap(-1, SIZE)
    first = ctypes.c_char.from_buffer(memory)
    arena = Arena(Memory(ctypes.addressof(first), SIZE))  # type: ignore[arg-type]
    held: list[tuple[int, int, int]] = []
    for number, (gives_back, size) in enumerate(steps):
        if gives_back and held:
            address, length, byte = held.pop(size % len(held))
            assert ctypes.string_at(address, length) == bytes([byte]) * length
            arena.free(address)
        else:
            address = arena.alloc(size)
            assert address % 16 == 0
            assert ctypes.string_at(address, size) == bytes(size)
            held.append((address, size, number % 255 + 1))
            fill(*held[-1])
    for address, length, byte in held:
        assert ctypes.string_at(address, length) == bytes([byte]) * length
    del first, arena
    memory.close()


def test_what_is_taken_back_is_given_again(region: Any) -> None:
    arena = Arena(region)
    first, second = arena.alloc(100), arena.alloc(100)
    arena.free(first)
    arena.free(second)
    assert {arena.alloc(112), arena.alloc(60 + 38)} == {first, second}
    assert arena.alloc(100) not in {first, second}


def test_another_goes_on_where_one_has_stopped(region: Any) -> None:
    one, other = Arena(region), Arena(region)
    first = one.alloc(50)
    assert other.alloc(50) != first
    other.free(first)
    assert one.alloc(50) == first
    one.root = first
    assert other.root == first
    assert Arena(region).root == first


def test_it_is_full_at_the_end_and_not_before(region: Any) -> None:
    arena = Arena(region)
    for order in range(18, 4, -1):
        while True:
            try:
                arena.alloc((1 << order) - 16)
            except OSError as error:
                assert error.errno == errno.ENOMEM  # noqa: PT017 - it is raised in the end, whatever fits before
                break
    assert arena._end - arena._header.top < 32
    for size in (16, 1 << 60):
        with pytest.raises(OSError, match="left") as caught:
            arena.alloc(size)
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("wrong", ["twice", "inside", "before", "beyond", "none"])
def test_only_what_was_given_out_is_taken_back(region: Any, wrong: str) -> None:
    arena = Arena(region)
    address, gone = arena.alloc(100), arena.alloc(100)
    fill(address, 100)
    arena.free(gone)
    place = {
        "twice": gone,
        "inside": address + 16,
        "before": region.address,
        "beyond": region.address + SIZE,
        "none": 0,
    }
    with pytest.raises(OSError, match="nothing that was given out") as caught:
        arena.free(place[wrong])
    assert caught.value.errno == errno.EINVAL
    assert arena.alloc(100) == gone
    assert ctypes.string_at(address, 100) == b"\xff" * 100


def test_what_cannot_be_asked_for_is_einval(region: Any) -> None:
    with pytest.raises(OSError, match="cannot be had"):
        Arena(region).alloc(-1)


def test_structures_and_arrays_stand_where_their_addresses_say(region: Any) -> None:
    arena = Arena(region)
    pair = arena.new(Pair, 5, second=0.5)
    row = arena.new(Pair * 3, pair, Pair(6, 1.5))
    assert Pair.from_address(ctypes.addressof(pair)).first == 5
    assert [(each.first, each.second) for each in row] == [(5, 0.5), (6, 1.5), (0, 0)]
    assert region.address < ctypes.addressof(row) < region.address + SIZE
    arena.free(ctypes.addressof(pair))
    assert ctypes.addressof(arena.new(Pair)) == ctypes.addressof(pair)


def test_a_window_elsewhere_is_einval(region: Any) -> None:
    arena = Arena(region)
    arena._header.base += 4096
    with pytest.raises(OSError, match="where it lies at") as caught:
        Arena(region)
    assert caught.value.errno == errno.EINVAL


def test_a_region_that_holds_something_else_is_left_alone(region: Any) -> None:
    fill(region.address, 8)
    with pytest.raises(OSError, match="something else"):
        Arena(region)
    assert ctypes.string_at(region.address + 8, 100) == bytes(100)


def test_the_lock_is_held_for_every_change(region: Any) -> None:
    class Lock:
        held = 0

        def __enter__(self) -> None:
            self.held += 1

        def __exit__(self, *_exc: object) -> None:
            fill(region.address + SIZE - 1, 1, self.held)

    lock = Lock()
    arena = Arena(region, lock)
    arena.free(arena.alloc(1))
    assert lock.held == 3
