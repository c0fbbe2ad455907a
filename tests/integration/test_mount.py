"""The mount as everybody's tools see it: names, attributes, introspection, refusals."""

from __future__ import annotations

import errno
import grp
import mmap
import os
import pwd
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
NOBODY = pwd.getpwnam("nobody").pw_uid
DAEMON_UID = pwd.getpwnam("daemon").pw_uid


@pytest.fixture
def creator(client: Callable[..., Client], name: str) -> Client:
    c = client()
    c.do(f"name = {name!r}; r = mshare.mshare(name, 0x5000_0000_0000, 4 * MIB, CREATE, 0o640); r.buf[0] = 1")
    return c


@pytest.fixture
def path(daemon: Daemon, creator: Client, name: str) -> Path:
    assert creator.is_alive()
    return daemon.mount / name


def sh(command: str, *args: object, uid: int | None = None) -> subprocess.CompletedProcess[str]:
    """A shell command with arguments $1, $2, ..."""
    return subprocess.run(
        ["sh", "-c", command, "sh", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        user=uid,
        group=uid,
        extra_groups=[] if uid is not None else None,
        env={**os.environ, "LC_ALL": "C"},
    )


def test_a_region_file_starts_with_the_abi_of_the_series(path: Path) -> None:
    raw = path.read_bytes()
    assert struct.unpack("@LL", raw[:16]) == (0x5000_0000_0000, 4 * MIB)
    text = raw[16:].decode()
    assert text == "\nstart 0x500000000000\nsize 0x400000 (4194304 bytes, 4 MiB)\n"
    assert path.stat().st_size == len(raw)
    assert sh("od -A n -t u8 -N 16 $1", path).stdout.split() == [str(0x5000_0000_0000), str(4 * MIB)]
    with path.open("rb", buffering=0) as file:
        assert (file.read(8), file.read(8), os.pread(file.fileno(), 5, 17)) == (raw[:8], raw[8:16], b"start")


def test_mshare_info(daemon: Daemon) -> None:
    first, *lines = (daemon.mount / "mshare_info").read_text().splitlines()
    fields = dict(line.split(" ", 1) for line in lines)
    assert first == str(2 * MIB)
    assert {"version", "page_size", "backing", "window", "socket"} <= fields.keys()
    assert (fields["socket"], fields["backing"], fields["page_size"]) == (str(daemon.socket), "thp", "4096")
    assert (daemon.mount / "mshare_info").stat().st_size == len((daemon.mount / "mshare_info").read_bytes())


def test_the_root(daemon: Daemon, path: Path) -> None:
    assert (daemon.mount.stat().st_mode & 0o7777, daemon.mount.stat().st_uid) == (0o1777, 0)
    assert {"mshare_info", ".regions", ".metrics", path.name} <= set(os.listdir(daemon.mount))
    assert path.name in os.listdir(daemon.mount / ".regions")
    line = next(x for x in Path("/proc/self/mountinfo").read_text().splitlines() if f" {daemon.mount} " in x)
    assert " - fuse.msharefs " in line


def test_attributes(path: Path) -> None:
    found = path.stat()
    assert (found.st_mode, found.st_uid, found.st_gid, found.st_nlink) == (0o100640, 0, 0, 1)
    assert sh("stat -c %A $1", path).stdout == "-rw-r-----\n"


def test_introspection(daemon: Daemon, creator: Client, name: str) -> None:
    info = daemon.mount / ".regions" / name
    assert sorted(os.listdir(info)) == ["attachments", "maps", "pagetables", "smaps", "stat"]
    assert (info / "maps").read_text() == "500000000000-500000400000 rw-s 000000000000 [anon]\n"
    assert "Resident:           2048 kB" in (info / "smaps").read_text()
    assert "leaves 1 of 2048 kB" in (info / "pagetables").read_text()
    assert (info / "attachments").read_text() == f"{creator.pid} rw 500000000000-500000400000\n"
    fields = dict(line.split(" ", 1) for line in (info / "stat").read_text().splitlines())
    assert (fields["size"], fields["backing"], fields["attached"]) == (str(4 * MIB), "thp", "1")
    assert (fields["resident"], fields["faults"]) == (str(2 * MIB), "0")
    assert (info / "maps").stat().st_mode == 0o100440


def test_metrics(daemon: Daemon, creator: Client, name: str) -> None:
    assert creator.is_alive()
    text = (daemon.mount / ".metrics").read_text()
    assert f'msharefs_region_size_bytes{{region="{name}"}} {4 * MIB}\n' in text
    assert f'msharefs_region_attached_processes{{region="{name}"}} 1\n' in text


def test_metrics_count_files_that_are_shared_without_a_name(
    daemon: Daemon, client: Callable[..., Client], name: str
) -> None:
    c = client()
    c.do(f"f = os.memfd_create({name!r}); os.ftruncate(f, 2 * MIB); m = mshare.mmap(f, 2 * MIB)")
    (key,) = os.listdir(daemon.mount / ".regions" / ".files")
    text = (daemon.mount / ".metrics").read_text()
    assert "\nmsharefs_files 1\n" in text
    assert f'msharefs_file_size_bytes{{file="{key}"}} {2 * MIB}\n' in text
    assert f'msharefs_file_attached_processes{{file="{key}"}} 1\n' in text
    c.do("m.munmap()")
    assert "\nmsharefs_files 0\n" in (daemon.mount / ".metrics").read_text()


def test_extended_attributes(path: Path) -> None:
    assert sorted(os.listxattr(path)) == [f"user.mshare.{key}" for key in ("attached", "backing", "size", "start")]
    values = {key: os.getxattr(path, f"user.mshare.{key}") for key in ("start", "size", "backing", "attached")}
    assert values == {"start": b"0x500000000000", "size": b"4194304", "backing": b"thp", "attached": b"1"}
    for attempt in (
        lambda: os.setxattr(path, "user.mshare.size", b"1"),
        lambda: os.removexattr(path, "user.mshare.size"),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            attempt()
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        os.getxattr(path, "user.other")


def test_statfs_tells_the_memory_for_regions(daemon: Daemon, creator: Client) -> None:
    before = os.statvfs(daemon.mount)
    creator.do("r.buf[2 * MIB] = 1")
    after = os.statvfs(daemon.mount)
    assert (before.f_bfree - after.f_bfree) * before.f_frsize == 2 * MIB
    assert before.f_namemax == 255


@pytest.mark.parametrize(
    "command",
    [
        "rm -f $1",
        "mv $1 $1-moved",
        "mv /etc/hostname $1",
        "truncate -s 0 $1",
        ": > $1",
        "dd if=/dev/zero of=$1 bs=1 count=1 conv=notrunc",
        "touch $1",
        "touch $1-new",
        "mkdir $1-new",
        "ln $1 $1-new",
        "ln -s x $1-new",
        "mknod $1-new p",
        "rmdir $(dirname $1)/.regions/$(basename $1)",
        "rm $(dirname $1)/.regions/$(basename $1)/maps",
        "rm $(dirname $1)/mshare_info",
        "chmod 777 $(dirname $1)/mshare_info",
        "chmod 777 $(dirname $1)/.regions/$(basename $1)/maps",
        "echo x > $(dirname $1)/mshare_info",
    ],
)
def test_what_would_change_the_tree_is_refused(daemon: Daemon, path: Path, command: str) -> None:
    before = path.read_bytes()
    done = sh(command, path)
    assert (done.returncode != 0, "Operation not permitted" in done.stderr) == (True, True), done.stderr
    assert path.read_bytes() == before
    assert not (daemon.mount / f"{path.name}-new").exists()


def test_the_file_is_not_the_memory(path: Path) -> None:
    with path.open("r+b") as file, pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        mmap.mmap(file.fileno(), 16, mmap.MAP_SHARED)


def test_a_listing_of_any_length(start_daemon: Callable[..., Daemon], client: Callable[..., Client]) -> None:
    c = client(start_daemon())
    c.do("names = [f'region-{i:04}-' + 'x' * 200 for i in range(400)]")
    c.do("for name in names: mshare.mshare(name, None, 2 * MIB, CREATE).detach()")
    c.do("import mshare.inspect")
    assert c.ask("[r.name for r in mshare.inspect.regions()] == names")
    assert c.ask("sorted(set(os.listdir(find_mount())) - {'mshare_info', '.regions', '.metrics'}) == names")


def test_names_that_are_not_there(daemon: Daemon) -> None:
    for missing in ("nothing", ".regions/nothing", ".regions/nothing/maps", "x" * 255, ".hidden"):
        with pytest.raises(FileNotFoundError):
            (daemon.mount / missing).stat()
    with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
        (daemon.mount / ("x" * 256)).stat()


def test_chmod_and_chown_by_owner_and_root_only(path: Path, client: Callable[..., Client]) -> None:
    path.chmod(0o644)
    assert path.stat().st_mode == 0o100644
    assert sh("chmod 600 $1", path, uid=NOBODY).returncode != 0
    os.chown(path, NOBODY, NOBODY)
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
    assert sh("chmod 604 $1", path, uid=NOBODY).returncode == 0
    assert sh("chown daemon $1", path, uid=NOBODY).returncode != 0
    assert path.stat().st_mode == 0o100604
    reader = client(uid=DAEMON_UID)
    reader.do(f"r = mshare.mshare({path.name!r}, None, 0, RO)")
    assert reader.ask("r.buf[0]") == 1


def test_odd_names_come_through(daemon: Daemon, client: Callable[..., Client]) -> None:
    c = client()
    for odd in ("with blank", "new\nline", "ünïcödé", "-dash", "a" * 255, "tab\tquote\"'", "\udcff\udcfe"):
        c.do(f"r = mshare.mshare({odd!r}, None, 2 * MIB, CREATE)")
        assert odd in os.listdir(daemon.mount)
        assert c.ask("r.stat().name") == odd
        assert (daemon.mount / ".regions" / odd / "stat").exists()
        assert (daemon.mount / ".metrics").read_bytes()
        c.do(f"mshare.mshare_unlink({odd!r})")


class TestPermissions:
    """What the mode of a region's file allows whom."""

    @pytest.mark.parametrize(
        ("mode", "who", "reads", "writes"),
        [
            (0o600, NOBODY, True, True),
            (0o600, DAEMON_UID, False, False),
            (0o644, DAEMON_UID, True, False),
            (0o666, DAEMON_UID, True, True),
            (0o400, NOBODY, True, False),
            (0o066, NOBODY, False, False),
            (0o000, 0, True, True),
        ],
    )
    def test_open_follows_the_mode(
        self, client: Callable[..., Client], name: str, mode: int, who: int, reads: bool, writes: bool
    ) -> None:
        owner, other = client(uid=NOBODY), client(uid=who or None)
        owner.do(f"os.umask(0); r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, {mode:#o})")
        for flags, allowed in (("RO", reads), ("RW", writes)):
            attempt = f"mshare.mshare({name!r}, None, 0, {flags}).detach()"
            if allowed:
                other.do(attempt)
            else:
                assert other.error_of(attempt).errno == errno.EACCES
        assert owner.ask("r.stat().attached") == 1

    def test_the_group_counts(self, client: Callable[..., Client], name: str, daemon: Daemon) -> None:
        owner, member = client(), client()
        owner.do(f"os.umask(0); r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o660)")
        group = grp.getgrnam("games").gr_gid
        os.chown(daemon.mount / name, 0, group)
        member.do(f"drop({NOBODY}, [{group}])")
        member.do(f"r = mshare.mshare({name!r}, None, 0, RW); r.buf[0] = 4")
        assert owner.ask("r.buf[0]") == 4

    def test_umask_applies(self, client: Callable[..., Client], name: str, daemon: Daemon) -> None:
        c = client()
        c.do(f"os.umask(0o027); r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o666)")
        assert (daemon.mount / name).stat().st_mode == 0o100640
        assert c.ask("os.umask(0o022)") == 0o027

    def test_introspection_follows_the_mode(self, client: Callable[..., Client], name: str, daemon: Daemon) -> None:
        client().do(f"mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o600)")
        info = daemon.mount / ".regions" / name
        assert sh("cat $1/stat", info, uid=NOBODY).returncode != 0
        (daemon.mount / name).chmod(0o604)
        assert sh("cat $1/stat", info, uid=NOBODY).returncode == 0

    def test_unlinking_what_is_not_ours(self, client: Callable[..., Client], name: str) -> None:
        owner, other = client(), client(uid=NOBODY)
        owner.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o644)")
        assert other.error_of(f"mshare.mshare_unlink({name!r})").errno == errno.EACCES
        assert other.error_of(f"mshare.remove({name!r})").errno == errno.EPERM
        owner.kill()
        assert other.error_of(f"mshare.mshare_unlink({name!r})").errno == errno.EACCES
        other.do(f"r = mshare.mshare({name!r}, None, 0, RO); mshare.mshare_unlink({name!r})")
        assert other.ask("r.closed")
        client().do(f"mshare.mshare_unlink({name!r})")

    def test_creating_needs_write_permission_on_the_root(
        self, start_daemon: Callable[..., Daemon], client: Callable[..., Client]
    ) -> None:
        private = start_daemon("--mode", "755")
        error = client(private, uid=NOBODY).error_of("mshare.mshare('x', None, 2 * MIB, CREATE)")
        assert (error.errno, "--mode" in error.text) == (errno.EACCES, True)
        client(private).do("mshare.mshare('x', None, 2 * MIB, CREATE, 0o644)")
        assert client(private, uid=NOBODY).ask("mshare.mshare('x', None, 0, RO).buf[0]") == 0

    def test_an_opened_file_is_a_ticket_that_chmod_does_not_take_back(
        self, client: Callable[..., Client], name: str, daemon: Daemon
    ) -> None:
        client().do(f"os.umask(0); mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o666)")
        other = client(uid=NOBODY)
        other.do(f"link = connect(find_mount()); ticket = os.open(link.mount / {name!r}, os.O_RDWR)")
        (daemon.mount / name).chmod(0o600)
        other.do("offer, fds = link.exchange(protocol.Attach(None, 0), (ticket,))")
        assert other.ask("(offer.readonly, len(fds))") == [False, 2]


def test_who_asks_the_mount_does_not_wait_for_a_daemon_that_looks_for_faults(daemon: Daemon) -> None:
    """What stays awake looks out for requests of the mount, too: two sets of descriptors have its connection."""
    process = Path(f"/proc/{daemon.pid}")
    (connection,) = [fd.name for fd in (process / "fd").iterdir() if os.path.realpath(fd) == "/dev/fuse"]
    watched = [info.read_text() for info in (process / "fdinfo").iterdir()]
    assert sum(f"tfd:{connection:>9} " in text for text in watched) == 2
