"""What is written down: each record as it was after reading, and what a row of them comes to."""

from __future__ import annotations

from typing import Any, get_args

import attrs
import pytest

from mshared import encoding
from mshared import records as rec
from mshared.saved import Saved
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.effects import Arm, Protect, Punch, Signal, Stash, Unstash, WriteBack
from msharefs.errors import InternalError
from msharefs.file_sharing import FileKey, SharedFile
from msharefs.frames import StoreNo
from msharefs.host_mm import HostMm
from msharefs.perms import PROT_RW, Advice, Ownership, Prot
from msharefs.refpage import RefPage
from msharefs.region import Attachment, AttachmentId, BackingKind, Region, RegionId, Unshared
from msharefs.vma import Arming, FileId, FileSource, Vma

BASE = 32 << 40


def pages(first: int, count: int = 1) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, count * PAGE_SIZE)


def region(number: int = 1, *, store: int = 0, family: int = 1, **fields: Any) -> rec.RegionIs:
    ar = AddrRange.sized(BASE, PMD_SIZE)
    model = Region(RegionId(number), f"r{number}", Ownership(1, 2, 0o640), BackingKind.SMALL, HostMm(ar), **fields)
    layout = rec.Layout(
        ar, 4, PAGE_SIZE, PAGE_SIZE, False, Signal.SIGBUS, Arming.WP, family, StoreNo(store)
    )  # fmt: skip
    return rec.RegionIs(encoding.region_fields(model), layout, rec.Memory(10, 11, 12, None, 0, "/p", None), 99)


ATTACHMENT = rec.AttachmentIs(
    1, Attachment(AttachmentId(5), 77, pages(0, 512), readonly=True, forked_from=AttachmentId(4)), 4096, 20, None, 3, 9,
    ((pages(1), 8192),), (4096,), (8192,), 1000, True,
)  # fmt: skip
FILE = FileSource(FileId(1), 8192, shared=True, writable=False)
VMAS = (
    Vma(pages(0, 2)),
    Vma(pages(2), Prot.NONE),
    Vma(pages(3, 3), Prot.READ, FILE, Advice.RANDOM),
    Vma(pages(6), PROT_RW, RefPage.of(b"\0\xff")),
)
CHANGES = (
    Arm(pages(0), Arming.MISSING | Arming.WP), Protect(pages(0)), Punch(pages(1)), Stash(pages(2)), Unstash(pages(2)),
    WriteBack(pages(3), FileId(1), 4096),
)  # fmt: skip
FORKED = rec.Forked(
    2, 1, (pages(0, 3),), StoreNo(1), rec.Memory(13, 14, 15), 98, Ownership(1, 2, 0o640), "twin", "r1"
)  # fmt: skip
ALL: list[rec.Record] = [
    region(),
    region(2, unshared=Unshared("then", "why"), origin="r1", used=5, transient=True, kept=True),
    region(3, file=SharedFile(FileKey(1, 2, 3), 0, Prot.READ, resident=True)),
    rec.RegionGone(1),
    rec.Mapped(1, pages(0, 7), VMAS, cleared=True),
    rec.FileIs(1, FileId(1), 30, "/tmp/\udc80", 0xEF53),
    rec.FileGone(1, FileId(1)),
    rec.Begun(1, CHANGES),
    rec.Moved(1, 2),
    rec.Ended(1),
    rec.Dirty(1, pages(0, 4), (pages(1), pages(3))),
    rec.SetAside(1, 1, 31, 4096, bytes(range(256)), 0),
    rec.Written(1, 1),
    FORKED,
    rec.Refers(2, ((pages(0), StoreNo(0)),)),
    rec.Inherited(1, pages(0), StoreNo(0), StoreNo(1)),
    ATTACHMENT,
    rec.AttachmentGone(5),
    rec.WasAttached(9, 1),
    rec.Poisoned(5, 4096, on=True),
    rec.Refused(5, 4096, on=False),
    rec.PoisonedForAll(1, pages(0), on=True),
    rec.UntakenIs("t", 2, True, 1, 2, (3, 4), 77, 9),
    rec.UntakenGone("t"),
    rec.Answered("s", 77, 9, 3, b"MSHR\0\xff"),
    rec.SessionGone("s"),
    rec.Counters(7, 8),
]


def test_every_kind_is_here() -> None:
    assert {type(record) for record in ALL} == set(get_args(rec.Record))


@pytest.mark.parametrize("record", ALL, ids=lambda record: type(record).__name__)
def test_a_record_is_read_as_it_was_written(record: rec.Record) -> None:
    assert encoding.decode(encoding.encode([record])) == [record]


def test_of_a_region_all_fields_are_there_but_those_that_are_told_apart() -> None:
    """A field that the core gets one day is written down, too."""
    written = set(
        encoding.region_fields(Region(RegionId(1), None, Ownership(0, 0, 0), BackingKind.THP, HostMm(pages(0))))
    )
    assert written == {field.name for field in attrs.fields(Region)} - {"mm", "attachments", "latency"}


def replay(*records: rec.Record) -> Saved:
    return Saved.of([encoding.encode(records)])


