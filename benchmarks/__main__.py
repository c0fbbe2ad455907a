"""The command ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import machine, measure, report
from benchmarks.daemon import private_daemon, stop_cleanly_on_signals
from benchmarks.measure import Plan

_RESULTS = Path(__file__).resolve().parent / "results" / "latest.json"


def main() -> None:
    """Read the command line, measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare msharefs with its peers.")
    parser.add_argument("--quick", action="store_true", help="less memory, fewer rounds: figures of less worth")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="where the JSON goes [%(default)s]")
    options = parser.parse_args()
    stop_cleanly_on_signals()
    try:
        _measure(options.output, quick=options.quick)
    except RuntimeError as error:
        sys.exit(f"benchmarks: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks: interrupted; everything was taken down")


def _measure(output: Path, *, quick: bool) -> None:
    size = machine.fitting_size(256 * machine.MIB if quick else machine.GIB)
    plan = Plan(size, 3, 500, 5, 200) if quick else Plan(size, 7, 2000, 20, 200)
    described = machine.describe()
    with private_daemon("benchmark") as daemon:
        described["default backing"] = daemon.backing
        _say("\n".join([*daemon.warnings, *(f"{key}: {value}" for key, value in described.items()), "", report.METHOD]))
        samples = measure.run(daemon.mount, measure.kinds_of(daemon.backing), plan, _say)
    print(report.table(samples, plan))
    report.write_json(output, described, plan, samples)
    _say(f"everything measured is in {output}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
