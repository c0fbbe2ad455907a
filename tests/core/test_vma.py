"""One VMA: cut, grown, merged, and what it makes the kernel report."""

from __future__ import annotations

import attrs
import pytest

from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.errors import InvalidArgumentError
from msharefs.perms import PROT_RW, Prot
from msharefs.vma import Arming, FileId, FileSource, Vma

FILE = FileSource(FileId(1), 7 * PAGE_SIZE, shared=True, writable=True)


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def test_split_gives_the_part_below_and_the_part_from_an_address() -> None:
    below, above = Vma(pages(2, 8), Prot.READ).split(Address(5 * PAGE_SIZE))
    assert below == Vma(pages(2, 5), Prot.READ)
    assert above == Vma(pages(5, 8), Prot.READ)


@pytest.mark.parametrize("page", [2, 8, 1, 9])
def test_a_split_at_a_border_or_outside_is_refused(page: int) -> None:
    with pytest.raises(InvalidArgumentError):
        Vma(pages(2, 8)).split(Address(page * PAGE_SIZE))


def test_split_parts_merge_again() -> None:
    whole = Vma(pages(2, 8), Prot.READ)
    below, above = whole.split(Address(5 * PAGE_SIZE))
    assert below.merges_with(above)
    assert below.joined(above) == whole


@pytest.mark.parametrize(
    "above",
    [
        pytest.param(Vma(pages(5, 8), Prot.READ), id="another protection"),
        pytest.param(Vma(pages(6, 8)), id="a hole between"),
        pytest.param(Vma(pages(4, 8)), id="an overlap"),
        pytest.param(Vma(pages(0, 2)), id="below"),
    ],
)
def test_what_does_not_go_on_in_the_same_way_does_not_merge(above: Vma) -> None:
    assert not Vma(pages(2, 5)).merges_with(above)


@pytest.mark.parametrize(
    ("ar", "expected"),
    [
        (pages(0, 4), pages(2, 4)),
        (pages(4, 6), pages(4, 6)),
        (pages(6, 9), pages(6, 8)),
        (pages(0, 9), pages(2, 8)),
    ],
)
def test_clipped_keeps_the_part_in_common(ar: AddrRange, expected: AddrRange) -> None:
    assert Vma(pages(2, 8), Prot.READ).clipped(ar) == Vma(expected, Prot.READ)


@pytest.mark.parametrize(
    ("prot", "arming"),
    [
        (PROT_RW, Arming.NATIVE),
        (Prot.WRITE, Arming.NATIVE),
        (Prot.READ, Arming.WP),
        (Prot.NONE, Arming.MISSING),
    ],
)
def test_only_what_is_not_writable_must_be_seen_by_the_daemon(prot: Prot, arming: Arming) -> None:
    assert Vma(pages(0, 1), prot).arming() == arming


def at(page: int, *, shared: bool = True) -> FileSource:
    """The file from a page of it on."""
    return attrs.evolve(FILE, offset=page * PAGE_SIZE, shared=shared)


def test_each_page_of_a_file_has_its_own_offset() -> None:
    vma = Vma(pages(2, 8), source=FILE)
    assert [vma.source_at(Address(page * PAGE_SIZE)) for page in (2, 3, 8)] == [at(7), at(8), at(13)]
    assert Vma(pages(2, 8)).source_at(Address(3 * PAGE_SIZE)) is None


def test_what_is_cut_off_a_file_shows_what_it_showed() -> None:
    whole = Vma(pages(2, 8), source=FILE)
    below, above = whole.split(Address(5 * PAGE_SIZE))
    assert (below.source, above.source) == (at(7), at(10))
    assert whole.clipped(pages(4, 20)) == Vma(pages(4, 8), source=at(9))
    assert below.merges_with(above)
    assert below.joined(above) == whole


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(None, id="memory"),
        pytest.param(at(7), id="the same part again"),
        pytest.param(at(11), id="a part further up"),
        pytest.param(at(10, shared=False), id="private"),
        pytest.param(attrs.evolve(at(10), file=FileId(2)), id="another file"),
    ],
)
def test_what_does_not_go_on_in_the_file_does_not_merge(source: FileSource | None) -> None:
    assert not Vma(pages(2, 5), source=FILE).merges_with(Vma(pages(5, 8), source=source))
    assert not Vma(pages(2, 5)).merges_with(Vma(pages(5, 8), source=FILE))


@pytest.mark.parametrize(
    ("prot", "shared", "arming"),
    [
        (PROT_RW, True, Arming.MISSING | Arming.WP),
        (Prot.WRITE, True, Arming.MISSING | Arming.WP),
        (Prot.READ, True, Arming.MISSING | Arming.WP),
        (Prot.NONE, True, Arming.MISSING),
        (PROT_RW, False, Arming.MISSING),
        (Prot.READ, False, Arming.MISSING | Arming.WP),
        (Prot.NONE, False, Arming.MISSING),
    ],
)
def test_of_a_file_each_first_touch_is_seen_and_of_a_shared_one_each_first_store(
    prot: Prot, shared: bool, arming: Arming
) -> None:
    vma = Vma(pages(0, 1), prot, at(0, shared=shared))
    assert vma.arming() == arming
    assert vma.reaches_file is shared


def test_memory_reaches_no_file() -> None:
    assert not Vma(pages(0, 1)).reaches_file


def test_a_split_leaves_the_faults_counted_with_the_lower_part_and_joined_they_add_up() -> None:
    whole = Vma(pages(4, 8))
    whole.count.served = 3
    below, above = whole.split(Address(5 * PAGE_SIZE))
    assert (below.count.served, above.count.served) == (3, 0)
    above.count.served += 2
    assert below.joined(above).count.served == 5
