"""The mount: names, modes and introspection over FUSE. The only place that knows FUSE's words.

Never the data path: files are opened with direct_io, so that mmap(2) of one fails with ENODEV. Names are never cached:
a dead daemon must not answer. Nor are attributes, but for a moment those of a region, whose name was just looked up.
Regions come and go through the control socket, so everything that would make, change or remove a file here is EPERM;
chmod and chown are the exception, checked by the kernel (default_permissions).
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import stat
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn, TypeVar

import attrs
import pyfuse3

from mshared.service import INODES_A_REGION, Service
from msharefs import dump
from msharefs.errors import MshareError
from msharefs.names import INFO_NAME, NAME_MAX
from msharefs.perms import Ownership
from msharefs.region import Region, RegionId

log = logging.getLogger(__name__)

_ROOT: Final = pyfuse3.ROOT_INODE
_INFO: Final = 2
_REGIONS: Final = 3
_METRICS: Final = 4
_FILES: Final = 5
_FILES_NAME: Final = ".files"
_FIXED: Final = {INFO_NAME: _INFO, ".regions": _REGIONS, ".metrics": _METRICS}
_DIRECTORIES: Final = (_ROOT, _REGIONS, _FILES)
_PARTS: Final = ("", ".", "maps", "smaps", "pagetables", "attachments", "stat")
"""What a region's inodes are, by their number within the region: its file, its directory, its info files."""
_PART_DIRECTORY: Final = 1
_ABI: Final = struct.Struct("@LL")
_XATTRS: Final = ("user.mshare.start", "user.mshare.size", "user.mshare.backing", "user.mshare.attached")
_NO_ATTRIBUTE: Final = errno.ENODATA
_WHILE_OPENED: Final = 0.01
"""Seconds for which the kernel need not ask for a region's attributes again: it has just looked the name up."""

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def _guarded(handler: F) -> F:
    """A handler whose mistakes are an errno for that caller: anything but FUSEError would end the daemon."""

    @functools.wraps(handler)
    async def wrapper(*args: object, **kwargs: object) -> object:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except MshareError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except Exception as error:
            log.exception("fuse: %s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return wrapper  # type: ignore[return-value]


@attrs.frozen
class Opened:
    """An open file or directory: what it held when it was opened."""

    content: bytes = b""
    entries: tuple[tuple[str, int], ...] = ()


class MshareFs(pyfuse3.Operations):
    """The tree of one mount. ``info`` is the text of ``mshare_info``."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, service: Service, info: str) -> None:
        super().__init__()
        self._service = service
        self._info = info.encode()
        self._open: dict[int, Opened] = {}
        self._handles = itertools.count(1)
        self._started_ns = time.time_ns()

    @_guarded
    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """Find a name in one of the directories."""
        if len(name) > NAME_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        return self._attributes(self._find(parent, os.fsdecode(name)))

    @_guarded
    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """Say what an inode is."""
        return self._attributes(inode)

    @_guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: object,  # noqa: ARG002
        ctx: object,  # noqa: ARG002
    ) -> pyfuse3.EntryAttributes:
        """Carry out chmod and chown of a region; truncate, touch and the rest are refused."""
        region, part = self._region_of(inode)
        if region is None or part or fields.update_size or fields.update_atime or fields.update_mtime:
            raise pyfuse3.FUSEError(errno.EPERM)
        self._service.names.change_owner(
            region,
            mode=stat.S_IMODE(attr.st_mode) & 0o777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
        )
        return self._attributes(inode)

    @_guarded
    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:  # noqa: ARG002
        """Open a file: for a region the kernel has checked its mode, and the descriptor is the ticket."""
        region, part = self._region_of(inode)
        if flags & os.O_TRUNC or (flags & os.O_ACCMODE != os.O_RDONLY and (region is None or part)):
            raise pyfuse3.FUSEError(errno.EPERM)
        return pyfuse3.FileInfo(fh=self._keep(Opened(await self._content(inode))), direct_io=True)

    @_guarded
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """Read what the file held when it was opened."""
        return self._open[fh].content[offset : offset + size]

    @_guarded
    async def write(self, fh: int, offset: int, buf: bytes) -> int:  # noqa: ARG002
        """Refuse: memory is written through a window."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def release(self, fh: int) -> None:
        """Forget an open file."""
        del self._open[fh]

    @_guarded
    async def opendir(self, inode: int, ctx: object) -> int:  # noqa: ARG002
        """Open a directory: its names are those of this moment."""
        return self._keep(Opened(entries=tuple(self._entries(inode))))

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from an entry on."""
        for index, (name, inode) in enumerate(self._open[fh].entries[start_id:], start_id + 1):
            try:
                attributes = self._attributes(inode)
            except pyfuse3.FUSEError:
                continue  # Gone since the directory was opened.
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, index):
                return

    @_guarded
    async def releasedir(self, fh: int) -> None:
        """Forget an open directory."""
        del self._open[fh]

    @_guarded
    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:  # noqa: ARG002
        """Tell how much memory regions can have, in pages."""
        total, free = self._service.store.capacity()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks, data.f_bfree, data.f_bavail = total // 4096, free // 4096, free // 4096
        limit = self._service.namespace.policy.limits.max_regions or 1 << 20
        data.f_files = limit
        data.f_ffree = data.f_favail = max(0, limit - len(self._service.namespace.all()))
        data.f_namemax = NAME_MAX
        return data

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:  # noqa: ARG002
        """Tell one of the ``user.mshare`` attributes of a region."""
        region, part = self._region_of(inode)
        key = os.fsdecode(name)
        if region is None or part or key not in _XATTRS:
            raise pyfuse3.FUSEError(_NO_ATTRIBUTE)
        values = (f"{region.ar.start:#x}", str(region.ar.size), region.backing.value, str(region.process_count))
        return values[_XATTRS.index(key)].encode()

    @_guarded
    async def listxattr(self, inode: int, ctx: object) -> list[bytes]:  # noqa: ARG002
        """List those attributes."""
        region, part = self._region_of(inode)
        return [] if region is None or part else [name.encode() for name in _XATTRS]

    @_guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: object) -> None:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def removexattr(self, inode: int, name: bytes, ctx: object) -> None:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: object) -> NoReturn:  # noqa: ARG002
        """Refuse: regions are made by mshare()."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: object) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: object) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: object) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def link(self, inode: int, parent: int, name: bytes, ctx: object) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def unlink(self, parent: int, name: bytes, ctx: object) -> None:  # noqa: ARG002
        """Refuse: regions end by mshare_unlink() or remove()."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def rmdir(self, parent: int, name: bytes, ctx: object) -> None:  # noqa: ARG002
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def rename(self, *_args: object) -> None:
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    def _keep(self, opened: Opened) -> int:
        handle = next(self._handles)
        self._open[handle] = opened
        return handle

    def _region_of(self, inode: int) -> tuple[Region | None, int]:
        """The region an inode belongs to and which part of it; None for the fixed files. ENOENT when it is gone."""
        number, part = divmod(inode, INODES_A_REGION)
        if not number:
            return None, 0
        region = self._service.namespace.get(RegionId(number))
        if region is None or not region.ready or part >= len(_PARTS):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return region, part

    def _find(self, parent: int, name: str) -> int:
        """The inode of a name. Raises FUSEError ENOENT."""
        if parent == _ROOT and name in _FIXED:
            return _FIXED[name]
        if parent == _REGIONS and name == _FILES_NAME:
            return _FILES
        if parent in (_ROOT, _REGIONS):
            region = self._service.namespace.find(name)
            return region.id * INODES_A_REGION + (_PART_DIRECTORY if parent == _REGIONS else 0)
        found = next((inode for entry, inode in self._entries(parent) if entry == name), None)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return found

    def _entries(self, inode: int) -> list[tuple[str, int]]:
        """Names and inodes in a directory."""
        if inode == _ROOT:
            return [*_FIXED.items(), *((r.name or "", r.id * INODES_A_REGION) for r in self._service.namespace)]
        if inode in (_REGIONS, _FILES):
            regions = self._service.namespace if inode == _REGIONS else self._service.namespace.files()
            fixed = [(_FILES_NAME, _FILES)] if inode == _REGIONS else []
            return [*fixed, *((r.title, r.id * INODES_A_REGION + _PART_DIRECTORY) for r in regions)]
        region, part = self._region_of(inode)
        if region is None or part != _PART_DIRECTORY:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        base = region.id * INODES_A_REGION
        return [(name, base + number) for number, name in enumerate(_PARTS) if number > _PART_DIRECTORY]

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        region, part = self._region_of(inode)
        directory = part == _PART_DIRECTORY if region else inode in _DIRECTORIES
        owner = self._ownership(inode, region, part)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = owner.mode | (stat.S_IFDIR if directory else stat.S_IFREG)
        entry.st_uid, entry.st_gid = owner.uid, owner.gid
        entry.st_nlink = 2 if directory else 1
        entry.st_size = self._size(inode, region, part)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._time_of(region)
        entry.entry_timeout = 0
        entry.attr_timeout = _WHILE_OPENED if region and not part else 0
        return entry

    def _ownership(self, inode: int, region: Region | None, part: int) -> Ownership:
        """The region's own for its file; what may be read of it for its info files, and searched for its directory."""
        root = self._service.namespace.root
        if region is None:
            return root if inode == _ROOT else Ownership(root.uid, root.gid, 0o555 if inode in _DIRECTORIES else 0o444)
        if not part:
            return region.owner
        readable = region.owner.mode & 0o444
        mode = readable | readable >> 2 if part == _PART_DIRECTORY else readable
        return Ownership(region.owner.uid, region.owner.gid, mode)

    def _time_of(self, region: Region | None) -> int:
        return self._started_ns if region is None else self._service.lifetimes.region(region).created_ns

    def _size(self, inode: int, region: Region | None, part: int) -> int:
        """Bytes of a file whose text is at hand; 0, as in /proc, for those made when they are opened."""
        if region is None:
            return len(self._info) if inode == _INFO else 0
        return 0 if part else len(self._region_file(region))

    def _region_file(self, region: Region) -> bytes:
        return _ABI.pack(region.ar.start, region.ar.size) + dump.region_file(region).encode()

    async def _content(self, inode: int) -> bytes:
        """What a file holds now."""
        region, part = self._region_of(inode)
        if region is not None:
            return self._region_file(region) if not part else await self._info_file(region, _PARTS[part])
        if inode == _INFO:
            return self._info
        if inode == _METRICS:
            return (await self._service.views.metrics()).encode()
        raise pyfuse3.FUSEError(errno.EISDIR)

    async def _info_file(self, region: Region, which: str) -> bytes:
        live = self._service.lifetimes.region(region)
        stats = await self._service.views.stat(live)
        render = {
            "maps": lambda: dump.maps_text(region),
            "smaps": lambda: dump.smaps_text(region),
            "pagetables": lambda: dump.pagetables_text(region, stats),
            "attachments": lambda: dump.attachments_text(region.attachments.values()),
            "stat": lambda: dump.stat_text(stats),
        }
        return render[which]().encode("utf-8", "surrogateescape")
