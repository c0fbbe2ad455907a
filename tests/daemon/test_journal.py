"""The state file: what is appended is there again, what was cut short is dropped, anything else is refused."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest

from mshared import journal
from mshared.journal import Journal, StateError, load
from msharefs.errors import NoSpaceError

HEADER = 16 + 4 + 32 + 36 + 4


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / journal.NAME


@pytest.fixture
def written(path: Path) -> Path:
    """A file with three records."""
    book = Journal(path)
    book.keeper = "keeper-1"
    book.replace(b"one")
    book.append(b"two")
    book.append(b"three" * 1000)
    book.close()
    return path


def test_no_file_is_no_state(path: Path) -> None:
    assert load(path) is None
    assert journal.keeper_named(path) is None


def test_what_was_written_is_read_in_order(written: Path) -> None:
    found = load(written)
    assert found is not None
    assert found.records == (b"one", b"two", b"three" * 1000)
    assert (found.keeper, found.boot) == ("keeper-1", journal.boot_id())
    assert journal.keeper_named(written) == "keeper-1"
    assert written.stat().st_mode & 0o777 == 0o600


def test_replacing_leaves_one_record_and_appending_goes_on(path: Path) -> None:
    book = Journal(path)
    for text in (b"old", b"new"):
        book.replace(text)
        book.append(text + b" more")
    assert book.size == path.stat().st_size
    found = load(path)
    assert found is not None
    assert found.records == (b"new", b"new more")
    book.close()


def test_a_record_cut_short_anywhere_is_dropped(written: Path) -> None:
    """Whoever died while writing it had told nobody of it."""
    whole = written.read_bytes()
    first_two = HEADER + 12 + 3 + 12 + 3
    for length in [*range(first_two, first_two + 40), len(whole) - 1]:
        written.write_bytes(whole[:length])
        found = load(written)
        assert found is not None
        assert found.records == (b"one", b"two")


@pytest.mark.parametrize("at", [0, 17, 30, 60, 90, HEADER, HEADER + 5, HEADER + 9, HEADER + 13, HEADER + 30, -1])
def test_a_changed_byte_is_refused_with_the_file_and_a_cure(written: Path, at: int) -> None:
    data = bytearray(written.read_bytes())
    data[at] ^= 0x40
    written.write_bytes(data)
    with pytest.raises(StateError) as caught:
        load(written)
    assert str(written) in str(caught.value)
    assert f"remove the directory {written.parent}" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 4096, os.urandom(4096)])
def test_a_foreign_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StateError, match="no state file"):
        load(path)


def test_another_version_is_refused_by_number(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "VERSION", 7)
    with pytest.raises(StateError, match="has version 1, and this mshared knows version 7"):
        load(written)


def test_a_header_alone_is_no_state(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:HEADER])
    with pytest.raises(StateError, match="nothing is in it"):
        load(written)


def test_without_room_nothing_is_added(tmpfs: object, path: Path) -> None:
    place = tmpfs("size=256k") / journal.NAME  # type: ignore[operator]
    book = Journal(place)
    book.replace(b"kept")
    with pytest.raises(NoSpaceError, match="make room"):
        book.append(b"x" * (1 << 20))
    with pytest.raises(NoSpaceError):
        book.check_room()
    book.append(b"after")
    found = load(place)
    assert found is not None
    assert found.records == (b"kept", b"after")
    with pytest.raises(NoSpaceError):
        book.replace(b"y" * (1 << 20))
    assert load(place) == found
    assert sorted(os.listdir(place.parent)) == [journal.NAME]
    book.close()


def test_promised_room_is_there_when_the_rest_is_taken(tmpfs: object) -> None:
    place = tmpfs("size=2m") / journal.NAME  # type: ignore[operator]
    book = Journal(place)
    book.replace(b"first")
    book.check_room()
    with (place.parent / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
        while True:
            other.write(b"x" * 65536)
    book.append(b"y" * 60000)
    found = load(place)
    assert found is not None
    assert [len(record) for record in found.records] == [5, 60000]
    book.close()


def test_records_have_their_length_and_two_checksums(written: Path) -> None:
    """The layout that the module describes, as another program would read it."""
    data = written.read_bytes()
    assert data[:16] == b"msharefs state\r\n"
    assert struct.unpack_from("<I", data, HEADER)[0] == 3
