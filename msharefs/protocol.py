"""The control protocol: what client and daemon say to each other over the SOCK_SEQPACKET socket.

One packet is one message: 8 bytes of header (``MSHR``, version as u16, number of descriptors sent along as u16, both
little-endian), then a JSON object with the key ``op`` naming the message and its fields beside it. A packet has at
most 64 KiB. The client's first message is ``hello``. Every request has one answer, ``failed`` being one.
"""

from __future__ import annotations

import functools
import json
import struct
import types
from collections.abc import Sequence
from typing import Any, Final, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import BaseValidationError
from cattrs.gen import make_dict_structure_fn

from msharefs.errors import ProtocolError
from msharefs.reports import RegionName as RegionName
from msharefs.reports import RegionStat as RegionStat
from msharefs.reports import Vma as Vma

MAGIC: Final = b"MSHR"
VERSION: Final = 1
MAX_PACKET: Final = 64 << 10
MAX_DESCRIPTORS: Final = 4
ANCHOR_PAGES: Final = 1024
"""Pages of address space, not of memory, that a client sets aside beside each window."""
_ROOM_FOR_THE_REST: Final = 256  # Bytes of a packet beside the items of a list.
HEADER: Final = struct.Struct("<4sHH")
_SHORT: Final = 200  # Letters of somebody else's nonsense that an answer repeats.


@attrs.frozen
class Hello:
    """Client: the first message. ``client`` says who speaks, for the log."""

    client: str


@attrs.frozen
class Welcome:
    """Daemon: go on. Without ``fork_events`` a forked child must adopt its windows before it touches them."""

    server: str
    mount: str
    fork_events: bool


@attrs.frozen
class DonatedRange:
    """A mapping of the donor inside the range: offset and length in bytes, protection as PROT_*."""

    offset: int
    length: int
    prot: int


@attrs.frozen
class Create:
    """Client: make a region. ``mode`` is what umask left; with ``donated`` the rest of the range is a hole.

    ``readonly``: the creator itself wants a window that cannot write.
    """

    name: str
    addr: int | None
    size: int
    mode: int
    exclusive: bool
    empty: bool
    readonly: bool = False
    backing: str | None = None
    donated: tuple[DonatedRange, ...] = ()


@attrs.frozen
class Attach:
    """Client: open a region; one descriptor, the opened file of the mount. 0 and None take the region's own."""

    addr: int | None
    length: int


@attrs.frozen
class Exists:
    """Daemon: there is such a region already; attach to it."""


@attrs.frozen
class Offer:
    """Daemon: map this. Descriptors: the backing file and, with ``device``, /dev/userfaultfd.

    Without ``device`` the client makes its userfaultfd by the system call, for user mode only. ``inode`` is that of the
    region's file.
    """

    offer: int
    inode: int
    addr: int
    size: int
    readonly: bool
    device: bool


@attrs.frozen
class Mapped:
    """Client: the window stands at ``addr``. Descriptors: its userfaultfd, and perhaps a second one.

    The second is for pages that a system call must not store to: it answers by itself, with SIGBUS or EFAULT.

    ``anchor`` is the address of ANCHOR_PAGES pages of private anonymous memory that nobody touches (PROT_NONE): the
    daemon registers the first with the userfaultfd, so that every fork is reported, and others to tell children apart.
    """

    offer: int
    addr: int
    anchor: int


@attrs.frozen
class Abort:
    """Client: the window could not be mapped; forget the offer."""

    offer: int


@attrs.frozen
class Attached:
    """Daemon: armed, and counted as a reference."""

    attachment: int


@attrs.frozen
class Adopt:
    """Client: a forked child asks for the attachment it inherited from its parent's ``attachment``.

    Where the kernel reports no forks, one descriptor: a userfaultfd of the child's own, made as for ``mapped``.
    """

    attachment: int


@attrs.frozen
class Detach:
    """Client: the window is gone."""

    attachment: int


@attrs.frozen
class Unlink:
    """Client: end my access; the last one ends the region. One descriptor: the opened file, where it may be opened."""

    name: str


@attrs.frozen
class Remove:
    """Client: take the name away at once."""

    name: str


@attrs.frozen
class GetStat:
    """Client: tell about a region; by attachment, or by one descriptor of the opened file."""

    attachment: int | None = None


@attrs.frozen
class GetMaps:
    """Client: list the VMAs; by attachment, or by one descriptor of the opened file. ``after``: from that offset on."""

    attachment: int | None = None
    after: int | None = None


@attrs.frozen
class Mmap:
    """Client: map memory inside the region; protection and flags as in mmap(2), ``offset`` None for any gap.

    Without MAP_ANONYMOUS one descriptor, the opened file, which is shown from ``file_offset`` on.
    """

    attachment: int
    offset: int | None
    length: int
    prot: int
    flags: int
    file_offset: int = 0


@attrs.frozen
class Placed:
    """Daemon: mapped, at this offset, in every process."""

    offset: int


@attrs.frozen
class Munmap:
    """Client: unmap a range inside the region, for everybody."""

    attachment: int
    offset: int
    length: int


@attrs.frozen
class Mprotect:
    """Client: change the protection of a range inside the region, for everybody; as in mprotect(2)."""

    attachment: int
    offset: int
    length: int
    prot: int


