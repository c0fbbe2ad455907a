"""Clients in containers: in mount, pid and user namespaces of their own."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
EVIL, GOOD = 65534, 1
SIGBUS, SIGSEGV = 7, 11
UNSHARE = """
libc = ctypes.CDLL(None, use_errno=True)
def unshare(flags):
    if libc.unshare(flags): raise OSError(ctypes.get_errno(), 'unshare')
"""
NEWNS, NEWUSER, NEWPID = 0x20000, 0x1000_0000, 0x2000_0000


@pytest.fixture
def c(client: Callable[..., Client]) -> Client:
    found = client()
    found.do(UNSHARE)
    return found


@pytest.fixture
def outside(client: Callable[..., Client], name: str) -> Client:
    """Somebody outside who has made the region, with a hole and a page that may only be read."""
    found = client()
    found.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE, 0o666); r.buf[0] = 1")
    found.do("r.munmap(PAGE, PAGE); r.mprotect(2 * PAGE, PAGE, mmap.PROT_READ)")
    return found


class TestMountNamespace:
    """The mount and the socket are bound into it, and nothing else of the daemon's."""

    @pytest.fixture
    def inside(self, daemon: Daemon, c: Client) -> Iterator[Client]:
        """A process where the daemon's directory has only these two, each at its own path."""
        c.do(f"""
            unshare({NEWNS})
            def run(*words): subprocess.run(list(map(str, words)), check=True)
            place = Path({str(daemon.directory)!r})
            run('mount', '--make-rprivate', '/')
            run('mount', '-t', 'tmpfs', 'tmpfs', '/mnt'); os.mkdir('/mnt/mount'); open('/mnt/socket', 'w').close()
            run('mount', '--bind', place / 'mount', '/mnt/mount')
            run('mount', '--bind', place / 'state/socket', '/mnt/socket')
            run('mount', '-t', 'tmpfs', 'tmpfs', place); (place / 'mount').mkdir(); (place / 'state').mkdir()
            (place / 'state/socket').touch()
            run('mount', '--move', '/mnt/mount', place / 'mount')
            run('mount', '--bind', '/mnt/socket', place / 'state/socket')
            """)
        assert c.ask("sorted(os.listdir(place))") == ["mount", "state"]
        return c

    def test_all_is_as_outside(self, inside: Client, outside: Client, name: str) -> None:
        inside.do(f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW); r.buf[1] = 2")
        assert outside.ask("(r.buf[1], r.stat().attached)") == [2, 2]
        assert inside.ask("fork('r.buf[PAGE]')") == -SIGBUS
        assert inside.ask("fork('r.buf[2 * PAGE] = 1')") == -SIGSEGV
        outside.do("r.mmap(PAGE, offset=PAGE, flags=0x31); r.buf[PAGE] = 9")
        assert inside.ask("r.buf[PAGE]") == 9

    def test_its_files_can_be_mapped_for_everybody(self, inside: Client, outside: Client, name: str) -> None:
        """Files that only it can name: a descriptor is all that the daemon needs."""
        inside.do("open('/mnt/own', 'wb').write(b'own' * 5000); own = os.open('/mnt/own', RW)")
        inside.do(
            f"r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW); r.mmap(PAGE, offset=PAGE, fd=own, flags=0x11)"
        )
        assert outside.ask("bytes(r.buf[PAGE : PAGE + 3]).decode()") == "own"
        outside.do("r.buf[PAGE] = 79; r.msync()")
        assert inside.ask("open('/mnt/own', 'rb').read(3).decode()") == "Own"


