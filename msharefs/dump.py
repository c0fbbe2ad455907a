"""What is known about a region, as numbers and as text in the style of /proc/PID."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

import attrs

from msharefs import clean_pages, forking, histogram
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.page_table import LEVEL_NAMES
from msharefs.pte import PteFlag
from msharefs.region import Attachment, BackingKind, Region
from msharefs.reports import RegionName, RegionStat, Vma
from msharefs.units import format_size
from msharefs.vma import Arming
from msharefs.vma import Vma as HostVma


@attrs.frozen
class KernelFacts:
    """What only the kernel knows of a region, read by the daemon when it is asked. All in bytes.

    ``page_tables`` is the sum of VmPTE of the attached processes, ``page_tables_growth`` that of the machine's
    PageTables since the region was made, ``huge`` what one process has mapped by 2 MiB entries, ``copied`` what forks
    have copied of each other.
    """

    resident: int = 0
    page_tables: int = 0
    page_tables_growth: int = 0
    huge: int = 0
    notes: tuple[str, ...] = ()
    copied: int = 0


def region_name(region: Region) -> RegionName:
    """The line of a listing. Preconditions: the region has a name, or is a file's."""
    return RegionName(
        name=region.title,
        address=region.ar.start,
        size=region.ar.size,
        backing=_backing(region),
        uid=region.owner.uid,
        gid=region.owner.gid,
        mode=region.owner.mode,
        attached=region.process_count,
    )


def region_stat(region: Region, facts: KernelFacts) -> RegionStat:
    """Everything ``stat`` tells. Preconditions: the tables were brought up to date."""
    tables = region.mm.table
    shared = forking.shared_bytes(region.mm) // PAGE_SIZE
    notes = (*facts.notes, sharing(region), *_hugeness(region, facts))
    buckets = region.latency.buckets()
    return RegionStat(
        name=region.title,
        address=region.ar.start,
        size=region.ar.size,
        backing=_backing(region),
        uid=region.owner.uid,
        gid=region.owner.gid,
        mode=region.owner.mode,
        attached=region.process_count,
        resident=facts.resident,
        faults=region.faults,
        vmas=len(region.mm.vmas),
        tables=tables.tables_by_name(),
        table_bytes_private=tables.table_bytes * region.process_count,
        table_bytes_shared=tables.table_bytes,
        table_bytes_kernel=facts.page_tables,
        table_bytes_growth=facts.page_tables_growth,
        origin=region.origin,
        leaf_tables_shared=tables.shared_tables(),
        leaf_tables_private=tables.tables[0] - tables.shared_tables(),
        pages_shared=shared,
        pages_private=tables.resident // PAGE_SIZE - shared,
        copied=facts.copied,
        breaks=region.breaks,
        fault_p50_ns=histogram.quantile(buckets, 0.5),
        fault_p99_ns=histogram.quantile(buckets, 0.99),
        fault_total_ns=region.latency.total,
        fault_buckets=buckets,
        clean=_bytes(clean_pages.clean(region.mm, region.ar)),
        tables_shared=region.tables_shared,
        huge_bytes=facts.huge,
        notes=notes,
    )


def _backing(region: Region) -> str:
    return "file" if region.file is not None and region.file.resident else region.backing


def sharing(region: Region) -> str:
    """Whether the kernel shares page tables of a region between processes, and if not, why."""
    if region.unshared is not None:
        return f"page tables are per process since {region.unshared.since}: {region.unshared.why}"
    if region.backing is not BackingKind.HUGETLB:
        return f"page tables are per process: the kernel does not share those of {region.backing} memory"
    if not region.tables_shared:
        return "page tables are per process since stores had to be seen for a while; new windows share"
    readers = sum(each.readonly for each in region.attachments.values())
    others = sum(each.own_tables for each in region.attachments.values())
    exceptions = [f"{readers} read-only windows"] if readers else []
    if others:
        exceptions.append(f"all of {others} windows that stood when stores had to be seen for a while")
    return "page tables are shared by the kernel" + (f", but not with {' or '.join(exceptions)}" if exceptions else "")


