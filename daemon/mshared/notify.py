"""Telling a service manager how we are (sd_notify(3)), when one started us."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send ``READY=1`` and its like to $NOTIFY_SOCKET; whether anybody was there to be told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return False
    return True
