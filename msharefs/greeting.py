"""The first message of either side."""

from __future__ import annotations

import attrs


@attrs.frozen
class Hello:
    """Client: the first message. ``client`` says who speaks, for the log.

    A client whose daemon was killed goes on with the next one in the same ``session``, a name of its choice, in which
    ``answered`` requests had their answer. ``waiting``: one more was sent, and its answer was lost.
    """

    client: str
    session: str = ""
    answered: int = 0
    waiting: bool = False


@attrs.frozen
class Welcome:
    """Daemon: go on. Without ``fork_events`` a forked child must adopt its windows before it touches them.

    ``known``: the request that waits was carried out, and its answer is the next packet; else it never was.
    """

    server: str
    mount: str
    fork_events: bool
    known: bool = False
