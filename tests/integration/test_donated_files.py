"""Mappings of files that are donated stay that: in the region, with every store, for every process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
PAGE = 4096
BASE = 0x5200_0000_0000
SIGBUS, SIGSEGV = 7, 11
SHARED, PRIVATE = 1, 2
MAP = f"""
BASE = {BASE}
from mmap import *
def anon(at, n, prot=3):
    sc.mmap(BASE + at, n, prot, 0x22 | sc.MAP_FIXED_NOREPLACE)
def show(at, n, f, prot=3, flags=1, offset=0):
    sc.mmap(BASE + at, n, prot, flags | sc.MAP_FIXED_NOREPLACE, f, offset)
def fd_of(path, how=os.O_RDWR):
    return os.open(path, how | os.O_CLOEXEC)
"""


def pattern(size: int) -> bytes:
    """Byte n is n % 251."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.fixture(scope="module", params=["auto", "all"])
def paging(request: pytest.FixtureRequest, start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon(f"--paging={request.param}")


@pytest.fixture(params=["thp", "4k"])
def backing(request: pytest.FixtureRequest) -> str:
    return f"backing={request.param!r}"


@pytest.fixture
def start(paging: Daemon, client: Callable[..., Client]) -> Callable[..., Client]:
    """Start a client that knows how to map."""

    def go(**options: Any) -> Client:
        c = client(paging, **options)
        c.do(MAP)
        return c

    return go


@pytest.fixture(params=["disk", "memory", "memfd"])
def path(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> Iterator[Path]:
    """A file of 3 MiB and 100 bytes."""
    if request.param == "memfd":
        fd = os.memfd_create("data")
        os.write(fd, pattern(3 * MIB + 100))
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
        os.close(fd)
        return
    path = tmp_path / "data" if request.param == "disk" else Path("/dev/shm") / name
    path.write_bytes(pattern(3 * MIB + 100))
    yield path
    path.unlink(missing_ok=True)


def vmas(c: Client) -> list[tuple[object, ...]]:
    """Offset, length, protection, shared, whether of a file, offset in it."""
    found = c.ask("[(v.offset, v.length, v.prot, v.shared, v.file is not None, v.file_offset) for v in r.maps()]")
    return [tuple(each) for each in found]


def touch(c: Client, offset: int, *, store: bool = False) -> int:
    """What a forked child gets from a touch: 0, or the signal."""
    status: int = -c.ask(f"fork('r.buf[{offset}] = 2')" if store else f"fork('r.buf[{offset}]')")
    return status


def test_a_shared_mapping_stays_one(start: Callable[..., Client], backing: str, path: Path, name: str) -> None:
    a = start()
    a.do(f"f = fd_of({str(path)!r}); show(2 * MIB, 2 * MIB, f, offset=PAGE); os.close(f)")
    a.do("anon(0, MIB); ctypes.memset(BASE, 7, MIB)")
    a.do("ctypes.memset(BASE + 2 * MIB + 5, 200, 1)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 8 * MIB, CREATE, {backing})")
    assert vmas(a) == [(0, MIB, 3, True, False, 0), (2 * MIB, 2 * MIB, 3, True, True, PAGE)]
    assert path.read_bytes()[PAGE + 5] == 200
    b = start()
    b.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    for c in (a, b):
        assert c.ask("r.buf[:MIB] == bytes([7]) * MIB")
        assert c.ask("r.buf[2 * MIB + 5]") == 200
        assert c.ask(
            f"bytes(r.buf[2 * MIB + 6 : 4 * MIB]) == open({str(path)!r}, 'rb').read()[PAGE + 6 : 2 * MIB + PAGE]"
        )
        assert touch(c, MIB) == touch(c, 4 * MIB) == touch(c, 8 * MIB - 1) == SIGBUS
    b.do("r.buf[2 * MIB + 9] = 201")
    a.do("ctypes.memset(BASE + 4 * MIB - 1, 202, 1)")
    a.do("r.msync()")
    data = path.read_bytes()
    assert (data[PAGE + 5], data[PAGE + 9], data[2 * MIB + PAGE - 1]) == (200, 201, 202)
    assert len(data) == 3 * MIB + 100


def test_another_process_that_maps_the_file_sees_it_after_msync(
    start: Callable[..., Client], backing: str, path: Path, name: str
) -> None:
    a, stranger = start(), start()
    for c in (a, stranger):
        c.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE, {backing}); r.buf[MIB] = 99; r.msync()")
    assert stranger.ask("ctypes.string_at(BASE + MIB, 1)[0]") == 99


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with threads"])
def test_a_private_mapping_keeps_the_donors_pages(
    start: Callable[..., Client], backing: str, path: Path, name: str, others: bool
) -> None:
    a = start()
    before = path.read_bytes()
    if others:
        a.do("end = threading.Event(); threading.Thread(target=end.wait, daemon=True).start()")
    a.do(f"f = fd_of({str(path)!r}, RO); show(0, 4 * MIB, f, flags=MAP_PRIVATE); os.close(f)")
    a.do("ctypes.memset(BASE + 5, 200, 1); ctypes.memset(BASE + MIB + 3 * PAGE, 201, PAGE)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 4 * MIB, CREATE, {backing})")
    assert vmas(a) == [(0, 4 * MIB, 3, False, True, 0)]
    expected = bytearray(before[: 3 * MIB + 100].ljust(3 * MIB + PAGE, b"\0"))
    expected[5] = 200
    expected[MIB + 3 * PAGE : MIB + 4 * PAGE] = bytes([201]) * PAGE
    copied = a.ask("r.stat().resident")
    assert copied == (3 * MIB + PAGE if others else 2 * PAGE)
    b = start()
    b.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    b.do(f"expected = bytes.fromhex({bytes(expected).hex()!r})")
    assert b.ask("r.buf[:3 * MIB + PAGE] == expected")
    assert touch(a, 3 * MIB + PAGE) == touch(b, 4 * MIB - 1, store=True) == SIGBUS
    b.do("r.buf[2 * MIB] = 202; r.msync()")
    assert a.ask("ctypes.string_at(BASE + 2 * MIB, 1)[0]") == 202
    assert path.read_bytes() == before


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with threads"])
def test_protections_are_kept(
    start: Callable[..., Client], backing: str, path: Path, name: str, flags: int, others: bool
) -> None:
    a = start()
    if others:
        a.do("end = threading.Event(); threading.Thread(target=end.wait, daemon=True).start()")
    a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f, flags={flags}); ctypes.memset(BASE + PAGE, 200, 2 * PAGE)")
    a.do("sc.mprotect(BASE + PAGE, PAGE, 1); sc.mprotect(BASE + 2 * PAGE, PAGE, 0)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE, {backing})")
    shared = flags == SHARED
    assert vmas(a) == [
        (0, PAGE, 3, shared, True, 0),
        (PAGE, PAGE, 1, shared, True, PAGE),
        (2 * PAGE, PAGE, 0, shared, True, 2 * PAGE),
        (3 * PAGE, 2 * MIB - 3 * PAGE, 3, shared, True, 3 * PAGE),
    ]
    b = start()
    b.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    for c in (a, b):
        assert c.ask("[r.buf[PAGE], r.buf[2 * PAGE - 1], r.buf[3]]") == [200, 200, 3]
        assert touch(c, PAGE, store=True) == touch(c, 2 * PAGE) == touch(c, 2 * PAGE, store=True) == SIGSEGV
    b.do("r.mprotect(PAGE, 2 * PAGE, 3)")
    assert a.ask("list(ctypes.string_at(BASE + 2 * PAGE, PAGE)) == [200] * PAGE")
    a.do("ctypes.memset(BASE + PAGE, 77, 1); r.msync()")
    assert b.ask("r.buf[PAGE]") == 77
    assert path.read_bytes()[PAGE] == (77 if shared else PAGE % 251)


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_what_sticks_out_is_split_at_the_border(
    start: Callable[..., Client], backing: str, path: Path, name: str, flags: int
) -> None:
    a = start()
    a.do(f"f = fd_of({str(path)!r}); show(-MIB, 3 * MIB - PAGE, f, flags={flags}, offset=PAGE)")
    a.do("ctypes.memset(BASE - 1, 200, 2)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE, {backing})")
    assert vmas(a) == [(0, 2 * MIB - PAGE, 3, flags == SHARED, True, MIB + PAGE)]
    assert a.ask("list(ctypes.string_at(BASE - 2, 4))") == [
        (MIB + PAGE - 2) % 251,
        200,
        200,
        (MIB + PAGE + 1) % 251,
    ]
    a.do("ctypes.memset(BASE - 1, 201, 2); r.msync()")
    data = path.read_bytes()
    expected = [201, 201] if flags == SHARED else [(MIB + PAGE - 1) % 251, (MIB + PAGE) % 251]
    assert list(data[MIB + PAGE - 1 : MIB + PAGE + 1]) == expected


