"""Packets: every message survives the way there, and nothing else arrives as one."""

from __future__ import annotations

import json
import struct
import typing
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs import protocol
from msharefs.errors import ProtocolError
from msharefs.protocol import HEADER, MAX_PACKET, decode, encode

KINDS: tuple[type[Any], ...] = typing.get_args(protocol.Message)
"""Every message there is, whatever is added to them."""
EXAMPLES: tuple[type[Any], ...] = tuple(kind for kind in KINDS if attrs.fields(kind))

NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
"""Lone surrogates included: they stand for bytes of file names that are no UTF-8."""


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Anything a field of that type may hold."""
    if annotation is int:
        return NUMBERS
    if annotation is str:
        return TEXTS
    if annotation is bool:
        return st.booleans()
    if annotation is type(None):
        return st.none()
    if attrs.has(annotation):
        return messages_of(annotation)
    of = [values_of(part) for part in typing.get_args(annotation) if part is not ...]
    match typing.get_origin(annotation):
        case origin if origin is tuple:
            return st.lists(of[0], max_size=3).map(tuple)
        case origin if origin is dict:
            return st.dictionaries(of[0], of[1], max_size=3)
        case _:
            return st.one_of(of)


def messages_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any message of a kind."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in attrs.fields(kind)})


MESSAGES = st.one_of([messages_of(kind) for kind in KINDS])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def packet(body: object, *, magic: bytes = b"MSHR", version: int = 1, descriptors: int = 0) -> bytes:
    """A packet with any JSON in it, or with raw bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack("<4sHH", magic, version, descriptors) + raw


def body_of(message: Any) -> dict[str, Any]:
    """The JSON object that a message is sent as."""
    body = json.loads(encode(message)[HEADER.size :])
    assert isinstance(body, dict)
    return body


def refused(body: object, text: str) -> None:
    """No message, and the error says why."""
    with pytest.raises(ProtocolError, match=text):
        decode(packet(body))


class TestWholeMessages:
    """What is encoded is decoded."""

    @given(MESSAGES, st.integers(0, 16))
    def test_every_message_arrives_as_it_was_sent(self, message: Any, descriptors: int) -> None:
        arrived, announced = decode(encode(message, descriptors))
        assert arrived == message
        assert type(arrived) is type(message)
        assert announced == descriptors

    def test_the_header_is_magic_version_and_descriptors_in_little_endian(self) -> None:
        assert encode(protocol.Done(), 0x0201) == b'MSHR\x01\x00\x01\x02{"op":"done"}'
        assert encode(protocol.Detach(7)) == b'MSHR\x01\x00\x00\x00{"op":"detach","attachment":7}'

    def test_no_message_without_a_name_of_its_own(self) -> None:
        assert set(protocol._OPS.values()) == set(KINDS)
        assert len(protocol._NAMES) == len(protocol._OPS)

    def test_changes_of_what_is_mapped_are_messages(self) -> None:
        changes = {protocol.Mmap, protocol.Munmap, protocol.Mprotect, protocol.Madvise, protocol.Msync}
        assert set(typing.get_args(protocol.Changing)) == changes
        assert {*changes, protocol.Placed} <= set(EXAMPLES)

    def test_a_mapping_as_an_older_daemon_tells_it_is_memory(self) -> None:
        old = {"offset": 0, "length": 4096, "prot": 3, "paged": False, "resident": 0}
        arrived, _ = decode(packet({"op": "maps", "vmas": [old]}))
        assert isinstance(arrived, protocol.Maps)
        (vma,) = arrived.vmas
        assert (vma.shared, vma.file, vma.file_offset, vma.dirty) == (True, None, 0, 0)

    @pytest.mark.parametrize(
        "field", [{"file": "1"}, {"shared": 1}, {"dirty": None}, {"file_offset": 1.5}, {"inode": 1}]
    )
    def test_a_mapping_is_told_in_the_right_types(self, field: dict[str, object]) -> None:
        vma = {"offset": 0, "length": 4096, "prot": 3, "paged": False, "resident": 0, **field}
        refused({"op": "maps", "vmas": [vma]}, next(iter(field)))

    def test_a_donation_arrives_with_its_files(self) -> None:
        file = protocol.DonatedFile(descriptor=1, offset=4096, shared=True)
        parts = (protocol.DonatedRange(0, 4096, 3), protocol.DonatedRange(4096, 4096, 1, file))
        message = attrs.evolve(CREATE, donated=parts)
        assert decode(encode(message, 2)) == (message, 2)
        short = {"offset": 0, "length": 4096, "prot": 3}
        assert body_of(message)["donated"][0] == short
        arrived, _ = decode(packet({**body_of(CREATE), "donated": [short]}))
        assert isinstance(arrived, protocol.Create)
        assert arrived.donated == parts[:1]

    def test_defaults_may_be_left_out(self) -> None:
        assert decode(packet({"op": "get_stat"})) == (protocol.GetStat(None), 0)

    @pytest.mark.parametrize("number", [-(1 << 63), -1, 0, (1 << 64) - 1])
    def test_numbers_of_64_bits_arrive(self, number: int) -> None:
        assert decode(encode(protocol.Detach(number)))[0] == protocol.Detach(number)

    def test_names_of_any_bytes_arrive(self) -> None:
        name = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
        assert decode(encode(protocol.Remove(name)))[0] == protocol.Remove(name)


