"""The command ``mshared``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from msharefs.addr import PMD_SIZE
from msharefs.effects import Signal
from msharefs.errors import InvalidArgumentError
from msharefs.namespace import Limits, Policy
from msharefs.region import BackingKind
from msharefs.units import parse_size


def size(text: object) -> int:
    """Bytes for a size as people write it."""
    try:
        return parse_size(str(text))
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error)) from None


def octal_mode(text: str | int) -> int:
    """The number for a file mode in octal."""
    if isinstance(text, int):
        return text
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o1777:
        raise click.BadParameter(f"{text!r} is not an octal mode from 0 to 1777")
    return mode


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="msharefs")
@click.option("--mount", type=Path, metavar="DIR", help="Where to mount. [default: /run/mshare for root]")
@click.option("--state-dir", type=Path, metavar="DIR", help="Socket and backing files. [default: by mount]")
@click.option(
    "--backing",
    type=click.Choice([kind.value for kind in BackingKind]),
    help="Backing of regions that name none. [default: thp for root]",
)
@click.option(
    "--align", type=size, metavar="SIZE", default=PMD_SIZE, help="Alignment of addresses and sizes. [default: 2M]"
)
@click.option(
    "--paging", type=click.Choice(["auto", "all"]), default="auto", show_default=True, help="Which faults to see."
)
@click.option(
    "--hole-signal",
    type=click.Choice([s.name for s in Signal]),
    default="SIGBUS",
    show_default=True,
    help="What a touch of a hole is answered with.",
)
@click.option("--hugetlb-pool", type=size, metavar="SIZE", help="Add so much to the machine's pool of huge pages.")
@click.option(
    "--writeback",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    default=30,
    help="Have mapped files hold stores after that time, unasked. [default: 30]",
)
@click.option("--max-bytes", type=size, metavar="SIZE", help="Sum of all region sizes at most.")
@click.option("--max-regions", type=click.IntRange(min=1), help="Number of regions at most.")
@click.option("--max-bytes-per-user", type=size, metavar="SIZE", help="Sum of the sizes of one user's regions at most.")
@click.option(
    "--max-regions-per-user",
    type=click.IntRange(min=1),
    default=Limits().max_regions_per_uid,
    show_default=True,
    help="Number of one user's regions at most.",
)
@click.option(
    "--mode", type=octal_mode, metavar="OCTAL", default=0o1777, help="Mode of the mount's root. [default: 1777]"
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What to write to stderr.",
)
def main(
    *,
    mount: Path | None,
    state_dir: Path | None,
    backing: str | None,
    align: int,
    paging: str,
    hole_signal: str,
    hugetlb_pool: int | None,
    writeback: float,
    max_bytes: int | None,
    max_regions: int | None,
    max_bytes_per_user: int | None,
    max_regions_per_user: int,
    mode: int,
    log_level: str,
) -> None:
    """Serve msharefs regions: mount their names, keep their memory, answer their faults.

    Runs in the foreground until SIGTERM or Ctrl-C. Exit status: 0 stopped, 1 could not start, 2 wrong usage.
    """
    logging.basicConfig(level=log_level.upper(), format="mshared: %(levelname)s: %(message)s", stream=sys.stderr)
    if align < PMD_SIZE or align & (align - 1):
        raise click.BadParameter("must be a power of two of at least 2M", param_hint="--align")
    policy = Policy(
        align=align,
        paging_all=paging == "all",
        hole_signal=Signal[hole_signal],
        limits=Limits(max_regions, max_bytes, max_regions_per_user, max_bytes_per_user),
    )
    kind = BackingKind(backing) if backing else None
    _run(mount, state_dir, policy, kind, mode, hugetlb_pool, writeback)


def _run(
    mount: Path | None,
    state_dir: Path | None,
    policy: Policy,
    backing: BackingKind | None,
    mode: int,
    hugetlb_pool: int | None,
    writeback: float,
) -> None:
    try:
        from mshared import app, places
    except ImportError as error:
        raise click.ClickException(
            f"{error}: the daemon needs `pip install 'msharefs[daemon]'` and libfuse3"
        ) from error
    os.umask(0o022)
    try:
        place = Path(os.path.abspath(mount or app.default_mount()))  # noqa: PTH100 - resolve() would ask a dead mount
        state = state_dir.absolute() if state_dir else app.default_state_dir(place)
        os.chdir("/")
        app.run(app.Config(place, state, policy, backing, mode, hugetlb_pool, writeback))
    except places.StartError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
