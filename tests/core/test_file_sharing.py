"""Who shares the mapping of a file with whom, and the regions by which they do."""

from __future__ import annotations

import attrs
import pytest

from msharefs import dump
from msharefs.addr import PAGE_SIZE, PMD_SIZE, WINDOW_START, Address, AddrRange
from msharefs.effects import Arm, Fill, Signal
from msharefs.errors import InvalidArgumentError, QuotaError
from msharefs.fault import Fault
from msharefs.file_sharing import FileKey, SharedFile, Wanted
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.namespace import Limits, Namespace, Policy
from msharefs.perms import PROT_RW, Access, Ownership, Prot
from msharefs.region import BackingKind, Region
from msharefs.vma import Arming, FileId, FileSource

SIZE = 3 * PMD_SIZE
HERE = 16 << 40
KEY, OTHER = FileKey(8, 1, 77), FileKey(8, 1, 78)
ASKED = Wanted(HERE, SIZE, PMD_SIZE, PROT_RW)
ANN = Ownership(10, 10, 0o400)


def namespace(limits: Limits | None = None, *, paging_all: bool = False) -> Namespace:
    return Namespace(Ownership(0, 0, 0o1777), Policy(limits=limits or Limits(), paging_all=paging_all))


def shared(key: FileKey = KEY, mode: Prot = PROT_RW, *, resident: bool = True) -> SharedFile:
    return SharedFile(key, PMD_SIZE, mode, resident)


def share(ns: Namespace, key: FileKey = KEY, addr: int | None = None, kind: BackingKind = BackingKind.SMALL) -> Region:
    return ns.share(shared(key), addr, SIZE, ANN, kind)


class TestWhoShares:
    def test_who_asks_for_the_same(self) -> None:
        assert shared().why_not(AddrRange.sized(HERE, SIZE), ASKED) is None

    def test_who_takes_any_address(self) -> None:
        assert shared().why_not(AddrRange.sized(HERE, SIZE), attrs.evolve(ASKED, addr=None)) is None

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"addr": HERE + PMD_SIZE}, "at 0x100000000000, not at 0x100000200000"),
            ({"addr": 0}, "not at 0x0"),
            ({"length": PMD_SIZE}, "6 MiB of the file, not 2 MiB"),
            ({"offset": 0}, "from offset 0x200000 on, not from 0x0"),
            ({"prot": Prot.READ}, "rw-, which r-- does not include"),
            ({"prot": Prot.NONE}, "rw-, which --- does not include"),
        ],
    )
    def test_who_asks_for_something_else_does_not(self, changed: dict[str, int], why: str) -> None:
        found = shared().why_not(AddrRange.sized(HERE, SIZE), attrs.evolve(ASKED, **changed))
        assert found is not None
        assert why in found

    @pytest.mark.parametrize("mode", [Prot.NONE, Prot.READ, PROT_RW])
    def test_more_includes_less(self, mode: Prot) -> None:
        assert shared(mode=mode).why_not(AddrRange.sized(HERE, SIZE), ASKED) is None

    @pytest.mark.parametrize("name", ["addr", "length", "offset"])
    def test_all_is_made_of_2_mib(self, name: str) -> None:
        assert ASKED.why_unaligned() is None
        assert attrs.evolve(ASKED, addr=None).why_unaligned() is None
        found = attrs.evolve(ASKED, **{name: PMD_SIZE + PAGE_SIZE}).why_unaligned()
        assert found is not None
        assert "is not a multiple of 2 MiB" in found