def test_several_files_beside_each_other_in_one_huge_page(
    start: Callable[..., Client], backing: str, tmp_path: Path, name: str
) -> None:
    """Neighbours may be anything: huge pages that one would bring must not reach the others."""
    a = start()
    paths = [tmp_path / str(n) for n in range(6)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([100 + n]) * 4 * PAGE)
        a.do(f"f{n} = fd_of({str(path)!r}); show({n} * 8 * PAGE, 4 * PAGE, f{n}, flags={1 + n % 2})")
        a.do(f"anon(({n} * 8 + 4) * PAGE, 2 * PAGE); ctypes.memset(BASE + ({n} * 8 + 4) * PAGE, {n}, 2 * PAGE)")
    a.do("show(48 * PAGE, 2 * PAGE, f0, offset=PAGE)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE, {backing})")
    b = start()
    b.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)")
    for c in (a, b):
        for n in range(6):
            assert c.ask(f"bytes(r.buf[{n} * 8 * PAGE : ({n} * 8 + 4) * PAGE]) == bytes([{100 + n}]) * 4 * PAGE")
            assert c.ask(f"bytes(r.buf[({n} * 8 + 4) * PAGE : ({n} * 8 + 6) * PAGE]) == bytes([{n}]) * 2 * PAGE")
            assert touch(c, (n * 8 + 6) * PAGE) == SIGBUS
    b.do("r.buf[PAGE + 3] = 1; r.buf[8 * PAGE] = 2; r.msync()")
    assert (paths[0].read_bytes()[PAGE + 3], paths[1].read_bytes()[0]) == (1, 101)
    shown = a.ask("[(v.offset // PAGE, v.file, v.file_offset) for v in r.maps() if v.file is not None]")
    assert shown[-1][:1] + shown[-1][2:] == [48, PAGE]
    assert shown[-1][1] == shown[0][1]
    assert len({file for _, file, _ in shown}) == 6


