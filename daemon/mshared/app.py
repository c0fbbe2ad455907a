"""The daemon from start to stop: what it takes from the machine, in order, and gives back in the reverse order."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import logging
import os
import resource
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import attrs
import trio

from mshared import control, fs, hugetlb, mounts, uffd
from mshared.backing import BackingStore, MemfdStore, MountedStore
from mshared.changes import Changes
from mshared.lasting import lasting
from mshared.lifetimes import Lifetimes
from mshared.notify import keep_watchdog, notify
from mshared.pager import Pager
from mshared.relaxing import Relaxing
from mshared.reload import LogFile, reload_on_hangup
from mshared.service import Service
from mshared.sizes import keep_sizes
from mshared.stop_signals import StopSignals
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, WINDOW_END, WINDOW_START
from msharefs.errors import NoMemoryError
from msharefs.mountinfo import FSTYPE
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Ownership
from msharefs.region import BackingKind

log = logging.getLogger(__name__)

_LOCK: Final = "lock"
_MOUNT_PATIENCE: Final = 3.0
"""Seconds a mount that stands at our place may take to show that somebody serves it."""


class StartError(Exception):
    """The daemon cannot start; the message has the cure."""


@attrs.frozen
class Config:
    """What the command line says. ``backing`` None: what this machine and user can have; ``hugetlb_pool`` in bytes.

    ``writeback``: seconds until stores to files are written without being asked.
    """

    mount: Path
    state_dir: Path
    policy: Policy
    backing: BackingKind | None = None
    mode: int = 0o1777
    hugetlb_pool: int | None = None
    writeback: float = 30


def default_mount() -> Path:
    """Where a daemon of this user mounts, if nobody says otherwise."""
    return runtime_directory() / "mshare"


def default_state_dir(mount: Path) -> Path:
    """Where the daemon of ``mount`` keeps its socket and backing files."""
    return runtime_directory() / "mshared" / str(mount).strip("/").replace("/", "-")


def runtime_directory() -> Path:
    """Where this user's sockets and mounts belong: /run for root."""
    if os.geteuid() == 0:
        return Path("/run")
    found = os.environ.get("XDG_RUNTIME_DIR")
    if not found:
        raise StartError("XDG_RUNTIME_DIR is not set: log in with a session, or give --mount and --state-dir")
    return Path(found)


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, however many come. Raises StartError."""
    _raise_descriptor_limit()
    stop = StopSignals(hangup=sys.stderr.isatty())
    with contextlib.ExitStack() as stack:
        stack.enter_context(_directory(config.state_dir.parent))
        stack.enter_context(_directory(config.state_dir, ours=True))
        stack.enter_context(_lock(config.state_dir / _LOCK, config.mount))
        stack.enter_context(_directory(config.mount))
        _clear_stale(config)
        stack.enter_context(_hugetlb_pool(config))
        store = stack.enter_context(_store(config))
        device, features, notes = _userfaultfd()
        if device is not None:
            stack.callback(os.close, device)
        pager = Pager()
        stack.callback(pager.close)
        root = Ownership(os.geteuid(), os.getegid(), config.mode)
        lifetimes = Lifetimes(Namespace(root, config.policy), pager, features, device)
        stack.callback(_release, lifetimes)
        service = Service(
            lifetimes.namespace,
            lifetimes,
            store,
            default_backing=_default_backing(config, store),
            changes=Changes(lifetimes.read_events),
            notes=notes + store.notes,
        )
        listener = stack.enter_context(_listener(config.state_dir / "socket"))
        stack.enter_context(_mounted(fs.MshareFs(service, info_text(config, service)), config.mount))
        trio.run(_serve, config, service, pager, listener, stop)
    stop.ignore()


def info_text(config: Config, service: Service) -> str:
    """The file mshare_info: the alignment alone, then key value lines."""
    lines = {
        "version": version("msharefs"),
        "page_size": PAGE_SIZE,
        "backing": service.default_backing.value,
        "window": f"{WINDOW_START:#x}-{WINDOW_END:#x}",
        "socket": config.state_dir / "socket",
        "pid": os.getpid(),
    }
    align = max(config.policy.align, service.default_backing.align)
    return f"{align}\n" + "".join(f"{key} {value}\n" for key, value in lines.items())


async def _serve(config: Config, service: Service, pager: Pager, listener: object, stop: StopSignals) -> None:
    """All tasks, until a signal ends them."""
    device = mounts.mount_at(config.mount)
    if device is None or device.fstype != FSTYPE:
        raise StartError(f"{config.mount} was unmounted while starting")
    server = control.ControlServer(service, config.mount, device.device)
    gc.freeze()  # What is there by now stays: no collection need look at it, which would take milliseconds.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fuse_until_unmounted, nursery.cancel_scope)
        nursery.start_soon(server.serve, trio.socket.from_stdlib_socket(listener))  # type: ignore[arg-type]
        for task in _background(config, service, pager):
            nursery.start_soon(lasting, task)
        await _until_served(config.mount)
        status = f"serving {config.mount}"
        if not sys.stderr.isatty():  # else SIGHUP says that the terminal has gone.
            await nursery.start(reload_on_hangup, LogFile(), partial(_overview, service), status)
        sys.stderr.write(f"mshared: ready: mount {config.mount} backing {service.default_backing}\n")
        sys.stderr.flush()
        notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={status}")
        number = await stop.wait()
        log.info("%s: stopping", number.name)
        notify("STOPPING=1")
        _report_attached(service)
        await service.lifetimes.settling.flush_all(service.lifetimes.regions())  # While faults are served still.
        nursery.cancel_scope.cancel()


def _background(config: Config, service: Service, pager: Pager) -> list[Callable[[], Awaitable[None]]]:
    """What runs for as long as the daemon does, whatever goes wrong."""
    lifetimes = service.lifetimes
    return [
        pager.run,
        lifetimes.sweep_forever,
        lifetimes.forks.run,
        lifetimes.filling.run,
        lifetimes.settling.run,
        partial(lifetimes.settling.from_time_to_time, lifetimes.regions, config.writeback),
        keep_watchdog,
        partial(keep_sizes, lifetimes),
        service.snapshots.prepare,
        Relaxing(lifetimes).run,
    ]


async def _fuse_until_unmounted(scope: trio.CancelScope) -> None:
    """Serve FUSE; when somebody unmounts us there is nothing left to serve."""
    await fs.serve()
    log.warning("unmounted from outside: stopping")
    scope.cancel()


async def _until_served(mount: Path) -> None:
    """Wait until the mount answers, asked from a thread: our own loop is what must answer."""
    await trio.to_thread.run_sync(mount.stat)


def _overview(service: Service) -> str:
    """How much is served, in words."""
    service.lifetimes.sweep()
    return f"{len(service.lifetimes.regions())} regions, {service.lifetimes.attachment_count} attachments"


def _report_attached(service: Service) -> None:
    service.lifetimes.sweep()
    count = sum(live.model.process_count for live in service.lifetimes.regions())
    if count:
        log.warning("stopping with %d attachments: their memory stays theirs until they end, the names are gone", count)


def _release(lifetimes: Lifetimes) -> None:
    """Let go of every reference and region."""
    for region in lifetimes.regions():
        for attachment in list(region.attachments):
            lifetimes.drop(attachment)
        if region in lifetimes.regions():
            lifetimes.forget(region)
    lifetimes.settling.finish()


def _default_backing(config: Config, store: BackingStore) -> BackingKind:
    if config.backing is None:
        return store.kinds[0]
    if config.backing not in store.kinds:
        raise StartError(store.why_not(config.backing))
    return config.backing


def _userfaultfd() -> tuple[int | None, abi.Feature, tuple[str, ...]]:
    """The device to hand to clients if there is one, the features this kernel gives us, and what is amiss in words."""
    notes: tuple[str, ...] = ()
    try:
        device: int | None = os.open(uffd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        device = None
        note = f"no {uffd.DEVICE} ({error.strerror}): system calls on missing paged memory give EFAULT"
        notes = (note,)
        log.warning("%s", note)
    for features in (uffd.WANTED | uffd.OPTIONAL, uffd.WANTED | abi.Feature.EVENT_FORK, uffd.WANTED):
        if device is None and features & abi.Feature.EVENT_FORK:
            continue
        try:
            probe = uffd.new(device)
        except OSError as error:
            raise StartError(f"no userfaultfd: {error.strerror}; `mshare doctor` says what to do") from error
        try:
            probe.open_api(features)
        except OSError:
            continue
        else:
            return device, features, notes
        finally:
            probe.close()
    raise StartError("this kernel's userfaultfd cannot write-protect shared memory; Linux 6.1 or later is needed")


@contextlib.contextmanager
def _hugetlb_pool(config: Config) -> Iterator[None]:
    """Have the machine's pool of huge pages as much larger as was asked for."""
    note = config.state_dir / "hugetlb-pool"
    if not config.hugetlb_pool and not note.exists():
        yield
        return
    try:
        pool = hugetlb.Pool(config.hugetlb_pool or 0, note)
    except NoMemoryError as error:
        raise StartError(f"--hugetlb-pool: {error}") from error
    except OSError as error:
        raise StartError(f"--hugetlb-pool: cannot write {hugetlb.POOL}: {error.strerror}; it takes root") from error
    try:
        yield
    finally:
        pool.close()


