"""The daemon from start to stop: what it takes from the machine, in order, and gives back in the reverse order."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import attrs
import trio

from mshared import control, fs, fuse_loop, hugetlb, journal, keeper, mounts, places, recovery, uffd
from mshared.backing import BackingStore, MemfdStore, MountedStore
from mshared.book import Book
from mshared.changes import Changes
from mshared.journal import State, StateError
from mshared.lasting import lasting
from mshared.lifetimes import Lifetimes
from mshared.notify import keep_watchdog, notify
from mshared.pager import Pager
from mshared.places import Fate, StartError
from mshared.relaxing import Relaxing
from mshared.reload import LogFile, reload_on_hangup
from mshared.saved import Saved
from mshared.service import Service
from mshared.sizes import keep_sizes
from mshared.stop_signals import StopSignals
from mshared.upkeep import Upkeep
from msharefs import uffd_abi as abi
from msharefs.addr import PAGE_SIZE, WINDOW_END, WINDOW_START
from msharefs.errors import NoMemoryError
from msharefs.mountinfo import FSTYPE
from msharefs.namespace import Namespace, Policy
from msharefs.perms import Ownership
from msharefs.region import BackingKind

log = logging.getLogger(__name__)


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
    fate = Fate()
    with contextlib.ExitStack() as stack:
        made = places.Made(config.state_dir / places.NOTE)
        stack.enter_context(made.directory(config.state_dir.parent))
        stack.enter_context(made.directory(config.state_dir, ours=True))
        lock = stack.enter_context(places.lock(config.state_dir / places.LOCK, config.mount, fate))
        stack.enter_context(made.directory(config.mount))
        stack.enter_context(made.noted(fate))
        fate.keep = (config.state_dir / journal.NAME).exists()
        before = _state_before(config)
        fate.keep = before is not None
        places.clear_stale(config.mount, config.state_dir, memory=before is None)
        stack.enter_context(_hugetlb_pool(config, fate))
        store = stack.enter_context(_store(config, fate))
        device, features, notes = _userfaultfd()
        if device is not None:
            stack.callback(os.close, device)
        pager = Pager()
        stack.callback(pager.close)
        root = Ownership(os.geteuid(), os.getegid(), config.mode)
        book = Book(journal.Journal(config.state_dir / journal.NAME))
        lifetimes = Lifetimes(Namespace(root, config.policy), pager, features, device, book)
        service = Service(
            lifetimes.namespace,
            lifetimes,
            store,
            default_backing=_default_backing(config, store),
            changes=Changes(lifetimes.read_events),
            notes=notes + store.notes,
        )
        upkeep = stack.enter_context(_kept(service, config, lock, fate))
        _go_on(before, service, store, upkeep, config)
        listener = stack.enter_context(_listener(config.state_dir / "socket"))
        stack.enter_context(_mounted(fs.MshareFs(service, info_text(config, service)), config.mount, pager))
        fate.keep = True  # Whatever ends it now, the next one goes on.
        trio.run(_serve, config, service, pager, upkeep, listener, stop)
        fate.keep = _report_attached(service)
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


def _state_before(config: Config) -> State | None:
    """What a daemon before this one has written down and was not at its end with."""
    path = config.state_dir / journal.NAME
    try:
        found = journal.load(path)
    except StateError as error:
        raise StartError(str(error)) from None
    if found is not None and found.boot != journal.boot_id():
        log.warning("%s is from before the machine was started: nothing of what it tells is there any more", path)
        path.unlink()
        return None
    return found


@contextlib.contextmanager
def _kept(service: Service, config: Config, lock: int, fate: Fate) -> Iterator[Upkeep]:
    """Have a keeper; what there is goes at the end, or stays with the keeper."""
    for old in config.state_dir.glob("keeper-*") if not fate.keep else ():
        old.unlink()
    upkeep = Upkeep(service, config.state_dir, lock)
    try:
        yield upkeep
    finally:
        if not fate.keep:
            _release(service.lifetimes)
            upkeep.end()
        elif not service.book.regions:
            upkeep.keeper.end()


def _go_on(before: State | None, service: Service, store: BackingStore, upkeep: Upkeep, config: Config) -> None:
    """Go on where the daemon before has ended, if there was one. Raises StartError with its state as it was."""
    if before is None:
        upkeep.write_all()
        return
    try:
        saved = Saved.of(before.records)
    except Exception as error:
        raise StartError(str(journal.unusable(config.state_dir / journal.NAME, f"is corrupt ({error})"))) from error
    predecessor = keeper.ask(config.state_dir, before.keeper)
    if predecessor is None:
        log.warning("no keeper is left of the daemon before; what only it had is lost")
    going_on = recovery.Recovery(saved, predecessor.fds if predecessor else {}, service, store)
    going_on.restore()
    upkeep.write_all()
    if predecessor is not None:
        predecessor.release()
    for old in config.state_dir.glob("keeper-*"):
        if old.name != upkeep.keeper.name:
            old.unlink()
    try:
        going_on.carry_on()
    except OSError as error:
        raise StartError(f"no memory to go on with what was under way ({error}); free some and start again") from error
    count = service.lifetimes.attachment_count
    log.info("going on with %d regions and %d attachments", len(service.lifetimes.regions()), count)


async def _serve(
    config: Config, service: Service, pager: Pager, upkeep: Upkeep, listener: object, stop: StopSignals
) -> None:
    """All tasks, until a signal ends them."""
    device = mounts.mount_at(config.mount)
    if device is None or device.fstype != FSTYPE:
        raise StartError(f"{config.mount} was unmounted while starting")
    server = control.ControlServer(service, pager, config.mount, device.device)
    gc.freeze()  # What is there by now stays: no collection need look at it, which would take milliseconds.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fuse_until_unmounted, nursery.cancel_scope)
        nursery.start_soon(server.serve, trio.socket.from_stdlib_socket(listener))  # type: ignore[arg-type]
        for task in _background(config, service, pager, upkeep):
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
        await service.lifetimes.settling.flush_all(service.lifetimes.regions())  # While faults are served still.
        nursery.cancel_scope.cancel()


def _background(config: Config, service: Service, pager: Pager, upkeep: Upkeep) -> list[Callable[[], Awaitable[None]]]:
    """What runs for as long as the daemon does, whatever goes wrong."""
    lifetimes = service.lifetimes
    return [
        pager.run,
        lifetimes.sweep_forever,
        lifetimes.forks.run,
        lifetimes.faults.filling.run,
        lifetimes.settling.run,
        partial(lifetimes.settling.from_time_to_time, lifetimes.regions, config.writeback),
        keep_watchdog,
        partial(keep_sizes, lifetimes),
        service.snapshots.prepare,
        Relaxing(lifetimes).run,
        upkeep.watch_journal,
        upkeep.watch_keeper,
        upkeep.watch_the_dead,
    ]


async def _fuse_until_unmounted(scope: trio.CancelScope) -> None:
    """Serve FUSE; when somebody unmounts us there is nothing left to serve."""
    await fuse_loop.serve()
    log.warning("unmounted from outside: stopping")
    scope.cancel()


async def _until_served(mount: Path) -> None:
    """Wait until the mount answers, asked from a thread: our own loop is what must answer."""
    await trio.to_thread.run_sync(mount.stat)


def _overview(service: Service) -> str:
    """How much is served, in words."""
    service.lifetimes.sweep()
    return f"{len(service.lifetimes.regions())} regions, {service.lifetimes.attachment_count} attachments"


def _report_attached(service: Service) -> bool:
    """Say so if anybody is attached, and whether."""
    service.lifetimes.sweep()
    count = sum(live.model.process_count for live in service.lifetimes.regions())
    if count:
        log.warning(
            "stopping with %d attachments: all regions are kept for the next mshared with this --mount and --state-dir;"
            " until then nobody can attach, and touches that it would have to see to wait",
            count,
        )
    return bool(count)


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
def _hugetlb_pool(config: Config, fate: Fate) -> Iterator[None]:
    """Have the machine's pool of huge pages as much larger as was asked for."""
    note = config.state_dir / "hugetlb-pool"
    if not config.hugetlb_pool and not note.exists():
        yield
        return
    try:
        pool = hugetlb.Pool(config.hugetlb_pool or 0, note, in_use=fate.keep)
    except NoMemoryError as error:
        raise StartError(f"--hugetlb-pool: {error}") from error
    except OSError as error:
        raise StartError(f"--hugetlb-pool: cannot write {hugetlb.POOL}: {error.strerror}; it takes root") from error
    try:
        yield
    finally:
        if not fate.keep:
            pool.close()


@contextlib.contextmanager
def _store(config: Config, fate: Fate) -> Iterator[BackingStore]:
    limit = config.policy.limits.max_bytes
    try:
        store: BackingStore = MountedStore(config.state_dir, limit) if os.geteuid() == 0 else MemfdStore()
    except OSError as error:
        raise StartError(f"cannot mount a tmpfs in {config.state_dir}: {error.strerror}") from error
    try:
        yield store
    finally:
        if not fate.keep:
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
def _mounted(tree: fs.MshareFs, mount: Path, pager: Pager) -> Iterator[None]:
    """Have the mount. Who asks something of it is not to wait for the pager either."""
    try:
        connections = fuse_loop.initialize(tree, mount, everybody=os.geteuid() == 0)
    except RuntimeError as error:
        raise StartError(f"cannot mount at {mount}: {error}; `mshare doctor` says what this machine lacks") from error
    for fd in connections:
        pager.add_caller(fd)
    try:
        yield
    finally:
        for fd in connections:
            pager.remove_caller(fd)
        fuse_loop.shut_down()


def _raise_descriptor_limit() -> None:
    """Each attachment takes three descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
