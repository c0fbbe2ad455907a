"""mshare create, fork, unlink and rm against a real daemon."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare import inspect
from mshare.cli import change
from msharefs.protocol import RegionName

NOBODY = 65534
Mshare = Callable[..., Any]
Regions = Callable[[], dict[str, RegionName]]


@pytest.fixture
def regions(daemon: Any) -> Regions:
    """The regions of the mount by name."""
    return lambda: {region.name: region for region in inspect.regions(daemon.mount)}


def test_create_makes_an_orphan(cli: Mshare, regions: Regions, name: str) -> None:
    """And says where it lies."""
    assert cli("create", name, "--size", "4M", "--addr", "0x220000000000").lines == [
        f"{name}  0x220000000000  4194304 (4 MiB)"
    ]
    made = regions()[name]
    assert (made.address, made.size, made.attached, made.mode) == (0x220000000000, 4 << 20, 0, 0o600)


def test_what_was_created_can_be_attached(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    cli("create", name, "--size", "2M")
    attached = client()
    attached.do(f"r = mshare.mshare({name!r}, None, 0, RW); r.buf[:5] = b'hello'")
    assert attached.ask("bytes(r.buf[:5]).decode()") == "hello"


def test_an_address_may_be_decimal(cli: Mshare, regions: Regions, name: str) -> None:
    cli("create", name, "--size", "2097152", "--addr", str(0x221000000000))
    assert regions()[name].address == 0x221000000000


def test_create_takes_a_backing_and_emptiness(cli: Mshare, regions: Regions, name: str) -> None:
    cli("create", name, "--size", "1G", "--backing", "4k", "--empty")
    assert regions()[name].backing == "4k"
    assert cli("maps", name, "--json").json == []


def test_the_umask_takes_from_the_mode(cli: Mshare, regions: Regions, name: str) -> None:
    before = os.umask(0o027)
    try:
        cli("create", name, "--size", "2M", "--mode", "666")
    finally:
        os.umask(before)
    assert regions()[name].mode == 0o640


def test_a_region_belongs_to_whoever_created_it(cli: Mshare, regions: Regions, name: str) -> None:
    assert cli("create", name, "--size", "2M", uid=NOBODY).status == 0
    assert regions()[name].uid == NOBODY


def test_a_name_that_is_taken(cli: Mshare, name: str) -> None:
    """Is an error that names both ways out; --no-excl takes what is there, wherever it lies."""
    first = cli("create", name, "--size", "2M").lines
    error = cli("create", name, "--size", "2M").error
    assert error == f"region '{name}' exists; `mshare rm` takes it away, --no-excl takes it as it is"
    assert cli("create", name, "--size", "2M", "--no-excl", "--addr", "0x222000000000").lines == first


def test_memory_of_the_command_itself_is_not_donated(cli: Mshare, regions: Regions, name: str) -> None:
    """The stack and the libraries of any process lie there: mshare() would make them the region's."""
    error = cli("create", name, "--size", "8T", "--addr", "0x780000000000").error
    assert "is in use in this process" in error
    assert "between 0x200000000000 and 0x400000000000" in error
    assert name not in regions()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--size", "1M"), "multiples of 0x200000"),
        (("--size", "0"), "size"),
        (("--size", "2M", "--addr", "0x223000000001"), "multiples of 0x200000"),
    ],
    ids=str,
)
def test_the_daemon_has_the_last_word(cli: Mshare, name: str, arguments: tuple[str, ...], said: str) -> None:
    error = cli("create", name, *arguments).error
    assert said in error or "length" in error


def test_fork_makes_a_region_of_what_another_is(
    cli: Mshare, client: Callable[..., Any], regions: Regions, name: str
) -> None:
    """Where it lies, for whoever asks, and attached to nobody."""
    attached, new = client(), f"{name}-new"
    attached.do(f"r = mshare.mshare({name!r}, 0x224000000000, 4 << 20, CREATE, 0o644); r.buf[:5] = b'hello'")
    assert cli("fork", name, new, uid=NOBODY).status == 1  # It takes write access.
    attached.do(f"os.chmod(connect(find_mount()).mount / {name!r}, 0o646)")
    assert cli("fork", name, new, uid=NOBODY).lines == [f"{new}  0x224000000000  4194304 (4 MiB)"]
    made = regions()[new]
    assert (made.address, made.size, made.attached, made.mode, made.uid) == (0x224000000000, 4 << 20, 0, 0o600, NOBODY)
    attached.do(f"r.buf[:5] = b'later'; s = mshare.mshare({new!r}, 0x600000000000, 0, RO)")
    assert attached.ask("bytes(s.buf[:5]).decode()") == "hello"


