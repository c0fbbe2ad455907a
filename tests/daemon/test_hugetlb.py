"""Huge pages: the machine's pool, and the calls that promise, find, fill and make pages of a file."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hugepages import GIB, HUGE, MIB, Pool, need_memory, pages_left, pool, pool_size

from mshared import hugetlb, libc, table_sharing
from mshared.backing import Backing, BackingStore, MemfdStore, MountedStore
from mshared.filler import Filler
from mshared.live import LiveRegion
from mshared.sparse import punch
from msharefs.addr import AddrRange
from msharefs.effects import Arm
from msharefs.errors import NoMemoryError
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership, Prot
from msharefs.region import BackingKind, RegionId

pytestmark = pytest.mark.pool

SIZE = 3 * GIB
"""Of which whole GiB, whose tables the kernel can share, lie in any mapping."""

WHOLE = AddrRange.sized(0, SIZE)

Eventually = Callable[[Callable[[], bool]], None]


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(first * HUGE, (end - first) * HUGE)


NOTE = Path(tempfile.gettempdir()) / f"msharefs-test-pool-{os.getpid()}"


@pytest.fixture
def pool_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Instead of the machine's own."""
    path = tmp_path / "nr_hugepages"
    path.write_text("7\n")
    NOTE.unlink(missing_ok=True)
    monkeypatch.setattr(hugetlb, "POOL", path)
    yield path
    NOTE.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hugetlb.Pool]:
    """64 pages more."""
    if os.geteuid() != 0:
        pytest.skip("raising the pool of huge pages is for root only")
    need_memory(64 * HUGE)
    added = hugetlb.Pool(64 * HUGE, tmp_path_factory.mktemp("pool") / "note")
    yield added
    added.close()


@pytest.fixture
def before(raised: hugetlb.Pool, eventually: Eventually) -> Iterator[Pool]:
    """The pool before the test; it must be the same afterwards."""
    found = pool()
    yield found
    eventually(lambda: pool() == found)


@pytest.fixture
def fd(before: Pool) -> Iterator[int]:
    """A file of huge pages with none in it."""
    fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def mappings() -> int:
    """How many of this process's mappings are of such files."""
    return Path("/proc/self/maps").read_text().count("huge (deleted)")


class TestPool:
    """What is added is taken away again, and nothing else."""

    def test_pages_are_added_and_given_back(self, pool_file: Path) -> None:
        pool = hugetlb.Pool(5 * HUGE, NOTE)
        assert pool_file.read_text() == "12"
        pool.close()
        assert pool_file.read_text() == "7"
        pool.close()
        assert pool_file.read_text() == "7"

    def test_what_a_daemon_that_was_killed_has_added_is_given_back(self, pool_file: Path) -> None:
        hugetlb.Pool(5 * HUGE, NOTE)
        pool = hugetlb.Pool(2 * HUGE, NOTE)
        assert (pool_file.read_text(), NOTE.read_text()) == ("9", "2")
        pool.close()
        assert (pool_file.read_text(), NOTE.exists()) == ("7", False)

    def test_parts_of_a_page_count_as_one(self, pool_file: Path) -> None:
        hugetlb.Pool(2 * HUGE + 1, NOTE)
        assert pool_file.read_text() == "10"

    def test_what_others_do_to_the_pool_stays(self, pool_file: Path) -> None:
        pool = hugetlb.Pool(5 * HUGE, NOTE)
        pool_file.write_text("112")
        pool.close()
        assert pool_file.read_text() == "107"

    def test_a_pool_that_others_have_emptied_is_not_raised(self, pool_file: Path) -> None:
        pool = hugetlb.Pool(5 * HUGE, NOTE)
        pool_file.write_text("2")
        pool.close()
        assert pool_file.read_text() == "0"

    def test_more_than_is_free_is_not_even_tried(self, pool_file: Path) -> None:
        """The kernel would swallow what is left, and be slow about it."""
        with pytest.raises(NoMemoryError, match=r"only .* of memory are free; ask for less"):
            hugetlb.Pool(hugetlb.available() + GIB, NOTE)
        assert pool_file.read_text() == "7\n"

    @pytest.mark.parametrize(("found", "said"), [(3, "6 MiB of 10 MiB"), (0, "0 B of 10 MiB")])
    def test_what_the_kernel_cannot_find_is_given_back(
        self, pool_file: Path, monkeypatch: pytest.MonkeyPatch, found: int, said: str
    ) -> None:
        written = []

        def grant(path: Path, text: str) -> int:
            if path == pool_file:
                written.append(text)
                text = str(min(int(text), 7 + found))
            with path.open("w") as file:
                return file.write(text)

        monkeypatch.setattr(Path, "write_text", grant)
        with pytest.raises(NoMemoryError, match=r"the kernel finds .*hugepages=") as caught:
            hugetlb.Pool(5 * HUGE, NOTE)
        assert written == ["12", "7"] if found else written == ["12"]
        assert pool_file.read_text() == "7"
        assert said in str(caught.value)

    def test_who_may_not_write_it_is_told_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hugetlb, "POOL", tmp_path / "none" / "such")
        with pytest.raises(OSError, match="No such file"):
            hugetlb.Pool(HUGE, NOTE)

    @pytest.mark.usefixtures("before")
    def test_the_machines_own(self) -> None:
        size = pool_size()
        added = hugetlb.Pool(8 * HUGE, NOTE)
        try:
            assert pool_size() == size + 8
        finally:
            added.close()
        assert pool_size() == size


