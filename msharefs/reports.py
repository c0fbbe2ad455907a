"""What is told of regions, over the socket and to people."""

from __future__ import annotations

import attrs


@attrs.frozen
class RegionStat:
    """What ``stat`` tells. Bytes unless said otherwise.

    ``attached`` counts processes, ``faults`` those the daemon served. ``tables`` counts table pages of the host mm by
    level. ``table_bytes_private`` is what the attached processes would need with tables of their own,
    ``table_bytes_shared`` what one shared set takes, ``table_bytes_kernel`` what the kernel says that they use (the sum
    of VmPTE: all else in those processes included, and a shared table counted in each), ``table_bytes_growth`` how much
    the machine's PageTables have grown since the region was made, whoever made them. ``huge_bytes`` are those that
    one process has mapped by 2 MiB entries.

    Of forks: ``origin`` is the name of the region that this one is a fork of, None if it is none. Leaf tables and pages
    (of 4 KiB) are shared with relatives, or private; a 2 MiB leaf is 512 pages. ``copied`` are the bytes that were
    copied between all relatives so far, ``breaks`` the touches of this region that made it necessary.

    How long faults took from when the daemon read of them to the answer: ``fault_p50_ns``, ``fault_p99_ns`` in
    nanoseconds, ``fault_buckets`` counts by the bounds of ``msharefs.histogram``, ``fault_total_ns`` their sum.

    ``clean`` are the bytes in pages that were only read since they came from their reference page.
    """

    name: str
    address: int
    size: int
    backing: str
    uid: int
    gid: int
    mode: int
    attached: int
    resident: int
    faults: int
    vmas: int
    tables: dict[str, int]
    table_bytes_private: int
    table_bytes_shared: int
    table_bytes_kernel: int
    tables_shared: bool
    huge_bytes: int
    notes: tuple[str, ...] = ()
    table_bytes_growth: int = 0
    origin: str | None = None
    leaf_tables_shared: int = 0
    leaf_tables_private: int = 0
    pages_shared: int = 0
    pages_private: int = 0
    copied: int = 0
    breaks: int = 0
    fault_p50_ns: int = 0
    fault_p99_ns: int = 0
    fault_total_ns: int = 0
    fault_buckets: tuple[int, ...] = ()
    clean: int = 0


@attrs.frozen
class Vma:
    """One mapping inside a region, as the client sees it: offset and length in bytes, protection as PROT_*.

    ``shared``: stores reach everybody it shows to, be that the region's processes or the file. ``file`` numbers the
    files of a region, None is anonymous memory; what lies at ``file_offset`` shows at the mapping's start. ``dirty``
    are the bytes in pages that were stored to and are not in the file yet. ``refpage`` is the pattern of a reference
    page, in hexadecimal; ``clean`` are the bytes in pages that were only read since they came from it. ``faults``
    counts those that the daemon has served since the mapping was made; of one that was split, the lower part has them.
    """

    offset: int
    length: int
    prot: int
    paged: bool
    resident: int
    shared: bool = True
    file: int | None = None
    file_offset: int = 0
    dirty: int = 0
    faults: int = 0
    refpage: str | None = None
    clean: int = 0


@attrs.frozen
class RegionName:
    """One line of a listing: what the mount's directory shows anybody, and the number of attached processes.

    Of a file that is shared without a name, ``name`` is its device and inode, as in /proc/PID/maps, ``backing`` is
    ``file`` where its own pages are mapped, and ``mode`` says who may read what is told about it.
    """

    name: str
    address: int
    size: int
    backing: str
    uid: int
    gid: int
    mode: int
    attached: int


@attrs.frozen
class Refusal:
    """A touch that was refused. ``number`` grows with each; ``time_ns`` is the wall clock's.

    ``address`` is that of the process, ``offset`` inside the region, None where the process had moved the memory out of
    its window. ``access``: read, write, or touch where that is not known. ``sent``: SIGBUS or SIGSEGV, EFAULT where a
    system call was made to fail, SIGKILL where that was not possible. ``cause``: hole (nothing is mapped there),
    protection, file (nothing there, or it could not be read), memory (too little), moved. Of the mapping that lay
    there, where one did: where it starts, its length, protection as PROT_*, and file.
    """

    number: int
    time_ns: int
    region: str
    pid: int
    tid: int
    address: int
    offset: int | None
    access: str
    sent: str
    cause: str
    vma_offset: int | None = None
    vma_length: int | None = None
    prot: int | None = None
    file: int | None = None


@attrs.frozen
class TraceEvent:
    """A fault that the daemon answered: when it came in, on the monotonic clock, and how long that took.

    ``pid`` 0: a forked child not told apart yet; ``tid`` as the process's own pid namespace has it. ``access``: read or
    write. ``how``: zero (a fresh page), file, pattern, copy (of a page shared with forks), allow (the store may go on),
    refuse.
    """

    time_ns: int
    duration_ns: int
    pid: int
    tid: int
    offset: int
    access: str
    how: str


@attrs.frozen
class Heat:
    """Equal pieces of a region, by address. ``cell`` is the size of one in bytes; the last may be smaller.

    The others have a number for each, 0 for none of it, 255 for all. ``mapped``: what is no hole. ``present``: pages
    that exist. ``dirty``: stored to, and not in the file yet. ``shared``: in common with forks.
    """

    cell: int
    mapped: tuple[int, ...]
    present: tuple[int, ...]
    dirty: tuple[int, ...]
    shared: tuple[int, ...]
