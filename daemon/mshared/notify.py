"""Telling a service manager how we are (sd_notify(3)), when one started us."""

from __future__ import annotations

import os
import socket
import time
from typing import Final

import trio

PATIENCE: Final = 5.0
"""Seconds a service manager may take to make room for a message that it must not miss."""


def notify(state: str, patience: float = PATIENCE) -> bool:
    """Send ``READY=1`` and its like to $NOTIFY_SOCKET; whether anybody took it, within that many seconds."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(patience)
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return False
    return True


def notify_reloading() -> bool:
    """Say that a reload has begun, and when, by which systemd knows it from an earlier one; ``READY=1`` ends it."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval() -> float | None:
    """Seconds from one ``WATCHDOG=1`` to the next, half of what is allowed; None where nobody watches us.

    $WATCHDOG_PID names the process that is meant, if it is there (sd_watchdog_enabled(3)).
    """
    try:
        allowed = int(os.environ["WATCHDOG_USEC"])
        pid = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return allowed / 2e6 if allowed > 0 and pid == os.getpid() else None


async def keep_watchdog() -> None:
    """Send ``WATCHDOG=1`` in time, from the loop: when that hangs, nothing comes, and we are started anew."""
    interval = watchdog_interval()
    while interval is not None:
        notify("WATCHDOG=1", patience=0)
        await trio.sleep(interval)
