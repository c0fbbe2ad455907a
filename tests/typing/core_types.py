"""What the type checker must know of the core. Never run: ``test_typing.py`` has mypy read it.

A line with ``type: ignore`` is one that must be an error; mypy complains when it is none.
"""

from __future__ import annotations

from typing import assert_never, assert_type

from msharefs import protocol
from msharefs.addr import Address, AddrRange, FrameNo, Offset
from msharefs.effects import (
    Allow,
    Answer,
    Arm,
    Bring,
    Change,
    Deliver,
    Effect,
    Fill,
    FillPattern,
    Preserve,
    Protect,
    Punch,
    Signal,
    Stash,
    Unstash,
    WriteBack,
    ZeroFill,
)
from msharefs.fault import Fault
from msharefs.host_mm import HostMm
from msharefs.page_table import PageTable
from msharefs.perms import Access, Prot
from msharefs.pte import Pte
from msharefs.region import Attachment, AttachmentId, Region, RegionId


def addresses_offsets_and_frames_are_told_apart(
    region: Region, attachment: Attachment, addr: Address, offset: Offset, frame: FrameNo, table: PageTable
) -> None:
    assert_type(region.to_host(attachment, addr), Address)
    region.to_host(attachment, offset)  # type: ignore[arg-type]
    table.walk(0x1000)  # type: ignore[arg-type]
    table.walk(frame)  # type: ignore[arg-type]
    table.set(addr, Pte(addr))  # type: ignore[arg-type]
    assert_type(region.offset_of(region.ar), Offset)
    assert_type(region.mm.frame_at(addr), FrameNo)
    AddrRange(0, 4096)  # type: ignore[arg-type]
    assert_type(AddrRange.sized(0, 4096), AddrRange)


def numbers_of_regions_are_no_numbers_of_attachments(region: Region, number: RegionId) -> None:
    region.attachments[number]  # type: ignore[index]
    region.attachments.get(AttachmentId(number))


def ranges_and_effects_cannot_be_changed(ar: AddrRange, effect: Punch) -> None:
    ar.start = Address(0)  # type: ignore[misc]
    effect.ar = ar  # type: ignore[misc]


def calls_take_enums_and_keywords(mm: HostMm, ar: AddrRange) -> None:
    assert_type(mm.mmap(ar, ar.size, Prot.READ, fixed=True), tuple[AddrRange, list[Change]])
    mm.mmap(ar, ar.size, Prot.READ, True)  # type: ignore[call-arg]
    mm.mprotect(ar, 3)  # type: ignore[arg-type]
    Fault(ar.start, "read")  # type: ignore[arg-type]
    assert_type(mm.fault(Fault(ar.start, Access.READ)).signal, Signal | None)


def the_effects_are_these_and_no_more(effect: Effect) -> None:
    match effect:
        case (Arm() | Protect() | Punch() | Stash() | Unstash() | WriteBack()) | (
            Allow() | Bring() | Deliver() | Fill() | FillPattern() | Preserve() | ZeroFill()
        ):
            pass
        case _:
            assert_never(effect)


def the_answers_are_not_fewer(effect: Answer) -> None:
    match effect:
        case Allow() | Deliver() | Fill():
            pass
        case _:
            assert_never(effect)  # type: ignore[arg-type]


def packets_carry_messages() -> None:
    assert_type(protocol.decode(b""), tuple[protocol.Message, int])
    protocol.encode("done")  # type: ignore[arg-type]
    protocol.Detach("7")  # type: ignore[arg-type]
