"""Tensors of PyTorch that processes share: one fills and changes them in place, others see that. Nothing is copied.

    python examples/tensors.py

Needs PyTorch and a running daemon (``mshared``). The reader is a process of its own, which finds the memory by name.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from multiprocessing.connection import Connection

import torch

import mshare

ROWS, COLUMNS = 64 << 10, 256
SIZE = 4 * ROWS * COLUMNS


def table_of(region: mshare.Region) -> torch.Tensor:
    """The region as a tensor, in place.

    PyTorch keeps the object that it is given, and no hold on the memory. Given a view of its own, as here, it holds
    off ``detach`` while the tensor lives; given ``region.buf`` itself, a touch after ``detach`` would be a crash.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # It may be: a store is a SIGSEGV then.
        return torch.frombuffer(memoryview(region.buf), dtype=torch.float32).view(ROWS, COLUMNS)


def look(name: str, pipe: Connection) -> None:
    """In another process: say what the rows add up to, as often as asked."""
    table = table_of(mshare.mshare(name, None, 0, os.O_RDONLY))
    while pipe.recv() == "look":
        pipe.send(table[:, 0].mean().item())


def main() -> None:
    """Make a table, and change it while somebody else looks."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    region = mshare.mshare("table", None, SIZE, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    try:
        table = table_of(region)
        table[:] = torch.arange(ROWS)[:, None]
        reader = processes.Process(target=look, args=(region.name, theirs))
        reader.start()
        for factor in (1.0, 2.0):
            table.mul_(factor)
            ours.send("look")
            print(f"times {factor}, another process sees a mean of {ours.recv()}")
        ours.send("end")
        reader.join()
        try:
            region.detach()
        except BufferError:
            print("the region is not detached while there is a tensor on it")
        del table
        region.detach()
    finally:
        mshare.remove("table")


if __name__ == "__main__":
    main()
