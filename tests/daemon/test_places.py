"""Directories, lock and mounts, piece by piece."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from mshared import mounts, places
from mshared.places import Fate, Made, StartError
from msharefs.mountinfo import FSTYPE, Mount


@attrs.frozen
class Config:
    """Where a daemon is to be."""

    mount: Path
    state_dir: Path


@pytest.fixture
def config(directory: Path) -> Config:
    return Config(directory / "mount", directory / "state")


def clear(config: Config, *, memory: bool = True) -> None:
    places.clear_stale(config.mount, config.state_dir, memory=memory)


class TestDirectories:
    """Those that go with the daemon, if it made them."""

    @pytest.fixture
    def made(self, directory: Path) -> Made:
        return Made(directory / "note")

    def test_made_and_taken_away(self, directory: Path, made: Made) -> None:
        with made.directory(directory / "new"):
            assert stat.S_IMODE((directory / "new").stat().st_mode) == 0o755
        assert not (directory / "new").exists()

    def test_so_are_those_above_it(self, directory: Path, made: Made) -> None:
        (directory / "old").mkdir()
        with made.directory(directory / "old" / "a" / "b" / "c"):
            assert (directory / "old" / "a" / "b" / "c").is_dir()
        assert os.listdir(directory / "old") == []

    def test_one_that_was_there_stays(self, directory: Path, made: Made) -> None:
        (directory / "old").mkdir()
        with made.directory(directory / "old"):
            pass
        assert (directory / "old").is_dir()

    def test_one_that_holds_something_stays(self, directory: Path, made: Made) -> None:
        with made.directory(directory / "new"):
            (directory / "new" / "file").touch()
        assert (directory / "new" / "file").exists()

    def test_it_goes_though_the_daemon_fails(self, directory: Path, made: Made) -> None:
        with contextlib.suppress(ZeroDivisionError), made.directory(directory / "new"):
            raise ZeroDivisionError
        assert not (directory / "new").exists()

    @pytest.mark.parametrize("generations", [1, 3])
    def test_those_that_a_killed_daemon_made_go_with_the_next(self, directory: Path, generations: int) -> None:
        """Or with one after that. Those that nobody made stay."""
        (directory / "old").mkdir()
        places = [directory / "old" / "deep" / "mount", directory / "parent" / "state", directory / "old"]
        killed: list[contextlib.ExitStack] = []
        for _ in range(generations):
            with contextlib.ExitStack() as daemon:
                made = Made(directory / "note")
                for place in places:
                    daemon.enter_context(made.directory(place))
                daemon.enter_context(made.noted(Fate()))
                killed.append(daemon.pop_all())
        with contextlib.ExitStack() as daemon:
            made = Made(directory / "note")
            for place in places:
                daemon.enter_context(made.directory(place))
            daemon.enter_context(made.noted(Fate()))
        assert sorted(os.listdir(directory)) == ["old"]
        assert os.listdir(directory / "old") == []

    def test_what_is_noted_stays_so_for_the_next_that_goes_on(self, directory: Path, made: Made) -> None:
        with made.directory(directory / "new"), made.noted(Fate(keep=True)):
            (directory / "new" / "file").touch()
        (directory / "new" / "file").unlink()
        following = Made(directory / "note")
        with following.directory(directory / "new"), following.noted(Fate()):
            pass
        assert os.listdir(directory) == []

    def test_where_nothing_was_made_nothing_is_noted(self, directory: Path, made: Made) -> None:
        with made.directory(directory), made.noted(Fate()):
            assert os.listdir(directory) == []

    def test_a_note_that_cannot_be_written_is_told(self, directory: Path) -> None:
        made = Made(directory / "nowhere" / "note")
        with (
            made.directory(directory / "new"),
            pytest.raises(StartError, match=f"cannot write {directory}/nowhere/note: No such file"),
            made.noted(Fate()),
        ):
            pass

    def test_one_left_by_a_daemon_that_was_killed_goes_with_the_next(self, directory: Path, made: Made) -> None:
        """Before it had noted anything."""
        (directory / "state").mkdir()
        (directory / "state" / "lock").touch()
        with made.directory(directory / "state", ours=True):
            (directory / "state" / "lock").unlink()
        assert not (directory / "state").exists()

    def test_one_where_a_dead_mount_stands_is_ours(
        self, directory: Path, made: Made, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (directory / "dead").mkdir()

        def dead(*_args: object, **_kwargs: object) -> None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

        monkeypatch.setattr(Path, "mkdir", dead)
        with made.directory(directory / "dead"):
            pass
        assert not (directory / "dead").exists()

    def test_one_that_cannot_be_made_is_told(self, directory: Path, made: Made) -> None:
        (directory / "file").touch()
        with (
            pytest.raises(StartError, match=f"cannot make {directory}/file/below: Not a directory"),
            made.directory(directory / "file" / "below"),
        ):
            pass


class TestLock:
    """One daemon a mount."""

    def test_a_second_is_refused_and_a_third_comes_after(self, directory: Path) -> None:
        path = directory / "lock"
        with places.lock(path, Path("/run/mshare"), Fate()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with (
                pytest.raises(StartError, match=r"another mshared serves /run/mshare; `mshare down` stops it"),
                places.lock(path, Path("/run/mshare"), Fate()),
            ):
                pass
            assert path.exists()
        assert not path.exists()
        with places.lock(path, Path("/run/mshare"), Fate()):
            pass

    def test_a_file_that_a_killed_daemon_left_hinders_nobody(self, directory: Path) -> None:
        path = directory / "lock"
        path.touch()
        with places.lock(path, Path("/m"), Fate()):
            pass
        assert not path.exists()

    def test_a_file_that_goes_while_it_is_being_locked_is_no_lock(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, open_descriptors: Callable[[], int]
    ) -> None:
        path = directory / "lock"
        before = open_descriptors()
        plain, calls = fcntl.flock, []

        def flock(fd: int, operation: int) -> None:
            calls.append(fd)
            if len(calls) == 1:
                path.unlink()
            elif len(calls) == 2:
                path.unlink()
                path.touch()
            plain(fd, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with places.lock(path, Path("/m"), Fate()):
            assert len(calls) == 3
            assert open_descriptors() == before + 1
            assert path.stat().st_ino == os.fstat(calls[-1]).st_ino
        assert open_descriptors() == before

    def test_no_descriptor_is_left_when_it_is_refused(
        self, directory: Path, open_descriptors: Callable[[], int]
    ) -> None:
        with places.lock(directory / "lock", Path("/m"), Fate()):
            before = open_descriptors()
            with contextlib.suppress(StartError), places.lock(directory / "lock", Path("/m"), Fate()):
                pass
            assert open_descriptors() == before

    def test_a_place_that_cannot_be_used_is_told_with_the_cure(self, directory: Path) -> None:
        (directory / "file").touch()
        path = directory / "file" / "lock"
        with pytest.raises(StartError, match="--state-dir"), places.lock(path, Path("/m"), Fate()):
            pass

    def test_the_keeper_of_a_daemon_that_has_ended_is_waited_for(self, directory: Path, gone: int) -> None:
        """It has the lock, too, and lets it go when everything else is closed."""
        path = directory / "lock"
        hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print('locked', flush=True); input()"
        path.write_text(str(gone))
        with subprocess.Popen(
            [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as keeper:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"locked\n"
            threading.Timer(0.1, keeper.kill).start()
            with places.lock(path, Path("/m"), Fate()):
                assert keeper.wait(60) == -9
                assert path.read_text() == str(os.getpid())

    def test_one_that_never_lets_go_is_given_up(
        self, directory: Path, gone: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(places, "_KEEPER_PATIENCE", 0.05)
        path = directory / "lock"
        with places.lock(path, Path("/m"), Fate()):
            path.write_text(str(gone))
            with pytest.raises(StartError, match="another mshared"), places.lock(path, Path("/m"), Fate()):
                pass


def mount(point: Path, fstype: str) -> Mount:
    return Mount(1, (0, 1), str(point), fstype, 0)


class TestStale:
    """What a daemon that was killed left."""

    @pytest.fixture
    def mounted(self, monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[str]]:
        """What is mounted where, by type; the last is the topmost."""
        table: dict[Path, list[str]] = {}

        def mount_at(path: Path) -> Mount | None:
            return mount(path, table[path][-1]) if table.get(path) else None

        monkeypatch.setattr(mounts, "mount_at", mount_at)
        monkeypatch.setattr(mounts, "unmount", lambda path: table[path].pop())
        return table

    def test_nothing_is_left_most_often(self, config: Config, mounted: dict[Path, list[str]]) -> None:
        clear(config)
        assert mounted == {}

    def test_memory_goes_however_often_it_was_mounted(
        self, config: Config, mounted: dict[Path, list[str]], caplog: pytest.LogCaptureFixture
    ) -> None:
        for kind in ("thp", "4k"):
            mounted[config.state_dir / kind] = ["tmpfs", "tmpfs"]
        clear(config)
        assert not any(mounted.values())
        assert caplog.text.count("left by a daemon that was killed") == 4

    def test_memory_of_which_a_journal_tells_stays(self, config: Config, mounted: dict[Path, list[str]]) -> None:
        mounted[config.state_dir / "thp"] = ["tmpfs"]
        clear(config, memory=False)
        assert mounted[config.state_dir / "thp"] == ["tmpfs"]

    def test_a_dead_mount_is_replaced(
        self, config: Config, mounted: dict[Path, list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mounted[config.mount] = [FSTYPE]
        monkeypatch.setattr(places, "_is_served", lambda _mount: False)
        clear(config)
        assert mounted[config.mount] == []

    def test_one_that_is_served_is_not(
        self, config: Config, mounted: dict[Path, list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mounted[config.mount] = [FSTYPE]
        monkeypatch.setattr(places, "_is_served", lambda _mount: True)
        with pytest.raises(StartError, match=f"another mshared serves {config.mount}"):
            clear(config)
        assert mounted[config.mount] == [FSTYPE]

    def test_another_filesystem_is_mounted_over(
        self, config: Config, mounted: dict[Path, list[str]], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        mounted[config.mount] = ["ext4"]
        clear(config)
        assert mounted[config.mount] == ["ext4"]
        assert "mounting over the ext4" in caplog.text

    def test_a_directory_is_served(self, directory: Path) -> None:
        assert places._is_served(directory)

    @pytest.mark.parametrize(
        ("number", "served"),
        [(errno.ENOTCONN, False), (errno.ECONNABORTED, False), (errno.EACCES, True), (errno.EIO, True)],
    )
    def test_only_a_dead_one_is_not_served(
        self, monkeypatch: pytest.MonkeyPatch, directory: Path, number: int, served: bool
    ) -> None:
        def fail(_path: Path) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "stat", fail)
        assert places._is_served(directory) is served

    def test_one_that_hangs_counts_as_served(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        end = threading.Event()
        monkeypatch.setattr(Path, "stat", lambda _path: end.wait(60))
        monkeypatch.setattr(places, "_MOUNT_PATIENCE", 0.01)
        assert places._is_served(directory)
        end.set()