class TestNamespace:
    def test_a_region_is_found_by_its_file(self) -> None:
        ns = namespace()
        region = share(ns)
        assert ns.find_file(KEY) is region
        assert ns.find_file(OTHER) is None
        assert (region.name, region.title) == (None, "08:01:77")
        assert list(ns) == []

    def test_it_is_listed_once_somebody_maps_it(self) -> None:
        ns = namespace()
        region, second = share(ns), share(ns, FileKey(8, 1, 5))
        assert ns.files() == []
        ns.attach(region, region.ar.start, 1, readonly=False)
        ns.attach(second, second.ar.start, 1, readonly=False)
        assert ns.files() == [second, region]

    def test_the_last_detach_ends_it(self) -> None:
        ns = namespace()
        region = share(ns)
        first, second = (ns.attach(region, region.ar.start, pid, readonly=False) for pid in (1, 2))
        assert not ns.detach(region, first)
        assert ns.find_file(KEY) is region
        assert ns.detach(region, second)
        assert ns.find_file(KEY) is None
        assert ns.all() == []
        assert share(ns) is not region

    def test_one_that_nobody_took_up_is_abandoned(self) -> None:
        ns = namespace()
        ns.abandon(share(ns))
        assert ns.find_file(KEY) is None
        assert ns.all() == []

    def test_addresses_are_free_ones_or_those_asked_for(self) -> None:
        ns = namespace()
        first, second = share(ns), share(ns, OTHER)
        assert first.ar.start == WINDOW_START
        assert not first.ar.overlaps(second.ar)
        assert share(ns, FileKey(8, 1, 79), HERE).ar == AddrRange.sized(HERE, SIZE)

    def test_an_address_that_no_process_has_is_refused(self) -> None:
        ns = namespace()
        with pytest.raises(InvalidArgumentError, match="not within user addresses"):
            share(ns, addr=1 << 60)
        assert ns.find_file(KEY) is None

    def test_limits_count_it_for_its_first_mapper(self) -> None:
        ns = namespace(Limits(max_regions_per_uid=1))
        share(ns)
        with pytest.raises(QuotaError):
            share(ns, OTHER)
        assert ns.find_file(OTHER) is None

    @pytest.mark.parametrize(("resident", "seen"), [(True, False), (False, True)])
    def test_first_touches_of_a_file_in_memory_are_never_reported(self, resident: bool, seen: bool) -> None:
        """Past its end a page could not be made: the kernel knows what to do there."""
        ns = namespace(paging_all=True)
        region = ns.share(shared(resident=resident), None, SIZE, ANN, BackingKind.SMALL)
        assert region.mm.paging_all is seen

    def test_it_is_shown_as_the_file(self) -> None:
        ns = namespace()
        region = share(ns, addr=HERE)
        region.mm.mmap(region.ar, SIZE, fixed=True)
        assert dump.maps_text(region) == "100000000000-100000600000 rw-s 000000200000 [file 08:01:77]\n"
        stat = dump.region_stat(region, dump.KernelFacts())
        assert (stat.name, stat.backing) == ("08:01:77", "file")


class TestComparedFiles:
    """Of memory whose tables are shared, stores are not reported: what was stored is found by looking."""

    SOURCE = FileSource(FileId(1), 0, shared=True, writable=True, compared=True)

    def mm(self) -> HostMm:
        mm = HostMm(AddrRange.sized(HERE, SIZE), page=PMD_SIZE, granule=PMD_SIZE)
        mm.mmap(mm.ar, SIZE, fixed=True, source=self.SOURCE)
        return mm

    def test_only_first_touches_are_reported(self) -> None:
        mm = self.mm()
        assert list(mm.armings()) == [(mm.ar, Arming.MISSING)]
        fault = mm.fault(Fault(Address(HERE + PMD_SIZE + 5), Access.WRITE))
        assert fault.effect == Fill(AddrRange.sized(HERE + PMD_SIZE, PMD_SIZE), FileId(1), PMD_SIZE)

    def test_pages_are_writable_and_never_dirty(self) -> None:
        mm = self.mm()
        mm.filled(AddrRange.sized(HERE, PMD_SIZE))
        assert mm.dirty(mm.ar) == mm.write_back(mm.ar) == []
        check_mm(mm)
        mm.sync([AddrRange.sized(HERE, 2 * PMD_SIZE)], huge=True)
        check_mm(mm)

    def test_a_protection_against_stores_is_reported_as_ever(self) -> None:
        mm = self.mm()
        mm.filled(AddrRange.sized(HERE, PMD_SIZE))
        assert mm.mprotect(mm.ar, Prot.READ) == [Arm(mm.ar, Arming.MISSING | Arming.WP)]
        check_mm(mm)
        assert mm.fault(Fault(Address(HERE), Access.WRITE, protected=True)).signal is Signal.SIGSEGV
        assert mm.mprotect(mm.ar, PROT_RW) == [Arm(mm.ar, Arming.MISSING)]
        check_mm(mm)

    def test_what_lies_further_on_is_compared_too(self) -> None:
        mm = self.mm()
        source = mm.vmas.overlapping(mm.ar)[0].source_at(Address(HERE + PMD_SIZE))
        assert source == attrs.evolve(self.SOURCE, offset=PMD_SIZE)