def _hugeness(region: Region, facts: KernelFacts) -> tuple[str, ...]:
    """A note where less is mapped by 2 MiB entries than could be."""
    possible = facts.resident // PMD_SIZE * PMD_SIZE
    if region.backing is not BackingKind.THP or not region.attachments or facts.huge >= possible:
        return ()
    told = f"{format_size(facts.huge)} of {format_size(facts.resident)} are mapped by 2 MiB entries"
    return (f"{told}: small pages, or pages not touched yet; madvise(COLLAPSE) makes large ones",)


def vmas(region: Region) -> tuple[Vma, ...]:
    """The VMAs of a region by offset. Preconditions: the tables were brought up to date."""
    paged = [ar for ar, arming in region.mm.armings() if arming & Arming.MISSING]
    ends = [ar.end for ar in paged]
    found = []
    for vma in region.mm.vmas:
        first = bisect_right(ends, vma.ar.start)
        is_paged = first < len(paged) and paged[first].overlaps(vma.ar)
        resident = sum(run.size for run, _ in region.mm.table.runs(vma.ar))
        told = Vma(region.offset_of(vma.ar), vma.ar.size, int(vma.prot), is_paged, resident, faults=vma.count.served)
        found.append(_with_source(region, vma, told))
    return tuple(found)


def region_file(region: Region) -> str:
    """What follows the 16 bytes of ABI in the region's file, for people."""
    ar = region.ar
    return f"\nstart {ar.start:#x}\nsize {ar.size:#x} ({ar.size} bytes, {format_size(ar.size)})\n"


def maps_text(region: Region) -> str:
    """One line a VMA, as in /proc/PID/maps: addresses, protection, offset, what it is.

    The offset is that in the file which the VMA shows, and of anonymous memory that in the region.
    """
    return "".join(_maps_line(region, vma) for vma in region.mm.vmas)


def smaps_text(region: Region) -> str:
    """As ``maps_text``, with sizes below each VMA, as in /proc/PID/smaps."""
    lines = []
    for asked, vma in zip(region.mm.vmas, vmas(region), strict=True):
        lines.append(_maps_line(region, asked))
        huge = sum(r.size for r, pte in region.mm.table.runs(asked.ar) if pte.flags & PteFlag.HUGE)
        lines += [
            f"Size:           {vma.length // 1024:>8} kB\n",
            f"Resident:       {vma.resident // 1024:>8} kB\n",
            f"HugeLeaves:     {huge // 1024:>8} kB\n",
        ]
        if vma.file is not None:
            lines.append(f"Dirty:          {vma.dirty // 1024:>8} kB\n")
        if vma.refpage is not None:
            lines.append(f"Clean:          {vma.clean // 1024:>8} kB\n")
        lines.append(f"Faults:         {vma.faults:>8}\nMode:           {'paged' if vma.paged else 'native':>8}\n")
    return "".join(lines)


def pagetables_text(region: Region, stat: RegionStat) -> str:
    """Tables by level, then what they cost with and without sharing, in kB, and what the kernel uses."""
    tables, count = region.mm.table, region.process_count
    lines = [f"{'level':<6} {'tables':>8} {'bytes an entry':>15}\n"]
    for level in reversed(range(tables.levels)):
        name, span = LEVEL_NAMES[tables.levels][level], PAGE_SIZE << (9 * level)
        lines.append(f"{name:<6} {tables.tables[level]:>8} {format_size(span):>15}\n")
    lines += [
        f"pages {tables.pages} of {PAGE_SIZE // 1024} kB\n",
        f"leaves {tables.huge_pages} of {PMD_SIZE // 1024} kB\n",
        f"one set {tables.table_bytes // 1024} kB\n",
        f"a set for each of {count} processes {count * tables.table_bytes // 1024} kB\n",
        f"VmPTE of these processes {stat.table_bytes_kernel // 1024} kB\n",
        f"growth of PageTables since the region was made {stat.table_bytes_growth // 1024} kB\n",
        f"shared by the kernel: {'yes' if region.tables_shared else 'no'} ({sharing(region)})\n",
    ]
    return "".join(lines)


def attachments_text(attachments: Iterable[Attachment]) -> str:
    """One line an attachment: pid, access, window, and the pid it was forked from."""
    by_id = {a.id: a for a in attachments}
    lines = []
    for a in by_id.values():
        parent = by_id.get(a.forked_from) if a.forked_from is not None else None
        origin = f" forked-from {parent.pid}" if parent is not None and parent.pid is not None else ""
        lines.append(f"{a.pid if a.pid is not None else '?'} {'ro' if a.readonly else 'rw'} {a.window}{origin}\n")
    return "".join(lines)


