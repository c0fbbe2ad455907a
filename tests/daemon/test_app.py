"""What the daemon takes from the machine when it starts, piece by piece, and gives back."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed: scripts/setup installs it")

from mshared import app, mounts, uffd
from mshared.app import Config
from mshared.backing import MemfdStore
from mshared.places import Fate, StartError
from msharefs import uffd_abi as abi
from msharefs.namespace import Limits, Policy
from msharefs.region import BackingKind, RegionId


@pytest.fixture
def config(directory: Path) -> Config:
    return Config(directory / "mount", directory / "state", Policy())


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)


class TestPlaces:
    """Where things are when nobody says where."""

    def test_of_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        as_user(monkeypatch, 0)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
        assert app.default_mount() == Path("/run/mshare")
        assert app.default_state_dir(Path("/run/mshare")) == Path("/run/mshared/run-mshare")

    def test_of_a_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        as_user(monkeypatch, 1000)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
        assert app.default_mount() == Path("/run/user/1000/mshare")
        assert app.default_state_dir(Path("/home/me/m")) == Path("/run/user/1000/mshared/home-me-m")

    @pytest.mark.parametrize("value", [None, ""])
    def test_of_a_user_without_a_session(self, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        as_user(monkeypatch, 1000)
        if value is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        with pytest.raises(StartError, match="give --mount and --state-dir"):
            app.default_mount()


def test_what_the_mount_says_of_itself(config: Config) -> None:
    service: Any = SimpleNamespace(default_backing=BackingKind.THP)
    first, *lines = app.info_text(config, service).splitlines()
    assert first == str(2 << 20)
    fields = dict(line.split(" ", 1) for line in lines)
    assert fields.keys() == {"version", "page_size", "backing", "window", "socket", "pid"}
    assert fields["page_size"] == "4096"
    assert fields["backing"] == "thp"
    assert fields["window"] == f"{32 << 40:#x}-{64 << 40:#x}"
    assert fields["socket"] == str(config.state_dir / "socket")
    assert fields["pid"] == str(os.getpid())


class TestListener:
    """The socket's file."""

    def test_it_comes_and_goes(self, directory: Path) -> None:
        path = directory / "socket"
        with app._listener(path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(path))
        assert not path.exists()

    def test_one_that_was_left_is_replaced(self, directory: Path) -> None:
        path = directory / "socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(path))
        with app._listener(path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(path))

    def test_a_path_that_no_socket_can_have_is_told_with_the_cure(
        self, directory: Path, open_descriptors: Callable[[], int]
    ) -> None:
        before = open_descriptors()
        with pytest.raises(StartError, match="--state-dir"), app._listener(directory / ("x" * 120) / "socket"):
            pass
        assert open_descriptors() == before


