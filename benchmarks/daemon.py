"""A daemon for one benchmark: on a mount with a name of its own, gone afterwards whatever happened."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

_PATIENCE: Final = 60.0
"""Seconds to start or to stop in."""
_PR_SET_PDEATHSIG: Final = 1
_READY: Final = "mshared: ready: "
_PIPE: Final = 1 << 20
"""Bytes that a daemon may say before somebody reads them."""
_HUGE_PAGES: Final = Path("/proc/sys/vm/nr_hugepages")
_libc: Final = ctypes.CDLL(None)


@attrs.frozen
class Serving:
    """A daemon that serves: its mount, the default backing it chose, what it warned of, whether it has huge pages."""

    mount: Path
    backing: str
    warnings: tuple[str, ...]
    hugetlb: bool = False


@contextlib.contextmanager
def private_daemon(label: str, *options: str) -> Iterator[Serving]:
    """Run an mshared below /run, for an ordinary user below $XDG_RUNTIME_DIR. Raises RuntimeError with what it said."""
    place = _runtime_directory() / f"mshare-{label}-{secrets.token_hex(4)}"
    pool = _HUGE_PAGES.read_text()
    directories = ["--mount", str(place / "mount"), "--state-dir", str(place / "state")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mshared", *directories, "--log-level", "warning", *options],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    assert process.stderr is not None
    with contextlib.suppress(OSError):  # An ordinary user's pipes may have reached their limit.
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, _PIPE)
    try:
        yield _wait_until_ready(process, place)
    finally:
        _stop(process, place)
        if process.returncode < 0 and _HUGE_PAGES.read_text() != pool:  # It was killed, and has not given them back.
            with contextlib.suppress(OSError):
                _HUGE_PAGES.write_text(pool)


def stop_cleanly_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: through every ``finally``."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def _runtime_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/run")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())


def _end_with_parent() -> None:
    """In the daemon-to-be: should the benchmark be killed, the kernel sends SIGTERM, and everything is taken down.

    The benchmark has one thread only: the signal comes again for each that the daemon's parenthood passes on to.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _wait_until_ready(process: subprocess.Popen[bytes], place: Path) -> Serving:
    """Read what the daemon says until it serves. What it says later stays in the pipe until it stops."""
    assert process.stderr is not None
    said: list[str] = []
    while select.select([process.stderr], [], [], _PATIENCE)[0]:
        line = process.stderr.readline().decode(errors="replace").rstrip("\n")
        if line.startswith(_READY):
            return Serving(place / "mount", line.split()[-1], tuple(said))
        if not line and process.poll() is not None:
            break
        said.append(line)
    raise RuntimeError("mshared did not start: " + ("\n".join(said) or "it said nothing"))


def _stop(process: subprocess.Popen[bytes], place: Path) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    sys.stderr.write((process.stderr.read(_PIPE) or b"").decode(errors="replace"))
    process.stderr.close()
    for mounted in _mounts_below(place):  # Only after a daemon that did not stop by itself.
        unmount = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
        subprocess.run([*unmount, mounted], check=False)
    if not _mounts_below(place):
        shutil.rmtree(place, ignore_errors=True)


def _mounts_below(place: Path) -> list[str]:
    """Mount points, the last mounted first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point.startswith(f"{place}/")]
