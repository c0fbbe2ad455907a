"""docs/protocol.md: its packets are what is really said, byte by byte, and no message is missing."""

from __future__ import annotations

import json
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

import attrs
import pytest

from msharefs import protocol, uffd_abi
from msharefs.heat import MOST_CELLS
from msharefs.perms import MAP_REFPAGE

TEXT = (Path(__file__).parent.parent.parent / "docs/protocol.md").read_text()


def blocks(language: str) -> list[str]:
    """The contents of the blocks of a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", TEXT, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(inside) for _, inside in found]


def packet_of(block: str) -> bytes:
    """The bytes that a block stands for: a header in hexadecimal, and a line of JSON."""
    header, body, *rest = block.splitlines()
    assert rest == []
    return bytes.fromhex(header) + body.encode()


PACKETS = [packet_of(block) for block in blocks("text") if "{" in block]
KINDS: tuple[type[Any], ...] = typing.get_args(protocol.Message)


@pytest.mark.parametrize("packet", PACKETS, ids=lambda packet: json.loads(packet[8:])["op"])
def test_each_packet_is_encoded_like_that(packet: bytes) -> None:
    message, descriptors = protocol.decode(packet)
    assert protocol.encode(message, descriptors) == packet


def test_the_dump_is_the_first_packet() -> None:
    (dump,) = (block for block in blocks("text") if "{" not in block)
    assert bytes.fromhex(dump) == PACKETS[0]


def test_every_block_is_a_packet() -> None:
    """So that none is left which these tests do not look at."""
    assert len(re.findall(r"^ *```", TEXT, re.MULTILINE)) == 2 * len(blocks("text"))


def test_every_message_is_shown() -> None:
    """Whatever either side can say: a new one is to be described before it is green."""
    shown = {type(protocol.decode(packet)[0]).__name__ for packet in PACKETS}
    assert {kind.__name__ for kind in KINDS} - shown == set()


def test_as_many_descriptors_go_along_as_are_told() -> None:
    counts = {type(message).__name__: count for message, count in map(protocol.decode, PACKETS) if count}
    by_file = {"GetStat": 1, "GetHeat": 1, "GetTrace": 1}
    assert counts == {"Attach": 1, "Offer": 2, "Mapped": 2, "Unlink": 1, "MapFile": 1, **by_file}


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    assert f"at most {protocol.MAX_PACKET} bytes" in TEXT
    assert f"version of the protocol, little-endian: {protocol.VERSION} |" in TEXT
    assert f"`{protocol.MAGIC.decode()}`" in TEXT
    assert f"{protocol.ANCHOR_PAGES} pages of 4096 bytes" in TEXT
    assert f"more than {protocol.MAX_DONATED_FILES} descriptors" in TEXT
    assert f"({MOST_CELLS} at most)" in TEXT
    assert f"`MAP_REFPAGE` ({MAP_REFPAGE:#x})" in TEXT


def test_fields_that_may_be_left_out_may_be() -> None:
    """As the text says of ``create``, from ``readonly`` on."""
    (create,) = (packet for packet in PACKETS if b'"create"' in packet)
    body: dict[str, Any] = json.loads(create[8:])
    required = list(body)[: list(body).index("readonly")]
    short = {key: body[key] for key in required}
    message, _ = protocol.decode(create[:8] + json.dumps(short).encode())
    assert message == protocol.decode(create)[0]
    fields = attrs.fields(protocol.Create)
    assert [each.name for each in fields if each.default is attrs.NOTHING] == required[1:]


def test_the_c_client_has_the_same_numbers() -> None:
    source = (Path(__file__).parent.parent.parent / "client/c/mshare.c").read_text()
    numbers = {
        name: int(value, 0)
        for name, value in re.findall(r"^#define (\w+) (\w+)\b", source, re.MULTILINE)
        if value[0].isdigit()
    }
    assert numbers["IOC_NEW"] == uffd_abi.USERFAULTFD_IOC_NEW
    assert numbers["USER_MODE_ONLY"] == uffd_abi.UFFD_USER_MODE_ONLY
    assert numbers["PACKET_MAX"] == protocol.MAX_PACKET
    assert numbers["VERSION"] == protocol.VERSION
    assert numbers["HEADER"] == protocol.HEADER.size
    assert numbers["FDS_MAX"] == protocol.MAX_DESCRIPTORS
    assert f"#define ANCHOR ({protocol.ANCHOR_PAGES} * 4096)" in source
