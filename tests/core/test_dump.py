"""What people and programs read about a region, letter by letter."""

from __future__ import annotations

import attrs
import pytest

from msharefs import clean_pages, dump, histogram, protocol
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.dump import KernelFacts
from msharefs.effects import Arm
from msharefs.host_mm import HostMm
from msharefs.perms import PROT_RW, Ownership, Prot
from msharefs.refpage import RefPage
from msharefs.region import Attachment, AttachmentId, BackingKind, Region, RegionId, Unshared
from msharefs.vma import Arming, FileId, FileSource

BASE = 32 << 40
SIZE = 4 * PMD_SIZE


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def region(*, backing: BackingKind = BackingKind.THP, paging_all: bool = False) -> Region:
    """Read-write below, then read-only, then inaccessible, then a hole; a 2 MiB leaf and three pages installed."""
    mm = HostMm(AddrRange.sized(BASE, SIZE), paging_all=paging_all)
    for first, end, prot in ((0, 1024, PROT_RW), (1024, 1030, Prot.READ), (1030, 1040, Prot.NONE)):
        mm.mmap(pages(first, end), (end - first) * PAGE_SIZE, prot, fixed=True)
    mm.sync([pages(0, 512), pages(600, 602), pages(1024, 1025)], huge=True)
    return Region(RegionId(1), "db", Ownership(10, 20, 0o640), backing, mm)


def region_of_files() -> Region:
    """Memory, then a file mapped shared with two dirty pages, then one mapped private, then a hole."""
    shown = Region(RegionId(1), "db", Ownership(0, 0, 0), BackingKind.SMALL, HostMm(AddrRange.sized(BASE, SIZE)))
    log = FileSource(FileId(3), 16 * PAGE_SIZE, shared=True, writable=True)
    code = FileSource(FileId(4), 0, shared=False, writable=False)
    for first, source, prot in ((0, None, PROT_RW), (4, log, PROT_RW), (8, code, Prot.READ)):
        shown.mm.mmap(pages(first, first + 4), 4 * PAGE_SIZE, prot, fixed=True, source=source)
    shown.mm.filled(pages(4, 7))
    for page in (4, 6):
        shown.mm.stored_to(pages(page, page + 1))
    shown.mm.filled(pages(8, 9))
    return shown


def region_of_refpages() -> Region:
    """Memory that shows a reference page, two pages of it clean and one written, then such with a long pattern."""
    shown = Region(RegionId(1), "db", Ownership(0, 0, 0), BackingKind.SMALL, HostMm(AddrRange.sized(BASE, SIZE)))
    for first, content in ((0, b"\xaa"), (8, bytes(range(32)))):
        shown.mm.mmap(pages(first, first + 8), 8 * PAGE_SIZE, fixed=True, source=RefPage.of(content))
    clean_pages.came(shown.mm, pages(1, 3), clean=True)
    clean_pages.came(shown.mm, pages(4, 5), clean=False)
    return shown


def attach(to: Region, *pids: int | None) -> None:
    for number, pid in enumerate(pids, 1):
        to.attachments[AttachmentId(number)] = Attachment(AttachmentId(number), pid, to.ar, readonly=False)


FACTS = KernelFacts(resident=PMD_SIZE, page_tables=12345, huge=PMD_SIZE, notes=("beware",))


def test_the_name_of_a_region_comes_with_what_the_directory_shows() -> None:
    shown = region()
    attach(shown, 100, 100, None)
    assert dump.region_name(shown) == protocol.RegionName(
        name="db", address=BASE, size=SIZE, backing="thp", uid=10, gid=20, mode=0o640, attached=2
    )


