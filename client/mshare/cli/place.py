"""From what a command was given to what it acts on, and from what went wrong to one line with the cure."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from mshare.cli.render import printable
from mshare.discovery import find_mount, read_info
from msharefs.errors import MshareError

T = TypeVar("T")


class TranslatingGroup(click.Group):
    """A group whose commands' OSErrors are one line on stderr and exit status 1, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Whoever read our output has gone: click ends us quietly.
        except (OSError, MshareError) as error:
            raise click.ClickException(one_line(error)) from error


def one_line(error: OSError | MshareError) -> str:
    """What an error says, without its number."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text += f": {error.filename}"
    return printable(text)


def served_mount(chosen: Path | None) -> Path:
    """The mount to use, after it has answered. Raises OSError with the cure when there is none, or nobody serves it."""
    mount = find_mount(chosen)
    read_info(mount)
    return mount


@contextlib.contextmanager
def about_region(name: str) -> Iterator[None]:
    """Say what helps when there is no region of that name."""
    try:
        yield
    except FileNotFoundError as error:
        raise click.ClickException(
            f"no region is named '{printable(name)}'; `mshare ls` lists them, `mshare create` makes one"
        ) from error


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does, with what is to be done in the end."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What ``ask`` returns or the OSError it raises; None if it takes too long, and then its thread is left alone.

    A daemon that hangs holds up whoever reads its mount, for as long as it hangs.
    """
    results: list[T] = []
    errors: list[OSError] = []

    def run() -> None:
        try:
            results.append(ask())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return results[0] if results else None
