"""Finding mounts in the text of /proc/PID/mountinfo."""

from __future__ import annotations

import pytest

from msharefs.mountinfo import Mount, msharefs_mounts, parse_mountinfo

PLAIN = "36 35 98:0 / /mnt rw,noatime - ext4 /dev/root rw,errors=continue"
SHARED = "40 25 0:35 / /run rw,nosuid shared:5 master:1 - tmpfs tmpfs rw,size=1024k"
OURS = "77 40 0:52 / /run/mshare rw,nosuid,nodev shared:9 - fuse.msharefs mshared rw,user_id=0,group_id=0,allow_other"
USERS = "78 40 0:53 / /run/user/1000/mshare rw - fuse.msharefs mshared rw,user_id=1000,group_id=1000"


def points(text: str) -> list[str]:
    return [mount.point for mount in parse_mountinfo(text)]


def mounted_at(field: str) -> str:
    """A line with that mount point, as the kernel writes it."""
    return OURS.replace("/run/mshare", field)


def test_a_line_is_read_with_and_without_optional_fields() -> None:
    assert list(parse_mountinfo(f"{PLAIN}\n{SHARED}\n")) == [
        Mount(36, (98, 0), "/mnt", "ext4", None),
        Mount(40, (0, 35), "/run", "tmpfs", None),
    ]


def test_a_fuse_mount_has_the_user_who_mounted_it() -> None:
    assert list(parse_mountinfo(f"{OURS}\n{USERS}\n")) == [
        Mount(77, (0, 52), "/run/mshare", "fuse.msharefs", 0),
        Mount(78, (0, 53), "/run/user/1000/mshare", "fuse.msharefs", 1000),
    ]


def test_an_option_that_only_ends_like_user_id_is_another() -> None:
    (mount,) = parse_mountinfo(OURS.replace("user_id=0", "fake_user_id=0"))
    assert mount.uid is None


def test_only_our_own_type_is_ours_and_the_order_stays() -> None:
    other = USERS.replace("fuse.msharefs", "fuse.sshfs")
    assert [mount.mount_id for mount in msharefs_mounts(f"{USERS}\n{PLAIN}\n{other}\n{OURS}\n")] == [78, 77]


@pytest.mark.parametrize("text", ["", "\n", "\n\n"])
def test_no_lines_are_no_mounts(text: str) -> None:
    assert points(text) == []


@pytest.mark.parametrize(
    ("field", "point"),
    [
        (r"/my\040region", "/my region"),
        (r"/tab\011new\012line", "/tab\tnew\nline"),
        (r"/back\134slash", "/back\\slash"),
        (r"/back\134040", r"/back\040"),
        (r"/hash\043", "/hash#"),
        (r"/no\04", r"/no\04"),
        ("/日本", "/日本"),
        (r"/日本\040ä", "/日本 ä"),
        ("/caf\udce9", "/caf\udce9"),
        (r"/caf\351", "/caf\udce9"),
        ("/caf\udce9" + r"\040x", "/caf\udce9 x"),
    ],
    ids=ascii,
)
def test_escapes_are_undone_and_any_bytes_kept(field: str, point: str) -> None:
    """As os.fsdecode gives them: bytes that are no UTF-8 stand as lone surrogates."""
    assert points(mounted_at(field)) == [point]


@pytest.mark.parametrize("char", ["\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028"], ids=ascii)
def test_a_path_may_hold_what_looks_like_the_end_of_a_line(char: str) -> None:
    assert points(f"{mounted_at(f'/a{char}b')}\n{PLAIN}\n") == [f"/a{char}b", "/mnt"]


def test_what_is_no_line_is_passed_over() -> None:
    """Reading as text may make two lines of one, where a path holds a carriage return."""
    broken = mounted_at("/a\r7").replace("\r", "\n")
    assert points(f"{PLAIN}\n{broken}\n7\nx y z - a b c\n{USERS}\n") == ["/mnt", "/run/user/1000/mshare"]
