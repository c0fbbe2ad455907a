"""mshare ls, stat and maps against a real daemon."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare import inspect

NOBODY = 65534
Mshare = Callable[..., Any]


def test_ls_shows_a_region_as_it_is(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    """Name, address, size, backing, owner, mode, and who is attached."""
    client().do(f"r = mshare.mshare({name!r}, 0x210000000000, 4 << 20, CREATE, 0o640, backing='4k')")
    head, *rows = cli("ls").lines
    assert head.split() == ["NAME", "ADDRESS", "SIZE", "BACKING", "OWNER", "MODE", "ATTACHED"]
    (row,) = [row.split() for row in rows if row.startswith(name)]
    assert row == [name, "0x210000000000", "4MiB", "4k", "root", "rw-r-----", "1"]


def test_ls_in_json_has_numbers(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, 0x211000000000, 2 << 20, CREATE, 0o600, backing='thp')")
    (found,) = [region for region in cli("ls", "--json").json if region["name"] == name]
    assert found == {
        "name": name,
        "address": 0x211000000000,
        "size": 2 << 20,
        "backing": "thp",
        "uid": 0,
        "gid": 0,
        "mode": 0o600,
        "attached": 1,
    }


def test_names_of_any_bytes_are_listed_and_found(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    r"""A name is bytes: here one that is no UTF-8, a line break, and an escape sequence."""
    odd = os.fsencode(name) + b"\xff\n\x1b[31m"
    client().do(f"r = mshare.mshare({odd!r}, None, 2 << 20, CREATE)")
    (row,) = [row for row in cli("ls").lines if row.startswith(name)]
    assert row.startswith(name + r"\xff\n\x1b[31m  0x")
    assert name + r"\xff\n\x1b[31m" in cli("stat", os.fsdecode(odd)).lines[0]
    assert os.fsdecode(odd) in [region["name"] for region in cli("ls", "--json").json]


def test_letters_that_the_locale_lacks_are_escapes(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name + '名'!r}, None, 2 << 20, CREATE)")
    assert any(row.startswith(name + r"\u540d ") for row in cli("ls", env={"PYTHONIOENCODING": "latin-1"}).lines)


def test_ls_shows_files_that_are_shared_without_a_name(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    """One of memory, one of a disk; a line each, however many map them, and none among the regions."""
    memory, disk = (Path(place) / name for place in ("/dev/shm", "/var/tmp"))
    try:
        for path in (memory, disk):
            path.write_bytes(b"x")
            os.truncate(path, 4 << 20)
        for c in (client(), client()):
            for number, path in enumerate((memory, disk)):
                c.do(f"f = os.open({str(path)!r}, os.O_RDWR); m{number} = mshare.mmap(f, 4 << 20, backing='4k')")
        found = {row["name"]: row for row in cli("ls", "--files", "--json").json}
        rows = {row.split()[0]: row.split() for row in cli("ls", "--files").lines[1:]}
        for path, backing in ((memory, "file"), (disk, "4k")):
            about = path.stat()
            key = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
            assert rows[key][2:] == ["4MiB", backing, "root", "r--r--r--", "2"]
            assert rows[key][1] == f"{found[key]['address']:#x}"
            assert (found[key]["size"], found[key]["attached"]) == (4 << 20, 2)
        assert not found.keys() & {region["name"] for region in cli("ls", "--json").json}
    finally:
        memory.unlink(missing_ok=True)
        disk.unlink(missing_ok=True)


def test_ls_is_for_everybody(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE, 0)")
    assert any(row.startswith(name) for row in cli("ls", uid=NOBODY).lines)


def test_stat_tells_all_in_json(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    """Exactly what Region.stat() says to whoever is attached."""
    attached = client()
    attached.do(f"r = mshare.mshare({name!r}, None, 4 << 20, CREATE); r.buf[:3] = b'abc'")
    expected = attached.ask("__import__('attrs').asdict(r.stat())")
    found = cli("stat", name, "--json").json
    assert found.pop("table_bytes_kernel") > 0
    for moving in ("table_bytes_kernel", "table_bytes_growth"):
        expected.pop(moving)
    del found["table_bytes_growth"]
    assert found == expected
    assert found["resident"] > 0


def test_stat_has_sizes_in_words_beside_bytes(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, 0x212000000000, 6 << 20, CREATE, 0o640)")
    told = {key: value for key, _, value in (line.partition(" ") for line in cli("stat", name).lines)}
    told = {key: value.strip() for key, value in told.items()}
    assert told["name"] == name
    assert told["address"] == "0x212000000000"
    assert told["size"] == "6291456 (6 MiB)"
    assert told["mode"] == "0640 (rw-r-----)"
    assert told["owner"] == "root (uid 0, gid 0)"
    assert told["attached"] == "1"
    assert set(told) >= {"backing", "resident", "huge_bytes", "faults", "vmas", "tables", "tables_shared"}
    assert set(told) >= {"table_bytes_private", "table_bytes_shared", "table_bytes_kernel"}


def test_maps_shows_what_is_mapped(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 4 << 20, CREATE, backing='4k'); r.buf[:4096] = bytes(4096)")
    assert [line.split() for line in cli("maps", name).lines] == [
        ["OFFSET", "LENGTH", "PROT", "FAULTS", "RESIDENT"],
        ["0x0", "4MiB", "rw-", "native", "4KiB"],
    ]
    memory = {"shared": True, "file": None, "file_offset": 0, "dirty": 0, "faults": 0}
    memory |= {"refpage": None, "clean": 0}
    assert cli("maps", name, "--json").json == [
        {"offset": 0, "length": 4 << 20, "prot": 3, "paged": False, "resident": 4096, **memory}
    ]


def test_maps_of_a_donated_region_shows_its_parts(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    """A mapping at each end, the first read-only and so paged, and a hole between them that no line covers."""
    client().do(
        f"""
        at = 0x213000000000
        for part, prot in ((at, 3), (at + (3 << 20), 3)):
            sc.mmap(part, MIB, prot, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        ctypes.memset(at, 1, 4096)
        sc.mprotect(at, MIB, sc.PROT_READ)
        r = mshare.mshare({name!r}, at, 4 * MIB, CREATE)
        """
    )
    rows = [line.split()[:3] for line in cli("maps", name).lines[1:]]
    assert rows == [["0x0", "1MiB", "r--"], ["0x300000", "1MiB", "rw-"]]


@pytest.mark.parametrize("command", ["stat", "maps"])
def test_a_name_that_is_not_there(cli: Mshare, command: str) -> None:
    assert cli(command, "nothing").error.startswith("no region is named 'nothing'; `mshare ls` lists them")


@pytest.mark.parametrize("command", ["stat", "maps"])
def test_a_name_that_cannot_be(cli: Mshare, command: str) -> None:
    assert "cannot name a region" in cli(command, "a/b").error


@pytest.mark.parametrize("command", ["stat", "maps"])
def test_who_may_not_read_is_told_who_can_change_that(
    cli: Mshare, client: Callable[..., Any], name: str, command: str
) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE, 0o600)")
    assert "its owner can chmod" in cli(command, name, uid=NOBODY).error


def test_a_mode_that_lets_read_is_enough(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    client().do(f"os.umask(0); r = mshare.mshare({name!r}, None, 2 << 20, CREATE, 0o644)")
    assert cli("stat", name, "--json", uid=NOBODY).json["name"] == name


def test_a_program_can_look_without_attaching(daemon: Any, client: Callable[..., Any], name: str) -> None:
    """mshare.inspect is the way in for others too."""
    attached = client()
    attached.do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE)")
    assert name in [region.name for region in inspect.regions(daemon.mount)]
    assert inspect.stat(name, daemon.mount).attached == 1
    assert [vma.length for vma in inspect.maps(name, daemon.mount)] == [2 << 20]


def test_ls_sorts_and_shows_the_columns_asked_for(cli: Mshare, client: Callable[..., Any], name: str) -> None:
    """Numbers from the largest; without titles a line is a value, for scripts."""
    client().do(
        f"""
        small = mshare.mshare({name + "-a"!r}, None, 2 << 20, CREATE)
        large = mshare.mshare({name + "-b"!r}, None, 6 << 20, CREATE)
        """
    )
    shown = [line for line in cli("ls", "--sort", "size", "-n", "-o", "size,name").lines if name in line]
    assert [line.split() for line in shown] == [["6MiB", f"{name}-b"], ["2MiB", f"{name}-a"]]
    names = [line for line in cli("ls", "-r", "-n", "-o", "name").lines if name in line]
    assert names == [f"{name}-b", f"{name}-a"]
    ran = cli("ls", "-o", "name,colour")
    assert ran.status == 2
    assert "'COLOUR' is none of NAME, ADDRESS" in ran.err