class TestFitting:
    """Lists that are longer than a packet are sent in parts."""

    @pytest.mark.parametrize(
        "name", ["a", "x" * 255, "\udcff" * 255, "\0" * 255], ids=["short", "long", "bytes", "nul"]
    )
    def test_what_fits_fits_and_little_room_is_left(self, name: str) -> None:
        most, ids = (1 << 64) - 1, dict.fromkeys(("uid", "gid", "mode", "attached"), (1 << 32) - 1)
        region = protocol.RegionName(name=name, address=most, size=most, backing="hugetlb", **ids)
        count = protocol.fitting([region] * 2000)
        assert count > 0
        assert len(encode(protocol.Listing((region,) * count, more=True))) <= MAX_PACKET
        assert len(encode(protocol.Listing((region,) * (2 * count), more=True))) > MAX_PACKET

    def test_mappings_fit_too(self) -> None:
        most = (1 << 64) - 1
        vma = protocol.Vma(most, most, 3, paged=False, resident=most, file=most, file_offset=most, dirty=most)
        count = protocol.fitting([vma] * 2000)
        assert len(encode(protocol.Maps((vma,) * count, more=True))) <= MAX_PACKET
        assert len(encode(protocol.Maps((vma,) * (2 * count), more=True))) > MAX_PACKET

    def test_a_short_list_goes_whole(self) -> None:
        assert protocol.fitting([]) == 0
        assert protocol.fitting([protocol.Vma(0, 4096, 3, paged=False, resident=0)] * 3) == 3


class TestHeader:
    """What is no packet of this protocol."""

    @pytest.mark.parametrize("size", range(HEADER.size))
    def test_a_packet_shorter_than_its_header(self, size: int) -> None:
        with pytest.raises(ProtocolError, match=f"this one {size}"):
            decode(encode(protocol.Done())[:size])

    def test_a_packet_of_64_kib_is_taken_and_a_longer_one_is_not(self) -> None:
        room = MAX_PACKET - len(encode(protocol.Hello("")))
        assert decode(encode(protocol.Hello("x" * room)))[0] == protocol.Hello("x" * room)
        with pytest.raises(ProtocolError, match="65537"):
            decode(encode(protocol.Hello("x" * (room + 1))))

    @pytest.mark.parametrize("magic", [b"mshr", b"\0\0\0\0", b"RHSM"])
    def test_another_magic(self, magic: bytes) -> None:
        with pytest.raises(ProtocolError, match="starts with"):
            decode(packet({"op": "done"}, magic=magic))

    @pytest.mark.parametrize("version", [0, 2, 256])
    def test_another_version(self, version: int) -> None:
        with pytest.raises(ProtocolError, match=f"has version {version}"):
            decode(packet({"op": "done"}, version=version))