@contextlib.contextmanager
def _store(config: Config) -> Iterator[BackingStore]:
    limit = config.policy.limits.max_bytes
    try:
        store: BackingStore = MountedStore(config.state_dir, limit) if os.geteuid() == 0 else MemfdStore()
    except OSError as error:
        raise StartError(f"cannot mount a tmpfs in {config.state_dir}: {error.strerror}") from error
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _listener(path: Path) -> Iterator[object]:
    try:
        path.unlink(missing_ok=True)
        sock = control.listen(path)
    except OSError as error:
        raise StartError(f"cannot listen at {path}: {error}; give another --state-dir, with a short path") from error
    try:
        yield sock
    finally:
        sock.close()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _mounted(tree: fs.MshareFs, mount: Path) -> Iterator[None]:
    try:
        fs.initialize(tree, mount, everybody=os.geteuid() == 0)
    except RuntimeError as error:
        raise StartError(f"cannot mount at {mount}: {error}; `mshare doctor` says what this machine lacks") from error
    try:
        yield
    finally:
        fs.shut_down()


@contextlib.contextmanager
def _directory(path: Path, *, ours: bool = False) -> Iterator[None]:
    """Have a directory; one that we made goes with us, if it is empty then. ``ours``: it is for our files alone."""
    try:
        path.mkdir(mode=0o755, parents=True)
        made = True
    except FileExistsError:
        made = ours and (path / _LOCK).exists()  # Left by a daemon that was killed.
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise StartError(f"cannot make {path}: {error.strerror}") from error
        made = True  # A dead mount stands there.
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _lock(path: Path, mount: Path) -> Iterator[None]:
    """Be the only daemon of this mount; the lock goes with the process, however it ends."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            text = f"cannot use {path.parent}: {error.strerror}; give --state-dir a directory of this user"
            raise StartError(text) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StartError(f"another mshared serves {mount}; `mshare down` stops it") from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)  # The daemon before us took the file away while we waited for it.
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _clear_stale(config: Config) -> None:
    """Take away what a daemon that was killed left mounted. Preconditions: we hold the lock."""
    for kind in BackingKind:
        place = config.state_dir / kind
        while mounts.mount_at(place) is not None:
            log.warning("taking away %s, left by a daemon that was killed", place)
            mounts.unmount(place)
    found = mounts.mount_at(config.mount)
    if found is None:
        return
    if found.fstype != FSTYPE:
        log.info("mounting over the %s at %s", found.fstype, config.mount)
        return
    if _is_served(config.mount):
        raise StartError(f"another mshared serves {config.mount}; `mshare down` stops it")
    log.warning("replacing the mount at %s, left by a daemon that was killed", config.mount)
    mounts.unmount(config.mount)


def _is_served(mount: Path) -> bool:
    """Whether a mount answers at all. One that hangs counts: somebody must look at it."""
    dead = threading.Event()

    def ask() -> None:
        try:
            mount.stat()
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                dead.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_MOUNT_PATIENCE)
    return not dead.is_set()


def _raise_descriptor_limit() -> None:
    """Each attachment takes three descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