def test_stat_counts_tables_once_and_for_each_process() -> None:
    shown = region()
    attach(shown, 100, 200)
    shown.faults = 7
    assert dump.region_stat(shown, FACTS) == protocol.RegionStat(
        name="db",
        address=BASE,
        size=SIZE,
        backing="thp",
        uid=10,
        gid=20,
        mode=0o640,
        attached=2,
        resident=PMD_SIZE,
        faults=7,
        vmas=3,
        tables={"pgd": 1, "pud": 1, "pmd": 1, "pte": 2},
        table_bytes_private=2 * 5 * PAGE_SIZE,
        table_bytes_shared=5 * PAGE_SIZE,
        table_bytes_kernel=12345,
        leaf_tables_private=2,
        pages_private=515,
        tables_shared=False,
        huge_bytes=PMD_SIZE,
        notes=("beware", "page tables are per process: the kernel does not share those of thp memory"),
    )


def test_what_is_told_of_a_region_arrives_at_the_client() -> None:
    stat = dump.region_stat(region(), FACTS)
    listing = protocol.Listing((dump.region_name(region()),))
    maps = protocol.Maps(dump.vmas(region()))
    for message in (stat, listing, maps):
        assert protocol.decode(protocol.encode(message))[0] == message


def test_vmas_are_told_by_offset_with_what_is_resident_of_each() -> None:
    assert dump.vmas(region()) == (
        protocol.Vma(0, 1024 * PAGE_SIZE, 3, paged=False, resident=514 * PAGE_SIZE),
        protocol.Vma(1024 * PAGE_SIZE, 6 * PAGE_SIZE, 1, paged=False, resident=PAGE_SIZE),
        protocol.Vma(1030 * PAGE_SIZE, 10 * PAGE_SIZE, 0, paged=True, resident=0),
    )


def test_with_paging_all_every_vma_is_paged() -> None:
    assert all(vma.paged for vma in dump.vmas(region(paging_all=True)))


def test_a_vma_beside_a_hole_is_not_paged_for_that() -> None:
    mm = HostMm(AddrRange.sized(BASE, SIZE))
    assert mm.mmap(pages(1, 2), PAGE_SIZE, fixed=True)[1] == [Arm(pages(1, 2), Arming.NATIVE)]
    shown = Region(RegionId(1), "db", Ownership(0, 0, 0), BackingKind.THP, mm)
    assert [vma.paged for vma in dump.vmas(shown)] == [False]


def test_vmas_of_files_are_told_with_what_they_show_and_what_is_dirty() -> None:
    memory, log, code = dump.vmas(region_of_files())
    size = 4 * PAGE_SIZE
    assert (memory.shared, memory.file, memory.file_offset, memory.dirty) == (True, None, 0, 0)
    assert log == protocol.Vma(
        offset=size,
        length=size,
        prot=3,
        paged=True,
        resident=3 * PAGE_SIZE,
        shared=True,
        file=3,
        file_offset=16 * PAGE_SIZE,
        dirty=2 * PAGE_SIZE,
    )
    assert code == protocol.Vma(2 * size, size, 1, paged=True, resident=PAGE_SIZE, shared=False, file=4)
    maps = protocol.Maps((memory, log, code))
    assert protocol.decode(protocol.encode(maps))[0] == maps


def test_the_region_file_goes_on_for_people() -> None:
    assert dump.region_file(region()) == "\nstart 0x200000000000\nsize 0x800000 (8388608 bytes, 8 MiB)\n"


def test_maps_looks_like_proc_maps() -> None:
    assert dump.maps_text(region()) == (
        "200000000000-200000400000 rw-s 000000000000 [anon]\n"
        "200000400000-200000406000 r--s 000000400000 [anon]\n"
        "200000406000-200000410000 ---s 000000406000 [anon]\n"
    )


def test_maps_says_which_file_shows_and_from_where_on() -> None:
    assert dump.maps_text(region_of_files()) == (
        "200000000000-200000004000 rw-s 000000000000 [anon]\n"
        "200000004000-200000008000 rw-s 000000010000 [file 3]\n"
        "200000008000-20000000c000 r--p 000000000000 [file 4]\n"
    )


