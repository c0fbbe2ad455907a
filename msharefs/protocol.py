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
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from msharefs.errors import ProtocolError
from msharefs.messages import Abort as Abort
from msharefs.messages import Adopt as Adopt
from msharefs.messages import Attach as Attach
from msharefs.messages import Attached as Attached
from msharefs.messages import Attaching as Attaching
from msharefs.messages import Changing as Changing
from msharefs.messages import Create as Create
from msharefs.messages import Detach as Detach
from msharefs.messages import DonatedFile as DonatedFile
from msharefs.messages import DonatedRange as DonatedRange
from msharefs.messages import Done as Done
from msharefs.messages import Exists as Exists
from msharefs.messages import Failed as Failed
from msharefs.messages import Forget as Forget
from msharefs.messages import Fork as Fork
from msharefs.messages import Forking as Forking
from msharefs.messages import GetHeat as GetHeat
from msharefs.messages import GetList as GetList
from msharefs.messages import GetMaps as GetMaps
from msharefs.messages import GetRefusals as GetRefusals
from msharefs.messages import GetStat as GetStat
from msharefs.messages import GetTrace as GetTrace
from msharefs.messages import Hello as Hello
from msharefs.messages import Listing as Listing
from msharefs.messages import Looking as Looking
from msharefs.messages import Madvise as Madvise
from msharefs.messages import MapFile as MapFile
from msharefs.messages import Mapped as Mapped
from msharefs.messages import Maps as Maps
from msharefs.messages import Message as Message
from msharefs.messages import Mmap as Mmap
from msharefs.messages import Mprotect as Mprotect
from msharefs.messages import Msync as Msync
from msharefs.messages import Munmap as Munmap
from msharefs.messages import Offer as Offer
from msharefs.messages import Ordinary as Ordinary
from msharefs.messages import Placed as Placed
from msharefs.messages import Refusals as Refusals
from msharefs.messages import Remove as Remove
from msharefs.messages import Reply as Reply
from msharefs.messages import Request as Request
from msharefs.messages import Settled as Settled
from msharefs.messages import Snapshot as Snapshot
from msharefs.messages import Snapshots as Snapshots
from msharefs.messages import Take as Take
from msharefs.messages import Traced as Traced
from msharefs.messages import Unlink as Unlink
from msharefs.messages import Welcome as Welcome
from msharefs.reports import Heat as Heat
from msharefs.reports import Refusal as Refusal
from msharefs.reports import RegionName as RegionName
from msharefs.reports import RegionStat as RegionStat
from msharefs.reports import TraceEvent as TraceEvent
from msharefs.reports import Vma as Vma

MAGIC: Final = b"MSHR"
VERSION: Final = 1
MAX_PACKET: Final = 64 << 10
MAX_DESCRIPTORS: Final = 4
MAX_DONATED_FILES: Final = 16
"""Descriptors that one packet to the daemon may bring."""
ANCHOR_PAGES: Final = 1024
"""Pages of address space, not of memory, that a client sets aside beside each window."""
_ROOM_FOR_THE_REST: Final = 256  # Bytes of a packet beside the items of a list.
HEADER: Final = struct.Struct("<4sHH")
_OFTEN: Final = 128  # Bytes of packets that are decoded once when they come again.
_SHORT: Final = 200  # Letters of somebody else's nonsense that an answer repeats.

_OPS: Final[dict[str, type[Any]]] = {
    "hello": Hello,
    "create": Create,
    "attach": Attach,
    "map_file": MapFile,
    "mapped": Mapped,
    "settled": Settled,
    "abort": Abort,
    "adopt": Adopt,
    "detach": Detach,
    "unlink": Unlink,
    "remove": Remove,
    "fork": Fork,
    "snapshot": Snapshot,
    "forget": Forget,
    "take": Take,
    "snapshots": Snapshots,
    "get_stat": GetStat,
    "get_maps": GetMaps,
    "get_list": GetList,
    "get_heat": GetHeat,
    "get_refusals": GetRefusals,
    "get_trace": GetTrace,
    "mmap": Mmap,
    "munmap": Munmap,
    "mprotect": Mprotect,
    "madvise": Madvise,
    "msync": Msync,
    "placed": Placed,
    "welcome": Welcome,
    "exists": Exists,
    "ordinary": Ordinary,
    "offer": Offer,
    "attached": Attached,
    "done": Done,
    "failed": Failed,
    "region_stat": RegionStat,
    "maps": Maps,
    "listing": Listing,
    "heat": Heat,
    "refusals": Refusals,
    "traced": Traced,
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
    # Of the first there may be more than a thousand in a packet; the others say no more than they have to.
    for terse in (DonatedRange, Hello, Welcome):
        short = make_dict_unstructure_fn(terse, converter, _cattrs_omit_if_default=True)
        converter.register_unstructure_hook(terse, short)
    return converter


_converter: Final = _make_converter()


_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


def encode(message: Message, descriptors: int = 0) -> bytes:
    """The packet for ``message``, to be sent with that many descriptors."""
    if message.__class__ is Done and not descriptors:
        return _DONE
    return _encode(message, descriptors)


def _encode(message: Message, descriptors: int) -> bytes:
    body = {"op": _NAMES[type(message)], **_converter.unstructure(message)}
    return HEADER.pack(MAGIC, VERSION, descriptors) + _to_json(body).encode()


_DONE: Final = _encode(Done(), 0)
"""What most requests are answered, of which there may be thousands a second."""


def fitting(items: Sequence[RegionName | Vma | Refusal | TraceEvent]) -> int:
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
    decode_body = _decode_often if len(packet) <= _OFTEN else _decode_body
    return decode_body(packet[HEADER.size :]), descriptors


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


_decode_often: Final = functools.lru_cache(maxsize=64)(_decode_body)
"""Messages cannot be changed: those that come again and again, such as ``Done``, are the same ones."""
