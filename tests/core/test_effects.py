"""Effects are plain values: equal when they say the same, and their numbers are those of Linux."""

from __future__ import annotations

import signal
import typing

import attrs
import pytest

from msharefs.addr import PAGE_SIZE, AddrRange
from msharefs.effects import Answer, Arm, Change, Effect, Fill, Signal, WriteBack, ZeroFill
from msharefs.vma import Arming, FileId

PAGE = AddrRange.sized(PAGE_SIZE, PAGE_SIZE)


@pytest.mark.parametrize("member", Signal)
def test_signals_have_the_numbers_of_linux(member: Signal) -> None:
    assert int(member) == getattr(signal, member.name)


@pytest.mark.parametrize("kind", typing.get_args(Effect), ids=lambda kind: kind.__name__)
def test_an_effect_cannot_be_changed_once_it_is_decided(kind: type[attrs.AttrsInstance]) -> None:
    effect = kind(*[None for _ in attrs.fields(kind)])
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(effect, attrs.fields(kind)[0].name, None)


def test_effects_compare_by_what_they_say() -> None:
    assert Arm(PAGE, Arming.WP) == Arm(PAGE, Arming.WP)
    assert Arm(PAGE, Arming.WP) != Arm(PAGE, Arming.MISSING)
    assert ZeroFill(PAGE) != ZeroFill(PAGE, protected=True)
    assert Fill(PAGE, FileId(1), 0) != Fill(PAGE, FileId(1), PAGE_SIZE)
    assert Fill(PAGE, FileId(1), 0) != WriteBack(PAGE, FileId(1), 0)


def test_an_effect_answers_a_fault_or_changes_the_region_for_all() -> None:
    answers, calls = set(typing.get_args(Answer)), set(typing.get_args(Change))
    assert answers.isdisjoint(calls)
    assert answers | calls == set(typing.get_args(Effect))