class TestBody:
    """What is no message."""

    @pytest.mark.parametrize(
        "raw",
        [b"", b"{", b"op", b"{'op': 'done'}", b'{"op":"done"}{"op":"done"}', b"\xff\xfe", b'{"op":"d\xff"}', b"\0" * 8],
        ids=ascii,
    )
    def test_what_is_not_json(self, raw: bytes) -> None:
        refused(raw, "not JSON")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
    def test_json_in_another_encoding(self, encoding: str) -> None:
        refused('{"op":"done"}'.encode(encoding), "not JSON")

    @pytest.mark.parametrize(
        "body",
        [None, 5, "done", [], ["done"], {}, {"op": None}, {"op": "no"}, {"op": ["done"]}, {"op": {}}, {"Op": "done"}],
    )
    def test_what_names_no_operation(self, body: object) -> None:
        refused(body, "unknown operation")

    @pytest.mark.parametrize("raw", [b"[" * 60000, b'{"op":' * 10000, b'{"op":"hello","client":' + b"[" * 60000])
    def test_what_is_nested_deeply(self, raw: bytes) -> None:
        refused(raw, "not JSON")

    @pytest.mark.parametrize("number", ["9" * 5000, "9" * 4000, str(1 << 64), str(-(1 << 63) - 1)], ids=len)
    def test_numbers_of_more_than_64_bits(self, number: str) -> None:
        refused(b'{"op":"detach","attachment":' + number.encode() + b"}", "attachment|not JSON")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1.0", "1e3", "1.5"])
    def test_numbers_that_are_not_whole(self, number: str) -> None:
        refused(b'{"op":"detach","attachment":' + number.encode() + b"}", r"expected int @ \$.attachment")

    @pytest.mark.parametrize("value", ["5", True, None, [5], {"": 5}, ""])
    def test_what_is_no_number(self, value: object) -> None:
        refused({"op": "detach", "attachment": value}, r"expected int @ \$.attachment")

    @pytest.mark.parametrize("value", [5, True, None, ["x"], {}])
    def test_what_is_no_text(self, value: object) -> None:
        refused({"op": "hello", "client": value}, r"expected str @ \$.client")

    @pytest.mark.parametrize("value", [0, 1, "true", None, []])
    def test_what_is_neither_true_nor_false(self, value: object) -> None:
        refused({**body_of(protocol.Welcome("s", "m", fork_events=True)), "fork_events": value}, "fork_events")

    @pytest.mark.parametrize("value", ["", "abc", {}, {"a": 1}, None, 5, [5], [None], [["note"]]])
    def test_what_is_no_list_of_texts(self, value: object) -> None:
        refused({**body_of(STAT), "notes": value}, "notes")

    @pytest.mark.parametrize("value", ["", {}, None, 5, ["5"], [None], [1.5], [[1]], [1 << 64]])
    def test_what_is_no_list_of_addresses(self, value: object) -> None:
        refused({**body_of(protocol.Mapped(1, 2, 3, (4,))), "staged": value}, "staged")

    @pytest.mark.parametrize("value", [[], None, "", {"pte": "1"}, {"pte": 1.0}, {"pte": None}, [["pte", 1]]])
    def test_what_is_no_table_of_numbers(self, value: object) -> None:
        refused({**body_of(STAT), "tables": value}, "tables")

    def test_what_is_wrong_inside_another_message_is_named(self) -> None:
        good = {"offset": 0, "length": 4096, "prot": 3}
        create = body_of(CREATE)
        refused({**create, "donated": [good, {**good, "prot": "3"}]}, r"donated\[1\].prot")
        refused(
            {**create, "donated": [{"offset": 0, "length": 4096}]}, r"required field missing @ \$.donated\[0\].prot"
        )
        refused({**create, "donated": [{**good, "more": 1}]}, r"extra fields found \(more\) @ \$.donated\[0\]")
        refused({**create, "donated": [5]}, "donated")
        refused({**create, "donated": [{**good, "file": 1}]}, r"donated\[0\]")
        file = {"descriptor": 0, "offset": 0, "shared": True}
        refused({**create, "donated": [{**good, "file": {**file, "shared": 1}}]}, r"donated\[0\]")
        refused({**create, "donated": [{**good, "file": {**file, "path": "x"}}]}, r"donated\[0\]")
        refused({**create, "donated": [{**good, "file": {"descriptor": 0, "offset": 0}}]}, r"donated\[0\]")

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_a_key_too_many(self, kind: type[Any]) -> None:
        body = {"op": protocol._NAMES[kind], "surplus": 1}
        refused(body, r"extra fields found \(surplus\)|required field missing")

    @pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
    @given(st.data())
    def test_a_key_too_few(self, kind: type[Any], data: st.DataObject) -> None:
        body = body_of(data.draw(messages_of(kind)))
        required = [f.name for f in attrs.fields(kind) if f.default is attrs.NOTHING]
        if required:
            missing = data.draw(st.sampled_from(required))
            del body[missing]
            refused(body, rf"required field missing @ \$.{missing}")

    @given(MESSAGES, st.data())
    def test_a_value_of_another_type_never_arrives(self, message: Any, data: st.DataObject) -> None:
        """Put anything in the place of one value: it is refused, or it was a value of that type."""
        body = body_of(message)
        key = data.draw(st.sampled_from(sorted(body)))
        body[key] = data.draw(ANY_JSON)
        try:
            arrived, _ = decode(packet(body))
        except ProtocolError:
            return
        again = body_of(arrived)
        assert {k: again[k] for k in body} == body
        assert type(again[key]) is type(body[key])

    @given(ANY_JSON)
    def test_any_json_is_refused_or_is_a_message(self, body: object) -> None:
        try:
            arrived, _ = decode(packet(body))
        except ProtocolError:
            return
        assert type(arrived) in KINDS

    @given(st.binary(max_size=200))
    def test_any_bytes_are_refused(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            decode(raw)

    @given(MESSAGES, st.data())
    def test_a_packet_cut_short_is_refused(self, message: Any, data: st.DataObject) -> None:
        whole = encode(message)
        with pytest.raises(ProtocolError):
            decode(whole[: data.draw(st.integers(0, len(whole) - 1))])

    @pytest.mark.parametrize(
        "body",
        [{"op": "x" * 60000}, {"op": "done", "x" * 60000: 1}, {"op": "done", **{f"key {n}": n for n in range(4000)}}],
        ids=["operation", "key", "keys"],
    )
    def test_the_answer_to_nonsense_is_short(self, body: object) -> None:
        """It must fit into a packet itself, however much nonsense came."""
        with pytest.raises(ProtocolError) as caught:
            decode(packet(body))
        assert len(str(caught.value)) < 300


CREATE = protocol.Create("a", None, 1 << 21, 0o600, exclusive=True, empty=False)
STAT = protocol.RegionStat(
    name="a",
    address=32 << 40,
    size=1 << 21,
    backing="thp",
    uid=0,
    gid=0,
    mode=0o600,
    attached=1,
    resident=0,
    faults=0,
    vmas=1,
    tables={"pgd": 1},
    table_bytes_private=0,
    table_bytes_shared=0,
    table_bytes_kernel=0,
    tables_shared=False,
    huge_bytes=0,
)


def test_what_comes_again_is_decoded_once_with_the_descriptors_that_came_with_it() -> None:
    first, second = (
        protocol.decode(protocol.encode(protocol.Done(), 0)),
        protocol.decode(protocol.encode(protocol.Done(), 2)),
    )
    assert first[0] is second[0]
    assert (first[1], second[1]) == (0, 2)
    nonsense = protocol.encode(protocol.Done())[: protocol.HEADER.size] + b"{}"
    for _ in range(2):
        with pytest.raises(ProtocolError, match="unknown operation"):
            protocol.decode(nonsense)
