"""Regions of huge pages, from the machine's pool and back to it: what is mapped is promised, and not refused later."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon, mounts_below
from hugepages import (
    ELSEWHERE,
    GIB,
    HUGE,
    SIGBUS,
    SIGSEGV,
    Pool,
    layout,
    need_memory,
    pages_left,
    pool,
    pool_size,
    touch,
)

pytestmark = pytest.mark.pool

NOBODY = pwd.getpwnam("nobody").pw_uid
MORE = 1 << 40
"""Bytes that no test machine has in its pool."""

Eventually = Callable[[Callable[[], bool]], None]
Start = Callable[..., Client]


class TestPool:
    """Pages are promised for what is mapped, taken when it is touched, and given back with the mapping."""

    def test_a_region_has_its_pages_promised_and_takes_them_when_touched(self, creator: Client, before: Pool) -> None:
        assert pool() == before.with_region(mapped=512, touched=4)
        assert creator.ask("(r.stat().resident, r.size % GIB, r.address % GIB)") == [4 * HUGE, 0, 0]

    def test_processes_that_attach_take_no_more(
        self, creator: Client, other: Client, attached: Start, before: Pool
    ) -> None:
        for c in (creator, other, attached("RO")):
            assert c.ask("(r.buf[4 * H - 1], r.buf[4 * H])") == [1, 0]
        assert pool() == before.with_region(mapped=512, touched=5)

    def test_holes_have_nothing_promised(self, hugetlb: Daemon, before: Pool, client: Start, name: str) -> None:
        c = client(hugetlb)
        c.do(f"r = mshare.mshare({name!r}, None, {MORE}, CREATE, empty=True, backing='hugetlb')")
        assert pool() == before.with_region(mapped=0, touched=0, kept=1)
        c.do("r.mmap(6 * MIB, offset=512 * GIB)")
        assert pool() == before.with_region(mapped=3, touched=0)
        c.do("r.buf[512 * GIB + 2 * MIB] = 1")
        assert c.ask("(r.stat().resident, [(v.offset, v.resident) for v in r.maps()])") == [HUGE, [[512 * GIB, HUGE]]]

    def test_an_unmapping_gives_back_pages_and_promises(self, creator: Client, other: Client, before: Pool) -> None:
        other.do("r.munmap(H, 9 * H)")
        assert pool() == before.with_region(mapped=503, touched=1, kept=1)
        creator.do("r.munmap(0, 100 * H)")
        assert pool() == before.with_region(mapped=412, touched=0, kept=1)
        assert (creator.ask("r.stat().resident"), layout(creator)) == (0, [(100, 412, 3)])

    def test_a_mapping_in_a_hole_has_pages_promised_again(self, creator: Client, other: Client, before: Pool) -> None:
        creator.do("r.munmap(2 * H, 4 * H); assert r.mmap(4 * H) == 2 * H")
        assert pool() == before.with_region(mapped=512, touched=2)
        for c in (other, creator):
            assert c.ask("(r.buf[2 * H - 1], sum(r.buf[2 * H : 6 * H : 512]), r.buf[6 * H])") == [1, 0, 0]

    @pytest.mark.parametrize(
        "call",
        [
            "r.mmap(4 * H, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10, offset=2 * H)",
            "r.madvise(2 * H, 4 * H, MADV_REMOVE)",
        ],
        ids=["mmap over it", "MADV_REMOVE"],
    )
    def test_memory_that_is_replaced_is_zeros_and_keeps_its_promise(
        self, creator: Client, other: Client, before: Pool, call: str
    ) -> None:
        other.do(call)
        assert pool() == before.with_region(mapped=512, touched=4)
        for c in (creator, other):
            assert c.ask("(r.buf[2 * H - 1], sum(r.buf[2 * H : 6 * H : 512]), r.buf[6 * H])") == [1, 0, 0]

    def test_removing_much_leaves_the_rest(self, creator: Client, other: Client, before: Pool) -> None:
        creator.do("for page in range(45): r.buf[page * H] = r.buf[page * H + H - 1] = 1")
        other.do("r.madvise(2 * H, 41 * H, MADV_REMOVE)")
        assert creator.ask("[n for n in range(45) if r.buf[n * H] or r.buf[n * H + H - 1]]") == [0, 1, 43, 44]
        assert pool() == before.with_region(mapped=512, touched=45)

    def test_hidden_contents_leave_the_pool_and_their_place_is_kept(self, creator: Client, before: Pool) -> None:
        creator.do("r.mprotect(H, 2 * H, 0)")
        assert pool() == before.with_region(mapped=512, touched=2)
        creator.do("r.mprotect(H, 2 * H, PROT_READ)")
        assert pool() == before.with_region(mapped=512, touched=4)
        creator.do("r.mprotect(H, 2 * H, 0); r.munmap(H, 2 * H)")
        assert pool() == before.with_region(mapped=510, touched=2, kept=1)

    @pytest.mark.parametrize("end", ["mshare.mshare_unlink(name)", "mshare.remove(name); r.detach()"])
    def test_the_end_of_a_region_gives_everything_back(self, creator: Client, before: Pool, end: str) -> None:
        creator.do(end)
        assert pool() == before

    def test_a_death_leaves_the_region_and_its_pages(
        self, creator: Client, attached: Start, before: Pool, eventually: Eventually
    ) -> None:
        creator.kill()
        heir = attached()
        assert heir.ask("(r.buf[4 * H - 1], r.stat().attached)") == [1, 1]
        assert pool() == before.with_region(mapped=512, touched=4)
        heir.do("r.buf[9 * H] = 1; mshare.remove(name)")
        assert pool() == before.with_region(mapped=512, touched=5)
        heir.kill()
        eventually(lambda: pool() == before)


class TestNotEnough:
    """Never a SIGBUS later: the pool is asked when memory is mapped, and the answer says what to do."""

    def test_a_region_that_the_pool_cannot_hold(self, hugetlb: Daemon, before: Pool, client: Start, name: str) -> None:
        c = client(hugetlb)
        error = c.error_of(f"mshare.mshare({name!r}, None, {MORE}, CREATE, backing='hugetlb')")
        assert (error.errno, "vm.nr_hugepages" in error.text) == (errno.ENOMEM, True)
        assert "--hugetlb-pool" in error.text
        assert pool() == before
        assert c.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.ENOENT
        c.do(f"r = mshare.mshare({name!r}, None, GIB, CREATE, backing='hugetlb'); r.buf[0] = 1")

    @pytest.mark.parametrize(("flags", "offset"), [(0x21, HUGE), (0x100021, HUGE), (0x31, 0)])
    def test_a_mapping_that_the_pool_cannot_hold(
        self, hugetlb: Daemon, before: Pool, client: Start, name: str, flags: int, offset: int
    ) -> None:
        c = client(hugetlb)
        c.do(f"H = 2 * MIB; r = mshare.mshare({name!r}, None, {MORE}, CREATE, empty=True, backing='hugetlb')")
        c.do("r.mmap(H, offset=0); r.buf[0] = 7")
        error = c.error_of(f"r.mmap({MORE - offset}, flags={flags}, offset={offset})")
        assert (error.errno, "vm.nr_hugepages" in error.text) == (errno.ENOMEM, True)
        assert pool() == before.with_region(mapped=1, touched=1)
        assert (layout(c), c.ask("r.buf[0]"), touch(c, HUGE)) == ([(0, 1, 3)], 7, SIGBUS)

    def test_what_would_fit_of_a_mapping_is_not_promised_either(self, creator: Client, before: Pool) -> None:
        size = (pages_left() // 512 + 1) * GIB
        error = creator.error_of(f"mshare.mshare('y', None, {size}, CREATE, backing='hugetlb')")
        assert error.errno == errno.ENOMEM
        assert pool() == before.with_region(mapped=512, touched=4)

    def test_what_was_promised_is_there_when_nothing_else_is(
        self, creator: Client, hugetlb: Daemon, client: Start
    ) -> None:
        greedy = client(hugetlb)
        greedy.do(f"r = mshare.mshare('greedy', None, {MORE}, CREATE, empty=True, backing='hugetlb')")
        greedy.do(f"r.mmap({(pages_left() + 1) * HUGE})")
        assert pages_left() == 0
        creator.do(
            "r.buf[GIB - 1] = 5; r.madvise(H, H, MADV_REMOVE); r.buf[H] = 1; r.mprotect(0, H, 0); r.mprotect(0, H, 3)"
        )
        assert creator.ask("(r.buf[GIB - 1], r.buf[0], r.buf[H], r.buf[H + 1])") == [5, 1, 1, 0]
        creator.do("r.munmap(0, 2 * H)")
        assert pages_left() == 1
        assert creator.ask("(r.mmap(2 * H), r.buf[0], r.buf[H])") == [0, 0, 0]
        assert greedy.error_of("r.mmap(2 * MIB)").errno == errno.ENOMEM

    def test_an_unmapping_works_when_nothing_is_free(self, creator: Client, hugetlb: Daemon, client: Start) -> None:
        """Even of pages that their user took out by madvise(2), and with them the promises: another has got one."""
        creator.do("sc.madvise(r.address, 2 * H, MADV_REMOVE)")
        greedy = client(hugetlb)
        greedy.do(f"r = mshare.mshare('greedy', None, {MORE}, CREATE, empty=True, backing='hugetlb')")
        greedy.do(f"r.mmap({(pages_left() + 1) * HUGE})")
        assert pages_left() == 0
        creator.do("r.munmap(0, 10 * H)")
        assert pages_left() == 8
        assert (layout(creator), creator.ask("r.buf[10 * H]")) == ([(10, 502, 3)], 0)


@pytest.mark.parametrize(
    "call",
    [
        "r.mmap(4096)",
        "r.mmap(MIB)",
        "r.mmap(H, offset=4096)",
        "r.mmap(H, flags=MAP_SHARED | MAP_ANONYMOUS | 0x10, offset=MIB)",
        "r.munmap(0, 4096)",
        "r.munmap(100 * H + 4096, H)",
        "r.munmap(0, GIB + H)",
        "r.mprotect(0, MIB, 1)",
        "r.mprotect(MIB, H, 0)",
        "r.madvise(0, 4096, MADV_REMOVE)",
        "r.msync(4096, H)",
    ],
)
def test_everything_is_made_of_whole_huge_pages(creator: Client, before: Pool, call: str) -> None:
    assert creator.error_of(call).errno == errno.EINVAL
    assert layout(creator) == [(0, 512, 3)]
    assert creator.ask("(r.buf[0], r.buf[4 * H - 1])") == [1, 1]
    assert pool() == before.with_region(mapped=512, touched=4)


@pytest.mark.parametrize(
    ("addr", "size"),
    [("None", "2 * MIB"), ("None", "GIB + 2 * MIB"), ("None", "GIB // 2"), ("40 * 1024 * GIB + 2 * MIB", "GIB")],
)
def test_regions_are_made_of_whole_gib(
    hugetlb: Daemon, before: Pool, client: Start, name: str, addr: str, size: str
) -> None:
    error = client(hugetlb).error_of(f"mshare.mshare({name!r}, {addr}, {size}, CREATE, backing='hugetlb')")
    assert error.errno == errno.EINVAL
    assert ("0x40000000" in error.text, "hugetlb" in error.text) == (True, True)


def test_windows_stand_at_whole_gib(creator: Client, client: Start, attached: Start, hugetlb: Daemon) -> None:
    error = client(hugetlb).error_of(f"mshare.mshare({creator.ask('name')!r}, {ELSEWHERE + HUGE}, 0, RW)")
    assert (error.errno, "0x40000000" in error.text) == (errno.EINVAL, True)
    c = attached(address=ELSEWHERE + 5 * GIB)
    c.do("r.buf[GIB - 1] = 9")
    assert (c.ask("r.buf[0]"), creator.ask("r.buf[GIB - 1]")) == (1, 9)
    assert creator.ask("r.stat().attached") == 2


def test_other_backings_keep_their_alignment(hugetlb: Daemon, before: Pool, client: Start, name: str) -> None:
    c = client(hugetlb)
    c.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE); r.buf[5] = 1")
    assert c.ask("(r.stat().backing, r.stat().tables_shared)") == ["thp", False]
    assert (hugetlb.mount / "mshare_info").read_text().splitlines()[0] == str(HUGE)


def test_processes_of_ordinary_users(creator: Client, hugetlb: Daemon, client: Start, before: Pool) -> None:
    """They create, attach, change and read as the modes say."""
    name = creator.ask("name")
    a, b = client(hugetlb, uid=NOBODY), client(hugetlb, uid=NOBODY)
    assert a.error_of(f"mshare.mshare({name!r}, None, 0, RW)").errno == errno.EACCES
    a.do("H = 2 * MIB; r = mshare.mshare('of-nobody', None, GIB, CREATE, backing='hugetlb'); r.buf[H] = 3")
    b.do(f"H = 2 * MIB; r = mshare.mshare('of-nobody', {ELSEWHERE}, 0, RW)")
    b.do("r.munmap(4 * H, H); r.mprotect(H, H, 1); r.buf[5 * H] = 4")
    assert a.ask("(r.buf[H], r.buf[5 * H])") == [3, 4]
    assert (touch(a, 4 * HUGE), touch(a, HUGE, store=True), touch(b, 4 * HUGE)) == (SIGBUS, SIGSEGV, SIGBUS)
    (hugetlb.mount / name).chmod(0o644)
    b.do(f"s = mshare.mshare({name!r}, None, 0, RO)")
    assert b.ask("s.buf[4 * H - 1]") == 1
    a.do("r.detach()")
    b.do("mshare.mshare_unlink('of-nobody')")
    assert pool() == before.with_region(mapped=512, touched=4)


class TestForks:
    """Children are attached as their parents are, at any moment."""

    def test_children_share_memory_and_holes(self, creator: Client, other: Client, before: Pool) -> None:
        creator.do("r.munmap(3 * H, H)")
        for c in (creator, other):
            assert c.ask("fork('assert r.buf[H] == 1; r.buf[H + 5] += 1; r.buf[100 * H] = 8')") == 0
            assert touch(c, 3 * HUGE) == touch(c, 3 * HUGE + 5, store=True) == SIGBUS
        assert other.ask("(r.buf[H + 5], r.buf[100 * H])") == [3, 8]
        assert pool() == before.with_region(mapped=511, touched=4, kept=1)

    def test_children_follow_changes_and_make_their_own(self, creator: Client, other: Client) -> None:
        creator.do("""
            told, tell = os.pipe(); said, say = os.pipe()
            if not (child := os.fork()):
                r.buf[200 * H] = 1; r.munmap(H, H); r.mprotect(2 * H, H, PROT_READ); os.write(say, b'.')
                os.read(told, 1)
                try: os._exit(10 * r.buf[5 * H] + r.buf[6 * H])
                finally: os._exit(99)
            os.read(said, 1)
            """)
        for c in (creator, other):
            assert (touch(c, HUGE), touch(c, 2 * HUGE, store=True), touch(c, 2 * HUGE)) == (SIGBUS, SIGSEGV, 0)
        other.do("r.munmap(5 * H, 2 * H); r.mmap(2 * H, offset=5 * H); r.buf[5 * H] = 2; r.buf[6 * H] = 3")
        creator.do("os.write(tell, b'.')")
        assert creator.ask("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == 23

    def test_a_child_outlives_its_parent(self, creator: Client, attached: Start, eventually: Eventually) -> None:
        creator.do("told, tell = os.pipe(); said, say = os.pipe()")
        creator.do("""
            if os.fork() == 0:
                r.buf[50 * H] = 4; os.write(say, b'.'); signal.pause()
            os.read(said, 1)
            """)
        creator.kill()
        c = attached()
        eventually(lambda: c.ask("r.stat().attached") == 2)
        assert c.ask("(r.buf[50 * H], r.buf[0])") == [4, 1]


class TestDaemon:
    """What a daemon adds to the pool it takes away again, whoever it serves."""

    def test_the_pool_is_as_before_when_it_stops(self, start_daemon: Callable[..., Daemon]) -> None:
        need_memory(GIB)
        size = pool_size()
        daemon = start_daemon("--hugetlb-pool", "1G")
        assert pool_size() == size + 512
        assert daemon.stop() == 0
        assert pool_size() == size

    def test_pages_that_are_in_use_then_stay_for_the_next_one_and_leave_with_it(
        self, start_daemon: Callable[..., Daemon], client: Start, eventually: Eventually
    ) -> None:
        need_memory(GIB)
        size, was = pool_size(), pool()
        daemon = start_daemon("--hugetlb-pool", "1G")
        c = client(daemon)
        c.do("r = mshare.mshare('x', None, GIB, CREATE, backing='hugetlb'); r.buf[0] = 5")
        assert daemon.stop() == 0
        assert c.ask("(r.buf[0], r.buf[GIB - 1])") == [5, 0]
        daemon.restart()
        assert c.ask("(r.buf[0], r.stat().attached)") == [5, 1]
        c.kill()
        assert daemon.stop() == 0
        assert pool_size() == size
        eventually(lambda: pool() == was)

    def test_too_much_is_refused_and_nothing_changes(self, tmp_path: Path) -> None:
        size = pool_size()
        command = [sys.executable, "-m", "mshared", "--mount", str(tmp_path / "m"), "--state-dir", str(tmp_path / "s")]
        run = subprocess.run(
            [*command, "--hugetlb-pool", "900G"], capture_output=True, text=True, timeout=60, check=False
        )
        assert (run.returncode, "memory are free; ask for less" in run.stderr) == (1, True)
        assert pool_size() == size
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("hugetlb")
    def test_huge_pages_as_the_default(self, start_daemon: Callable[..., Daemon], client: Start, before: Pool) -> None:
        daemon = start_daemon("--backing", "hugetlb")
        lines = (daemon.mount / "mshare_info").read_text().splitlines()
        assert lines[0] == str(GIB)
        assert "backing hugetlb" in lines
        c = client(daemon)
        c.do("r = mshare.mshare('x', None, GIB, CREATE); r.buf[0] = 1")
        assert c.ask("(r.stat().backing, r.stat().tables_shared)") == ["hugetlb", True]
        assert pool() == before.with_region(mapped=512, touched=1)
        c.do("mshare.mshare_unlink('x')")

    def test_the_command_line_makes_such_regions(
        self, hugetlb: Daemon, before: Pool, attached: Start, name: str
    ) -> None:
        def mshare(*words: str) -> subprocess.CompletedProcess[str]:
            env = {**os.environ, "MSHAREFS": str(hugetlb.mount)}
            command = [str(Path(sys.executable).with_name("mshare")), *words]
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

        made = mshare("create", name, "--size", "1G", "--backing", "hugetlb")
        assert (made.returncode, made.stderr) == (0, "")
        assert pool() == before.with_region(mapped=512, touched=0)
        assert attached().ask("r.stat().backing") == "hugetlb"
        refused = mshare("create", "second", "--size", "512G", "--backing", "hugetlb")
        assert (refused.returncode != 0, "vm.nr_hugepages" in refused.stderr) == (True, True)

    @pytest.mark.usefixtures("hugetlb")
    def test_of_an_ordinary_user(
        self, start_daemon: Callable[..., Daemon], client: Start, before: Pool, eventually: Eventually
    ) -> None:
        """Its regions are memfds; the pool is root's to raise."""
        daemon = start_daemon(uid=NOBODY)
        a, b = client(daemon, uid=NOBODY), client(daemon, uid=NOBODY)
        a.do("H = 2 * MIB; r = mshare.mshare('x', None, GIB, CREATE, backing='hugetlb'); r.buf[H] = 3")
        b.do(f"H = 2 * MIB; r = mshare.mshare('x', {ELSEWHERE}, 0, RW); r.buf[2 * H] = 4")
        assert pool() == before.with_region(mapped=512, touched=2)
        assert a.ask("(r.buf[2 * H], r.stat().resident, r.stat().tables_shared)") == [4, 2 * HUGE, True]
        b.do("r.munmap(2 * H, 2 * H); r.mprotect(H, H, 1)")
        assert pool() == before.with_region(mapped=510, touched=1)
        for c in (a, b):
            assert (touch(c, 2 * HUGE), touch(c, HUGE, store=True), c.ask("r.buf[H]")) == (SIGBUS, SIGSEGV, 3)
        b.do("r.mprotect(H, H, 0); r.mprotect(H, H, 3); r.buf[H + 1] = 5")
        assert a.ask("list(r.buf[H : H + 2])") == [3, 5]
        assert a.error_of(f"r.mmap({MORE}, flags=0x31, offset=0)").errno == errno.EINVAL
        assert a.error_of(f"mshare.mshare('y', None, {MORE}, CREATE, backing='hugetlb')").errno == errno.ENOMEM
        a.do("r.detach()")
        b.do("mshare.mshare_unlink('x')")
        eventually(lambda: pool() == before)

    @pytest.mark.usefixtures("hugetlb")
    def test_mounts_of_regions_go_with_the_daemon_after_one_that_was_killed(
        self, start_daemon: Callable[..., Daemon], client: Start, before: Pool, eventually: Eventually
    ) -> None:
        dead = start_daemon()
        c = client(dead)
        c.do("r = mshare.mshare('x', None, GIB, CREATE, backing='hugetlb'); r.buf[0] = 1")
        assert any("/state/hugetlb/" in place for place in mounts_below(dead.directory))
        dead.kill()
        c.kill()
        options = ["--mount", str(dead.mount), "--state-dir", str(dead.state)]
        with subprocess.Popen([sys.executable, "-m", "mshared", *options], stderr=subprocess.PIPE) as again:
            assert again.stderr is not None
            while b"ready" not in again.stderr.readline():
                assert again.poll() is None
            again.terminate()
        assert mounts_below(dead.directory) == []
        eventually(lambda: pool() == before)

    def test_that_is_no_roots_cannot_raise_the_pool(self, directory: Path) -> None:
        os.chown(directory, NOBODY, NOBODY)
        with pytest.raises(RuntimeError, match=r"--hugetlb-pool: cannot write .*nr_hugepages: Permission denied.*root"):
            Daemon(directory, "--hugetlb-pool", "2M", uid=NOBODY)
