"""What passes between the control socket and the service: who asks, what is offered, what is answered."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from mshared.live import LiveRegion
from msharefs import protocol
from msharefs.perms import Credentials


@attrs.frozen
class Caller:
    """Who is at the other end of a connection, as the kernel says."""

    pid: int
    who: Credentials


@attrs.frozen
class Pending:
    """An offer that waits for its ``mapped``: to the creator of a region, or to one that attaches.

    ``token`` is that of the twin that is to be taken; ``unarmed``: see ``LiveAttachment``.
    """

    region: LiveRegion
    readonly: bool
    creator: bool
    donated: tuple[protocol.DonatedRange, ...] = ()
    unarmed: bool = False
    token: str | None = None


@attrs.frozen
class Answer:
    """A reply and the descriptors that go with it; they stay the daemon's. It waits until ``after`` is set.

    ``again``: a packet that follows it, which was lost when it was sent before; then that one waits.
    ``then`` is done once it was sent.
    """

    reply: protocol.Reply
    fds: tuple[int, ...] = ()
    after: trio.Event | None = None
    again: bytes | None = None
    then: Callable[[], None] | None = None