@pytest.mark.parametrize(("count", "fits"), [(16, True), (17, False)])
def test_as_many_files_as_a_message_takes(
    start: Callable[..., Client], tmp_path: Path, name: str, count: int, fits: bool
) -> None:
    a = start()
    for n in range(count):
        (tmp_path / str(n)).write_bytes(bytes([n]) * PAGE)
        a.do(f"f = fd_of({str(tmp_path / str(n))!r}); show({n} * PAGE, PAGE, f); os.close(f)")
    create = f"mshare.mshare({name!r}, BASE, 2 * MIB, CREATE)"
    fds = a.ask("len(os.listdir('/proc/self/fd'))")
    if fits:
        a.do(f"r = {create}")
    else:
        error = a.error_of(create)
        assert (error.errno, "more than 16 files" in error.text) == (errno.E2BIG, True)
        assert a.ask("len(os.listdir('/proc/self/fd'))") == fds
    assert a.ask(f"[ctypes.string_at(BASE + n * PAGE, 1)[0] for n in range({count})]") == list(range(count))


def test_a_file_opened_for_reading(start: Callable[..., Client], backing: str, path: Path, name: str) -> None:
    """A mapping that could never have been written to is as little to be written by others."""
    a = start()
    a.do(f"f = fd_of({str(path)!r}, RO); show(0, 2 * MIB, f, prot=1)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE, {backing})")
    assert vmas(a) == [(0, 2 * MIB, 1, True, True, 0)]
    assert a.error_of("r.mprotect(0, PAGE, 3)").errno == errno.EACCES
    assert (a.ask("r.buf[7]"), touch(a, 7, store=True)) == (7, SIGSEGV)


def test_a_mapping_for_reading_of_a_file_opened_for_writing(
    start: Callable[..., Client], path: Path, name: str
) -> None:
    a = start()
    a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f, prot=1)")
    a.do(f"r = mshare.mshare({name!r}, BASE, 2 * MIB, CREATE); r.mprotect(0, PAGE, 3); r.buf[7] = 99; r.msync()")
    assert path.read_bytes()[7] == 99