class TestStore:
    """Where regions get their memory."""

    def test_a_user_has_memfds(self, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
        as_user(monkeypatch, 1000)
        with app._store(config, Fate()) as store:
            assert isinstance(store, MemfdStore)

    @pytest.mark.usefixtures("as_root")
    def test_root_has_mounts_of_the_size_allowed(self, directory: Path) -> None:
        (directory / "state").mkdir()
        config = Config(directory / "mount", directory / "state", Policy(limits=Limits(max_bytes=8 << 20)))
        with app._store(config, Fate()) as store:
            assert store.capacity()[0] == 8 << 20
        assert list((directory / "state").iterdir()) == []

    def test_where_mounting_is_not_allowed_it_says_so(self, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
        def refuse(*_args: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        as_user(monkeypatch, 0)
        config.state_dir.mkdir()
        monkeypatch.setattr(mounts, "mount_tmpfs", refuse)
        message = r"cannot mount a tmpfs .* Operation not permitted"
        with pytest.raises(StartError, match=message), app._store(config, Fate()):
            pass

    @pytest.mark.usefixtures("as_root")
    def test_what_is_to_be_kept_stays_mounted_and_is_taken_over(self, directory: Path) -> None:
        (directory / "state").mkdir()
        config = Config(directory / "mount", directory / "state", Policy())
        with app._store(config, Fate(keep=True)) as store:
            backing = store.create(RegionId(7), BackingKind.SMALL, 4096)
            os.pwrite(backing.fd, b"kept", 0)
            for fd in {backing.fd, backing.writable, backing.readonly}:
                os.close(fd)
        with app._store(config, Fate()) as store:
            assert backing.path is not None
            again = store.reopen(backing.path, BackingKind.SMALL, None)
            assert os.pread(again.readonly, 4, 0) == b"kept"
            store.sweep([backing.path])
            assert backing.path.exists()
            store.sweep([])
            assert not backing.path.exists()
            again.close()
            with pytest.raises(FileNotFoundError):
                store.reopen(backing.path, BackingKind.SMALL, None)
        assert list((directory / "state").iterdir()) == []

    def test_the_default_is_the_first_that_there_is(self, config: Config) -> None:
        assert app._default_backing(config, MemfdStore()) is BackingKind.SMALL

    def test_what_was_asked_for_is_had_or_refused(self, config: Config) -> None:
        small = Config(config.mount, config.state_dir, config.policy, BackingKind.SMALL)
        assert app._default_backing(small, MemfdStore()) is BackingKind.SMALL
        huge = Config(config.mount, config.state_dir, config.policy, BackingKind.THP)
        with pytest.raises(StartError, match="start mshared as root"):
            app._default_backing(huge, MemfdStore())


class TestUserfaultfd:
    """What this kernel and this user give."""

    class Kernel:
        """A userfaultfd that knows certain features only."""

        def __init__(self, known: abi.Feature) -> None:
            self.known = known
            self.closed = 0
            self.devices: list[int | None] = []

        def new(self, device: int | None) -> Any:
            self.devices.append(device)
            return SimpleNamespace(open_api=self.open_api, close=self.close)

        def open_api(self, features: abi.Feature) -> None:
            if features & ~self.known:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        def close(self) -> None:
            self.closed += 1

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
        """Stands in for /dev/userfaultfd."""
        path = directory / "userfaultfd"
        path.touch()
        monkeypatch.setattr(uffd, "DEVICE", str(path))
        return path

    def found(self, monkeypatch: pytest.MonkeyPatch, known: abi.Feature) -> tuple[Any, abi.Feature, tuple[str, ...]]:
        kernel = self.Kernel(known)
        monkeypatch.setattr(uffd, "new", kernel.new)
        device, features, notes = app._userfaultfd()
        if device is not None:
            os.close(device)
        assert kernel.closed == len(kernel.devices)
        assert set(kernel.devices) == {device}
        return device, features, notes

    @pytest.mark.parametrize("lacking", [abi.Feature(0), abi.Feature.POISON, uffd.OPTIONAL])
    @pytest.mark.usefixtures("device")
    def test_the_most_that_there_is(self, monkeypatch: pytest.MonkeyPatch, lacking: abi.Feature) -> None:
        everything = uffd.WANTED | uffd.OPTIONAL
        device, features, notes = self.found(monkeypatch, everything & ~lacking)
        assert features == everything & ~lacking
        assert device is not None
        assert notes == ()

    def test_without_the_device_no_fork_is_reported_and_a_note_says_what_else(
        self, monkeypatch: pytest.MonkeyPatch, device: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        device.unlink()
        found, features, (note,) = self.found(monkeypatch, uffd.WANTED | uffd.OPTIONAL)
        assert found is None
        assert not features & abi.Feature.EVENT_FORK
        assert "system calls on missing paged memory give EFAULT" in note
        assert note in caplog.text

    @pytest.mark.usefixtures("device")
    def test_an_old_kernel_is_told_from_one_that_forbids(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(StartError, match=r"Linux 6\.1 or later is needed"):
            self.found(monkeypatch, uffd.WANTED & ~abi.Feature.WP_HUGETLBFS_SHMEM)

        def forbidden(_device: int | None) -> Any:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(uffd, "new", forbidden)
        with pytest.raises(StartError, match="no userfaultfd: Operation not permitted; `mshare doctor`"):
            app._userfaultfd()

    def test_this_machine_has_one(self) -> None:
        device, features, _ = app._userfaultfd()
        if device is not None:
            os.close(device)
        assert features & uffd.WANTED == uffd.WANTED


class TestStopping:
    """The end."""

    def test_who_is_still_attached_is_counted_once_the_dead_are_gone(self, caplog: pytest.LogCaptureFixture) -> None:
        counts = [5, 6]
        service: Any = SimpleNamespace(
            lifetimes=SimpleNamespace(
                sweep=lambda: counts.__setitem__(slice(None), [2, 1]),
                regions=lambda: [SimpleNamespace(model=SimpleNamespace(process_count=count)) for count in counts],
            )
        )
        app._report_attached(service)
        assert "stopping with 3 attachments" in caplog.text

    def test_nobody_is_nothing_to_tell(self, caplog: pytest.LogCaptureFixture) -> None:
        service: Any = SimpleNamespace(lifetimes=SimpleNamespace(sweep=lambda: None, regions=list))
        app._report_attached(service)
        assert caplog.text == ""

    def test_every_reference_and_every_region_is_let_go_of(self) -> None:
        """A region without a name goes with its last reference; the others are to be forgotten."""
        named: Any = SimpleNamespace(name="x", attachments=["a", "b"])
        nameless: Any = SimpleNamespace(name=None, attachments=["c"])
        regions, dropped, forgotten = [named, nameless], [], []

        def drop(attachment: str) -> None:
            dropped.append(attachment)
            (region,) = (region for region in regions if attachment in region.attachments)
            region.attachments.remove(attachment)
            if region is nameless:
                regions.remove(region)

        def forget(region: Any) -> None:
            assert region.attachments == []
            forgotten.append(region)

        settling = SimpleNamespace(finish=lambda: forgotten.append("all is written"))
        lifetimes: Any = SimpleNamespace(regions=lambda: list(regions), drop=drop, forget=forget, settling=settling)
        app._release(lifetimes)
        assert dropped == ["a", "b", "c"]
        assert forgotten == [named, "all is written"]


def test_as_many_descriptors_as_there_may_be(apart: Callable[[Callable[[], object]], None]) -> None:
    def work() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))
        app._raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    apart(work)
