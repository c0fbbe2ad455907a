"""The daemon killed again and again, with huge pages, and with files of a disk that are written to.

As in the other test of kill points. Here files are mapped shared as well, into regions and without a name: what was
stored is in the file when msync(), or whatever else writes, has returned, and nothing that was not stored ever is.
KILL_POINTS is how many deaths there are in all, KILL_SEED has a run happen again, as far as that depends on us.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from conftest import Client, Daemon
from hugepages import HUGE, MIB, need_memory
from kill_points import Lives, Model, Workload, living

pytestmark = pytest.mark.pool

_SHARED = """
import mshare.api
M = {}
def share(path, pages, backing):
    "A shared mapping of a file without a name."
    fd = os.open(path, os.O_RDWR)
    try:
        found = mshare.mmap(fd, pages * UNIT, backing=backing)
    finally:
        os.close(fd)
    assert found.shared, found.why
    return found
"""


@attrs.define(eq=False)
class Disk:
    """A file: what it must hold, page by page, as far as that is known."""

    path: Path
    unit: int
    pages: dict[int, int]

    def wrong(self) -> list[tuple[int, int]]:
        """Pages that it does not hold, and what it should."""
        data = self.path.read_bytes()
        size = self.unit
        return [
            (page, value) for page, value in self.pages.items() if data[page * size :][:size] != bytes([value]) * size
        ]


@attrs.define(eq=False)
class Mapping:
    """A file that both have mapped without a name."""

    number: int
    disk: Disk
    pages: dict[int, int]


class FileWorkload(Workload):
    """The same calls, and stores to files."""

    kinds = (
        *["store"] * 4,
        *["mprotect"] * 2,
        *["mmap", "munmap", "remove", "mmap_file", "fork", "fork_process", "end"],
        *["share", "share", "msync", "msync"],
        *["map", "store_mapped", "store_mapped", "msync_mapped", "unmap"],
    )

    def __init__(self, lives: Lives, clients: list[Client], name: str, directory: Path) -> None:
        super().__init__(lives, clients, name, directory / "private")
        self.directory = directory
        self.disks: list[Disk] = []
        self.shown: dict[tuple[int, int], tuple[Disk, int]] = {}
        """For pages of regions that show a file: which, and which page of it."""
        self.mappings: list[Mapping] = []
        for c in clients:
            c.do(_SHARED)

    def _disk(self, pages: int) -> Disk:
        """A new file."""
        path = self.directory / f"shared-{self._next()}"
        contents = {page: 150 + page % 100 for page in range(pages)}
        path.write_bytes(b"".join(bytes([value]) * self.page for value in contents.values()))
        self.disks.append(Disk(path, self.page, contents))
        return self.disks[-1]

    def written(self, region: Model, pages: list[int]) -> None:
        """What these pages hold is in their files."""
        for page in pages:
            if (region.number, page) in self.shown:
                disk, at = self.shown[region.number, page]
                disk.pages[at] = region.pages[page][1]

    def _gone(self, region: Model, pages: list[int]) -> None:
        """These pages show no files any more."""
        self.written(region, pages)
        for page in pages:
            self.shown.pop((region.number, page), None)

    def _stored(self, region: Model, page: int) -> None:
        """Nobody knows whether it is in its file yet."""
        if (region.number, page) in self.shown:
            disk, at = self.shown[region.number, page]
            disk.pages.pop(at, None)

    def store(self, region: Model, who: int) -> None:
        before = dict(region.pages)
        super().store(region, who)
        for page in region.pages:
            if region.pages[page] != before[page]:
                self._stored(region, page)

    def fork_process(self, region: Model, who: int) -> None:
        before = dict(region.pages)
        super().fork_process(region, who)
        for page in region.pages:
            if region.pages[page] != before[page]:
                self._stored(region, page)

    def mprotect(self, region: Model, who: int) -> None:
        super().mprotect(region, who)
        self.written(region, [page for page in region.pages if not region.prot(page) & 2])

    def mmap(self, region: Model, who: int) -> None:
        first, count, pages = self._span()
        prot = self.random.choice([1, 3])
        self._clear(region, who, first, count, replaced=self._replaces())
        self.do(who, f"R[{region.number}].mmap({count * self.page}, {prot}, 0x31, offset={first * self.page})")
        region.pages.update(dict.fromkeys(pages, (prot, 0)))

    def _replaces(self) -> bool:
        """Whether a mapping replaces what is there; huge pages of forks cannot be."""
        return self.page != HUGE and self.random.random() < 0.5

    def munmap(self, region: Model, who: int) -> None:
        first, count, _ = self._span()
        self._clear(region, who, first, count)

    def mmap_file(self, region: Model, who: int) -> None:
        first, count, pages = self._span()
        self._clear(region, who, first, count, replaced=self._replaces())
        call = f"mmap({count * self.page}, 3, 0x12, offset={first * self.page}, fd=f.fileno())"
        self.do(who, f"R[{region.number}].{call}")
        region.pages.update({page: (3, 100 + (page - first) % 100) for page in pages})
        region.files.update(pages)

    def share(self, region: Model, who: int) -> None:
        """Map a file of its own."""
        first, count, pages = self._span()
        self._clear(region, who, first, count, replaced=self._replaces())
        disk = self._disk(count)
        call = f"mmap({count * self.page}, 3, 0x11, offset={first * self.page}, fd=it)"
        self.do(who, f"it = os.open({str(disk.path)!r}, os.O_RDWR); R[{region.number}].{call}; os.close(it)")
        region.pages.update({page: (3, disk.pages[page - first]) for page in pages})
        region.files.update(pages)
        self.shown.update({(region.number, page): (disk, page - first) for page in pages})

    def msync(self, region: Model, who: int) -> None:
        self.do(who, f"R[{region.number}].msync()")
        self.written(region, list(region.pages))

    def fork(self, region: Model, who: int) -> None:
        """What a fork shows of shared files it unmaps: two copies of a page would be written to one file."""
        before = len(self.regions)
        super().fork(region, who)
        if len(self.regions) > before:
            for page in [page for page in self.places if (region.number, page) in self.shown]:
                self._clear(self.regions[-1], who, page, 1)

    def end(self, region: Model, who: int) -> None:
        if len(self.regions) > 1:
            self._gone(region, list(region.pages))
        super().end(region, who)

    def map(self, _region: Model, who: int) -> None:
        """Without a name."""
        if len(self.mappings) < 2:
            number, disk = self._next(), self._disk(2 * HUGE // self.page)
            backing = self.random.choice(["hugetlb", "thp"])
            for each in (who, 1 - who):
                self.do(each, f"M[{number}] = share({str(disk.path)!r}, {len(disk.pages)}, {backing!r})")
            self.mappings.append(Mapping(number, disk, dict(disk.pages)))

    def store_mapped(self, _region: Model, who: int) -> None:
        for mapping in self.mappings:
            page, value = self.random.choice(list(mapping.pages)), self.random.randint(1, 255)
            at = f"{page * self.page} : {(page + 1) * self.page}"
            self.do(who, f"M[{mapping.number}].buf[{at}] = bytes([{value}]) * UNIT")
            mapping.pages[page] = value
            mapping.disk.pages.pop(page, None)

    def msync_mapped(self, _region: Model, who: int) -> None:
        for mapping in self.mappings:
            self.do(who, f"M[{mapping.number}].msync()")
            mapping.disk.pages.update(mapping.pages)

    def unmap(self, _region: Model, who: int) -> None:
        if self.mappings:
            mapping = self.mappings.pop(0)
            for each in (who, 1 - who):
                self.do(each, f"M.pop({mapping.number}).munmap()")
            mapping.disk.pages.update(mapping.pages)
            self._look_at(mapping.disk)

    def _clear(self, region: Model, who: int, first: int, count: int, *, replaced: bool = False) -> None:
        """Unmap pages, unless what comes is to replace them."""
        if not replaced:
            self.do(who, f"R[{region.number}].munmap({first * self.page}, {count * self.page})")
        pages = [page for page in self.places if first <= page < first + count]
        self._gone(region, [page for page in pages if page in region.pages])
        for page in pages:
            region.pages.pop(page, None)
        region.files.difference_update(pages)

    def _look_at(self, disk: Disk) -> None:
        wrong = disk.wrong()
        assert not wrong, "\n".join([f"{disk.path}: {wrong}, after {self.lives.deaths} deaths", *self.history[-40:]])

    def check(self) -> None:
        super().check()
        in_use = [disk for disk, _ in self.shown.values()] + [mapping.disk for mapping in self.mappings]
        for disk in list(self.disks):
            self._look_at(disk)
            if disk not in in_use:
                self.disks.remove(disk)
                disk.path.unlink()
        for mapping in self.mappings:
            values = f"M[{mapping.number}].buf[:: UNIT], M[{mapping.number}].buf[UNIT - 1 :: UNIT]"
            for who in (0, 1):
                seen = self.ask(who, f"[bytes(each).hex() for each in ({values})]")
                assert seen == [bytes(mapping.pages.values()).hex()] * 2, (mapping, self.history[-40:])


class HugeWorkload(FileWorkload):
    """The same, of huge pages."""

    page = HUGE
    places = (0, 1, 2, 3)
    size = 1 << 30
    backings = ("hugetlb",)

    def create(self, backing: str) -> None:
        """Only what is used of it is mapped."""
        number = self._next()
        how = f"'{self.name}-{number}', {self._address(0, number)}, {self.size}, CREATE"
        self.do(0, f"R[{number}] = mshare.mshare({how}, backing={backing!r}, empty=True)")
        self.do(0, f"R[{number}].mmap({len(self.places)} * UNIT, offset=0, flags=0x31)")
        self._attach(1, number)
        self.regions.append(Model(number, dict.fromkeys(self.places, (3, 0))))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [FileWorkload, HugeWorkload])
def test_no_store_is_lost(
    start_daemon: Callable[..., Daemon],
    client: Callable[..., Client],
    name: str,
    tmp_path: Path,
    kind: type[FileWorkload],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    """In the end everybody dies at once, and the files are complete none the less."""
    options = ("--hugetlb-pool", "256M", "--writeback", "0.3")
    need_memory(256 * MIB)
    with living(start_daemon(*options), *options) as lives:
        clients = [client(lives.daemon), client(lives.daemon)]
        workload = kind(lives, clients, name, tmp_path)
        workload.run(int(os.environ.get("KILL_POINTS", "40")) // 2)
        for region in workload.regions:
            workload.written(region, list(region.pages))
        for mapping in workload.mappings:
            mapping.disk.pages.update(mapping.pages)
        lives.kill()
        for c in clients:
            c.kill()
        eventually(lambda: not lives.restart_if_dead() and not any(disk.wrong() for disk in workload.disks))
