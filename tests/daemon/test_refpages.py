"""Filling memory from reference pages: who has what protected before, what comes, and what is noted of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
from fake_kernel import ELSEWHERE, PID, TID, World, calls, fail, pages

from mshared import apply, processes, refpages
from mshared.live import LiveAttachment
from mshared.uffd import Outcome
from msharefs import clean_pages
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import FillPattern
from msharefs.perms import PROT_RW
from msharefs.refpage import RefPage

AA = RefPage(b"\xaa")
LOADED, STORED = FillPattern(pages(4, 3), AA, clean=True), FillPattern(pages(4, 3), AA, clean=False)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.region.model.mm.mmap(pages(0, 512), PMD_SIZE, PROT_RW, fixed=True, replace=True, source=AA)
    yield world
    world.region.close()


def answer(attachment: LiveAttachment, effect: FillPattern) -> Outcome:
    return apply.answer_fault(attachment, attachment.guest(effect.ar).start, TID, effect)


def clean(world: World) -> list[AddrRange]:
    return clean_pages.clean(world.region.model.mm, pages(0, 512))


def installed(world: World) -> list[AddrRange]:
    return world.region.model.mm.table.present(pages(0, 512))


def content(world: World, number: int) -> bytes:
    return os.pread(world.region.backing.fd, PAGE_SIZE, number * PAGE_SIZE)


def test_clean_pages_come_after_everybody_else_has_them_protected(world: World) -> None:
    mine, other, reader = world.attach(), world.attach(ELSEWHERE), world.attach(readonly=True)
    assert answer(mine, LOADED) is Outcome.SERVED
    assert calls(other) == [("protect", pages(4, 3, at=ELSEWHERE))]
    assert calls(mine) == [("copy", pages(4, 3), True)]
    assert calls(reader) == []
    assert clean(world) == [pages(4, 3)]


def test_written_pages_come_as_they_are(world: World) -> None:
    mine, other = world.attach(), world.attach(ELSEWHERE)
    assert answer(mine, STORED) is Outcome.SERVED
    assert (calls(mine), calls(other)) == ([("copy", pages(4, 3), False)], [])
    assert (clean(world), installed(world)) == ([], [pages(4, 3)])


AHEAD = FillPattern(pages(4), AA, clean=False, ahead=(pages(20), pages(36), pages(52)))


def test_pages_ahead_come_from_the_last_on(world: World) -> None:
    """Who goes on is not woken for each of them: the next one is there when all are."""
    mine = world.attach()
    assert answer(mine, AHEAD) is Outcome.SERVED
    assert calls(mine) == [("copy", pages(number), False) for number in (4, 52, 36, 20)]
    assert installed(world) == [pages(number) for number in (4, 20, 36, 52)]


def test_a_page_ahead_that_is_there_already_is_left_out(world: World) -> None:
    mine = world.attach()
    fail(mine, "copy", 0, errno.EEXIST)
    assert answer(mine, AHEAD) is Outcome.SERVED
    assert installed(world) == [pages(number) for number in (4, 20, 36)]


def test_without_memory_no_more_pages_come_ahead(world: World) -> None:
    mine = world.attach()
    fail(mine, "copy", 0, 0, errno.ENOMEM)
    assert answer(mine, AHEAD) is Outcome.SERVED
    assert [call[0] for call in calls(mine)] == ["copy", "copy"]
    assert installed(world) == [pages(4), pages(52)]


def test_only_what_came_is_noted(world: World) -> None:
    mine = world.attach()
    uffd: Any = mine.uffd
    uffd.comes = 2 * PAGE_SIZE
    assert answer(mine, LOADED) is Outcome.SERVED
    assert clean(world) == [pages(4, 2)]


@pytest.mark.parametrize("failing", ["protect", "copy"])
def test_while_a_process_is_forked_nothing_comes(world: World, failing: str) -> None:
    mine, other = world.attach(), world.attach(ELSEWHERE)
    fail(other if failing == "protect" else mine, failing, errno.EAGAIN)
    assert answer(mine, LOADED) is Outcome.RETRY
    assert installed(world) == []


def test_what_is_there_already_is_left_alone(world: World) -> None:
    mine = world.attach()
    os.pwrite(world.region.backing.fd, b"old", 4 * PAGE_SIZE)
    fail(mine, "copy", errno.EEXIST)
    assert answer(mine, LOADED) is Outcome.SERVED
    assert calls(mine)[-1] == ("wake", pages(4))
    assert content(world, 4)[:4] == b"old\0"
    assert installed(world) == []


def test_a_readers_page_comes_by_the_file(world: World) -> None:
    """Its window is a private mapping: what is put there would not be the region's."""
    writer, reader = world.attach(), world.attach(ELSEWHERE, readonly=True)
    assert answer(reader, LOADED) is Outcome.SERVED
    assert calls(writer) == [("protect", pages(4, 3))]
    assert calls(reader) == [("wake", pages(4, at=ELSEWHERE))]
    assert content(world, 4) == b"\xaa" * PAGE_SIZE
    assert clean(world) == [pages(4)]


def test_without_memory_the_thread_gets_a_sigbus(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    mine = world.attach()
    fail(mine, "copy", errno.ENOMEM)

    def no_memory(offset: int, data: bytes) -> bool:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(world.region.filler(), "copy", no_memory)
    monkeypatch.setattr(processes, "in_system_call", lambda *_: False)
    monkeypatch.setattr(processes, "would_miss", lambda *_: False)
    monkeypatch.setattr(processes, "thread_seen_from_here", lambda _, tid: tid)
    monkeypatch.setattr(processes, "send_fault_signal", lambda *args: sent.append(args))
    answer(mine, STORED)
    assert sent == [(PID, TID, 7, pages(4).start)]
    assert installed(world) == []


def test_who_attaches_later_has_clean_pages_protected(world: World) -> None:
    clean_pages.came(world.region.model.mm, pages(7, 2), clean=True)
    clean_pages.came(world.region.model.mm, pages(9), clean=False)
    new, reader = world.attach(), world.attach(ELSEWHERE, readonly=True)
    for attachment in (new, reader):
        apply.arm_new(attachment)
    assert [call for call in calls(new) if call[0] == "protect"] == [("protect", pages(7, 2))]
    assert [call for call in calls(reader) if call[0] == "protect"] == []


def test_few_buffers_are_kept_and_none_of_what_nobody_shows() -> None:
    patterns = [RefPage(bytes([number])) for number in range(10)]
    for refpage in patterns:
        assert bytes(refpages._buffer(refpage).view[:2]) == refpage.pattern * 2
    assert len(refpages._buffers) <= 4
    kept = len(refpages._buffers)
    patterns.clear()
    del refpage
    assert len(refpages._buffers) < kept


def test_where_a_file_has_nothing_a_huge_page_may_come(world: World) -> None:
    """Here with a file of small pages, which takes the same."""
    backing = world.region.backing
    assert backing.is_empty(AddrRange.sized(0, PMD_SIZE))
    os.pwrite(backing.fd, b"x", 5 * PAGE_SIZE)
    assert not backing.is_empty(AddrRange.sized(0, PMD_SIZE))
    assert backing.is_empty(AddrRange.sized(0, 5 * PAGE_SIZE))
    assert backing.is_empty(AddrRange.sized(6 * PAGE_SIZE, PMD_SIZE - 6 * PAGE_SIZE))