class TestPidNamespace:
    """What it calls 1 is another process outside."""

    def test_signals_reach_the_thread_that_touched(self, c: Client, outside: Client, name: str) -> None:
        """Of several threads, in a process that has another pid there, and threads that have other ids."""
        c.do(f"unshare({NEWPID})")
        code = f"""
assert os.getpid() == 1
r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)
r.buf[3] = 4
report_faults()
for _ in range(5): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
touch = threading.Thread(target=lambda: r.buf[PAGE + 5]); touch.start(); touch.join()
"""
        assert c.ask(f"fork({code!r})") == 100 + SIGBUS
        assert outside.ask("r.buf[3]") == 4
        c.kill()
        assert f"SIGNAL {SIGBUS} {0x6000_0000_1005:x}" in c.stderr()

    def test_deaths_and_forks_are_seen(
        self, c: Client, outside: Client, name: str, eventually: Callable[[Callable[[], bool]], None]
    ) -> None:
        c.do(f"unshare({NEWPID})")
        code = f"""
r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)
assert fork('assert r.stat().attached == 3; r.buf[5] = 6') == 0
assert fork('r.buf[2 * PAGE] = 1') == -{SIGSEGV}
assert r.stat().attached == 2
"""
        assert c.ask(f"fork({code!r})") == 0
        assert outside.ask("r.buf[5]") == 6
        eventually(lambda: outside.ask("r.stat().attached") == 1)

    def test_nobody_else_is_taken_for_a_child_whose_thread_has_the_same_number(
        self, c: Client, outside: Client, daemon: Daemon, name: str
    ) -> None:
        """Children are born with the number that a process outside has, and touch what they may not at once."""
        c.do(f"unshare({NEWPID})")
        bystander = outside.pid
        code = f"""
r = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RW)
for n in range(20):
    open('/proc/sys/kernel/ns_last_pid', 'w').write('{bystander - 1}')
    pid = os.fork()
    if pid == 0:
        if n % 2: r.buf[PAGE]
        r.buf[2 * PAGE] = 1
    assert pid == {bystander}
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (-{SIGBUS}, -{SIGSEGV})
"""
        assert c.ask(f"fork({code!r})") == 0
        assert outside.is_alive()
        assert outside.ask("r.buf[0]") == 1
        assert f"for thread {bystander} " not in daemon.log()


class TestUserNamespace:
    """Whoever is mapped to root there is who it was here."""

    @pytest.fixture
    def mapped_root(self, c: Client) -> Client:
        c.do(f"""
            drop({EVIL}); unshare({NEWUSER})
            open('/proc/self/setgroups', 'w').write('deny')
            open('/proc/self/uid_map', 'w').write('0 {EVIL} 1'); open('/proc/self/gid_map', 'w').write('0 {EVIL} 1')
            """)
        assert c.ask("(os.getuid(), os.geteuid(), os.getgid())") == [0, 0, 0]
        return c

    def test_root_there_has_no_power_here(self, mapped_root: Client, client: Callable[..., Client], name: str) -> None:
        owner = client(uid=GOOD)
        owner.do(f"r = mshare.mshare({name!r}, None, 2 * MIB, CREATE, 0o644); r.buf[0] = 7; r.detach()")
        assert mapped_root.error_of(f"mshare.mshare_unlink({name!r})").errno == errno.EACCES
        mapped_root.do(f"reader = mshare.mshare({name!r}, 0x6000_0000_0000, 0, RO)")
        for attempt, number in (
            (f"mshare.mshare({name!r}, None, 0, RW)", errno.EACCES),
            (f"mshare.remove({name!r})", errno.EPERM),
            (f"os.chmod(find_mount() / {name!r}, 0o666)", errno.EPERM),
            (f"os.chown(find_mount() / {name!r}, 0, 0)", errno.EPERM),
            (f"reader.fork('{name}-twin')", errno.EACCES),
            (f"os.unlink(find_mount() / {name!r})", errno.EPERM),
        ):
            assert mapped_root.error_of(attempt).errno == number, attempt
        assert mapped_root.ask("reader.buf[0]") == 7
        mapped_root.do("reader.detach()")
        owner.do(f"os.chmod(find_mount() / {name!r}, 0o600)")
        assert mapped_root.error_of(f"mshare.mshare({name!r}, None, 0, RO)").errno == errno.EACCES

    def test_its_own_regions_are_its_own(
        self, mapped_root: Client, client: Callable[..., Client], daemon: Daemon, name: str
    ) -> None:
        mapped_root.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE, 0o600); r.buf[0] = 1; r.munmap(PAGE, PAGE)")
        assert (daemon.mount / name).stat().st_uid == EVIL
        assert mapped_root.ask("(fork('r.buf[PAGE]'), fork('assert r.stat().attached == 2'))") == [-SIGBUS, 0]
        assert client(uid=GOOD).error_of(f"mshare.mshare({name!r}, None, 0, RO)").errno == errno.EACCES
        mapped_root.do(f"r.fork('{name}-twin'); mshare.mshare_unlink({name!r}); mshare.remove('{name}-twin')")