class TestFinding:
    """How a donor without privileges has its file opened."""

    @pytest.fixture
    def theirs(self, directory: Path) -> Path:
        """A file of user 1234's."""
        path = directory / "theirs"
        path.write_bytes(pattern(2 * MIB))
        os.chown(path, 1234, 1234)
        directory.chmod(0o777)
        return path

    def create(self, name: str) -> str:
        return f"mshare.mshare({name!r}, BASE, 2 * MIB, CREATE)"

    def test_by_its_path(self, start: Callable[..., Client], theirs: Path, name: str) -> None:
        c = start(uid=1234)
        c.do(f"f = fd_of({str(theirs)!r}); show(0, 2 * MIB, f); os.close(f)")
        c.do(f"r = {self.create(name)}; r.buf[5] = 99; r.msync()")
        assert theirs.read_bytes()[5] == 99

    @pytest.mark.parametrize("letters", ["odd \n name \t", "\\012", "(deleted)", "\r\x85"])
    def test_a_name_with_odd_letters(self, start: Callable[..., Client], theirs: Path, name: str, letters: str) -> None:
        odd = theirs.with_name(letters)
        theirs.rename(odd)
        self.test_by_its_path(start, odd, name)

    def test_by_a_descriptor_when_it_has_no_name_any_more(
        self, start: Callable[..., Client], theirs: Path, name: str
    ) -> None:
        c = start(uid=1234)
        c.do(f"f = fd_of({str(theirs)!r}); show(0, 2 * MIB, f); os.unlink({str(theirs)!r})")
        c.do(f"r = {self.create(name)}; r.buf[5] = 99; r.msync()")
        assert c.ask("os.pread(f, 1, 5)[0]") == 99

    @pytest.mark.parametrize("left", ["", "f = fd_of(path, RO)", "f = os.open(path, os.O_WRONLY)"])
    def test_without_any_way_nothing_is_changed(
        self, start: Callable[..., Client], theirs: Path, name: str, left: str
    ) -> None:
        c = start(uid=1234)
        c.do(f"path = {str(theirs)!r}; g = fd_of(path); show(0, 2 * MIB, g); {left}\nos.close(g); os.unlink(path)")
        c.do("ctypes.memset(BASE + 5, 98, 1)")
        before = c.ask("sorted(os.listdir('/proc/self/fd'))")
        error = c.error_of(self.create(name))
        assert (error.errno, "keep a descriptor of it open for reading and writing" in error.text) == (
            errno.EINVAL,
            True,
        )
        assert c.ask("sorted(os.listdir('/proc/self/fd'))") == before
        assert c.ask("ctypes.string_at(BASE + 4, 2)[1]") == 98
        assert c.ask("[m.path.endswith('(deleted)') for m in sc.own_mappings(BASE, BASE + 2 * MIB)]") == [True]

    def test_another_file_of_that_name_is_not_taken_for_it(
        self, start: Callable[..., Client], theirs: Path, name: str
    ) -> None:
        c = start(uid=1234)
        c.do(f"path = {str(theirs)!r}; f = fd_of(path); show(0, 2 * MIB, f); os.close(f); os.rename(path, path + '2')")
        c.do("os.rename(path + '2', path + '3'); os.mkfifo(path)")
        c.do(f"r = {self.create(name)}; r.buf[5] = 99; r.msync()")
        assert Path(str(theirs) + "3").read_bytes()[5] == 99

    def test_memory_files_by_their_descriptor(self, start: Callable[..., Client], name: str) -> None:
        c = start(uid=1234)
        c.do("f = os.memfd_create('it'); os.ftruncate(f, 2 * MIB); show(0, 2 * MIB, f); ctypes.memset(BASE, 5, 9)")
        c.do(f"r = {self.create(name)}; r.buf[5] = 99; r.msync()")
        assert c.ask("list(os.pread(f, 7, 0))") == [5, 5, 5, 5, 5, 99, 5]


COUNT = """
        class Counter(threading.Thread):
            def __init__(self, at):
                super().__init__(daemon=True)
                self.cell = ctypes.c_uint64.from_address(BASE + at); self.cell.value = self.count = 0; self.stop = False
            def run(self):
                while not self.stop:
                    self.count += 1
                    assert self.cell.value == self.count - 1, (self.cell.value, self.count)
                    self.cell.value = self.count
        counters = [Counter((8 + 512 * 1024) * n) for n in range(3)]
        for c in counters: c.start()
        while any(c.count < 100 for c in counters): pass
        """
