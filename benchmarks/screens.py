"""The terminal screens of README.md, taken from a daemon of their own: python -m benchmarks.screens."""

from __future__ import annotations

import argparse
import contextlib
import io
import mmap
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.text import Text

import mshare
from benchmarks.daemon import private_daemon
from mshare import inspect
from mshare.cli import heat, render, show, top
from mshare.cli.samples import Sampler

MIB: Final = 1 << 20
PAGE: Final = 4096
_PLACE: Final = Path(__file__).parents[1] / "docs" / "screens"
_FONT_FACE: Final = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
_FORMAT: Final = _FONT_FACE.sub("", CONSOLE_SVG_FORMAT)
"""Without fonts from the net."""
_CREATE: Final = os.O_CREAT | os.O_EXCL | os.O_RDWR


def main() -> None:
    """Take the screens."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screens", description=__doc__)
    parser.add_argument("--out", type=Path, default=_PLACE, help="directory for the pictures (default: docs/screens)")
    parser.add_argument("--quick", action="store_true", help="fewer processes, less memory")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with private_daemon("screens") as daemon:
        os.environ["MSHAREFS"] = str(daemon.mount)
        size, processes = (64 * MIB, 3) if options.quick else (1024 * MIB, 48)
        with _scene(size, processes) as regions:
            for name, picture in _screens(daemon.mount, regions):
                (options.out / f"{name}.svg").write_text(picture)


@contextlib.contextmanager
def _scene(size: int, processes: int) -> Iterator[list[mshare.Region]]:
    """A buffer that many processes use, an index with a snapshot, and a file that is written through a region."""
    with contextlib.ExitStack() as stack:
        buffer = _region(stack, "buffer-pool", size)
        index = _region(stack, "index", 32 * MIB, backing="4k")
        events = _region(stack, "events", 32 * MIB, empty=True)
        file = stack.enter_context(tempfile.TemporaryFile())
        file.truncate(24 * MIB)
        events.mmap(24 * MIB, flags=mmap.MAP_SHARED, fd=file.fileno(), offset=0)
        _touch(buffer, 0, size * 7 // 8, 2 * MIB)
        _touch(index, 0, 20 * MIB, PAGE)
        _touch(index, 20 * MIB, 28 * MIB, 3 * PAGE)
        index.munmap(30 * MIB, 2 * MIB)
        index.fork("index-before")
        stack.callback(mshare.remove, "index-before")
        _touch(index, 4 * MIB, 6 * MIB, PAGE)
        _touch(events, 0, 5 * MIB, PAGE)
        for offset in range(5 * MIB, 15 * MIB, PAGE):
            events.buf[offset]
        for _ in range(processes):
            stack.callback(_end, _worker(buffer))
        yield [buffer, index, events]


def _region(stack: contextlib.ExitStack, name: str, size: int, **options: object) -> mshare.Region:
    region = mshare.mshare(name, None, size, _CREATE, **options)  # type: ignore[arg-type]
    stack.callback(mshare.remove, name)
    stack.enter_context(region)
    return region


def _touch(region: mshare.Region, start: int, end: int, step: int) -> None:
    for offset in range(start, end, step):
        region.buf[offset] = 1


def _worker(buffer: mshare.Region) -> int:
    """Start a process that has touched all of the buffer; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/comm").write_text("worker")
            for offset in range(0, buffer.size * 7 // 8, 2 * MIB):
                buffer.buf[offset]
            os.write(writer, b"r")
            signal.pause()
        finally:
            os._exit(1)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return pid


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _screens(mount: Path, regions: list[mshare.Region]) -> Iterator[tuple[str, str]]:
    """The name of each screen, and its picture."""
    _, index, events = regions
    yield "ls", _taken("mshare ls", render.rich_table(show.LS, map(show.ls_row, inspect.regions(mount))))
    sampler = Sampler(mount)
    sampler.look()
    _touch(index, 8 * MIB, 10 * MIB, PAGE)
    _touch(events, 15 * MIB, 17 * MIB, PAGE)
    sample = top.ordered(sampler.look(), "saved")
    yield "top", _taken("mshare top", top.screen(sample, "saved", 19))
    name = index.name
    picture = heat.take(inspect.stat(name, mount), inspect.heat(name, 64 * 32, mount), 64)
    yield "heat", _taken(f"mshare heat {name}", heat.as_text(picture))


def _taken(command: str, screen: RenderableType) -> str:
    console = Console(record=True, width=104, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ ", "dim") + Text(command, "bold"))
    console.print(screen)
    return console.export_svg(title=command, code_format=_FORMAT, unique_id=re.sub(r"\W+", "-", command))


if __name__ == "__main__":
    main()