def test_smaps_counts_what_is_not_in_the_file_yet() -> None:
    assert dump.smaps_text(region_of_files()).split("\n", 6)[6] == (
        "200000004000-200000008000 rw-s 000000010000 [file 3]\n"
        "Size:                 16 kB\n"
        "Resident:             12 kB\n"
        "HugeLeaves:            0 kB\n"
        "Dirty:                 8 kB\n"
        "Faults:                0\n"
        "Mode:              paged\n"
        "200000008000-20000000c000 r--p 000000000000 [file 4]\n"
        "Size:                 16 kB\n"
        "Resident:              4 kB\n"
        "HugeLeaves:            0 kB\n"
        "Dirty:                 0 kB\n"
        "Faults:                0\n"
        "Mode:              paged\n"
    )


def test_smaps_has_sizes_below_each_line() -> None:
    assert dump.smaps_text(region()) == (
        "200000000000-200000400000 rw-s 000000000000 [anon]\n"
        "Size:               4096 kB\n"
        "Resident:           2056 kB\n"
        "HugeLeaves:         2048 kB\n"
        "Faults:                0\n"
        "Mode:             native\n"
        "200000400000-200000406000 r--s 000000400000 [anon]\n"
        "Size:                 24 kB\n"
        "Resident:              4 kB\n"
        "HugeLeaves:            0 kB\n"
        "Faults:                0\n"
        "Mode:             native\n"
        "200000406000-200000410000 ---s 000000406000 [anon]\n"
        "Size:                 40 kB\n"
        "Resident:              0 kB\n"
        "HugeLeaves:            0 kB\n"
        "Faults:                0\n"
        "Mode:              paged\n"
    )


def test_pagetables_counts_levels_from_the_top_and_what_they_cost() -> None:
    shown = region()
    attach(shown, 100, 200, 300)
    stat = attrs.evolve(dump.region_stat(shown, FACTS), table_bytes_kernel=96 << 10, table_bytes_growth=4 << 10)
    assert dump.pagetables_text(shown, stat) == (
        "level    tables  bytes an entry\n"
        "pgd           1         512 GiB\n"
        "pud           1           1 GiB\n"
        "pmd           1           2 MiB\n"
        "pte           2           4 KiB\n"
        "pages 3 of 4 kB\n"
        "leaves 1 of 2048 kB\n"
        "one set 20 kB\n"
        "a set for each of 3 processes 60 kB\n"
        "VmPTE of these processes 96 kB\n"
        "growth of PageTables since the region was made 4 kB\n"
        "shared by the kernel: no (page tables are per process: the kernel does not share those of thp memory)\n"
    )


def test_maps_and_smaps_tell_the_pattern_of_a_reference_page_and_what_is_clean() -> None:
    shown = region_of_refpages()
    first = "200000000000-200000008000 rw-s 000000000000 [refpage aa]\n"
    assert dump.maps_text(shown).startswith(first)
    assert dump.maps_text(shown).endswith(" [refpage 000102030405060708090a0b0c0d0e0f...]\n")
    assert dump.smaps_text(shown).startswith(
        f"{first}"
        "Size:                 32 kB\n"
        "Resident:             12 kB\n"
        "HugeLeaves:            0 kB\n"
        "Clean:                 8 kB\n"
        "Faults:                0\n"
        "Mode:              paged\n"
    )
    told = dump.vmas(shown)
    assert [(vma.refpage, vma.clean) for vma in told] == [("aa", 2 * PAGE_SIZE), (bytes(range(32)).hex(), 0)]
    assert dump.region_stat(shown, FACTS).clean == 2 * PAGE_SIZE


