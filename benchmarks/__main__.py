"""The command ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from benchmarks import report, suite
from benchmarks.daemon import stop_cleanly_on_signals
from benchmarks.groups import ALL
from benchmarks.results import Results

_RESULTS: Final = Path(__file__).resolve().parent / "results" / "latest"


def main() -> None:
    """Read the command line, measure, print tables, write JSON, tables and plots."""
    options = _parser().parse_args()
    stop_cleanly_on_signals()
    if options.render:
        results = Results.load(options.render)
        suite.write(results, options.output)
        print("\n".join(report.text(group) for group in results.groups))
        return
    chosen = [group for group in ALL if group.name in options.only]
    try:
        groups = suite.measure(chosen, options.output, quick=options.quick)
    except RuntimeError as error:
        sys.exit(f"benchmarks: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks: interrupted; everything was taken down")
    failed = [group.name for group in groups if group.error]
    if failed:
        sys.exit(f"benchmarks: failed: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    names = [group.name for group in ALL]
    listed = "; ".join(f"{group.name}: {group.compares}" for group in ALL)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compare msharefs with its peers.", epilog=f"Groups are {listed}."
    )
    parser.add_argument("--quick", action="store_true", help="less memory, fewer rounds: figures of less worth")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="GROUP", help="these groups only")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="directory for what is found [%(default)s]")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing; tables and plots of a former run")
    return parser


if __name__ == "__main__":
    main()
