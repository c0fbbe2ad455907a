"""A key-value store in a region, saved to a file while its writer goes on.

    python examples/checkpoint.py [FILE]

The store is an array of slots, each with a key and a value; the writer moves money between accounts, two slots at a
time, so that the sum of all values never changes between two moves. A child made by ``mshare.odfork`` has a snapshot of
one instant, at the same address, and writes it to the file at its leisure. What it has saved adds up.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
from pathlib import Path

import mshare

ACCOUNTS = 50_000
EACH = 100
SLOT = struct.Struct("=16sq")  # key, value
SIZE = 2 << 20


def slot(number: int) -> int:
    """Where a slot lies."""
    return number * SLOT.size


def value(buf: memoryview, number: int) -> int:
    """What an account has."""
    return int(SLOT.unpack_from(buf, slot(number))[1])


def move(buf: memoryview, source: int, target: int, amount: int) -> None:
    """Take from one account what the other gets."""
    for number, change in ((source, -amount), (target, amount)):
        struct.pack_into("=q", buf, slot(number) + 16, value(buf, number) + change)


def save(buf: memoryview, path: Path) -> None:
    """Write all accounts to a file."""
    with path.open("w") as file:
        for number in range(ACCOUNTS):
            key, held = SLOT.unpack_from(buf, slot(number))
            file.write(f"{key.rstrip(bytes(1)).decode()} {held}\n")


def main() -> None:
    """Fill the store, save it once while it changes, and check what was saved."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "accounts"
    region = mshare.mshare("accounts", None, SIZE, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    try:
        for number in range(ACCOUNTS):
            SLOT.pack_into(region.buf, slot(number), f"account-{number}".encode(), EACH)
        chance = random.Random(1)  # noqa: S311 - nothing is kept secret by it
        child = mshare.odfork(region)
        if child == 0:
            save(region.buf, path)
            os._exit(0)
        moves = 0
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            move(region.buf, chance.randrange(ACCOUNTS), chance.randrange(ACCOUNTS), chance.randrange(EACH))
            moves += 1
        saved = [int(line.split()[1]) for line in path.read_text().splitlines()]
        now = [value(region.buf, number) for number in range(ACCOUNTS)]
        changed = sum(a != b for a, b in zip(saved, now, strict=True))
        print(f"saved {len(saved)} accounts that hold {sum(saved)} in all; {moves} moves were made meanwhile")
        print(f"the store holds {sum(now)}, and {changed} of its accounts are not as they were saved")
    finally:
        mshare.remove("accounts")


if __name__ == "__main__":
    main()