class TestReplay:
    """What holds in the end."""

    def test_the_last_word_on_a_region_holds_and_the_rest_of_it_stays(self) -> None:
        renamed = region()
        renamed = attrs.evolve(renamed, model={**renamed.model, "name": None})
        saved = replay(region(), rec.Mapped(1, pages(0, 7), VMAS), renamed)
        assert saved.regions[1].last == renamed
        assert list(saved.regions[1].vmas) == list(VMAS)
        assert saved.next_region == 2

    def test_a_mapping_replaces_what_lay_there_and_merges_with_its_neighbours(self) -> None:
        saved = replay(region(), rec.Mapped(1, pages(0, 7), VMAS), rec.Mapped(1, pages(2), (Vma(pages(2)),)))
        assert list(saved.regions[1].vmas) == [Vma(pages(0, 3)), *VMAS[2:]]
        saved.add(rec.Mapped(1, pages(1, 4), ()))
        assert [vma.ar for vma in saved.regions[1].vmas] == [pages(0), pages(5), pages(6)]

    def test_what_is_cleared_is_neither_dirty_nor_others(self) -> None:
        refers = rec.Refers(1, ((pages(0, 4), StoreNo(3)),))
        saved = replay(region(), refers, rec.Dirty(1, pages(0, 4), (pages(0, 4),)), rec.Mapped(1, pages(1, 2), ()))
        assert saved.regions[1].dirty == [pages(0, 4)]
        saved.add(rec.Mapped(1, pages(1, 2), (), cleared=True))
        assert saved.regions[1].dirty == [pages(0), pages(3)]
        assert saved.regions[1].foreign == [(pages(0), 3), (pages(3), 3)]

    def test_dirty_pages_are_those_of_the_last_word_on_each_range(self) -> None:
        saved = replay(
            region(),
            rec.Dirty(1, pages(1), (pages(1),)),
            rec.Dirty(1, pages(3), (pages(3),)),
            rec.Dirty(1, pages(0, 3), (pages(2),)),
        )
        assert saved.regions[1].dirty == [pages(2, 2)]

    def test_a_change_is_under_way_until_its_last_step(self) -> None:
        saved = replay(region(), rec.Begun(1, CHANGES), rec.Moved(1, 2))
        assert (saved.regions[1].change, saved.regions[1].steps) == (rec.Begun(1, CHANGES), 2)
        saved.add(rec.Ended(1))
        assert (saved.regions[1].change, saved.regions[1].steps) == (None, 0)

    def test_a_fork_refers_to_what_its_origin_has_and_to_what_that_refers_to(self) -> None:
        """Not to what lies in shared files, nor to what is hidden; and what was brought is the origin's own."""
        vmas = (Vma(pages(0, 4)), Vma(pages(4), Prot.NONE), Vma(pages(5), PROT_RW, attrs.evolve(FILE, writable=True)))
        saved = replay(
            region(2, store=1),
            rec.Mapped(2, pages(0, 6), vmas),
            rec.Refers(2, ((pages(0, 3), StoreNo(0)),)),
            attrs.evolve(FORKED, region=3, origin=2, present=(pages(1), pages(3, 3)), store=StoreNo(2)),
        )
        assert saved.regions[3].foreign == [(pages(0), 0), (pages(1), 1), (pages(2), 0), (pages(3), 1)]
        assert list(saved.regions[3].vmas) == list(vmas)
        saved.add(rec.Mapped(2, pages(0, 6), ()))
        assert list(saved.regions[3].vmas) == list(vmas)

    def test_a_fork_is_as_its_origin_but_for_what_is_its_own(self) -> None:
        """Whatever has become of the origin since, and before the fork."""
        origin = region(1, unshared=Unshared("then", "why"), used=5, transient=True, kept=True, faults=7, breaks=9)
        saved = replay(origin, FORKED, rec.RegionGone(1))
        mm = HostMm(pages(0, 512))
        model = Region(
            RegionId(2), "twin", Ownership(1, 2, 0o640), BackingKind.SMALL, mm, ready=True, origin="r1", used=5
        )
        layout = attrs.evolve(origin.layout, forked=Arming.MISSING, store=FORKED.store)
        last = saved.regions[2].last
        assert attrs.evolve(last, model={}) == rec.RegionIs({}, layout, FORKED.memory, 98)
        assert encoding.region_fields(
            Region(mm=mm, **encoding.structured_fields(last.model))
        ) == encoding.region_fields(model)
        assert saved.next_region == 3

    def test_an_heir_has_its_pages_itself_and_the_others_have_them_from_it(self) -> None:
        three = (((pages(0, 3), StoreNo(0)),), ((pages(0, 2), StoreNo(0)),), ((pages(0, 2), StoreNo(0)),))
        saved = replay(
            *(region(number + 1, store=number) for number in range(1, 3)),
            region(9, store=3, family=9),
            *(rec.Refers(number, refers) for number, refers in zip((2, 3, 9), three, strict=True)),
            rec.Inherited(1, pages(1), StoreNo(0), StoreNo(1)),
        )
        assert saved.regions[2].foreign == [(pages(0), 0), (pages(2), 0)]
        assert saved.regions[3].foreign == [(pages(0), 0), (pages(1), 1)]
        assert saved.regions[9].foreign == [(pages(0, 2), 0)]

    def test_pages_of_attachments_come_and_go(self) -> None:
        saved = replay(region(), ATTACHMENT, rec.Poisoned(5, 1, on=True), rec.Poisoned(5, 4096, on=False))
        saved.add(rec.Refused(5, 8192, on=False))
        assert (saved.attachments[5].poisoned, saved.attachments[5].refused) == ((1,), ())
        assert saved.next_attachment == 6

    def test_numbers_never_go_back(self) -> None:
        saved = replay(region(4), rec.RegionGone(4), rec.Counters(2, 9))
        assert (saved.regions, saved.next_region, saved.next_attachment) == ({}, 5, 9)

    @pytest.mark.parametrize("record", [rec.Moved(1, 1), rec.Poisoned(5, 0, on=True), FORKED])
    def test_what_is_about_nothing_is_refused(self, record: rec.Record) -> None:
        with pytest.raises(InternalError, match="is not there"):
            replay(record)
