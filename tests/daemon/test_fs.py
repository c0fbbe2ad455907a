"""The tree of the mount, asked without a mount: mistakes are an errno for the caller, never the end of the daemon."""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio

pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed: scripts/setup installs it")

import pyfuse3

from mshared import fs
from mshared.fs import MshareFs
from mshared.service import INODES_A_REGION
from msharefs.addr import PMD_SIZE
from msharefs.errors import AccessDeniedError, MshareError, NotFoundError
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Credentials, Ownership
from msharefs.region import BackingKind, Region

ROOT = pyfuse3.ROOT_INODE
INFO = b"2097152\nversion 1\n"


def run(call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    async def main() -> Any:
        return await call(*args)

    return trio.run(main)


def errno_of(call: Callable[..., Awaitable[Any]], *args: Any) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        run(call, *args)
    return int(caught.value.errno)


class TestGuard:
    """Around every handler."""

    @staticmethod
    def handler(error: Exception) -> Callable[..., Awaitable[Any]]:
        async def broken(*_args: object) -> object:
            raise error

        return fs._guarded(broken)

    @pytest.mark.parametrize("error", [AccessDeniedError("no"), NotFoundError("no"), MshareError("no")])
    def test_our_errors_have_an_errno(self, error: MshareError) -> None:
        assert errno_of(self.handler(error)) == error.errno

    def test_those_of_fuse_stay_what_they_are(self) -> None:
        assert errno_of(self.handler(pyfuse3.FUSEError(errno.ENOTDIR))) == errno.ENOTDIR

    def test_what_nobody_expected_is_eio_and_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        assert errno_of(self.handler(ZeroDivisionError("the details"))) == errno.EIO
        assert "fuse: broken failed" in caplog.text
        assert "the details" in caplog.text

    def test_what_goes_well_goes_through(self) -> None:
        async def fine(number: int) -> int:
            return number + 1

        assert run(fs._guarded(fine), 4) == 5

    def test_no_handler_is_without(self) -> None:
        """An exception that is not FUSEError would end the daemon."""
        handlers = [name for name, value in vars(MshareFs).items() if callable(value)]
        own = {name for name in handlers if not name.startswith("_") and hasattr(pyfuse3.Operations, name)}
        assert own >= {"lookup", "getattr", "open", "read", "readdir", "setattr", "unlink", "rename"}
        assert [name for name in own if not hasattr(vars(MshareFs)[name], "__wrapped__")] == []


@pytest.fixture
def namespace() -> Namespace:
    return Namespace(Ownership(0, 0, 0o1777), Policy())


@pytest.fixture
def tree(namespace: Namespace) -> MshareFs:
    service: Any = SimpleNamespace(
        namespace=namespace,
        lifetimes=SimpleNamespace(region=lambda model: SimpleNamespace(model=model, created_ns=0)),
        store=SimpleNamespace(capacity=lambda: (8 << 20, 6 << 20)),
    )
    return MshareFs(service, INFO.decode())


@pytest.fixture
def region(namespace: Namespace) -> Region:
    region = namespace.create("it", None, PMD_SIZE, 0o640, BackingKind.SMALL, Credentials(1000, 100))
    namespace.attach(region, region.ar.start, 1, readonly=False)
    return region


class TestTree:
    """Names, modes and contents."""

    def test_the_root_is_sticky(self, tree: MshareFs) -> None:
        entry = run(tree.getattr, ROOT)
        assert entry.st_mode == stat.S_IFDIR | 0o1777
        assert entry.attr_timeout == entry.entry_timeout == 0

    def test_a_region_is_known_while_it_is_opened_and_nothing_else_is(self, tree: MshareFs, region: Region) -> None:
        """Permissions of its info files follow its own, which the kernel cannot know."""
        entry = run(tree.lookup, ROOT, b"it")
        assert 0 < entry.attr_timeout <= 0.02
        assert entry.entry_timeout == 0
        for part in range(1, 7):
            entry = run(tree.getattr, region.id * INODES_A_REGION + part)
            assert entry.attr_timeout == entry.entry_timeout == 0

    def test_a_region_is_a_file_of_its_owner_as_long_as_what_it_says(self, tree: MshareFs, region: Region) -> None:
        entry = run(tree.lookup, ROOT, b"it")
        assert entry.st_ino == region.id * INODES_A_REGION
        assert (entry.st_mode, entry.st_uid, entry.st_gid) == (stat.S_IFREG | 0o640, 1000, 100)
        handle = run(tree.open, entry.st_ino, 0, None)
        assert handle.direct_io
        content = run(tree.read, handle.fh, 0, 1 << 20)
        assert len(content) == entry.st_size
        assert struct.unpack_from("@LL", content) == (region.ar.start, PMD_SIZE)
        assert content[16:].decode().startswith(f"\nstart {region.ar.start:#x}\n")
        assert run(tree.read, handle.fh, 8, 8) == content[8:16]

    def test_one_that_is_not_ready_is_not_there(self, tree: MshareFs, namespace: Namespace) -> None:
        namespace.create("unready", None, PMD_SIZE, 0o600, BackingKind.SMALL, Credentials(0, 0))
        assert errno_of(tree.lookup, ROOT, b"unready") == errno.ENOENT

    @pytest.mark.parametrize(("name", "number"), [(b"nothing", errno.ENOENT), (b"x" * 256, errno.ENAMETOOLONG)])
    def test_names_that_are_none(self, tree: MshareFs, name: bytes, number: int) -> None:
        assert errno_of(tree.lookup, ROOT, name) == number

    @pytest.mark.parametrize("inode", [5, 15, 7 * INODES_A_REGION, INODES_A_REGION + 15, 1 << 60])
    def test_inodes_that_are_none(self, tree: MshareFs, region: Region, inode: int) -> None:
        assert region.id == 1
        assert errno_of(tree.open, inode, 0, None) in (errno.ENOENT, errno.EISDIR)

    def test_what_an_open_file_holds_stays(self, tree: MshareFs, region: Region, namespace: Namespace) -> None:
        """A reader that takes several reads sees one state, though the region goes meanwhile."""
        handle = run(tree.open, region.id * INODES_A_REGION, 0, None).fh
        before = run(tree.read, handle, 0, 1000)
        namespace.remove(region, Credentials(0, 0))
        assert run(tree.read, handle, 0, 1000) == before
        run(tree.release, handle)
        assert errno_of(tree.read, handle, 0, 1000) == errno.EIO

    def test_the_info_file(self, tree: MshareFs) -> None:
        entry = run(tree.lookup, ROOT, b"mshare_info")
        assert (entry.st_mode, entry.st_size) == (stat.S_IFREG | 0o444, len(INFO))
        assert run(tree.read, run(tree.open, entry.st_ino, 0, None).fh, 0, 1000) == INFO

    def test_free_space_is_the_stores(self, tree: MshareFs) -> None:
        data = run(tree.statfs, None)
        assert (data.f_blocks * data.f_frsize, data.f_bavail * data.f_frsize) == (8 << 20, 6 << 20)
        assert data.f_namemax == 255

    def test_attributes_of_a_region(self, tree: MshareFs, region: Region) -> None:
        inode = region.id * INODES_A_REGION
        found = {name: run(tree.getxattr, inode, name, None) for name in run(tree.listxattr, inode, None)}
        assert found == {
            b"user.mshare.start": f"{region.ar.start:#x}".encode(),
            b"user.mshare.size": b"2097152",
            b"user.mshare.backing": b"4k",
            b"user.mshare.attached": b"1",
        }
        for where, name in ((inode, b"user.other"), (ROOT, b"user.mshare.size"), (inode + 2, b"user.mshare.size")):
            assert errno_of(tree.getxattr, where, name, None) == errno.ENODATA

    @pytest.mark.parametrize(
        ("handler", "count"),
        [
            ("write", 3),
            ("create", 5),
            ("mknod", 5),
            ("mkdir", 4),
            ("symlink", 4),
            ("link", 4),
            ("unlink", 3),
            ("rmdir", 3),
            ("rename", 6),
            ("setxattr", 4),
            ("removexattr", 3),
        ],
    )
    def test_what_would_change_names_is_refused(self, tree: MshareFs, handler: str, count: int) -> None:
        assert errno_of(getattr(tree, handler), *[0] * count) == errno.EPERM

    @pytest.mark.parametrize("flags", [0o1000, 0o1001, 0o1002])
    def test_no_open_truncates(self, tree: MshareFs, region: Region, flags: int) -> None:
        assert errno_of(tree.open, region.id * INODES_A_REGION, flags, None) == errno.EPERM

    def test_only_regions_are_opened_for_writing(self, tree: MshareFs, region: Region) -> None:
        base = region.id * INODES_A_REGION
        assert run(tree.open, base, 2, None).fh
        for inode in (2, 4, base + 2):
            assert errno_of(tree.open, inode, 2, None) == errno.EPERM
