"""Writing down: what a request has changed stands in one entry with its answer, and what finds no room is owed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import World, pages

from mshared import encoding, journal
from mshared import records as rec
from mshared.book import Asked, Book, asked, mapped
from mshared.journal import Journal
from mshared.saved import Saved
from msharefs import protocol
from msharefs.errors import NoSpaceError
from msharefs.perms import Prot

ME = Asked("mine", 77, 9, 3)


@pytest.fixture
def book(directory: Path) -> Iterator[Book]:
    file = Journal(directory / journal.NAME)
    book = Book(file)
    book.rewrite()
    yield book
    file.close()


@pytest.fixture
def request_() -> Iterator[None]:
    """One is under way."""
    token = asked.set(ME)
    yield
    asked.reset(token)


def entries(book: Book) -> list[list[rec.Record]]:
    """After the first, which says how everything is."""
    assert book.journal is not None
    found = journal.load(book.journal.path)
    assert found is not None
    return [encoding.decode(entry) for entry in found.records[1:]]


def test_records_and_answer_are_one_entry(book: Book, request_: None) -> None:
    book.commit(rec.RegionGone(1), rec.AttachmentGone(2), reply=protocol.Done())
    (entry,) = entries(book)
    assert entry == [
        rec.RegionGone(1),
        rec.AttachmentGone(2),
        rec.Answered("mine", 77, 9, 3, protocol.encode(protocol.Done())),
    ]


def test_nobody_is_answered_where_nobody_asked(book: Book) -> None:
    book.commit(rec.RegionGone(1), reply=protocol.Done())
    assert entries(book) == [[rec.RegionGone(1)]]
    book.commit()
    assert len(entries(book)) == 1


def test_an_answer_is_had_again_until_the_session_ends(book: Book, request_: None) -> None:
    book.commit(reply=protocol.Placed(5))
    hello = protocol.Hello("c", "mine", 2, waiting=True)
    again, packet, written = book.resume(hello, 77)
    assert (packet, written) == (protocol.encode(protocol.Placed(5)), None)
    assert again.number == 3
    later = protocol.Hello("c", "mine", 3, waiting=True)
    for other, pid in [(protocol.Hello("c", "mine", 2), 77), (later, 77), (hello, 78)]:
        assert book.resume(other, pid)[1] is None
    book.end_session("mine")
    assert book.resume(hello, 77)[1] is None
    assert entries(book)[-1] == [rec.SessionGone("mine")]


def test_an_answer_that_came_to_nothing_is_taken_back(book: Book, request_: None) -> None:
    book.commit(reply=protocol.Done())
    book.take_back_answer()
    assert book.answers == {}


def test_what_finds_no_room_is_owed_in_order(
    book: Book, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert book.journal is not None
    plain, full = book.journal.append, [True]

    def append(record: bytes) -> None:
        if full:
            raise NoSpaceError("the state cannot be written; make room")
        plain(record)

    monkeypatch.setattr(book.journal, "append", append)
    for number in (1, 2):
        book.commit(rec.RegionGone(number))
        assert not book.is_settled()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    full.clear()
    assert book.is_settled()
    assert entries(book) == [[rec.RegionGone(1), rec.RegionGone(2)]]


def test_it_says_when_it_would_be_worth_to_write_it_anew(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    book.grown = lambda: calls.append(1)
    monkeypatch.setattr(book, "_least", 2000)
    while not calls:
        book.commit(rec.RegionGone(1))
    assert book.journal is not None
    assert book.journal.size > 2000
    book.rewrite()
    assert entries(book) == []


def test_without_a_journal_nothing_is_written() -> None:
    book = Book()
    book.commit(rec.RegionGone(1), reply=protocol.Done())
    book.check_room()
    assert book.is_settled()


def test_a_region_is_written_as_it_is_and_again_as_it_changes(book: Book) -> None:
    """Whether it is written whole, or change by change, comes to the same."""
    world = World()
    region: Any = world.region
    region.book = book
    attachment: Any = world.attach()
    attachment.uffd.fd = 5
    book.regions[region.model.id] = region
    book.rewrite()
    before = journal.load(book.journal.path)  # type: ignore[union-attr]
    assert before is not None
    saved = Saved.of(before.records)
    assert saved.attachments[attachment.model.id].model == attachment.model
    assert list(saved.regions[region.model.id].vmas) == list(region.model.mm.vmas)
    changes = region.model.mm.mprotect(pages(3, 2), Prot.READ)
    world.carry_out(*changes)
    region.note(mapped(region, pages(3, 2)))
    by_change = journal.load(book.journal.path)  # type: ignore[union-attr]
    book.rewrite()
    whole = journal.load(book.journal.path)  # type: ignore[union-attr]
    assert by_change is not None
    assert whole is not None
    one, other = (Saved.of(each.records).regions[region.model.id] for each in (by_change, whole))
    assert list(one.vmas) == list(other.vmas) == list(region.model.mm.vmas)
    region.backing.close()
