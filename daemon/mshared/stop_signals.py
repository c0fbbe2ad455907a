"""SIGTERM and SIGINT: the first one stops the daemon, further ones change nothing. SIGHUP is one where a terminal goes.

What was taken from the machine is given back to the end, so a second signal must not cut that short; it is ignored by
the kernel, not by a handler, since an interpreter or a loop that is being taken down can run none.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Final

import trio

from mshared import libc

_SIG_IGN: Final = 1
_NUMBERS: Final = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Takes the signals over from its making on; ``wait`` returns when one has come, were it before.

    With ``hangup`` SIGHUP is one of them; else it is ignored until somebody else takes it.
    """

    def __init__(self, *, hangup: bool = False) -> None:
        self._numbers = (*_NUMBERS, signal.SIGHUP) if hangup else _NUMBERS
        self._came: signal.Signals | None = None
        self._event: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in self._numbers:
            signal.signal(number, self._on_signal)

    async def wait(self) -> signal.Signals:
        """Wait for the first signal; which it was."""
        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        if self._came is None:
            await self._event.wait()
        assert self._came is not None
        return self._came

    def ignore(self) -> None:
        """Have the interpreter leave them ignored while it ends."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _frame: object) -> None:
        for each in self._numbers:
            libc.call("signal", int(each), _SIG_IGN)  # Past Python, which complains of those that are on their way.
        self._came = signal.Signals(number)
        if self._token is not None and self._event is not None:
            with contextlib.suppress(trio.RunFinishedError):  # Stopping already, for another reason.
                self._token.run_sync_soon(self._event.set)