STOP = """
        reached = [c.count for c in counters]
        while any(c.count < n + 100 for c, n in zip(counters, reached)): pass
        for c in counters: c.stop = True
        for c in counters: c.join()
        """


SWAP = """
        libc = ctypes.CDLL(None); libc.strfry.argtypes = [ctypes.c_void_p]
        def swap():
            while len(done) < enough: libc.strfry(BASE); done.append(0)
        done, enough = [], 1 << 62; t = threading.Thread(target=swap); t.start()
        while not done: pass
        """


class TestStoresMeanwhile:
    """Other threads go on storing, by the old mapping and by the new one."""

    @pytest.mark.parametrize("path", ["disk", "memory"], indirect=True)
    @pytest.mark.parametrize("flags", [SHARED, PRIVATE])
    def test_of_python_threads(
        self, start: Callable[..., Client], backing: str, path: Path, name: str, flags: int
    ) -> None:
        a = start()
        a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f, flags={flags}); anon(4 * MIB, 2 * MIB)")
        a.do(COUNT)
        a.do(f"r = mshare.mshare({name!r}, BASE, 8 * MIB, CREATE, {backing})")
        a.do(STOP)
        assert a.ask("[c.cell.value == c.count for c in counters]") == [True] * 3
        b = start()
        b.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
        counts = a.ask("[c.count for c in counters]")
        assert b.ask("[struct.unpack_from('Q', r.buf, (8 + 512 * 1024) * n)[0] for n in range(3)]") == counts
        if flags == SHARED:
            b.do("r.msync()")
            data = path.read_bytes()
            found = [int.from_bytes(data[at : at + 8], "little") for at in range(0, MIB + 100, 8 + 512 * 1024)]
            assert found == counts

    @pytest.mark.parametrize("kind", ["shared on disk", "shared in memory", "private in memory"])
    def test_of_native_threads(
        self, start: Callable[..., Client], backing: str, tmp_path: Path, name: str, kind: str
    ) -> None:
        """A thread that holds no interpreter lock swaps letters at random: none may appear twice, none may go."""
        path = tmp_path / "data" if kind.endswith("disk") else Path("/dev/shm") / name
        path.write_bytes(b"a" * 2 * MIB + b"b" * (2 * MIB - 1) + b"\0")
        a = start()
        a.do(f"f = fd_of({str(path)!r}); show(0, 4 * MIB, f, flags={1 if kind.startswith('shared') else 2})")
        path.unlink()
        a.do(SWAP)
        a.do(f"r = mshare.mshare({name!r}, BASE, 4 * MIB, CREATE, {backing}); enough = len(done) + 2; t.join()")
        counts = [2 * MIB, 2 * MIB - 1, 1]
        assert a.ask("[r.buf.tobytes().count(each) for each in b'ab\\0']") == counts
        a.do("r.msync(); held = os.pread(f, 4 * MIB, 0)")
        assert a.ask("[held.count(each) for each in b'ab\\0']") == counts
        assert a.ask("held == r.buf.tobytes()") is kind.startswith("shared")


