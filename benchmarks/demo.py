"""What ``scripts/demo`` shows: a donor, a consumer, and what ten processes on one region cost."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from benchmarks import machine
from benchmarks.daemon import Serving, private_daemon, stop_cleanly_on_signals
from benchmarks.driver import Worker
from benchmarks.memory import Kind

_ROOT: Final = Path(__file__).resolve().parent.parent
_NAME: Final = "testregion"
_PROCESSES: Final = 10
_PATIENCE: Final = 30


@attrs.frozen
class Cost:
    """What ten processes that touch all pages of one memory take. Seconds; bytes."""

    first: float
    others: float
    page_tables: int


def main() -> None:
    """Show it. Everything started or mounted here is gone when this ends, however it ends."""
    argparse.ArgumentParser(prog="scripts/demo", description="Show msharefs at work, and measure it.").parse_args()
    stop_cleanly_on_signals()
    try:
        size = machine.fitting_size(machine.GIB)
        with private_daemon("demo") as daemon:
            _introduce(daemon)
            _donate_and_consume(daemon.mount)
            _compare(daemon, size)
    except (RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything was taken down")
    print("The daemon is stopped; nothing of this demo is left on the machine.")


def _introduce(daemon: Serving) -> None:
    print(f"A daemon serves {daemon.mount}, backing {daemon.backing}.")
    if os.geteuid() != 0:
        print(
            "\nYou are not root. What is different: the daemon cannot mount a tmpfs with huge pages, so regions have\n"
            "4 KiB pages (backing 4k) and cost what ordinary shared memory costs; and only your own processes see the\n"
            "mount. Names, equal addresses and donation work the same. As root the figures below are others."
        )
    for warning in daemon.warnings:
        print(f"  {warning}")


def _donate_and_consume(mount: Path) -> None:
    """The example of the patch series, as two processes that never live at the same time."""
    _title("A donor writes into its memory, gives it a name, and ends")
    _run(mount, sys.executable, "examples/donor.py", _NAME)
    _title("The donor is dead; its memory has a file that says where it is")
    _run(mount, "cat", str(mount / _NAME))
    _run(mount, "od", "-A", "d", "-t", "u8", "-N", "16", str(mount / _NAME))
    _title("A consumer finds the memory by its name, and reads the text at the same address")
    _run(mount, sys.executable, "examples/consumer.py", _NAME)


def _compare(daemon: Serving, size: int) -> None:
    _title(f"{_PROCESSES} processes on one memory of {size // machine.MIB} MiB, measured now")
    kind = Kind.THP if daemon.backing == Kind.THP else Kind.SMALL
    ours, theirs = (_cost(daemon.mount, each, size) for each in (kind, Kind.SHM))
    print(f"  {'':<44}{kind.label:>16}{'shared_memory':>16}{'ratio':>9}")
    _line("one process touches all pages first", ours, theirs, lambda cost: cost.first, " s")
    _line(f"then the other {_PROCESSES - 1} do, all at once", ours, theirs, lambda cost: cost.others, " s")
    _line("PageTables of the machine grew by", ours, theirs, lambda cost: cost.page_tables / machine.MIB, " MiB")
    print(
        "\n  shared_memory is Python's multiprocessing.shared_memory. Touching: a store into each 4 KiB page.\n"
        "  PageTables is from /proc/meminfo: all attached and touched, less before anybody attached. What memory this\n"
        "  takes was touched and freed before. Measured thoroughly by: python -m benchmarks\n"
    )


def _cost(mount: Path, kind: Kind, size: int) -> Cost:
    with contextlib.ExitStack() as stack:
        with Worker(mount) as warmer:
            warmer.call("warm_up", size=2 * size)
        workers = [stack.enter_context(Worker(mount)) for _ in range(_PROCESSES)]
        for worker in workers:
            worker.call("detach")  # Until each has started and waits.
        before = machine.page_tables()
        first, *others = workers
        handle = first.call("create", kind=kind, name=f"demo-{secrets.token_hex(6)}", size=size)
        for worker in others:
            worker.call("attach", kind=kind, handle=handle)
        seconds = first.call("write")["seconds"]
        start = time.perf_counter()
        for worker in others:
            worker.ask("write")
        for worker in others:
            worker.result()
        return Cost(seconds, time.perf_counter() - start, machine.page_tables() - before)


def _line(text: str, ours: Cost, theirs: Cost, value: Callable[[Cost], float], unit: str) -> None:
    small, large = value(ours), value(theirs)
    times = f"{large / small:.1f}x" if small > 0 else "-"
    print(f"  {text:<44}{f'{small:.2f}{unit}':>16}{f'{large:.2f}{unit}':>16}{times:>9}")


def _title(text: str) -> None:
    print(f"\n* {text}\n", flush=True)


def _run(mount: Path, *command: str) -> None:
    """Run a command as a process of its own, showing it as one would type it."""
    typed = " ".join("python" if part == sys.executable else part for part in command)
    print(f"$ {typed}", flush=True)
    env = {**os.environ, "MSHAREFS": str(mount)}
    subprocess.run(command, cwd=_ROOT, env=env, check=True, timeout=_PATIENCE)


if __name__ == "__main__":
    main()
