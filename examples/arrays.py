"""NumPy arrays that processes share: structured ones, one larger than 2 GiB, and a view that cannot write.

    python examples/arrays.py

Needs NumPy and a running daemon (``mshared``). The readers are processes of their own, which find the memory by name.
"""

from __future__ import annotations

import multiprocessing
import os

import numpy as np

import mshare

PARTICLE = np.dtype([("id", "u8"), ("position", "f8", 3), ("mass", "f4")])
COUNT = 100_000
LARGE = 3 << 30  # Bytes. Memory is taken where it is touched.


def move(name: str) -> None:
    """In another process: add 1 to every x, in place."""
    block = mshare.SharedMemory(name)
    particles = np.ndarray((COUNT,), PARTICLE, buffer=block.buf)
    particles["position"][:, 0] += 1


def look(name: str) -> None:
    """In another process: read both ends, and fail to write."""
    region = mshare.mshare(name, None, 0, os.O_RDONLY)
    numbers = np.frombuffer(region.buf, np.float64)
    print(f"a reader sees {numbers[0]} and {numbers[-1]} of {numbers.nbytes >> 30} GiB")
    try:
        numbers[0] = 3
    except ValueError as error:
        print(f"and cannot write: {error}")


def main() -> None:
    """Make both arrays, and have other processes use them."""
    processes = multiprocessing.get_context("spawn")

    block = mshare.SharedMemory(create=True, size=COUNT * PARTICLE.itemsize)
    particles = np.ndarray((COUNT,), PARTICLE, buffer=block.buf)
    particles["id"] = np.arange(COUNT)
    worker = processes.Process(target=move, args=(block.name,))
    worker.start()
    worker.join()
    print(f"{COUNT} particles have moved by {particles['position'][:, 0].mean()}, the last is {particles['id'][-1]}")
    block.unlink()

    region = mshare.mshare("numbers", None, LARGE, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    try:
        numbers = np.frombuffer(region.buf, np.float64)
        numbers[0], numbers[-1] = 1, 2
        reader = processes.Process(target=look, args=(region.name,))
        reader.start()
        reader.join()
    finally:
        mshare.remove("numbers")


if __name__ == "__main__":
    main()