class TestFailure:
    """The donor has its memory as before, the region never was, and nothing is left over."""

    def test_of_the_daemon_to_take_it(self, start: Callable[..., Client], path: Path, name: str) -> None:
        a = start()
        a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f, prot=5); anon(2 * MIB, MIB)")
        before = a.ask("[str(m) for m in sc.own_mappings(BASE, BASE + 4 * MIB)]")
        assert a.error_of(f"mshare.mshare({name!r}, BASE, 4 * MIB, CREATE)").errno == errno.EACCES
        assert a.ask("[str(m) for m in sc.own_mappings(BASE, BASE + 4 * MIB)]") == before

    @pytest.mark.parametrize("path", ["disk"], indirect=True)
    @pytest.mark.parametrize("when", ["staged", "moved", "open"])
    @pytest.mark.parametrize("others", [False, True], ids=["alone", "with threads"])
    def test_on_the_way(
        self,
        start: Callable[..., Client],
        paging: Daemon,
        backing: str,
        path: Path,
        name: str,
        when: str,
        others: bool,
        eventually: Callable[[Callable[[], bool]], None],
    ) -> None:
        """Wherever it ends: files have all stores, private pages are there, and what was hidden is."""
        a = start()
        a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f); show(2 * MIB, 2 * MIB, f, flags=2)")
        a.do("anon(4 * MIB, MIB); ctypes.memset(BASE + 4 * MIB, 6, MIB); sc.mprotect(BASE + 4 * MIB, PAGE, 0)")
        a.do("ctypes.memset(BASE + 5, 200, 1); ctypes.memset(BASE + 2 * MIB + 5, 201, 1)")
        if others:
            a.do("end = threading.Event(); threading.Thread(target=end.wait, daemon=True).start()")
        a.do(f"mshare.mshare({name!r} + '-other', None, 2 * MIB, CREATE)")
        fds, theirs = a.ask("len(os.listdir('/proc/self/fd'))"), paging.descriptors()
        a.do(f"""
            import mshare.api, mshare.donation as donation
            from mshare.window import Window
            class Stop(OSError): pass
            def stop(*_):
                if {when!r} != 'staged': ctypes.memset(BASE + 7, 202, 1); ctypes.memset(BASE + 2 * MIB + 7, 203, 1)
                raise Stop
            real = donation.move_in
            if {when!r} == 'staged': donation.move_in = stop
            elif {when!r} == 'moved': donation.move_in = lambda *args: (real(*args), stop())
            else:
                plain = Window.open
                Window.open = lambda self: (plain(self), stop())
            """)
        error = a.error_of(f"mshare.mshare({name!r}, BASE, 8 * MIB, CREATE, {backing})")
        assert error.kind == "Stop"
        a.do("donation.move_in = real\nif 'plain' in globals(): Window.open = plain")
        moved = when != "staged"
        data = path.read_bytes()
        assert (data[5], data[7]) == (200, 202 if moved else 7)
        assert a.ask("list(ctypes.string_at(BASE + 5, 3))") == [200, 6, 202 if moved else 7]
        assert a.ask("list(ctypes.string_at(BASE + 2 * MIB + 5, 3))") == [201, 6, 203 if moved else 7]
        assert a.ask(f"ctypes.string_at(BASE + 3 * MIB, MIB) == open({str(path)!r}, 'rb').read()[MIB:2 * MIB]")
        a.do("ctypes.memset(BASE + 9, 90, 1)")
        assert path.read_bytes()[9] == 90
        prots = a.ask("[(m.start - BASE, m.prot) for m in sc.own_mappings(BASE, BASE + 8 * MIB)]")
        assert prots == [[0, 3], [2 * MIB, 3], [4 * MIB, 0], [4 * MIB + PAGE, 3]]
        a.do("sc.mprotect(BASE + 4 * MIB, PAGE, 1)")
        assert a.ask("ctypes.string_at(BASE + 4 * MIB, MIB) == bytes([6]) * MIB")
        assert not (paging.mount / name).exists()
        assert a.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT
        assert a.ask("len(os.listdir('/proc/self/fd'))") == fds
        eventually(lambda: paging.descriptors() <= theirs)
        a.do(f"sc.munmap(BASE, 8 * MIB); mshare.mshare({name!r}, None, 2 * MIB, CREATE)")

    def test_by_death_before_all_has_moved(
        self,
        start: Callable[..., Client],
        paging: Daemon,
        path: Path,
        name: str,
        eventually: Callable[[Callable[[], bool]], None],
    ) -> None:
        """What was stored through the region by then reaches the file."""
        a, b = start(), start()
        a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f)")
        a.do("import mshare.donation as donation; real = donation.move_in")
        a.do("""
            def stop(*args):
                real(*args); ctypes.memset(BASE + 7, 202, 1); told.set(); threading.Event().wait()
            donation.move_in = stop; told = threading.Event()
            """)
        create = f"mshare.mshare({name!r}, BASE, 2 * MIB, CREATE)"
        a.do(f"threading.Thread(target=lambda: {create}, daemon=True).start(); told.wait()")
        assert path.read_bytes()[7] == 7
        a.kill()
        eventually(lambda: path.read_bytes()[7] == 202)
        assert b.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT
        assert not (paging.mount / name).exists()


