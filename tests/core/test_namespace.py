"""Names, places, limits and ends of regions."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.addr import (
    PAGE_SIZE,
    PGDIR_SIZE,
    PMD_SIZE,
    PUD_SIZE,
    USER_MAX,
    WINDOW_END,
    WINDOW_START,
    AddrRange,
)
from msharefs.effects import Signal
from msharefs.errors import (
    AccessDeniedError,
    BusyError,
    ExistsError,
    InternalError,
    InvalidArgumentError,
    MshareError,
    NameTooLongError,
    NoMemoryError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    QuotaError,
)
from msharefs.invariants import check_mm
from msharefs.names import check_name
from msharefs.namespace import Limits, Namespace, Policy, check_window
from msharefs.perms import PROT_RW, Credentials, Ownership
from msharefs.region import AttachmentId, BackingKind, Region

ROOT, ANN, BOB = Credentials(0, 0), Credentials(10, 10), Credentials(11, 11)
STICKY_FOR_ALL = Ownership(0, 0, 0o1777)
ADDR = 16 << 40
"""Far from where the daemon places regions by itself."""


def namespace(root: Ownership = STICKY_FOR_ALL, *, align: int = PMD_SIZE, limits: Limits | None = None) -> Namespace:
    return Namespace(root, Policy(align=align, limits=limits or Limits()))


def create(
    ns: Namespace,
    name: str = "a",
    addr: int | None = None,
    size: int = PMD_SIZE,
    *,
    who: Credentials = ANN,
    mode: int = 0o600,
    empty: bool = False,
) -> Region:
    return ns.create(name, addr, size, mode, BackingKind.SMALL, who, empty=empty)


def create_attached(ns: Namespace, name: str = "a", *, who: Credentials = ANN, pid: int = 100) -> Region:
    region = create(ns, name, who=who)
    ns.attach(region, region.ar.start, pid, readonly=False)
    return region


class TestNames:
    """What a region may be called."""

    @pytest.mark.parametrize(
        "name",
        ["a", "db", "with space", "ä" * 127 + "a", "x" * 255, "mshare_info2", "a.b", "a\\b", "\udcff", "-", "日本"],
    )
    def test_one_path_component_of_up_to_255_bytes(self, name: str) -> None:
        assert check_name(name) == name
        assert create(namespace(), name).name == name

    @pytest.mark.parametrize(
        "name", ["", ".", "..", ".hidden", ".regions", "a/b", "/", "a/", "a\0b", "\0", "mshare_info"]
    )
    def test_other_names_are_einval(self, name: str) -> None:
        with pytest.raises(InvalidArgumentError, match="cannot name a region"):
            check_name(name)
        with pytest.raises(InvalidArgumentError, match="cannot name a region"):
            create(namespace(), name)

    @pytest.mark.parametrize("name", ["x" * 256, "ä" * 128, "\udcff" * 256], ids=ascii)
    def test_bytes_count_not_letters(self, name: str) -> None:
        with pytest.raises(NameTooLongError):
            check_name(name)

    @pytest.mark.parametrize("name", ["\ud800", "a\udfffb"], ids=ascii)
    def test_what_no_file_name_decodes_to_is_einval(self, name: str) -> None:
        with pytest.raises(InvalidArgumentError):
            check_name(name)

    def test_a_second_spelling_of_the_same_bytes_is_einval(self) -> None:
        """Bytes of good UTF-8, each escaped alone: the mount would show two files of one name."""
        with pytest.raises(InvalidArgumentError):
            check_name("é".encode().decode("ascii", "surrogateescape"))

    def test_a_name_is_given_once(self) -> None:
        ns = namespace()
        first = create(ns, "a")
        with pytest.raises(ExistsError):
            create(ns, "a", who=BOB)
        assert ns.find("a") is first
        assert ns.all() == [first]

    def test_an_unknown_name_is_not_found(self) -> None:
        with pytest.raises(NotFoundError, match="'b'"):
            namespace().find("b")


class TestCreate:
    """What a new region is made of."""

    def test_it_starts_as_one_read_write_mapping(self) -> None:
        region = create(namespace())
        assert [(vma.ar, vma.prot) for vma in region.mm.vmas] == [(region.ar, PROT_RW)]
        check_mm(region.mm)

    def test_it_is_native_where_the_mount_says_nothing(self) -> None:
        ns = Namespace(STICKY_FOR_ALL, Policy())
        region = ns.create("a", None, PMD_SIZE, 0o600, BackingKind.SMALL, ANN)
        assert list(region.mm.armings()) == []
        assert region.mm.hole_signal is Signal.SIGBUS

    def test_or_as_one_hole(self) -> None:
        assert list(create(namespace(), empty=True).mm.vmas) == []

    def test_it_belongs_to_its_creator(self) -> None:
        assert create(namespace(), who=BOB, mode=0o640).owner == Ownership(11, 11, 0o640)

    def test_it_is_made_as_the_mount_says(self) -> None:
        ns = Namespace(STICKY_FOR_ALL, Policy(paging_all=True, hole_signal=Signal.SIGSEGV))
        mm = create(ns).mm
        assert mm.paging_all
        assert mm.hole_signal is Signal.SIGSEGV

    @pytest.mark.parametrize(
        ("backing", "page", "granule"),
        [
            (BackingKind.SMALL, PAGE_SIZE, PAGE_SIZE),
            (BackingKind.THP, PAGE_SIZE, PMD_SIZE),
            (BackingKind.HUGETLB, PMD_SIZE, PUD_SIZE),
        ],
    )
    def test_its_backing_decides_what_comes_at_one_fault(self, backing: BackingKind, page: int, granule: int) -> None:
        region = namespace().create("a", None, PUD_SIZE, 0o600, backing, ANN)
        assert (region.backing, region.mm.page, region.mm.granule) == (backing, page, granule)

    @pytest.mark.parametrize(
        ("addr", "size"), [(None, PMD_SIZE), (None, 3 * PUD_SIZE // 2), ((32 << 40) + PMD_SIZE, PUD_SIZE)]
    )
    def test_shared_tables_want_whole_ones(self, addr: int | None, size: int) -> None:
        with pytest.raises(InvalidArgumentError, match=r"multiples of 0x40000000 \(backing hugetlb"):
            namespace().create("a", addr, size, 0o600, BackingKind.HUGETLB, ANN)

    def test_so_does_a_window_elsewhere(self) -> None:
        ns = namespace()
        region = ns.create("a", None, PUD_SIZE, 0o600, BackingKind.HUGETLB, ANN)
        with pytest.raises(InvalidArgumentError, match="backing hugetlb"):
            ns.attach(region, region.ar.end + PMD_SIZE, 100, readonly=False)
        assert ns.attach(region, region.ar.end, 100, readonly=False).window.start == region.ar.end

    def test_numbers_are_never_given_twice(self) -> None:
        ns = namespace()
        numbers = []
        for _ in range(3):
            region = create(ns, "a")
            numbers.append(region.id)
            assert ns.get(region.id) is region
            ns.abandon(region)
            assert ns.get(region.id) is None
        assert len(set(numbers)) == 3

    @pytest.mark.parametrize(
        ("mode", "who", "allowed"),
        [
            (0o1777, BOB, True),
            (0o755, BOB, False),
            (0o755, ROOT, True),
            (0o700, ANN, True),
            (0o702, BOB, False),
            (0o703, BOB, True),
        ],
    )
    def test_it_needs_write_and_search_permission_on_the_root(self, mode: int, who: Credentials, allowed: bool) -> None:
        ns = namespace(Ownership(ANN.uid, ANN.gid, mode))
        if allowed:
            assert create(ns, who=who).name == "a"
        else:
            with pytest.raises(AccessDeniedError, match="--mode"):
                create(ns, who=who)
            assert ns.all() == []

    @pytest.mark.parametrize("mode", [0o1600, 0o4755, 0o100644, -1])
    def test_only_the_nine_bits_of_a_mode(self, mode: int) -> None:
        with pytest.raises(InvalidArgumentError, match="mode"):
            create(namespace(), mode=mode)


class TestPlaces:
    """Alignment, user addresses, and where the daemon puts regions itself."""

    @pytest.mark.parametrize("align", [PMD_SIZE, PUD_SIZE, PGDIR_SIZE], ids=["2M", "1G", "512G"])
    def test_address_and_size_are_multiples_of_the_alignment(self, align: int) -> None:
        ns = namespace(align=align)
        assert create(ns, "good", ADDR, align).ar == AddrRange.sized(ADDR, align)
        for addr, size in [
            (ADDR + align // 2, align),
            (ADDR, align // 2),
            (ADDR, align + PAGE_SIZE),
            (None, align // 2),
        ]:
            with pytest.raises(InvalidArgumentError, match="multiples"):
                create(ns, "bad", addr, size)
        assert [region.name for region in ns.all()] == ["good"]

    @pytest.mark.parametrize("align", [PMD_SIZE, PUD_SIZE, PGDIR_SIZE], ids=["2M", "1G", "512G"])
    def test_a_place_of_the_daemons_choice_is_aligned_too(self, align: int) -> None:
        ns = namespace(align=align)
        places = [create(ns, name, None, align).ar for name in "abc"]
        assert all(ar.is_aligned(align) for ar in places)

    @pytest.mark.parametrize(
        ("addr", "size"),
        [
            (0, PMD_SIZE),
            (-PMD_SIZE, PMD_SIZE),
            (1 << 47, PMD_SIZE),
            (ADDR, 1 << 47),
            (1 << 64, PMD_SIZE),
            (ADDR, 0),
            (ADDR, -PMD_SIZE),
            (None, 0),
            (None, 1 << 48),
            (10**4000 * PMD_SIZE, PMD_SIZE),
        ],
    )
    def test_only_user_addresses(self, addr: int | None, size: int) -> None:
        with pytest.raises(InvalidArgumentError):
            create(namespace(), "a", addr, size)

    def test_the_last_user_addresses_can_be_had(self) -> None:
        last = USER_MAX // PMD_SIZE * PMD_SIZE - PMD_SIZE
        assert create(namespace(), "a", last).ar.start == last

    def test_places_follow_one_another_and_an_old_one_is_not_given_again_at_once(self) -> None:
        """A pointer gone stale should find nothing new at its address."""
        ns = namespace()
        first, second = create(ns, "a").ar, create(ns, "b").ar
        assert (first.start, second.start) == (WINDOW_START, first.end)
        ns.abandon(ns.find("a"))
        assert create(ns, "c").ar.start == second.end

    def test_places_of_1_gib_and_more_begin_at_a_border_of_1_gib(self) -> None:
        """So that the kernel can share the page tables of huge pages."""
        ns = namespace()
        create(ns, "a", None, PMD_SIZE)
        assert create(ns, "b", None, PUD_SIZE + PMD_SIZE).ar.start == WINDOW_START + PUD_SIZE

    def test_places_avoid_regions_whose_address_was_asked_for(self) -> None:
        ns = namespace()
        create(ns, "a", WINDOW_START + PMD_SIZE, 2 * PMD_SIZE)
        assert create(ns, "b", None, 2 * PMD_SIZE).ar.start == WINDOW_START + 3 * PMD_SIZE

    def test_a_place_that_just_fits_between_is_taken(self) -> None:
        ns = namespace()
        create(ns, "a", WINDOW_START + 2 * PMD_SIZE)
        assert create(ns, "b", None, 2 * PMD_SIZE).ar.start == WINDOW_START

    def test_places_avoid_regions_that_have_lost_their_name(self) -> None:
        ns = namespace()
        half = (WINDOW_END - WINDOW_START) // 2
        kept = create(ns, "a", None, half)
        ns.attach(kept, kept.ar.start, 100, readonly=False)
        ns.remove(kept, ANN)
        ns.abandon(create(ns, "b", None, half))
        assert create(ns, "c", None, half).ar.start == WINDOW_START + half

    def test_the_window_is_used_again_from_its_start_when_its_end_is_reached(self) -> None:
        ns = namespace()
        most = WINDOW_END - WINDOW_START - PUD_SIZE
        ns.abandon(create(ns, "a", None, most))
        assert create(ns, "b", None, most).ar.start == WINDOW_START

    def test_a_full_window_is_enomem_and_costs_nothing(self) -> None:
        ns = namespace()
        create(ns, "a", None, WINDOW_END - WINDOW_START)
        with pytest.raises(NoMemoryError, match="name an address"):
            create(ns, "b")
        assert create(ns, "b", ADDR).ar.start == ADDR
        assert len(ns.all()) == 2

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 5),
                st.sampled_from([1, 2, 3, 512, 513, 4 * 512 * 1024, 10 * 512 * 1024]),
                st.none() | st.integers(0, 40),
            ),
            max_size=30,
        )
    )
    def test_places_of_the_daemons_choice_never_overlap(self, steps: list[tuple[int, int, int | None]]) -> None:
        """Regions come and go, some at addresses asked for, huge ones among them so that the window wraps."""
        ns = namespace()
        for slot, pmds, asked in steps:
            name = str(slot)
            if name in [region.name for region in ns.all()]:
                ns.abandon(ns.find(name))
                continue
            others = [region.ar for region in ns.all()]
            addr = None if asked is None else WINDOW_START + asked * PMD_SIZE
            try:
                place = create(ns, name, addr, pmds * PMD_SIZE).ar
            except NoMemoryError:
                continue
            if addr is None:
                assert not any(place.overlaps(other) for other in others)
                assert AddrRange(WINDOW_START, WINDOW_END).covers(place)
                assert place.start % (PUD_SIZE if place.size >= PUD_SIZE else PMD_SIZE) == 0


class TestLimits:
    """Too many or too much is an error that says which limit it was."""

    @pytest.mark.parametrize(
        ("limits", "error", "number", "other_may"),
        [
            (Limits(max_regions=2), NoSpaceError, errno.ENOSPC, False),
            (Limits(max_bytes=5 * PMD_SIZE), NoSpaceError, errno.ENOSPC, False),
            (Limits(max_regions_per_uid=2), QuotaError, errno.EDQUOT, True),
            (Limits(max_bytes_per_uid=5 * PMD_SIZE), QuotaError, errno.EDQUOT, True),
        ],
    )
    def test_the_third_region_of_two_is_refused(
        self, limits: Limits, error: type[MshareError], number: int, other_may: bool
    ) -> None:
        ns = namespace(limits=limits)
        first = create(ns, "a", size=2 * PMD_SIZE)
        create(ns, "b", size=2 * PMD_SIZE)
        with pytest.raises(error, match=errno.errorcode[number]):
            create(ns, "c", size=2 * PMD_SIZE)
        assert len(ns.all()) == 2
        if other_may:
            assert create(ns, "d", size=2 * PMD_SIZE, who=BOB).name == "d"
        ns.abandon(first)
        assert create(ns, "c", size=2 * PMD_SIZE).name == "c"

    def test_what_just_fits_is_given(self) -> None:
        ns = namespace(limits=Limits(max_bytes=2 * PMD_SIZE, max_regions=1))
        assert create(ns, size=2 * PMD_SIZE).ar.size == 2 * PMD_SIZE

    def test_a_region_without_a_name_still_counts(self) -> None:
        ns = namespace(limits=Limits(max_regions=1))
        ns.remove(create_attached(ns), ANN)
        with pytest.raises(NoSpaceError):
            create(ns, "b")

    def test_a_region_that_is_given_away_counts_for_its_new_owner(self) -> None:
        ns = namespace(limits=Limits(max_regions_per_uid=1))
        ns.change_owner(create(ns, "a"), uid=BOB.uid)
        create(ns, "b")
        with pytest.raises(QuotaError):
            create(ns, "c", who=BOB)

    def test_regions_that_there_were_before_count(self) -> None:
        before = namespace()
        region = create_attached(before)
        ns = namespace(limits=Limits(max_regions_per_uid=1, max_bytes=region.ar.size))
        ns.restore([region], before.counters)
        with pytest.raises(QuotaError):
            create(ns, "b")
        with pytest.raises(NoSpaceError):
            create(ns, "b", who=BOB)
        ns.remove(region, ANN)
        for attachment in list(region.attachments.values()):
            ns.detach(region, attachment)
        create(ns, "b")


class TestTransient:
    """Regions that end by themselves."""

    def made(self, ns: Namespace) -> Region:
        return ns.create("a", None, PMD_SIZE, 0o600, BackingKind.SMALL, ANN, kept=True)

    def test_while_it_is_kept_it_is_as_any_other(self) -> None:
        ns = namespace()
        region = self.made(ns)
        attachment = ns.attach(region, region.ar.start, 100, readonly=False)
        assert not ns.detach(region, attachment)
        assert ns.find("a") is region

    def test_nobody_has_it_and_then_it_is_not_kept_any_more(self) -> None:
        ns = namespace()
        region = self.made(ns)
        ns.detach(region, ns.attach(region, region.ar.start, 100, readonly=False))
        assert ns.release(region)
        assert (ns.all(), list(ns)) == ([], [])

    def test_it_is_not_kept_any_more_and_then_the_last_lets_it_go(self) -> None:
        ns = namespace()
        region = self.made(ns)
        first, second = (ns.attach(region, region.ar.start, pid, readonly=False) for pid in (100, 101))
        assert not ns.release(region)
        assert not ns.detach(region, first)
        assert ns.find("a") is region
        assert ns.detach(region, second)
        assert ns.all() == []
        create(ns, "a")

    def test_its_name_may_have_gone_before_and_be_anothers(self) -> None:
        ns = namespace()
        region = self.made(ns)
        attachment = ns.attach(region, region.ar.start, 100, readonly=False)
        ns.remove(region, ANN)
        other = create(ns, "a")
        assert not ns.release(region)
        assert ns.detach(region, attachment)
        assert ns.find("a") is other

    def test_any_other_stays(self) -> None:
        ns = namespace()
        region = create(ns)
        assert not ns.release(region)
        assert ns.find("a") is region

    @pytest.mark.parametrize("used", [0, -1, PMD_SIZE + 1])
    def test_no_more_of_it_can_be_used_than_there_is(self, used: int) -> None:
        ns = namespace()
        with pytest.raises(InvalidArgumentError):
            ns.create("a", None, PMD_SIZE, 0o600, BackingKind.SMALL, ANN, used=used)
        assert ns.all() == []


class TestAttachments:
    """References, and what is left when the last one goes."""

    def test_the_first_attachment_makes_a_region_ready_and_seen(self) -> None:
        ns = namespace()
        region = create(ns)
        assert list(ns) == []
        assert ns.find("a") is region
        ns.attach(region, region.ar.start, 100, readonly=False)
        assert region.ready
        assert list(ns) == [region]

    def test_listing_is_by_name(self) -> None:
        ns = namespace()
        for name in ("b", "c", "a"):
            create_attached(ns, name)
        assert [region.name for region in ns] == ["a", "b", "c"]

    def test_numbers_of_attachments_are_never_given_twice(self) -> None:
        ns = namespace()
        region = create(ns)
        numbers = []
        for _ in range(3):
            attachment = ns.attach(region, region.ar.start, 100, readonly=True)
            numbers.append(attachment.id)
            ns.detach(region, attachment)
        assert len(set(numbers)) == 3

    def test_a_forked_child_is_a_reference_of_its_own(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        (parent,) = region.attachments.values()
        child = ns.attach(region, parent.window.start, None, readonly=parent.readonly, forked_from=parent.id)
        assert (child.forked_from, child.pid, region.process_count) == (parent.id, None, 2)

    def test_a_named_region_outlives_its_last_attachment(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        assert not ns.detach(region, region.attachments[AttachmentId(1)])
        assert ns.find("a") is region
        assert list(ns) == [region]

    def test_a_nameless_region_goes_with_its_last_attachment(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        second = ns.attach(region, ADDR, 200, readonly=True)
        assert not ns.remove(region, ANN)
        assert not ns.detach(region, region.attachments[AttachmentId(1)])
        assert ns.all() == [region]
        assert ns.detach(region, second)
        assert ns.all() == []
        assert ns.get(region.id) is None

    def test_a_window_may_lie_elsewhere(self) -> None:
        region = create(namespace(), size=4 * PMD_SIZE)
        assert check_window(region, region.ar.start) == region.ar
        assert check_window(region, ADDR) == AddrRange.sized(ADDR, 4 * PMD_SIZE)

    @pytest.mark.parametrize("addr", [0, ADDR + PAGE_SIZE, USER_MAX - PMD_SIZE, 1 << 47, -PMD_SIZE])
    def test_a_window_is_aligned_and_of_user_addresses(self, addr: int) -> None:
        ns = namespace()
        region = create(ns, size=4 * PMD_SIZE)
        with pytest.raises(InvalidArgumentError):
            ns.attach(region, addr, 100, readonly=False)
        assert not region.attachments
        assert not region.ready


class TestUnlink:
    """mshare_unlink: the end of the caller's access, and of the region with the last."""

    def test_one_who_is_attached_may_unlink_without_write_permission(self) -> None:
        ns = namespace()
        ns.check_unlink(create_attached(ns, pid=100), 100, may_write=False)

    def test_one_who_is_not_attached_while_others_are_gets_ebusy(self) -> None:
        ns = namespace()
        with pytest.raises(BusyError, match="1 processes are attached"):
            ns.check_unlink(create_attached(ns, pid=100), 200, may_write=True)

    def test_an_orphan_takes_write_permission(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        ns.detach(region, region.attachments[AttachmentId(1)])
        with pytest.raises(AccessDeniedError, match="orphan"):
            ns.check_unlink(region, 200, may_write=False)
        ns.check_unlink(region, 200, may_write=True)

    def test_permission_comes_before_others(self) -> None:
        """Who may not write does not learn whether anybody is attached."""
        ns = namespace()
        with pytest.raises(AccessDeniedError):
            ns.check_unlink(create_attached(ns, pid=100), 200, may_write=False)

    def test_the_last_unlink_ends_name_and_region(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        ns.detach(region, region.attachments[AttachmentId(1)])
        assert ns.unlink(region, may_write=True)
        assert ns.all() == []
        with pytest.raises(NotFoundError):
            ns.find("a")

    def test_an_unlink_while_others_are_attached_leaves_the_region(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        assert not ns.unlink(region, may_write=True)
        assert ns.find("a") is region

    def test_an_unlink_by_one_who_may_not_write_leaves_an_orphan(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        ns.detach(region, region.attachments[AttachmentId(1)])
        assert not ns.unlink(region, may_write=False)
        assert ns.find("a") is region


class TestRemove:
    """remove: the name goes at once, as with unlink(2)."""

    def test_the_name_is_free_at_once_and_the_memory_stays_with_who_has_it(self) -> None:
        ns = namespace()
        old = create_attached(ns)
        assert not ns.remove(old, ANN)
        assert old.name is None
        assert list(ns) == []
        assert create(ns, "a") is not old
        assert old in ns.all()

    def test_an_orphan_goes_entirely(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        ns.detach(region, region.attachments[AttachmentId(1)])
        assert ns.remove(region, ANN)
        assert ns.all() == []

    @pytest.mark.parametrize(
        ("mode", "who", "error"),
        [
            (0o1777, ANN, None),
            (0o1777, ROOT, None),
            (0o1777, BOB, NotPermittedError),
            (0o777, BOB, None),
            (0o1755, ANN, AccessDeniedError),
            (0o755, BOB, AccessDeniedError),
            (0o755, ROOT, None),
        ],
    )
    def test_the_mode_of_the_root_decides(self, mode: int, who: Credentials, error: type[MshareError] | None) -> None:
        ns = namespace()
        region = create_attached(ns, who=ANN)
        ns.root = Ownership(0, 0, mode)
        if error is None:
            ns.remove(region, who)
            assert region.name is None
        else:
            with pytest.raises(error):
                ns.remove(region, who)
            assert ns.find("a") is region

    @pytest.mark.parametrize("who", [BOB, ROOT])
    def test_in_a_sticky_root_its_owner_and_root_may_remove_all(self, who: Credentials) -> None:
        ns = namespace(Ownership(BOB.uid, BOB.gid, 0o1777))
        region = create_attached(ns, who=ANN)
        ns.remove(region, who)
        assert region.name is None


class TestAbandon:
    """A creator that fails leaves nothing."""

    def test_name_and_region_are_gone(self) -> None:
        ns = namespace()
        region = create(ns)
        ns.abandon(region)
        assert ns.all() == []
        assert create(ns, "a").name == "a"

    def test_with_somebody_attached_it_is_a_bug_and_changes_nothing(self) -> None:
        ns = namespace()
        region = create_attached(ns)
        with pytest.raises(InternalError, match="abandoned while attached"):
            ns.abandon(region)
        assert ns.find("a") is region


class TestOwner:
    """chmod and chown."""

    def test_only_what_is_given_changes(self) -> None:
        ns = namespace()
        region = create(ns, mode=0o600)
        ns.change_owner(region, mode=0o644)
        assert region.owner == Ownership(10, 10, 0o644)
        ns.change_owner(region, uid=0, gid=7)
        assert region.owner == Ownership(0, 7, 0o644)
        ns.change_owner(region, mode=0)
        assert region.owner == Ownership(0, 7, 0)
