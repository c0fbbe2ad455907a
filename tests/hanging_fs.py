"""A user's own filesystem with one file, which stops answering one kind of request when told to, by a signal.

Started as ``python hanging_fs.py MOUNT UID KIND [private]``, it writes a line when it serves. After SIGUSR1 it never
answers requests of that kind again.
"""

# ruff: noqa: ARG002 - pyfuse3 says what its handlers are given

from __future__ import annotations

import errno
import os
import signal
import stat
import sys

import pyfuse3
import trio

FILE, SIZE = 2, 1 << 20


class HangingFs(pyfuse3.Operations):  # type: ignore[misc]
    """Each request waits for ever, if it is of the kind that does."""

    hangs = False
    kind = ""

    async def _maybe(self, kind: str) -> None:
        if self.hangs and kind == self.kind:
            await trio.sleep_forever()

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        await self._maybe("getattr")
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_uid, entry.st_size = inode, os.getuid(), SIZE
        entry.st_mode = stat.S_IFREG | 0o666 if inode == FILE else stat.S_IFDIR | 0o755
        entry.attr_timeout = 0
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        await self._maybe("open")
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        await self._maybe("read")
        return b"x" * min(size, SIZE - offset)

    async def write(self, fh: int, offset: int, buf: bytes) -> int:
        await self._maybe("write")
        return len(buf)

    async def flush(self, fh: int) -> None:
        await self._maybe("flush")

    async def release(self, fh: int) -> None:
        await self._maybe("release")

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        await self._maybe("statfs")
        return pyfuse3.StatvfsData()


async def main(fs: HangingFs) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            os.write(1, b"ready\n")
            async for _ in signals:
                fs.hangs = True
                os.write(1, b"hangs\n")


if __name__ == "__main__":
    mount, uid, kind, *private = sys.argv[1:]
    found = HangingFs()
    found.kind = kind
    if not private:  # As a user's own filesystem where /etc/fuse.conf has user_allow_other.
        pyfuse3.init(found, mount, {"fsname=hanging", "allow_other"})
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    if private:
        pyfuse3.init(found, mount, {"fsname=hanging"})
    trio.run(main, found)
