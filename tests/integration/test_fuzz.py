"""Fuzzing the control protocol and the mount: whatever is said to it, the daemon answers, and everybody else is well.

MSHAREFS_FUZZ_SECONDS sets for how long (by default 12), MSHAREFS_FUZZ_SEED where it begins; what was done, and the
seeds, are printed.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Client, Daemon
from hostile import GOOD, Bystander, bystander

pytestmark = pytest.mark.pool

SECONDS = float(os.environ.get("MSHAREFS_FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("MSHAREFS_FUZZ_SEED", random.randrange(1 << 32)))
TESTS = Path(__file__).parents[1]
SLICE = 1.0
PATIENCE = 5.0
USERS = (65534, 2)


@pytest.fixture
def by(
    daemon: Daemon, client: Callable[..., Client], name: str, eventually: Callable[..., None]
) -> Iterator[Bystander]:
    with bystander(daemon, client(daemon, GOOD), name, eventually) as found:
        yield found


class Fuzzing:
    """A process that fuzzes, begun anew with the next seed whenever it has come to its end."""

    def __init__(self, daemon: Daemon, uid: int, seed: int) -> None:
        self._daemon, self._uid, self._seed = daemon, uid, seed
        self._client: Client | None = None
        self.did: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """Start a process, and have it go on for a moment."""
        if self._client is None:
            self._client = Client(self._daemon.mount)
            self._client.do(f"sys.path.insert(0, {str(TESTS)!r}); from fuzzing import Fuzzer; drop({self._uid})")
            self._client.do(f"fuzzer = Fuzzer(find_mount(), {self._seed})")
        self._client.send(ask=f"fuzzer.run({SLICE})")

    def end(self) -> None:
        """Hear how it went. Its own death is its own business, and so is that it blocks in memory it has spoilt."""
        assert self._client is not None
        process = self._client._process
        assert process.stdout is not None
        what = "hangs"
        if select.select([process.stdout], [], [], PATIENCE)[0]:
            try:
                self.did = Counter(self._client.receive())
            except pytest.fail.Exception:
                what = "died"
            else:
                return
        where = self._client.stacks() if what == "hangs" else self._client.stderr()[-800:]
        sys.stdout.write(f"uid {self._uid} seed {self._seed} {what}: {where}\n")
        self.did[f"process {what}"] += 1
        self.close()
        self._seed += 1

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def test_whatever_is_said_the_daemon_answers_and_others_are_well(
    daemon: Daemon, by: Bystander, client: Callable[..., Client], eventually: Callable[..., None]
) -> None:
    sys.stdout.write(f"MSHAREFS_FUZZ_SEED={SEED}\n")
    root = client()
    root.do("theirs = mshare.mshare('theirs', None, 2 * MIB, CREATE, 0o644); theirs.buf[:6] = b'theirs'")
    with contextlib.ExitStack() as stack:
        fuzzers = [Fuzzing(daemon, uid, SEED + (index << 32)) for index, uid in enumerate(USERS)]
        for each in fuzzers:
            stack.callback(each.close)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            by.check()
            for each in fuzzers:
                each.end()
                each.begin()
        for each in fuzzers:
            each.end()
            sys.stdout.write(f"{sorted(each.did.items())}\n")
    assert root.ask("bytes(theirs.buf[:6]).decode()") == "theirs"
    for each in fuzzers:
        assert each.did["Attached done"] > 0, "it never got as far as being attached"
    for leftover in os.listdir(daemon.mount):
        if not leftover.startswith(".") and leftover not in ("mshare_info", by.region):
            root.do(f"remove_if_there({leftover!r})")
    root.do("theirs.detach(); connect(find_mount()).forget()")
