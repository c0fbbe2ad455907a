"""Protections, access and file modes."""

from __future__ import annotations

import mmap

import pytest

from msharefs.perms import (
    MAP_REFPAGE,
    MAP_SHARED_PT,
    PROT_RW,
    Access,
    Advice,
    Credentials,
    FileAccess,
    MapFlag,
    Ownership,
    Prot,
)

R, W, X = FileAccess.READ, FileAccess.WRITE, FileAccess.EXEC
OWNER, GROUP, OTHER = Credentials(10, 20), Credentials(11, 20), Credentials(11, 21)
BY_EXTRA_GROUP = Credentials(11, 21, frozenset({5, 20}))
ROOT = Credentials(0, 0)


def test_protections_have_the_numbers_of_linux() -> None:
    assert (Prot.READ, Prot.WRITE, Prot.EXEC) == (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC)


NEWER = {
    "MAP_FIXED": 0x10,
    "MAP_NORESERVE": 0x4000,
    "MAP_FIXED_NOREPLACE": 0x100000,
    "MADV_COLD": 20,
    "MADV_PAGEOUT": 21,
    "MADV_POPULATE_READ": 22,
    "MADV_POPULATE_WRITE": 23,
    "MADV_COLLAPSE": 25,
}
"""What Python's mmap module does not know, from mman.h of Linux on x86-64."""


@pytest.mark.parametrize("member", [*MapFlag, *Advice], ids=lambda member: member.name)
def test_flags_and_advice_have_the_numbers_of_linux(member: MapFlag | Advice) -> None:
    name = f"{'MAP' if isinstance(member, MapFlag) else 'MADV'}_{member.name}"
    assert member == NEWER.get(name, getattr(mmap, name, None))


@pytest.mark.parametrize("flag", [MAP_SHARED_PT, MAP_REFPAGE])
def test_our_own_flags_are_none_of_linux(flag: int) -> None:
    assert flag.bit_count() == 1
    assert not flag & sum(MapFlag)


@pytest.mark.parametrize(
    ("prot", "text"),
    [
        (Prot.NONE, "---"),
        (Prot.READ, "r--"),
        (Prot.WRITE, "-w-"),
        (PROT_RW, "rw-"),
        (Prot.READ | Prot.EXEC, "r-x"),
        (PROT_RW | Prot.EXEC, "rwx"),
    ],
)
def test_text_is_that_of_proc_maps(prot: Prot, text: str) -> None:
    assert prot.as_text() == text


@pytest.mark.parametrize(
    ("prot", "reads", "writes"),
    [
        (Prot.NONE, False, False),
        (Prot.READ, True, False),
        (Prot.WRITE, True, True),
        (PROT_RW, True, True),
        (Prot.EXEC, False, False),
    ],
)
def test_a_writable_page_can_be_read_as_on_x86(prot: Prot, reads: bool, writes: bool) -> None:
    assert Access.READ.allowed_by(prot) is reads
    assert Access.WRITE.allowed_by(prot) is writes


@pytest.mark.parametrize(
    ("mode", "who", "want", "allowed"),
    [
        (0o600, OWNER, R | W, True),
        (0o600, OWNER, X, False),
        (0o600, GROUP, R, False),
        (0o600, OTHER, R, False),
        (0o640, GROUP, R, True),
        (0o640, GROUP, W, False),
        (0o640, BY_EXTRA_GROUP, R, True),
        (0o640, OTHER, R, False),
        (0o606, OTHER, R | W, True),
        (0o604, OTHER, R | W, False),
        (0o711, OTHER, X, True),
        (0o711, OTHER, R | X, False),
        # One class decides, the first that fits, even if a later one would allow more.
        (0o077, OWNER, R, False),
        (0o707, GROUP, R, False),
        (0o707, BY_EXTRA_GROUP, R, False),
        # The sticky bit and its like give nothing.
        (0o7000, OTHER, R, False),
        (0o000, ROOT, R | W | X, True),
    ],
)
def test_modes_decide_as_in_the_kernel(mode: int, who: Credentials, want: FileAccess, allowed: bool) -> None:
    assert Ownership(10, 20, mode).allows(who, want) is allowed


def test_only_uid_0_is_root() -> None:
    assert ROOT.is_root
    assert not Credentials(1, 0).is_root
