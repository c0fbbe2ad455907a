"""Completion of region names in shells, and mshare completion, which prints what a shell needs for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

from mshare import inspect
from mshare.cli.place import within
from mshare.discovery import find_mount

F = TypeVar("F", bound=Callable[..., Any])
SHELLS: Final = ("bash", "zsh", "fish")
_PATIENCE: Final = 1.0
"""Seconds a shell waits for names at most."""
_VARIABLE: Final = "_MSHARE_COMPLETE"


def complete_region(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of regions; none where no daemon answers soon. Those with bytes that are no text cannot be typed."""
    chosen: Path | None = context.find_root().params.get("mount")
    try:
        found = within(_PATIENCE, lambda: inspect.regions(find_mount(chosen))) or []
    except OSError:
        return []
    names = [region.name for region in found if region.name.isprintable()]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def region_argument(command: F) -> F:
    """The argument NAME of a command, which shells complete."""
    return click.argument("name", shell_complete=complete_region)(command)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and names of regions.

    bash: `mshare completion bash > ~/.local/share/bash-completion/completions/mshare`. zsh: into a file _mshare in a
    directory of $fpath. fish: into ~/.config/fish/completions/mshare.fish. Or, for the shell that runs:
    `eval "$(mshare completion bash)"`.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root().command
    try:
        click.echo(kind(root, {}, "mshare", _VARIABLE).source())
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
