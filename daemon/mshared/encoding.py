"""How records become entries of the journal, and entries records."""

from __future__ import annotations

import binascii
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, Final, get_args

import attrs
import cattrs
from cattrs.preconf.json import make_converter

from mshared.records import Record, RegionIs
from msharefs.addr import AddrRange
from msharefs.effects import Change
from msharefs.region import Region

_KINDS: Final[dict[str, type[Any]]] = {kind.__name__: kind for kind in get_args(Record)}
_CHANGES: Final[dict[str, type[Any]]] = {kind.__name__: kind for kind in get_args(Change)}
_NOT_WRITTEN: Final = ("mm", "attachments", "latency")
"""What of a region has records of its own, or need not outlive the daemon."""


_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


def _make_converter() -> cattrs.Converter:
    converter: cattrs.Converter = make_converter(omit_if_default=True)
    converter.register_unstructure_hook(bytes, lambda data: binascii.b2a_base64(data, newline=False).decode())
    converter.register_structure_hook(bytes, lambda value, _: binascii.a2b_base64(value))
    converter.register_unstructure_hook(AddrRange, lambda ar: [ar.start, ar.end])
    converter.register_structure_hook(AddrRange, lambda value, _: AddrRange(*value))
    converter.register_unstructure_hook_func(
        lambda kind: kind == Change, lambda effect: [type(effect).__name__, converter.unstructure(effect)]
    )
    converter.register_structure_hook_func(
        lambda kind: kind == Change, lambda value, _: converter.structure(value[1], _CHANGES[value[0]])
    )
    as_it_is = cattrs.gen.override(unstruct_hook=lambda fields: fields)
    of_region = cattrs.gen.make_dict_unstructure_fn(RegionIs, converter, _cattrs_omit_if_default=True, model=as_it_is)
    converter.register_unstructure_hook(RegionIs, of_region)
    return converter


_converter: Final = _make_converter()


def encode(records: Iterable[Record]) -> bytes:
    """An entry of the journal."""
    rows = [[type(record).__name__, _converter.unstructure(record)] for record in records]
    return _to_json(rows).encode()


def decode(entry: bytes) -> list[Record]:
    """The records of an entry. Raises ValueError, KeyError or what cattrs raises for what ``encode`` does not make."""
    return [_converter.structure(value, _KINDS[kind]) for kind, value in json.loads(entry)]


@functools.cache
def _region_fields() -> dict[str, tuple[type[Any], Callable[[Any], Any]]]:
    """The types of fields that are written down, and what makes values for the journal of theirs."""
    types = attrs.fields_dict(attrs.resolve_types(Region))
    kinds: dict[str, Any] = {name: field.type for name, field in types.items() if name not in _NOT_WRITTEN}
    return {name: (kind, _converter.get_unstructure_hook(kind)) for name, kind in kinds.items()}


def region_fields(region: Region) -> dict[str, Any]:
    """The fields of a region that are written down."""
    return {name: unstructured(getattr(region, name)) for name, (_, unstructured) in _region_fields().items()}


def structured_fields(model: dict[str, Any]) -> dict[str, Any]:
    """What a region is to be made with, besides its host mm."""
    return {
        name: _converter.structure(model[name], kind) for name, (kind, _) in _region_fields().items() if name in model
    }