@attrs.frozen
class Madvise:
    """Client: advice about a range inside the region (madvise(2)); what one process may do alone it does itself."""

    attachment: int
    offset: int
    length: int
    advice: int


@attrs.frozen
class Msync:
    """Client: have what was stored to shared files in a range reach them. ``length`` None: all from ``offset`` on."""

    attachment: int
    offset: int
    length: int | None


@attrs.frozen
class GetList:
    """Client: list the regions of the mount. ``after``: those whose names come later."""

    after: str | None = None


@attrs.frozen
class Done:
    """Daemon: it is done."""


@attrs.frozen
class Failed:
    """Daemon: it is not done, and nothing has changed. ``errno`` as the kernel's own call would give."""

    errno: int
    message: str


@attrs.frozen
class Maps:
    """Daemon: the VMAs of a region, by offset; ``more`` when not all fit into a packet."""

    vmas: tuple[Vma, ...]
    more: bool = False


@attrs.frozen
class Listing:
    """Daemon: the regions of the mount, by name; ``more`` when not all fit into a packet."""

    regions: tuple[RegionName, ...]
    more: bool = False


Attaching = Hello | Create | Attach | Mapped | Abort | Adopt | Detach | Unlink | Remove
Changing = Mmap | Munmap | Mprotect | Madvise | Msync
Request = Attaching | Changing | GetStat | GetMaps | GetList
Reply = Welcome | Exists | Offer | Attached | Done | Failed | RegionStat | Maps | Listing | Placed
Message = Request | Reply

_OPS: Final[dict[str, type[Any]]] = {
    "hello": Hello,
    "create": Create,
    "attach": Attach,
    "mapped": Mapped,
    "abort": Abort,
    "adopt": Adopt,
    "detach": Detach,
    "unlink": Unlink,
    "remove": Remove,
    "get_stat": GetStat,
    "get_maps": GetMaps,
    "get_list": GetList,
    "mmap": Mmap,
    "munmap": Munmap,
    "mprotect": Mprotect,
    "madvise": Madvise,
    "msync": Msync,
    "placed": Placed,
    "welcome": Welcome,
    "exists": Exists,
    "offer": Offer,
    "attached": Attached,
    "done": Done,
    "failed": Failed,
    "region_stat": RegionStat,
    "maps": Maps,
    "listing": Listing,
}
_NAMES: Final = {cls: op for op, cls in _OPS.items()}


def _strict(value: object, kind: type[Any]) -> Any:  # noqa: ANN401 - cattrs hooks hand on whatever was asked for
    """Take a value of exactly that type: ``"5"`` is no number, and ``True`` neither. Numbers have 64 bits."""
    if type(value) is not kind:
        raise TypeError(f"not of type {kind.__name__}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError("more than 64 bits")
    return value


def _is_tuple(kind: Any) -> bool:  # noqa: ANN401 - any type at all
    return get_origin(kind) is tuple


def _structure_tuple(converter: cattrs.Converter, value: object, kind: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Take a JSON array, and nothing else that can be iterated."""
    as_list: Any = types.GenericAlias(list, get_args(kind)[:1])
    return tuple(converter.structure(_strict(value, list), as_list))


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _strict)
    converter.register_structure_hook_func(_is_tuple, functools.partial(_structure_tuple, converter))
    converter.register_structure_hook_factory(
        attrs.has, lambda cls: make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)
    )
    return converter


_converter: Final = _make_converter()


def encode(message: Message, descriptors: int = 0) -> bytes:
    """The packet for ``message``, to be sent with that many descriptors."""
    body = {"op": _NAMES[type(message)], **_converter.unstructure(message)}
    return HEADER.pack(MAGIC, VERSION, descriptors) + json.dumps(body, separators=(",", ":")).encode()


def fitting(items: Sequence[RegionName] | Sequence[Vma]) -> int:
    """How many of ``items``, from the first on, go into one packet."""
    room = MAX_PACKET - _ROOM_FOR_THE_REST
    for count, item in enumerate(items):
        room -= len(json.dumps(_converter.unstructure(item))) + 1
        if room < 0:
            return count
    return len(items)


def decode(packet: bytes) -> tuple[Message, int]:
    """The message in a packet and the number of descriptors its sender says to have sent with it.

    Raises ProtocolError for anything that ``encode`` does not make.
    """
    if len(packet) < HEADER.size or len(packet) > MAX_PACKET:
        raise ProtocolError(f"a packet has {HEADER.size} to {MAX_PACKET} bytes, this one {len(packet)}")
    magic, version, descriptors = HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise ProtocolError(f"a packet starts with {MAGIC!r}, this one with {magic!r}")
    if version != VERSION:
        raise ProtocolError(f"this side speaks version {VERSION} of the protocol, the packet has version {version}")
    return _decode_body(packet[HEADER.size :]), descriptors


def _decode_body(raw: bytes) -> Message:
    try:
        body = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    op = body.pop("op", None) if isinstance(body, dict) else None
    kind = _OPS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise ProtocolError(f"unknown operation {op!r:.{_SHORT}}")
    try:
        message: Message = _converter.structure(body, kind)
    except (BaseValidationError, TypeError, ValueError) as error:
        raise ProtocolError(f"{op}: {'; '.join(cattrs.transform_error(error)):.{_SHORT}}") from None
    return message