class TestReserve:
    """Pages are promised to a file, a range at a time, and stay so."""

    def test_they_are_promised_and_not_taken(self, fd: int, before: Pool) -> None:
        hugetlb.reserve(fd, pages(600, 610))
        assert pool() == before.with_region(mapped=10, touched=0)
        assert (os.fstat(fd).st_blocks, mappings()) == (0, 0)

    def test_what_is_promised_already_counts_once(self, fd: int, before: Pool) -> None:
        for first, end in ((0, 4), (0, 4), (2, 6), (10, 11)):
            hugetlb.reserve(fd, pages(first, end))
        assert pool() == before.with_region(mapped=7, touched=0)

    def test_a_page_that_is_there_needs_no_promise(self, fd: int, before: Pool) -> None:
        hugetlb.allocate(fd, pages(1, 3))
        hugetlb.reserve(fd, pages(0, 4))
        assert pool() == before.with_region(mapped=4, touched=2)

    def test_too_much_is_refused_as_a_whole(self, fd: int, before: Pool) -> None:
        hugetlb.reserve(fd, pages(0, 1))
        text = r"not enough huge pages for .* GiB; raise vm.nr_hugepages.*--hugetlb-pool"
        with pytest.raises(NoMemoryError, match=text):
            hugetlb.reserve(fd, pages(1, 1 + (pages_left() // 1024 + 1) * 1024))
        assert pool() == before.with_region(mapped=1, touched=0)
        assert mappings() == 0

    def test_other_mistakes_are_raised_as_they_are(self) -> None:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            hugetlb.reserve(-1, pages(0, 1))

    def test_what_is_promised_can_be_had_when_all_the_rest_is_taken(self, fd: int, before: Pool) -> None:
        hugetlb.reserve(fd, pages(0, 4))
        other = os.memfd_create("huge", os.MFD_HUGETLB)
        try:
            os.ftruncate(other, SIZE)
            hugetlb.reserve(other, pages(0, pages_left()))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                hugetlb.allocate(fd, pages(4, 5))
            hugetlb.allocate(fd, pages(0, 4))
        finally:
            os.close(other)
        assert pool() == before.with_region(mapped=4, touched=4)


class TestPresent:
    """Which pages a file has, without making any."""

    def find(self, fd: int, ar: AddrRange = WHOLE) -> list[AddrRange]:
        found = hugetlb.present(fd, ar, None)
        assert mappings() == 0
        return found

    def test_none(self, fd: int) -> None:
        assert self.find(fd) == []

    def test_runs_of_them_and_the_ends_of_the_file(self, fd: int, before: Pool) -> None:
        runs = [pages(0, 1), pages(3, 6), pages(7, 8), pages(511, 514), pages(1535, 1536)]
        for run in runs:
            hugetlb.allocate(fd, run)
        assert self.find(fd) == runs
        assert pool() == before.with_region(mapped=9, touched=9)

    def test_in_a_part_of_the_file(self, fd: int) -> None:
        hugetlb.allocate(fd, pages(3, 10))
        assert self.find(fd, pages(5, 8)) == [pages(5, 8)]
        assert self.find(fd, pages(8, 20)) == [pages(8, 10)]
        assert self.find(fd, pages(0, 4)) == [pages(3, 4)]
        assert self.find(fd, pages(10, 11)) == []

    def test_promised_pages_are_not_there(self, fd: int) -> None:
        hugetlb.reserve(fd, pages(0, 4))
        assert self.find(fd) == []

    def test_pages_that_are_gone_are_not_there(self, fd: int) -> None:
        hugetlb.allocate(fd, pages(600, 604))
        assert self.find(fd) == [pages(600, 604)]
        punch(fd, pages(601, 602))
        assert self.find(fd) == [pages(600, 601), pages(602, 604)]

    def test_that_others_have_mapped(self, fd: int) -> None:
        """Whether they made them by a store or have them by their table only."""
        address = libc.map_shared(fd, SIZE, reserve=False, writable=True)
        try:
            ctypes.memset(address + 600 * HUGE, 1, 1)
            ctypes.memset(address + 602 * HUGE, 1, 1)
            hugetlb.allocate(fd, pages(601, 602))
            assert hugetlb.present(fd, WHOLE, None) == [pages(600, 603)]
        finally:
            libc.unmap(address, SIZE)

    def test_that_the_daemons_own_filler_has_mapped(self, fd: int) -> None:
        """Its mapping is like that which asks: the kernel may share their tables."""
        filler = Filler(fd, SIZE, None, HUGE)
        try:
            hugetlb.allocate(fd, pages(600, 602))
            filler.zero(602 * HUGE)
            hugetlb.allocate(fd, pages(603, 604))
            for _ in range(3):
                assert hugetlb.present(fd, WHOLE, None) == [pages(600, 604)]
        finally:
            filler.close()

    def test_that_several_threads_ask_for_at_once(self, fd: int) -> None:
        hugetlb.allocate(fd, pages(500, 530))
        punch(fd, pages(520, 521))
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: hugetlb.present(fd, WHOLE, None), range(100)))
        assert found == [[pages(500, 520), pages(521, 530)]] * 100

    def test_nothing_is_left_open(self, fd: int, open_descriptors: Callable[[], int]) -> None:
        count = open_descriptors()
        self.find(fd)
        assert open_descriptors() == count


class TestContents:
    """Pages are made, and written over where they are."""

    def test_pages_are_made_of_zeros_and_kept_where_they_are(self, fd: int, before: Pool) -> None:
        hugetlb.allocate(fd, pages(1, 2))
        hugetlb.overwrite(fd, HUGE, b"x" * HUGE)
        hugetlb.allocate(fd, pages(0, 3))
        assert [os.pread(fd, 2, page * HUGE) for page in range(3)] == [b"\0\0", b"xx", b"\0\0"]
        assert pool() == before.with_region(mapped=3, touched=3)

    def test_only_what_is_meant_is_written_over(self, fd: int) -> None:
        hugetlb.allocate(fd, pages(0, 4))
        hugetlb.overwrite(fd, HUGE, b"a" * HUGE + b"b" * HUGE)
        edges = (0, HUGE - 1, HUGE, 2 * HUGE - 1, 2 * HUGE, 3 * HUGE - 1, 3 * HUGE)
        assert [os.pread(fd, 1, at) for at in edges] == [b"\0", b"\0", b"a", b"a", b"b", b"b", b"\0"]
        assert mappings() == 0

    def test_zeros_are_put_where_they_are_meant(self, fd: int, before: Pool) -> None:
        hugetlb.allocate(fd, pages(0, 4))
        for page in range(4):
            hugetlb.overwrite(fd, page * HUGE, b"a" * HUGE)
        hugetlb.zero(fd, pages(1, 3))
        edges = (0, HUGE - 1, HUGE, 3 * HUGE - 1, 3 * HUGE)
        assert [os.pread(fd, 1, at) for at in edges] == [b"a", b"a", b"\0", b"\0", b"a"]
        assert (mappings(), pool()) == (0, before.with_region(mapped=4, touched=4))

    def test_pages_that_went_and_are_not_to_be_had_end_nobody(self, fd: int) -> None:
        """A store of the daemon's own would be a SIGBUS."""
        hugetlb.allocate(fd, pages(1, 2))
        other = os.memfd_create("huge", os.MFD_HUGETLB)
        try:
            os.ftruncate(other, SIZE)
            hugetlb.reserve(other, pages(0, pages_left()))
            hugetlb.zero(fd, pages(0, 3))
            with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
                hugetlb.overwrite(fd, HUGE, bytes(2 * HUGE))
        finally:
            os.close(other)
        assert hugetlb.present(fd, pages(0, 3), None) == [pages(1, 2)]

    def test_what_cannot_be_had_is_an_error(self, fd: int) -> None:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            hugetlb.allocate(fd, pages(0, pages_left() + 1))


@pytest.fixture(params=["hugetlbfs", "memfd"])
def store(request: pytest.FixtureRequest, directory: Path) -> Iterator[BackingStore]:
    """What a daemon of root's has, and what one of an ordinary user has."""
    store: BackingStore = MountedStore(directory, 64 * MIB) if request.param == "hugetlbfs" else MemfdStore()
    yield store
    store.close()


@pytest.fixture
def backing(before: Pool, store: BackingStore) -> Iterator[Backing]:
    made = store.create(RegionId(7), BackingKind.HUGETLB, SIZE)
    yield made
    made.close()


def kept(backing: Backing) -> int:
    """How many pages its filesystem keeps when the file has let some go."""
    return int(backing.mount is not None)


class TestBacking:
    """The file of a region in huge pages."""

    def test_making_one_takes_a_page_at_most(self, backing: Backing, before: Pool) -> None:
        assert os.fstat(backing.fd).st_size == SIZE
        assert pool() == before.with_region(mapped=0, touched=0, kept=kept(backing))

    def test_its_memory_is_promised_taken_and_given_back(self, backing: Backing, before: Pool) -> None:
        backing.reserve(pages(0, 8))
        hugetlb.allocate(backing.fd, pages(0, 3))
        assert pool() == before.with_region(mapped=8, touched=3)
        backing.punch(pages(0, 2))
        assert pool() == before.with_region(mapped=6, touched=1, kept=kept(backing))

    def test_what_is_emptied_is_promised_whoever_else_wants_it(
        self, backing: Backing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All that is free goes to somebody else at the worst moment; without a mount of its own a page is lost."""
        backing.reserve(pages(0, 8))
        hugetlb.allocate(backing.fd, pages(0, 4))
        other = os.memfd_create("huge", os.MFD_HUGETLB)
        os.ftruncate(other, SIZE)
        punch = libc.punch

        def punch_late(fd: int, offset: int, size: int) -> None:
            punch(fd, offset, size)
            taken = os.fstat(other).st_blocks * 512
            os.posix_fallocate(other, 0, taken + pages_left() * HUGE) if pages_left() else None

        monkeypatch.setattr(libc, "punch", punch_late)
        try:
            lost = backing.empty(pages(0, 2))
            assert lost == (0 if kept(backing) else 2)
            assert hugetlb.present(backing.fd, pages(0, 8), None) == [pages(2, 4)]
            hugetlb.allocate(backing.fd, pages(lost, 8))
        finally:
            os.close(other)

    @pytest.mark.usefixtures("before")
    def test_one_that_the_pool_has_no_page_for(self, store: BackingStore, directory: Path) -> None:
        """The mount of its own takes one; a memfd takes none before something is mapped."""
        other = os.memfd_create("huge", os.MFD_HUGETLB)
        try:
            os.ftruncate(other, SIZE)
            hugetlb.reserve(other, pages(0, pages_left()))
            if isinstance(store, MountedStore):
                with pytest.raises(NoMemoryError, match=r"not even one huge page is free; raise vm.nr_hugepages"):
                    store.create(RegionId(8), BackingKind.HUGETLB, SIZE)
                assert list((directory / "hugetlb").iterdir()) == []
            else:
                store.create(RegionId(8), BackingKind.HUGETLB, SIZE).close()
        finally:
            os.close(other)

    def test_what_is_there_is_written_over(self, backing: Backing) -> None:
        hugetlb.allocate(backing.fd, pages(1, 2))
        backing.write(b"z" * HUGE, HUGE)
        assert os.pread(backing.readonly, 3, 2 * HUGE - 3) == b"zzz"

    def test_no_client_changes_its_size(self, backing: Backing) -> None:
        for fd in (backing.writable, backing.readonly):
            for size in (0, SIZE - GIB, SIZE + GIB):
                with pytest.raises(OSError, match=r".") as caught:
                    os.ftruncate(fd, size)
                assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EINVAL)
        assert os.fstat(backing.fd).st_size == SIZE

    def test_a_reader_cannot_write_by_any_call(self, backing: Backing) -> None:
        with pytest.raises(PermissionError):
            mmap.mmap(backing.readonly, SIZE)
        for call in (punch, hugetlb.allocate):
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                call(backing.readonly, pages(0, 1))

    def test_a_reader_cannot_open_it_again_for_writing(
        self, backing: Backing, apart: Callable[[Callable[[], object]], None]
    ) -> None:
        def work() -> None:
            if backing.path is None:
                os.setuid(65534)
                libc.call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self/fd is this user's own.
            with pytest.raises(OSError, match=r".") as caught:
                os.open(f"/proc/self/fd/{backing.readonly}", os.O_RDWR)
            assert caught.value.errno in (errno.EROFS, errno.EACCES)

        apart(work)


class TestLiveRegion:
    """What a region does with such a file."""

    @pytest.fixture
    def region(self, before: Pool) -> Iterator[LiveRegion]:
        """Pages 0..9 of 2 GiB are mapped, and promised."""
        assert pool() == before
        namespace = Namespace(Ownership(0, 0, 0o777), Policy())
        kind = BackingKind.HUGETLB
        model = namespace.create("it", None, 2 * GIB, 0o600, kind, Credentials(0, 0), empty=True)
        region = LiveRegion(model, MemfdStore().create(model.id, kind, 2 * GIB), None)
        model.mm.mmap(pages(0, 10).moved(model.ar.start), 10 * HUGE, fixed=True)
        region.reserve(model.ar)
        yield region
        region.close()

    def test_what_is_mapped_is_reserved(self, region: LiveRegion, before: Pool) -> None:
        assert pool() == before.with_region(mapped=10, touched=0)
        region.reserve(pages(0, 100).moved(region.model.ar.start))
        assert pool() == before.with_region(mapped=10, touched=0)

    def test_pages_are_put_and_replaced(self, region: LiveRegion, before: Pool) -> None:
        region.put(b"a" * HUGE + b"b" * HUGE, 2 * HUGE)
        region.put(b"c" * HUGE, 3 * HUGE)
        assert [os.pread(region.backing.fd, 1, page * HUGE) for page in range(1, 5)] == [b"\0", b"a", b"c", b"\0"]
        assert region.held(pages(0, 1024)) == [pages(2, 4)]
        assert pool() == before.with_region(mapped=10, touched=2)

    def test_new_pages_leave_what_is_there(self, region: LiveRegion) -> None:
        region.put(b"a" * HUGE, HUGE)
        region.put_new(b"n" * 3 * HUGE, 0)
        assert [os.pread(region.backing.fd, 1, page * HUGE) for page in range(4)] == [b"n", b"a", b"n", b"\0"]

    def test_tables_are_shared_until_stores_must_be_seen(self, region: LiveRegion) -> None:
        mm, start = region.model.mm, region.model.ar.start
        for effects in (mm.munmap(pages(9, 10).moved(start)), mm.mprotect(pages(1, 2).moved(start), Prot.READ)):
            assert region.model.tables_shared
            for effect in effects:
                if isinstance(effect, Arm):
                    table_sharing.note_arming(region, effect)
        assert not region.model.tables_shared
        assert region.model.unshared is not None
        since, why = region.model.unshared.since, region.model.unshared.why
        assert (since[:2], "stores to" in why, f"{start + HUGE:012x}" in why) == ("20", True, True)
