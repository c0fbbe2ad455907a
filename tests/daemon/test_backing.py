"""Backing files: their sizes, what clients can do with the descriptors, and what is held where."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mshared import backing as backing_module
from mshared import landlock, libc, mounts
from mshared import sparse as module
from mshared.backing import FILE_PREFIX, Backing, BackingStore, MemfdStore, MountedStore
from mshared.sparse import extents, punch, resident
from msharefs.addr import PAGE_SIZE, PMD_SIZE, AddrRange
from msharefs.errors import NoSpaceError, NotSupportedError
from msharefs.region import BackingKind, RegionId

SIZE = 4 * PMD_SIZE
NOBODY = 65534

Apart = Callable[[Callable[[], object]], None]


@pytest.fixture
def tmpfs_store(as_root: None, directory: Path) -> Iterator[MountedStore]:
    store = MountedStore(directory, 64 << 20)
    yield store
    store.close()


@pytest.fixture(params=["thp", "4k", "memfd"])
def backing(request: pytest.FixtureRequest) -> Iterator[Backing]:
    """A backing of every kind that this machine has."""
    if request.param == "memfd":
        store: BackingStore = MemfdStore()
        kind = BackingKind.SMALL
    else:
        store = request.getfixturevalue("tmpfs_store")
        kind = BackingKind(request.param)
        if kind not in store.kinds:
            pytest.skip(f"no backing {kind}: {store.notes}")
    made = store.create(RegionId(7), kind, SIZE)
    yield made
    made.close()


class TestHeld:
    """Where a file holds data."""

    def test_a_full_one_need_not_be_searched(self, backing: Backing, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, part = AddrRange.sized(0, SIZE), AddrRange.sized(PMD_SIZE, PAGE_SIZE)
        os.pwrite(backing.fd, bytes(SIZE - PMD_SIZE), 0)
        assert module.held(backing.fd, whole, backing.kind, None) == [AddrRange.sized(0, SIZE - PMD_SIZE)]
        os.pwrite(backing.fd, bytes(PMD_SIZE), SIZE - PMD_SIZE)
        monkeypatch.setattr(module, "extents", None)
        assert module.held(backing.fd, whole, backing.kind, None) == [whole]
        assert module.held(backing.fd, part, backing.kind, None) == [part]


class TestBacking:
    """The file of one region, and what is handed out of it."""

    def test_it_has_its_size_and_takes_no_memory(self, backing: Backing) -> None:
        assert os.fstat(backing.fd).st_size == SIZE
        assert resident(backing.fd) == 0
        assert list(extents(backing.fd)) == []

    def test_all_descriptors_are_of_the_same_file_and_inherited_by_nobody(self, backing: Backing) -> None:
        fds = (backing.fd, backing.writable, backing.readonly)
        assert len({os.fstat(fd).st_ino for fd in fds}) == 1
        assert not any(map(os.get_inheritable, fds))

    def test_clients_map_it_for_writing(self, backing: Backing) -> None:
        with mmap.mmap(backing.writable, SIZE) as mapped:
            mapped[PMD_SIZE : PMD_SIZE + 5] = b"hello"
        assert os.pread(backing.fd, 5, PMD_SIZE) == b"hello"
        assert os.pread(backing.readonly, 5, PMD_SIZE) == b"hello"

    def test_no_client_shrinks_it(self, backing: Backing) -> None:
        if backing.path is not None and not landlock.is_available():
            pytest.skip("no Landlock that binds truncation: Linux 6.2 has it")
        for fd in (backing.writable, backing.readonly):
            for size in (0, SIZE - PAGE_SIZE, SIZE + PAGE_SIZE):
                with pytest.raises(OSError, match=r".") as caught:
                    os.ftruncate(fd, size)
                assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EINVAL)
        assert os.fstat(backing.fd).st_size == SIZE

    def test_a_reader_cannot_write_by_any_call(self, backing: Backing) -> None:
        fd = backing.readonly
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE)
        calls: list[Callable[[], object]] = [
            lambda: os.write(fd, b"x"),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: punch(fd, AddrRange.sized(0, PAGE_SIZE)),
            lambda: os.posix_fallocate(fd, 0, PAGE_SIZE),
        ]
        for call in calls:
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                call()

    def test_a_reader_cannot_open_it_again_for_writing(self, backing: Backing, apart: Apart) -> None:
        """Not even root, where the file lies on a mount; a memfd's owner is the daemon's own user."""

        def work() -> None:
            if backing.path is None and os.geteuid() == 0:
                os.setuid(NOBODY)
                libc.call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self/fd is this user's own.
            assert os.listdir("/proc/self/fd")
            for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
                with pytest.raises(OSError, match=r".") as caught:
                    os.open(f"/proc/self/fd/{backing.readonly}", flags)
                assert caught.value.errno in (errno.EROFS, errno.EACCES)

        apart(work)

    def test_punching_takes_memory_out_of_every_process(self, backing: Backing) -> None:
        with mmap.mmap(backing.writable, SIZE) as mapped:
            mapped[0] = mapped[PMD_SIZE] = 1
            backing.punch(AddrRange.sized(0, PMD_SIZE))
            assert mapped[0] == 0
            assert mapped[PMD_SIZE] == 1
        assert os.fstat(backing.fd).st_size == SIZE

    def test_a_duplicate_outlives_it(self, backing: Backing, open_descriptors: Callable[[], int]) -> None:
        os.pwrite(backing.fd, b"still here", 0)
        before = open_descriptors()
        with backing.duplicate() as fd:
            assert fd not in (backing.fd, backing.writable, backing.readonly)
            assert os.pread(fd, 10, 0) == b"still here"
        assert open_descriptors() == before


class TestMemfdStore:
    """What a daemon without privileges has."""

    def test_no_huge_pages_on_tmpfs(self) -> None:
        store = MemfdStore()
        assert store.kinds == (BackingKind.SMALL, BackingKind.HUGETLB)
        with pytest.raises(NotSupportedError) as caught:
            store.create(RegionId(1), BackingKind.THP, SIZE)
        assert str(caught.value) == store.why_not(BackingKind.THP)

    def test_what_cannot_be_had_says_what_can(self) -> None:
        assert "start mshared as root" in MemfdStore().why_not(BackingKind.THP)
        assert "use one of 4k, hugetlb" in MemfdStore().why_not(BackingKind.THP)

    def test_seals_hold_for_the_daemons_own_descriptor_too(self) -> None:
        backing = MemfdStore().create(RegionId(1), BackingKind.SMALL, SIZE)
        try:
            with pytest.raises(PermissionError):
                os.ftruncate(backing.fd, 0)
            with pytest.raises(PermissionError):
                os.pwrite(backing.fd, b"x", SIZE)
            with pytest.raises(PermissionError):
                libc.call("fcntl", backing.fd, 1033, 8)  # F_ADD_SEALS, F_SEAL_WRITE: nobody else's seal comes on.
        finally:
            backing.close()

    def test_closing_leaves_no_descriptor(self, open_descriptors: Callable[[], int]) -> None:
        before = open_descriptors()
        backing = MemfdStore().create(RegionId(1), BackingKind.SMALL, SIZE)
        assert open_descriptors() > before
        backing.close()
        assert open_descriptors() == before

    def test_capacity_is_the_machines(self) -> None:
        total, free = MemfdStore().capacity()
        assert total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < free <= total

    def test_no_room_is_an_error_of_ours_and_leaves_nothing(
        self, open_descriptors: Callable[[], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = open_descriptors()
        monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(NoSpaceError, match=r"no room for a region of 8388608 bytes: No space left.*--max-bytes"):
            MemfdStore().create(RegionId(1), BackingKind.SMALL, SIZE)
        assert open_descriptors() == before

    def test_what_nobody_expects_is_raised_as_it_is(
        self, open_descriptors: Callable[[], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_args: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        before = open_descriptors()
        monkeypatch.setattr(os, "ftruncate", broken)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            MemfdStore().create(RegionId(1), BackingKind.SMALL, SIZE)
        assert open_descriptors() == before


@pytest.mark.usefixtures("as_root")
class TestMountedStore:
    """What a daemon run by root has."""

    def test_huge_pages_and_small_ones(self, tmpfs_store: MountedStore) -> None:
        if BackingKind.THP not in tmpfs_store.kinds:
            pytest.skip(f"{tmpfs_store.notes}")
        assert tmpfs_store.kinds == (BackingKind.THP, BackingKind.SMALL, BackingKind.HUGETLB)
        for kind, expected in ((BackingKind.THP, PMD_SIZE), (BackingKind.SMALL, PAGE_SIZE)):
            backing = tmpfs_store.create(RegionId(1), kind, SIZE)
            with mmap.mmap(backing.writable, SIZE) as mapped:
                mapped[PMD_SIZE + 5] = 1
            assert resident(backing.fd) == expected
            backing.close()

    def test_without_hugetlbfs_there_is_no_such_kind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def no_such_filesystem(_path: Path) -> None:
            raise OSError(errno.ENODEV, "No such device")

        monkeypatch.setattr(mounts, "mount_hugetlbfs", no_such_filesystem)
        store = MountedStore(tmp_path, None)
        try:
            assert store.kinds == (BackingKind.THP, BackingKind.SMALL)
            assert store.notes == ("no hugetlbfs (No such device): there is no backing hugetlb",)
            with pytest.raises(NotSupportedError, match="use one of thp, 4k"):
                store.create(RegionId(1), BackingKind.HUGETLB, SIZE)
        finally:
            store.close()
        assert "no hugetlbfs" in caplog.text
        assert list(tmp_path.iterdir()) == []

    def test_closing_a_backing_takes_its_name_and_its_memory(
        self, tmpfs_store: MountedStore, open_descriptors: Callable[[], int]
    ) -> None:
        before, (_, free) = open_descriptors(), tmpfs_store.capacity()
        backing = tmpfs_store.create(RegionId(1), tmpfs_store.kinds[0], SIZE)
        assert backing.path is not None
        assert backing.path.stat().st_mode & 0o777 == 0o600
        os.pwrite(backing.fd, b"x", 0)
        assert tmpfs_store.capacity()[1] < free
        backing.close()
        assert not backing.path.exists()
        assert open_descriptors() == before
        assert tmpfs_store.capacity()[1] == free

    def test_closing_a_backing_whose_name_is_gone(self, tmpfs_store: MountedStore) -> None:
        backing = tmpfs_store.create(RegionId(1), BackingKind.SMALL, SIZE)
        assert backing.path is not None
        backing.path.unlink()
        backing.close()

    def test_capacity_is_what_was_allowed(self, tmpfs_store: MountedStore) -> None:
        assert tmpfs_store.capacity() == (64 << 20, 64 << 20)

    def test_without_a_limit_it_is_most_of_the_machine(self, directory: Path) -> None:
        store = MountedStore(directory, None)
        try:
            total, _ = MemfdStore().capacity()
            assert store.capacity()[0] == pytest.approx(0.9 * total, rel=0.001)
        finally:
            store.close()

    def test_a_file_that_is_there_already_is_not_taken_over(
        self,
        tmpfs_store: MountedStore,
        directory: Path,
        open_descriptors: Callable[[], int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("secrets.token_hex", lambda _: "1")
        theirs = directory / "4k" / f"{FILE_PREFIX}1"
        theirs.write_bytes(b"somebody's")
        before = open_descriptors()
        with pytest.raises(FileExistsError):
            tmpfs_store.create(RegionId(1), BackingKind.SMALL, SIZE)
        assert theirs.read_bytes() == b"somebody's"
        assert open_descriptors() == before

    def test_failing_half_way_leaves_nothing(
        self,
        tmpfs_store: MountedStore,
        directory: Path,
        open_descriptors: Callable[[], int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def too_many(*_args: object) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        before = open_descriptors()
        monkeypatch.setattr(landlock, "open_without_truncate", too_many)
        monkeypatch.setattr(tmpfs_store, "_landlock", True)
        with pytest.raises(NoSpaceError, match="Too many open files"):
            tmpfs_store.create(RegionId(1), BackingKind.SMALL, SIZE)
        assert list((directory / "4k").iterdir()) == []
        assert open_descriptors() == before

    def test_files_are_made_ahead_while_there_are_few_and_are_the_next_regions(
        self, tmpfs_store: MountedStore, open_descriptors: Callable[[], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind, before = tmpfs_store.kinds[0], open_descriptors()
        tmpfs_store.prepare(kind)
        ready = open_descriptors()
        tmpfs_store.prepare(kind)
        assert open_descriptors() == ready
        for number in range(10, 16):
            tmpfs_store.create(RegionId(number), kind, SIZE).close()
        assert open_descriptors() == ready - 6 * 3
        tmpfs_store.prepare(kind)
        assert open_descriptors() == ready
        with monkeypatch.context() as patched:
            patched.setattr(landlock, "open_without_truncate", None)
            made = tmpfs_store.create(RegionId(3), kind, SIZE)
        assert open_descriptors() == ready
        assert os.fstat(made.fd).st_size == SIZE
        assert made.path is not None
        assert made.path.samefile(f"/proc/self/fd/{made.fd}")
        with pytest.raises(PermissionError):
            os.ftruncate(made.writable, 0)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.pwrite(made.readonly, b"x", 0)
        assert {file.stat().st_size for file in made.path.parent.iterdir() if file != made.path} == {0}
        made.close()
        assert not made.path.exists()
        assert open_descriptors() == ready - 3 > before

    def test_one_made_ahead_that_cannot_be_a_region_goes(
        self, tmpfs_store: MountedStore, open_descriptors: Callable[[], int], directory: Path
    ) -> None:
        tmpfs_store.prepare(BackingKind.SMALL)
        before, files = open_descriptors(), len(list((directory / "4k").iterdir()))
        with pytest.raises(OSError, match="Invalid argument"):
            tmpfs_store.create(RegionId(1), BackingKind.SMALL, -1)
        assert open_descriptors() == before - 3
        assert len(list((directory / "4k").iterdir())) == files - 1

    def test_closing_the_store_leaves_no_mount_and_no_descriptor(
        self, directory: Path, open_descriptors: Callable[[], int]
    ) -> None:
        before = open_descriptors()
        store = MountedStore(directory, 1 << 20)
        store.prepare(BackingKind.SMALL)
        assert mounts.mount_at(directory / "4k") is not None
        store.close()
        assert open_descriptors() == before
        assert mounts.mount_at(directory / "4k") is None
        assert list(directory.iterdir()) == []

    def test_memory_that_is_mapped_outlives_the_store(self, directory: Path) -> None:
        store = MountedStore(directory, 16 << 20)
        backing = store.create(RegionId(1), BackingKind.SMALL, SIZE)
        mapped = mmap.mmap(backing.writable, SIZE)
        mapped[0] = 5
        backing.close()
        store.close()
        assert mapped[0] == 5
        mapped[PMD_SIZE] = 6
        mapped.close()

    def test_without_huge_pages_for_tmpfs_there_are_small_ones_and_a_note(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = mounts.mount_tmpfs

        def old_kernel(path: Path, options: str) -> None:
            if "huge" in options:
                raise OSError(errno.EINVAL, "mount: Invalid argument")
            plain(path, options)

        monkeypatch.setattr(mounts, "mount_tmpfs", old_kernel)
        store = MountedStore(directory, 1 << 20)
        try:
            assert store.kinds == (BackingKind.SMALL, BackingKind.HUGETLB)
            assert "no huge pages for tmpfs" in " ".join(store.notes)
            assert store.capacity() == (1 << 20, 1 << 20)
            with pytest.raises(NotSupportedError, match="kernel") as caught:
                store.create(RegionId(1), BackingKind.THP, SIZE)
            assert "root" not in str(caught.value)
        finally:
            store.close()
        assert list(directory.iterdir()) == []

    @pytest.mark.parametrize("failing", ["thp", "4k"])
    def test_where_mounting_is_not_allowed_nothing_is_left(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        plain = mounts.mount_tmpfs

        def refuse(path: Path, options: str) -> None:
            if path.name == failing:
                raise PermissionError(errno.EPERM, "mount: Operation not permitted")
            plain(path, options)

        monkeypatch.setattr(mounts, "mount_tmpfs", refuse)
        with pytest.raises(PermissionError):
            MountedStore(directory, 1 << 20)
        assert mounts.mount_at(directory / "thp") is None
        assert list(directory.iterdir()) == []

    def test_where_nothing_can_be_made_readonly_it_works_all_the_same(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mounts, "readonly_copy", lambda _path: None)
        store = MountedStore(directory, 16 << 20)
        backing = store.create(RegionId(1), BackingKind.SMALL, SIZE)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.pwrite(backing.readonly, b"x", 0)
        backing.close()
        store.close()

    def test_without_landlock_it_says_what_that_means(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(landlock, "is_available", lambda: False)
        store = MountedStore(directory, 16 << 20)
        backing = store.create(RegionId(1), BackingKind.SMALL, SIZE)
        assert os.fstat(backing.writable).st_size == SIZE
        backing.close()
        store.close()
        assert "truncate its memory" in caplog.text
        assert "truncate its memory" in " ".join(store.notes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG])
def test_whatever_is_short_it_is_no_space(number: int) -> None:
    error = backing_module._no_room(OSError(number, os.strerror(number)), 1 << 20)
    assert isinstance(error, NoSpaceError)
    assert os.strerror(number) in str(error)