def test_attachments_tell_access_window_and_origin() -> None:
    ar = AddrRange.sized(BASE, SIZE)
    parent = Attachment(AttachmentId(1), 100, ar, readonly=False)
    child = Attachment(AttachmentId(2), 200, ar, readonly=True, forked_from=parent.id)
    unknown = Attachment(AttachmentId(3), None, ar.moved(SIZE), readonly=False, forked_from=child.id)
    orphan = Attachment(AttachmentId(4), 400, ar, readonly=False, forked_from=AttachmentId(99))
    grandchild = Attachment(AttachmentId(5), 500, ar, readonly=False, forked_from=unknown.id)
    assert dump.attachments_text([parent, child, unknown, orphan, grandchild]) == (
        "100 rw 200000000000-200000800000\n"
        "200 ro 200000000000-200000800000 forked-from 100\n"
        "? rw 200000800000-200001000000 forked-from 200\n"
        "400 rw 200000000000-200000800000\n"
        "500 rw 200000000000-200000800000\n"
    )


def test_an_empty_region_has_empty_texts() -> None:
    shown = Region(RegionId(1), "a", Ownership(0, 0, 0), BackingKind.SMALL, HostMm(AddrRange.sized(BASE, SIZE)))
    assert dump.maps_text(shown) == dump.smaps_text(shown) == dump.attachments_text([]) == ""
    assert dump.vmas(shown) == ()


def test_stat_has_a_line_for_each_field() -> None:
    shown = region()
    attach(shown, 100)
    shown.latency.note(1400)
    shown.latency.note(1600)
    assert dump.stat_text(dump.region_stat(shown, FACTS)) == (
        "name db\n"
        "address 0x200000000000\n"
        "size 8388608\n"
        "backing thp\n"
        "uid 10\n"
        "gid 20\n"
        "mode 0640\n"
        "attached 1\n"
        "resident 2097152\n"
        "faults 0\n"
        "vmas 3\n"
        "tables pgd=1 pud=1 pmd=1 pte=2\n"
        "table_bytes_private 20480\n"
        "table_bytes_shared 20480\n"
        "table_bytes_kernel 12345\n"
        "tables_shared false\n"
        "huge_bytes 2097152\n"
        "note beware\n"
        "note page tables are per process: the kernel does not share those of thp memory\n"
        "table_bytes_growth 0\n"
        "leaf_tables_shared 0\n"
        "leaf_tables_private 2\n"
        "pages_shared 0\n"
        "pages_private 515\n"
        "copied 0\n"
        "breaks 0\n"
        "fault_p50_ns 1536\n"
        "fault_p99_ns 2038\n"
        "fault_total_ns 3000\n"
        "fault_buckets 0 2\n"
        "clean 0\n"
    )


def test_metrics_are_those_of_all_regions_by_metric() -> None:
    one = dump.region_stat(region(), FACTS)
    other = attrs.evolve(one, name="b", size=PAGE_SIZE, faults=9)
    text, without = dump.metrics_text([one, other]), dump.metrics_text([])
    lines = text.removesuffix(without[without.index("# TYPE msharefs_files ") :]).splitlines()
    assert lines[:5] == [
        "# TYPE msharefs_regions gauge",
        "msharefs_regions 2",
        "# TYPE msharefs_region_size_bytes gauge",
        'msharefs_region_size_bytes{region="db"} 8388608',
        'msharefs_region_size_bytes{region="b"} 4096',
    ]
    assert "# TYPE msharefs_region_faults_total counter" in lines
    assert 'msharefs_region_faults_total{region="b"} 9' in lines
    buckets = len(histogram.BOUNDS) + 1
    assert len(lines) == 2 + 8 * 3 + 1 + 2 * (buckets + 2)


def test_metrics_of_files_are_the_same_by_their_own_names() -> None:
    """Device and inode are the label; no sum over regions has them in it."""
    shown = attrs.evolve(dump.region_stat(region(), FACTS), name="00:1a:77")
    of_files, of_regions = dump.metrics_text([], [shown]), dump.metrics_text([shown])
    assert "msharefs_regions 0\n" in of_files
    assert "msharefs_files 1\n" in of_files
    told = [line for line in of_regions.splitlines() if "{" in line]
    assert [line for line in of_files.splitlines() if "{" in line] == [
        line.replace("_region_", "_file_").replace("{region=", "{file=") for line in told
    ]