def test_nobody_is_let_in_before_all_has_moved(start: Callable[..., Client], path: Path, name: str) -> None:
    a, b = start(), start()
    a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f)")
    a.do("import mshare.donation as donation; real = donation.move_in")
    a.do("""
        def wait(*args):
            told.set(); go_on.wait(); real(*args)
        donation.move_in = wait; told, go_on = threading.Event(), threading.Event()
        """)
    create = f"regions.append(mshare.mshare({name!r}, BASE, 2 * MIB, CREATE))"
    a.do(f"regions = []; t = threading.Thread(target=lambda: {create}); t.start(); told.wait()")
    assert b.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT
    assert b.error_of(f"mshare.remove({name!r})").errno == errno.ENOENT
    assert b.error_of(f"mshare.mshare({name!r}, None, 2 * MIB, CREATE)").errno == errno.EEXIST
    a.do("ctypes.memset(BASE + 7, 202, 1); go_on.set(); t.join()")
    b.do(f"r = mshare.mshare({name!r}, None, 0, RW)")
    assert b.ask("r.buf[7]") == 202


def test_a_fork_meanwhile(start: Callable[..., Client], backing: str, path: Path, name: str) -> None:
    """The child sees the file by the mapping that it inherits; the region is none the worse."""
    a = start()
    a.do(f"f = fd_of({str(path)!r}); show(0, 2 * MIB, f); anon(2 * MIB, 2 * MIB); ctypes.memset(BASE + 2 * MIB, 7, 9)")
    a.do("import mshare.donation as donation; real = donation.move_in")
    a.do("""
        def fork_first(*args):
            code = "assert ctypes.string_at(BASE + 7, 1)[0] == 7; ctypes.memset(BASE + 8, 203, 1)"
            statuses.append(fork(code)); statuses.append(fork('ctypes.string_at(BASE + 4 * MIB, 1)')); real(*args)
        donation.move_in, statuses = fork_first, []
        """)
    a.do(f"r = mshare.mshare({name!r}, BASE, 8 * MIB, CREATE, {backing}); donation.move_in = real")
    assert a.ask("statuses") == [0, -SIGSEGV]  # Before, nothing was there.
    assert a.ask("list(r.buf[7:9])") == [7, 203]
    b = start()
    b.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW); r.buf[9] = 204; r.msync()")
    assert path.read_bytes()[7:10] == bytes([7, 203, 204])
    assert a.ask("fork('r.buf[10] = 205')") == 0
    assert b.ask("r.buf[10]") == 205


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_with_a_daemon_of_ones_own(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], directory: Path, flags: int
) -> None:
    """It has no privileges: no device, and no reports of forks."""
    path = directory / "data"
    path.write_bytes(pattern(3 * MIB))
    os.chown(path, 65534, 65534)
    a = client(start_daemon(uid=65534), uid=65534)
    a.do(MAP + f"f = fd_of({str(path)!r}); show(0, 4 * MIB, f, flags={flags}); ctypes.memset(BASE + 5, 200, 1)")
    a.do("r = mshare.mshare('it', BASE, 4 * MIB, CREATE); r.buf[6] = 201; r.msync()")
    assert a.ask("list(r.buf[4:8])") == [4, 200, 201, 7]
    assert list(path.read_bytes()[4:8]) == ([4, 200, 201, 7] if flags == SHARED else [4, 5, 6, 7])
    assert a.dies_of("r.buf[3 * MIB]")[0] == -SIGBUS


def test_what_is_moved_out_of_a_window_is_no_memory(start: Callable[..., Client], name: str) -> None:
    """Faults there reach the daemon still; they must not wait for ever."""
    c = start()
    c.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE); r.munmap(2 * MIB, 2 * MIB); r.buf[5] = 9")
    c.do("mremap = ctypes.CDLL(None).mremap; mremap.argtypes = [ctypes.c_size_t] * 5")
    c.do("mremap(r.address + 2 * MIB, 2 * MIB, 2 * MIB, 3, 0x6300_0000_0000)")
    c.do("end, pipe = os.pipe()")
    assert c.ask("fork('ctypes.string_at(0x6300_0000_0000, 1)')") == -SIGBUS
    libc = "ctypes.CDLL(None, use_errno=True)"
    c.do(f"got = {libc}.write(pipe, ctypes.c_void_p(0x6300_0000_1000), 8); number = ctypes.get_errno()")
    assert c.ask("got") == -1
    assert c.ask("r.buf[5]") == 9
    status, _ = c.dies_of("ctypes.string_at(0x6300_0000_2000, 1)")
    assert status == -SIGBUS