def test_a_region_that_lies_where_the_command_does_is_attached_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie anywhere; any other refusal stands."""
    asked, errors = [], [OSError(errno.EINVAL, "in use")]

    def attach(name: str, addr: int | None, *_: object, **__: object) -> str:
        asked.append(addr)
        if errors:
            raise errors.pop()
        return name

    monkeypatch.setattr(change.mshare, "mshare", attach)
    assert change._attached_somewhere("it", Path("/mount")) == "it"  # type: ignore[comparison-overlap]
    assert asked == [None, 0x4000_0000_0000]
    errors += 2 * [PermissionError(errno.EACCES, "no")]
    with pytest.raises(PermissionError):
        change._attached_somewhere("it", Path("/mount"))


def test_fork_takes_a_mode(cli: Mshare, regions: Regions, name: str) -> None:
    cli("create", name, "--size", "2M")
    before = os.umask(0o027)
    try:
        cli("fork", name, f"{name}-new", "--mode", "666")
    finally:
        os.umask(before)
    assert regions()[f"{name}-new"].mode == 0o640


def test_fork_to_a_name_that_is_taken_or_cannot_be(cli: Mshare, name: str) -> None:
    cli("create", name, "--size", "2M")
    assert cli("fork", name, name).error == f"region '{name}' exists; `mshare rm` takes it away"
    assert "a/b" in cli("fork", name, "a/b").error


def test_fork_of_what_is_not_there_or_not_readable(cli: Mshare, regions: Regions, name: str) -> None:
    assert cli("fork", "nothing", name).error.startswith("no region is named 'nothing'; `mshare ls` lists them")
    cli("create", name, "--size", "2M")
    assert "mode of region" in cli("fork", name, f"{name}-new", uid=NOBODY).error
    assert f"{name}-new" not in regions()


def test_fork_is_for_who_may_write_and_for_the_owner(cli: Mshare, daemon: Any, regions: Regions, name: str) -> None:
    """As the help says: others who may read may not."""
    cli("create", name, "--size", "2M", "--mode", "644")
    assert "takes a window that may write" in cli("fork", name, f"{name}-new", uid=NOBODY).error
    assert f"{name}-new" not in regions()
    os.chown(daemon.mount / name, NOBODY, NOBODY)
    (daemon.mount / name).chmod(0o444)
    cli("fork", name, f"{name}-new", uid=NOBODY)
    assert regions()[f"{name}-new"].uid == NOBODY


def test_unlink_ends_an_orphan(cli: Mshare, regions: Regions, name: str) -> None:
    cli("create", name, "--size", "2M")
    assert cli("unlink", name).lines == []
    assert name not in regions()


def test_unlink_leaves_a_region_that_is_in_use(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    attached = client()
    attached.do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE); r.buf[0] = 7")
    assert "attached" in cli("unlink", name).error
    assert attached.ask("r.buf[0]") == 7


def test_rm_takes_the_name_and_leaves_the_memory(
    cli: Mshare, client: Callable[..., Any], regions: Regions, name: str
) -> None:
    """To those who have it: the name is free at once."""
    attached = client()
    attached.do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE); r.buf[0] = 7")
    assert cli("rm", name).lines == []
    assert name not in regions()
    assert attached.ask("r.buf[0]") == 7
    assert cli("create", name, "--size", "2M").status == 0


@pytest.mark.parametrize("command", ["unlink", "rm"])
def test_a_name_that_is_not_there(cli: Mshare, command: str) -> None:
    assert cli(command, "nothing").error.startswith("no region is named 'nothing'; `mshare ls` lists them")


@pytest.mark.parametrize(("command", "said"), [("unlink", "write permission"), ("rm", "only its owner or root")])
def test_others_may_not(cli: Mshare, name: str, command: str, said: str) -> None:
    cli("create", name, "--size", "2M")
    assert said in cli(command, name, uid=NOBODY).error
    assert cli("stat", name).status == 0


def test_create_can_have_all_memory_at_once(cli: Mshare, name: str) -> None:
    cli("create", name, "--size", "8M", "--backing", "4k", "--populate")
    assert cli("stat", name, "--json").json["resident"] == 8 << 20
    assert cli("create", name + "-none", "--size", "2M", "--populate", "--empty").status == 2


def test_a_region_whose_memory_cannot_be_had_is_not_made(
    start_daemon: Callable[..., Any], mshare: Mshare, name: str
) -> None:
    """Its tmpfs holds less than the region would."""
    small = start_daemon("--backing", "thp")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    place = next(line.split()[4] for line in lines if str(small.state) in line)
    subprocess.run(["mount", "-o", "remount,size=16M", place], check=True)
    assert (
        "too little memory to populate it"
        in mshare("create", name, "--size", "256M", "--populate", mount=small.mount).error
    )
    assert name not in os.listdir(small.mount)
