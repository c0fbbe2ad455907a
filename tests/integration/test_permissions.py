"""Who may do what, across real users: an owner, a member of its group, somebody else, and root.

The expected answers are those that a file's mode gives (path_resolution(7)), and of a sticky directory (unlink(2)).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from conftest import Client, Daemon

MIB = 1 << 20
OWNER, MEMBER, OTHER, ROOT = 65534, 2, 1, 0
USERS = {"owner": OWNER, "member": MEMBER, "other": OTHER, "root": ROOT}
ELSEWHERE = 0x6000_0000_0000

ATTEMPTS = {
    "open ro": "mshare.mshare(N, 0x6000_0000_0000, 0, RO).detach()",
    "open rw": "mshare.mshare(N, 0x6000_0000_0000, 0, RW).detach()",
    "map": "via(RW, lambda w: w.mmap(PAGE, offset=0, flags=0x31))",
    "map ro": "via(RO, lambda w: w.mmap(PAGE, offset=0, flags=0x31))",
    "unmap": "via(RW, lambda w: w.munmap(2 * MIB, PAGE))",
    "protect": "via(RW, lambda w: w.mprotect(0, PAGE, mmap.PROT_READ | mmap.PROT_WRITE))",
    "protect ro": "via(RO, lambda w: w.mprotect(0, PAGE, 3))",
    "advise ro": "via(RO, lambda w: w.madvise(0, PAGE, mmap.MADV_REMOVE))",
    "fork": "via(RW, lambda w: w.fork(f'{N}-{os.getuid()}'))",
    "fork ro": "via(RO, lambda w: w.fork(f'{N}-{os.getuid()}-ro'))",
    "store ro": "via(RO, lambda w: w.buf.__setitem__(0, 1))",
    "see": "(find_mount() / '.regions' / N / 'maps').read_text()",
    "list": "os.listdir(find_mount() / '.regions' / N)",
    "read": "(find_mount() / N).read_bytes()",
    "stat": "(find_mount() / N).stat()",
    "chmod": "os.chmod(find_mount() / N, MODE)",
    "give away": "os.chown(find_mount() / N, OTHER, -1)",
    "unlink": "mshare.mshare_unlink(N)",
    "remove": "mshare.remove(N)",
    "rm": "os.unlink(find_mount() / N)",
    "create again": "mshare.mshare(N, None, 4 * MIB, CREATE)",
}
ENDS = {"unlink", "remove"}


def expected(who: str, mode: int) -> dict[str, int]:
    """The errno of each attempt, 0 where it works."""
    shift = {"owner": 6, "member": 3, "other": 0, "root": 6}[who]
    root, mine = who == "root", who in ("owner", "root")
    r, w = root or bool(mode >> shift & 4), root or bool(mode >> shift & 2)
    read = 0 if r else errno.EACCES
    both = 0 if r and w else errno.EACCES
    attached = read or errno.EACCES
    return {
        "open ro": read,
        "open rw": both,
        **dict.fromkeys(("map", "unmap", "protect", "fork"), both),
        **dict.fromkeys(("map ro", "protect ro", "advise ro"), attached),
        "fork ro": read or (0 if mine else errno.EACCES),
        "store ro": read or -1,
        **dict.fromkeys(("see", "list", "read"), read),
        "stat": 0,
        "chmod": 0 if mine else errno.EPERM,
        "give away": 0 if root else errno.EPERM,
        "unlink": both,
        "remove": 0 if mine else errno.EPERM,
        "rm": errno.EPERM,
        "create again": errno.EEXIST,
    }


@pytest.fixture(scope="module")
def users(daemon: Daemon) -> Iterator[dict[str, Client]]:
    """A process of each."""
    found = {who: Client(daemon.mount) for who in USERS}
    for who, c in found.items():
        if who != "root":
            c.do(f"drop({USERS[who]}, [{OWNER}] if {who!r} == 'member' else [])")
        c.do(f"""
            OTHER = {OTHER}
            def via(flags, work):
                with mshare.mshare(N, {ELSEWHERE}, 0, flags) as window: work(window)
            def attempt(code):
                try: eval(code, globals())
                except OSError as error: return error.errno
                except TypeError: return -1  # The buffer of a read-only window.
                return 0
            """)
    yield found
    for c in found.values():
        c.close()


@pytest.mark.parametrize("who", USERS)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o644, 0o666, 0o604, 0o606, 0o400, 0o000], ids=oct)
def test_a_region(users: dict[str, Client], name: str, who: str, mode: int) -> None:
    """All that can be tried, by one user, on a region of that mode that nobody is attached to."""
    owner, root, c = users["owner"], users["root"], users[who]
    owner.do(f"os.umask(0); mshare.mshare({name!r}, None, 4 * MIB, CREATE, {mode}).detach()")
    c.do(f"N, MODE = {name!r}, {mode}")
    found: dict[str, int] = {}
    for what, code in ATTEMPTS.items():
        found[what] = c.ask(f"attempt({code!r})")
        if what in ENDS and not found[what]:
            owner.do(f"mshare.mshare({name!r}, None, 4 * MIB, CREATE, {mode}).detach()")
        elif what == "give away" and not found[what]:
            root.do(f"os.chown(find_mount() / {name!r}, {OWNER}, -1)")
    root.do(f"[mshare.remove(n) for n in os.listdir(find_mount()) if n.startswith({name!r})]")
    assert found == expected(who, mode)


@pytest.mark.parametrize("who", USERS)
def test_a_region_that_others_are_attached_to(users: dict[str, Client], name: str, who: str) -> None:
    """Not even root ends it under them by unlink, and remove takes its name alone."""
    owner, c = users["owner"], users[who]
    owner.do(f"r = mshare.mshare({name!r}, None, 4 * MIB, CREATE, 0o666); r.buf[0] = 5")
    c.do(f"N = {name!r}")
    assert c.ask("attempt('mshare.mshare_unlink(N)')") == (0 if who == "owner" else errno.EBUSY)
    if who != "owner":
        assert c.ask("attempt('mshare.remove(N)')") == (0 if who == "root" else errno.EPERM)
        assert owner.ask("r.buf[0]") == 5
        owner.do("r.detach()")
        users["root"].do(f"if os.path.exists(find_mount() / {name!r}): mshare.remove({name!r})")


@pytest.mark.parametrize("who", USERS)
def test_what_was_opened_stays_open_whatever_chmod_does(users: dict[str, Client], name: str, who: str) -> None:
    """As with any file: the mode is asked when it is opened, and the answer is for the descriptor."""
    owner, c = users["owner"], users[who]
    owner.do(f"os.umask(0); mshare.mshare({name!r}, None, 4 * MIB, CREATE, 0o666).detach()")
    c.do(f"r = mshare.mshare({name!r}, {ELSEWHERE}, 0, RW); ticket = os.open(find_mount() / {name!r}, RW)")
    owner.do(f"os.chmod(find_mount() / {name!r}, 0)")
    c.do("r.buf[0] = 1; r.mprotect(0, PAGE, 3)")
    assert c.ask("type(connect(find_mount()).call(protocol.GetStat(), object, (ticket,))).__name__") == "RegionStat"
    c.do("r.detach(); os.close(ticket)")
    users["root"].do(f"mshare.remove({name!r})")


@pytest.mark.parametrize(
    ("mode", "may"),
    [("755", {"root"}), ("775", {"root"}), ("1777", {"owner", "member", "other", "root"}), ("777", set(USERS))],
)
def test_who_may_create(start_daemon: Callable[..., Daemon], mode: str, may: set[str]) -> None:
    """Whoever may write the mount's root; and where it is not sticky, whoever may create may remove, too."""
    daemon = start_daemon("--mode", mode)
    for who, uid in USERS.items():
        c = Client(daemon.mount, uid or None)
        try:
            for code in (f"mshare.mshare({who!r}, None, 2 * MIB, CREATE).detach()",):
                if who in may:
                    c.do(code)
                else:
                    assert c.error_of(code).errno == errno.EACCES
        finally:
            c.close()
    if mode == "777":
        c = Client(daemon.mount, OTHER)
        c.do("mshare.remove('root')")
        c.close()