def test_latency_is_a_histogram_as_prometheus_has_them() -> None:
    """Each bucket counts what those before it count, too; the last counts all."""
    shown = region()
    shown.latency.note(1500)
    shown.latency.note(3000)
    lines = dump.metrics_text([dump.region_stat(shown, FACTS)]).splitlines()
    told = [line.split("} ") for line in lines if line.startswith("msharefs_region_fault_seconds_bucket")]
    assert [count for _, count in told] == ["0", "1", *["2"] * (len(histogram.BOUNDS) - 1)]
    assert told[0][0].endswith('region="db",le="1.024e-06"')
    assert told[-1][0].endswith('le="+Inf"')
    assert 'msharefs_region_fault_seconds_sum{region="db"} 4.5e-06' in lines
    assert 'msharefs_region_fault_seconds_count{region="db"} 2' in lines


def test_metrics_without_regions_are_well_formed() -> None:
    text = dump.metrics_text([])
    assert text.startswith("# TYPE msharefs_regions gauge\nmsharefs_regions 0\n")
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("name", "label"),
    [('quo"te', r"quo\"te"), ("back\\slash", r"back\\slash"), ("new\nline", r"new\nline"), ("caf\udce9", "caf\ufffd")],
    ids=ascii,
)
def test_labels_are_escaped_and_always_utf_8(name: str, label: str) -> None:
    stat = attrs.evolve(dump.region_stat(region(), FACTS), name=name)
    text = dump.metrics_text([stat])
    assert f'msharefs_region_vmas{{region="{label}"}} 3\n' in text
    assert text.encode()


class TestSharing:
    """Whether the kernel shares page tables, and what is told of it."""

    def test_of_hugetlb_memory_until_stores_have_to_be_seen(self) -> None:
        shown = region(backing=BackingKind.HUGETLB)
        attach(shown, 100, 200)
        assert shown.tables_shared
        assert dump.sharing(shown) == "page tables are shared by the kernel"
        shown.unshared = Unshared("2026-01-01T00:00:00+00:00", "stores have to be seen")
        stat = dump.region_stat(shown, FACTS)
        assert not stat.tables_shared
        assert stat.notes[-1] == "page tables are per process since 2026-01-01T00:00:00+00:00: stores have to be seen"

    def test_windows_that_stood_meanwhile_keep_their_own(self) -> None:
        shown = region(backing=BackingKind.HUGETLB)
        attach(shown, 100, 200)
        for window in shown.attachments.values():
            window.own_tables = True
        assert not shown.tables_shared
        assert dump.sharing(shown).endswith("since stores had to be seen for a while; new windows share")
        shown.attachments[AttachmentId(9)] = Attachment(AttachmentId(9), 300, shown.ar, readonly=False)
        assert shown.tables_shared
        assert dump.sharing(shown).endswith(
            "but not with all of 2 windows that stood when stores had to be seen for a while"
        )

    def test_read_only_windows_have_tables_of_their_own(self) -> None:
        shown = region(backing=BackingKind.HUGETLB)
        attach(shown, 100)
        shown.attachments[AttachmentId(9)] = Attachment(AttachmentId(9), 300, shown.ar, readonly=True)
        assert dump.sharing(shown) == "page tables are shared by the kernel, but not with 1 read-only windows"

    @pytest.mark.parametrize(
        ("backing", "huge", "told"),
        [
            (BackingKind.THP, PMD_SIZE, False),
            (BackingKind.THP, 0, True),
            (BackingKind.SMALL, 0, False),
        ],
    )
    def test_of_thp_memory_it_is_told_what_is_not_mapped_by_large_entries(
        self, backing: BackingKind, huge: int, told: bool
    ) -> None:
        shown = region(backing=backing)
        attach(shown, 100)
        facts = KernelFacts(resident=PMD_SIZE + PAGE_SIZE, huge=huge)
        assert any("madvise(COLLAPSE)" in note for note in dump.region_stat(shown, facts).notes) == told
