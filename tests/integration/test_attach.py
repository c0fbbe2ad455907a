"""mshare(), mshare_unlink() and remove() between real processes."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
SIGSEGV = 11


@pytest.fixture
def creator(client: Callable[..., Client], name: str) -> Client:
    """A process attached to a region of 4 MiB that it created."""
    c = client()
    c.do(f"name = {name!r}; r = mshare.mshare(name, None, 4 * MIB, CREATE)")
    return c


def attach(c: Client, name: str, how: str = "None, 0, RW") -> Client:
    c.do(f"name = {name!r}; r = mshare.mshare(name, {how})")
    return c


def test_the_same_pages_at_the_same_address(creator: Client, client: Callable[..., Client], name: str) -> None:
    other = attach(client(), name)
    assert other.ask("(r.address, r.size)") == creator.ask("(r.address, r.size)")
    creator.do("r.buf[:5] = b'hello'")
    assert other.ask("bytes(r.buf[:5]).decode()") == "hello"
    other.do("ctypes.memmove(r.address + 4 * MIB - 3, b'end', 3)")
    assert creator.ask("ctypes.string_at(r.address + 4 * MIB - 3, 3).decode()") == "end"


def test_regions_of_the_daemons_choice_never_overlap(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"rs = [mshare.mshare(f'{name}-{{i}}', None, (i % 3 + 1) * 2 * MIB, CREATE) for i in range(12)]")
    ranges = sorted(c.ask("[(r.address, r.address + r.size) for r in rs]"))
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(ranges))
    assert all(32 << 40 <= start < end <= 64 << 40 for start, end in ranges)


def test_another_address(creator: Client, client: Callable[..., Client], name: str) -> None:
    other = attach(client(), name, "0x6000_0000_0000, 4 * MIB, RW")
    other.do("r.buf[7] = 7")
    assert (other.ask("r.address"), creator.ask("r.buf[7]")) == (0x6000_0000_0000, 7)


def test_two_windows_of_one_process_are_two_references(creator: Client, name: str) -> None:
    creator.do("second = mshare.mshare(name, 0x6000_0000_0000, 0, RW); second.buf[1] = 5")
    assert creator.ask("r.buf[1]") == 5
    creator.do("r.detach()")
    assert creator.ask("(second.stat().attached, second.buf[1])") == [1, 5]
    creator.do("mshare.mshare_unlink(name)")
    assert creator.ask("second.closed")


def test_create_or_attach(creator: Client, client: Callable[..., Client], name: str) -> None:
    other = attach(client(), name, "None, 4 * MIB, os.O_CREAT | os.O_RDWR")
    assert other.ask("r.stat().attached") == 2


def test_many_that_create_at_once_share_one(client: Callable[..., Client], name: str) -> None:
    several = [client() for _ in range(8)]
    for c in several:
        c.send(do=f"r = mshare.mshare({name!r}, None, 2 * MIB, os.O_CREAT | os.O_RDWR)")
    for c in several:
        c.receive()
    assert several[0].ask("r.stat().attached") == 8
    several[0].do("r.buf[0] = 9")
    assert [c.ask("r.buf[0]") for c in several] == [9] * 8


def test_o_excl_refuses_what_exists(creator: Client, client: Callable[..., Client]) -> None:
    error = creator.error_of("mshare.mshare(name, None, 4 * MIB, CREATE)")
    assert (error.kind, error.errno) == ("FileExistsError", errno.EEXIST)


@pytest.mark.parametrize("how", ["None, 2 * MIB, RW", "None, 8 * MIB, RW", "None, 2 * MIB, os.O_CREAT | RW"])
def test_a_wrong_length_is_refused(creator: Client, client: Callable[..., Client], name: str, how: str) -> None:
    error = client().error_of(f"mshare.mshare({name!r}, {how})")
    assert (error.errno, "0x400000" in error.text) == (errno.EINVAL, True)
    assert creator.ask("r.stat().attached") == 1


def test_a_range_in_use_is_refused_and_nothing_changes(
    creator: Client, client: Callable[..., Client], name: str
) -> None:
    other = client()
    other.do("p = sc.mmap(0x6000_0000_0000 + 2 * MIB, 4096, 3, 0x22 | 0x100000); ctypes.memset(p, 5, 4096)")
    before = other.ask("(len(os.listdir('/proc/self/fd')), len(sc.own_mappings(0, 1 << 47)))")
    assert other.error_of(f"mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)").errno == errno.EINVAL
    after = other.ask("(len(os.listdir('/proc/self/fd')), len(sc.own_mappings(0, 1 << 47)))")
    assert after == [before[0] + 1, before[1]]  # The connection stays.
    assert other.ask("ctypes.string_at(p, 4096) == bytes([5]) * 4096")
    assert creator.ask("r.stat().attached") == 1


def test_a_reader_cannot_write_by_any_path(creator: Client, client: Callable[..., Client], name: str) -> None:
    creator.do("r.buf[:] = bytes([1]) * 4 * MIB")
    reader = attach(client(), name, "None, 0, RO")
    assert reader.ask("(r.readonly, r.buf.readonly, r.buf[0])") == [True, True, 1]
    assert reader.error_of("r.buf.__setitem__(0, 2)").kind == "TypeError"
    assert reader.ask("fork('ctypes.memset(r.address, 2, 1)')") == -SIGSEGV
    reader.do("sc.mprotect(r.address, r.size, 3); ctypes.memset(r.address, 2, 1)")
    assert creator.ask("r.buf[0]") == 1
    targets = reader.ask("[os.path.realpath(f) for f in Path('/proc/self/fd').iterdir()]")
    assert not any("/thp/" in target for target in targets)


@pytest.mark.parametrize("backing", ["thp", "4k"])
@pytest.mark.parametrize("uid", [0, 65534])
def test_a_readers_descriptor_opens_no_door(client: Callable[..., Client], name: str, backing: str, uid: int) -> None:
    """The descriptor that a read-only client is handed, used in every way that could lead to writing."""
    creator, reader = client(), client(uid=uid or None)
    creator.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o644, backing={backing!r}); r.buf[0] = 1")
    reader.do(f"""
        link = connect(find_mount()); ticket = os.open(link.mount / {name!r}, os.O_RDONLY)
        offer, fds = link.exchange(protocol.Attach(None, 0), (ticket,)); fd = fds[0]
        """)
    for attempt in (
        "os.open(f'/proc/self/fd/{fd}', os.O_RDWR)",
        "os.open(f'/dev/fd/{fd}', os.O_WRONLY)",
        "mmap.mmap(fd, 4096, mmap.MAP_SHARED, 3)",
        "os.write(fd, b'x')",
        "os.pwrite(fd, b'x', 0)",
        "os.ftruncate(fd, 0)",
        "os.posix_fallocate(fd, 0, 4096)",
        "os.fchmod(fd, 0o666) or os.open(f'/proc/self/fd/{fd}', os.O_RDWR)",
    ):
        assert reader.error_of(attempt).kind in ("OSError", "PermissionError"), attempt
    assert creator.ask("r.buf[0]") == 1


@pytest.mark.parametrize("backing", ["thp", "4k"])
def test_a_writers_descriptor_cannot_shrink_the_memory(client: Callable[..., Client], name: str, backing: str) -> None:
    creator, writer = client(), client()
    creator.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, backing={backing!r}); r.buf[MIB] = 1")
    writer.do(f"""
        link = connect(find_mount()); ticket = os.open(link.mount / {name!r}, os.O_RDWR)
        offer, fds = link.exchange(protocol.Attach(None, 0), (ticket,)); fd = fds[0]
        """)
    assert writer.error_of("os.ftruncate(fd, 0)").errno in (errno.EACCES, errno.EPERM)
    assert creator.ask("r.buf[MIB]") == 1


def test_readers_see_stores_at_once(creator: Client, client: Callable[..., Client], name: str) -> None:
    reader = attach(client(), name, "None, 0, RO")
    assert reader.ask("r.buf[3 * MIB]") == 0
    creator.do("r.buf[3 * MIB] = 4")
    assert reader.ask("r.buf[3 * MIB]") == 4


def test_a_creator_may_want_to_read_only(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, os.O_CREAT | os.O_RDONLY)")
    assert c.ask("(r.readonly, r.buf[5])") == [True, 0]


def test_the_region_outlives_its_creator(creator: Client, client: Callable[..., Client], name: str) -> None:
    creator.do("r.buf[:4] = b'left'")
    creator.kill()
    other = attach(client(), name)
    assert other.ask("(bytes(r.buf[:4]).decode(), r.stat().attached)") == ["left", 1]


def test_unlink_by_the_last_ends_the_region(
    creator: Client, client: Callable[..., Client], name: str, daemon: Daemon
) -> None:
    other = attach(client(), name)
    creator.do("mshare.mshare_unlink(name)")
    assert creator.ask("r.closed")
    assert (daemon.mount / name).exists()
    assert other.ask("r.stat().attached") == 1
    other.do("mshare.mshare_unlink(name)")
    assert not (daemon.mount / name).exists()
    assert other.error_of("mshare.mshare(name, None, 0, RW)").kind == "FileNotFoundError"


def test_an_unlink_gives_the_memory_back(creator: Client, daemon: Daemon) -> None:
    def used() -> int:
        fs = os.statvfs(daemon.mount)
        return (fs.f_blocks - fs.f_bfree) * fs.f_frsize

    before = used()
    creator.do("r.buf[:] = bytes([1]) * 4 * MIB")
    assert used() == before + 4 * MIB
    creator.do("mshare.mshare_unlink(name)")
    assert used() == before


def test_an_orphan_can_be_unlinked_by_who_may_write(creator: Client, client: Callable[..., Client], name: str) -> None:
    creator.kill()
    client().do(f"mshare.mshare_unlink({name!r})")
    assert client().error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT


def test_unlink_while_others_are_attached_is_busy(creator: Client, client: Callable[..., Client], name: str) -> None:
    error = client().error_of(f"mshare.mshare_unlink({name!r})")
    assert (error.errno, "mshare.remove" in error.text) == (errno.EBUSY, True)
    assert creator.ask("r.stat().attached") == 1


def test_a_second_unlink_finds_nothing(creator: Client) -> None:
    creator.do("mshare.mshare_unlink(name)")
    assert creator.error_of("mshare.mshare_unlink(name)").kind == "FileNotFoundError"


def test_remove_takes_the_name_and_leaves_the_memory(
    creator: Client, client: Callable[..., Client], name: str, daemon: Daemon
) -> None:
    other = attach(client(), name)
    creator.do("mshare.remove(name)")
    assert not (daemon.mount / name).exists()
    other.do("r.buf[0] = 3")
    assert creator.ask("(r.buf[0], r.stat().attached)") == [3, 2]
    creator.do("again = mshare.mshare(name, None, 2 * MIB, CREATE)")
    assert creator.ask("(again.buf[0], r.buf[0])") == [0, 3]
    creator.do("mshare.mshare_unlink(name)")
    assert creator.ask("(again.closed, r.closed)") == [True, False]


def test_detach_refuses_while_views_live_and_changes_nothing(creator: Client) -> None:
    creator.do("buf = r.buf; view = r.buf[10:20]")
    assert creator.error_of("r.detach()").kind == "BufferError"
    assert creator.error_of("mshare.mshare_unlink(name)").kind == "BufferError"
    creator.do("view[0] = 4; buf[1] = 5")
    assert creator.ask("(r.buf[10], r.buf[1], r.stat().attached)") == [4, 5, 1]
    creator.do("del view; array = (ctypes.c_char * 10).from_buffer(r.buf)")
    assert creator.error_of("r.detach()").kind == "BufferError"
    creator.do("del array; gc.collect(); r.detach(); r.detach()")
    assert creator.error_of("r.buf").kind == "ValueError"
    assert creator.error_of("buf[0]").kind == "ValueError"
    assert creator.error_of("r.stat()").kind == "ValueError"


def test_a_region_is_a_context_manager(creator: Client, client: Callable[..., Client], name: str) -> None:
    other = client()
    other.do(f"with mshare.mshare({name!r}, None, 0, RW) as r: r.buf[0] = 8")
    assert other.ask("r.closed")
    assert creator.ask("(r.buf[0], r.stat().attached)") == [8, 1]


def test_a_range_is_free_again_after_detach(creator: Client, name: str) -> None:
    for _ in range(3):
        creator.do("address = r.address; r.detach(); r = mshare.mshare(name, address, 0, RW)")
    assert creator.ask("r.stat().attached") == 1


def test_several_threads_may_use_one_region(creator: Client) -> None:
    creator.do("""
        errors = []
        def work(n):
            try:
                for i in range(20):
                    r.buf[n] = i; r.stat(); r.maps()
                    with mshare.mshare(name, 0x6000_0000_0000 + n * 16 * MIB, 0, RW) as other: assert other.buf[n] == i
            except BaseException as error: errors.append(repr(error))
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        """)
    assert creator.ask("(errors, r.stat().attached, list(r.buf[:8]))") == [[], 1, [19] * 8]


def test_threads_that_create_at_once_share_one(client: Callable[..., Client], name: str) -> None:
    c = client()
    c.do(f"""
        got = []
        def work(n):
            got.append(mshare.mshare({name!r}, 0x6000_0000_0000 + n * 2 * MIB, 2 * MIB, os.O_CREAT | os.O_RDWR))
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        got[0].buf[0] = 3
        """)
    assert c.ask("[r.buf[0] for r in got]") == [3] * 8


def test_a_window_cannot_be_donated(creator: Client, name: str) -> None:
    error = creator.error_of(f"mshare.mshare({name!r} + '-2', r.address, 2 * MIB, CREATE)")
    assert (error.errno, name in error.text) == (errno.EINVAL, True)
    creator.do("r.buf[0] = 1")


def test_no_mount_is_a_clear_error(directory: Path) -> None:
    c = Client(directory)
    try:
        error = c.error_of("mshare.mshare('x', None, 0, RW)")
        assert (error.errno, "mshare up" in error.text) == (errno.ENOENT, True)
    finally:
        c.close()


@pytest.mark.parametrize(("align", "size"), [("1G", 1 << 30), ("512G", 512 << 30)])
def test_the_strict_alignment_of_the_series(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], align: str, size: int
) -> None:
    strict = start_daemon("--align", align)
    assert (strict.mount / "mshare_info").read_text().splitlines()[0] == str(size)
    c = client(strict)
    assert c.error_of(f"mshare.mshare('x', None, {size} // 2, CREATE)").errno == errno.EINVAL
    assert c.error_of(f"mshare.mshare('x', {size} * 70 + {size} // 2, {size}, CREATE)").errno == errno.EINVAL
    c.do(f"r = mshare.mshare('x', {size} * 70, {size}, CREATE); r.buf[{size} - 1] = 1")
    c.do(f"s = mshare.mshare('y', None, {size}, CREATE)")
    assert c.ask(f"s.address % {size}") == 0
