"""What is shown, at a terminal only, while something takes longer than a second."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE: Final = 1.0
"""Seconds before anything is shown."""


@contextlib.contextmanager
def waiting(what: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say what is waited for; ``detail`` is asked again and again."""
    console = _console()
    if console is None:
        yield
        return

    class Text:
        def __rich__(self) -> str:
            return f"{what} {detail()}"

    status = console.status(Text())
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


@contextlib.contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` bytes; what is yielded is told how many more are done."""
    console = _console()
    if console is None:
        yield lambda _done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=total)
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _console() -> Console | None:
    """Standard error, where it is a terminal that can do more than lines."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None
    from rich.console import Console

    return Console(stderr=True)