def stat_text(stat: RegionStat) -> str:
    """One ``key value`` line a field."""
    lines = []
    for key, value in attrs.asdict(stat, recurse=False).items():
        if value is None or value == ():
            continue
        if key == "notes":
            lines += [f"note {note}\n" for note in value]
        elif isinstance(value, Mapping):
            lines.append(f"{key} {' '.join(f'{name}={count}' for name, count in value.items())}\n")
        elif isinstance(value, tuple):
            lines.append(f"{key} {' '.join(map(str, value))}\n")
        elif key in ("address", "mode"):
            lines.append(f"{key} {value:{'#x' if key == 'address' else '04o'}}\n")
        else:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{key} {text.translate(_ESCAPES)}\n")
    return "".join(lines)


def metrics_text(regions: Sequence[RegionStat], files: Sequence[RegionStat] = ()) -> str:
    """All regions, and all files that are shared without a name, in Prometheus' text format."""
    return "".join((*_metrics_of("region", regions), *_metrics_of("file", files)))


def _metrics_of(what: str, stats: Sequence[RegionStat]) -> Iterator[str]:
    yield f"# TYPE msharefs_{what}s gauge\nmsharefs_{what}s {len(stats)}\n"
    for metric, kind, field in _METRICS:
        yield f"# TYPE msharefs_{what}_{metric} {kind}\n"
        for stat in stats:
            yield f'msharefs_{what}_{metric}{{{what}="{_label(stat)}"}} {getattr(stat, field)}\n'
    yield f"# TYPE msharefs_{what}_fault_seconds histogram\n"
    for stat in stats:
        yield from _histogram_lines(what, stat)


def _histogram_lines(what: str, stat: RegionStat) -> Iterator[str]:
    name, label, seen = f"msharefs_{what}_fault_seconds", f'{what}="{_label(stat)}"', 0
    for bound, count in zip_longest((*histogram.BOUNDS, None), stat.fault_buckets, fillvalue=0):
        seen += count
        yield f'{name}_bucket{{{label},le="{"+Inf" if bound is None else bound / 1e9}"}} {seen}\n'
    yield f"{name}_sum{{{label}}} {stat.fault_total_ns / 1e9}\n"
    yield f"{name}_count{{{label}}} {seen}\n"


def _label(stat: RegionStat) -> str:
    label = stat.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return label.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


_ESCAPES = str.maketrans({"\\": r"\134", "\n": r"\012"})
"""A name may hold anything; written as in /proc/mounts it makes no line of its own."""

_METRICS = (
    ("size_bytes", "gauge", "size"),
    ("resident_bytes", "gauge", "resident"),
    ("attached_processes", "gauge", "attached"),
    ("faults_total", "counter", "faults"),
    ("vmas", "gauge", "vmas"),
    ("table_bytes", "gauge", "table_bytes_shared"),
    ("breaks_total", "counter", "breaks"),
    ("copied_bytes_total", "counter", "copied"),
)


def _with_source(region: Region, vma: HostVma, told: Vma) -> Vma:
    """What is told of a mapping, with what it shows."""
    if vma.file is not None:
        dirty = _bytes(region.mm.dirty(vma.ar))
        return attrs.evolve(told, shared=vma.file.shared, file=vma.file.file, file_offset=vma.file.offset, dirty=dirty)
    if vma.refpage is not None:
        return attrs.evolve(told, refpage=vma.refpage.pattern.hex(), clean=_bytes(clean_pages.clean(region.mm, vma.ar)))
    return told


def _bytes(ranges: Iterable[AddrRange]) -> int:
    return sum(ar.size for ar in ranges)


def _maps_line(region: Region, vma: HostVma) -> str:
    ar, prot, source = vma.ar, vma.prot.as_text(), vma.file
    if region.file is not None:
        return f"{ar} {prot}s {region.file.offset + region.offset_of(ar):012x} [file {region.file.key}]\n"
    if source is None:
        what = "[anon]" if vma.refpage is None else f"[refpage {vma.refpage}]"
        return f"{ar} {prot}s {region.offset_of(ar):012x} {what}\n"
    return f"{ar} {prot}{'s' if source.shared else 'p'} {source.offset:012x} [file {source.file}]\n"
