"""Windows on a memfd, with no daemon: taken, looked through, and unmapped only when nobody looks."""

from __future__ import annotations

import array
import ctypes
import errno
import gc
import os
from collections.abc import Callable, Iterator

import pytest

from mshare import syscalls as sc
from mshare.window import ANCHOR_SIZE, RangeInUseError, Window
from msharefs.addr import PAGE_SIZE
from msharefs.protocol import Offer

Apart = Callable[[Callable[[], object]], None]

BASE = 0x5500_0000_0000
SIZE = 4 * PAGE_SIZE


@pytest.fixture
def backing() -> Iterator[int]:
    fd = os.memfd_create("backing")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def new_window() -> Iterator[Callable[..., Window]]:
    windows: list[Window] = []

    def make(*, readonly: bool = False) -> Window:
        windows.append(Window(Offer(1, 16, BASE, SIZE, readonly=readonly, device=False)))
        return windows[-1]

    yield make
    for window in windows:
        window.discard()
    assert standing() == []


@pytest.fixture
def window(new_window: Callable[..., Window], backing: int) -> Window:
    """One that is open."""
    window = new_window()
    window.map(backing)
    window.open()
    return window


def standing() -> list[sc.Mapping]:
    return sc.own_mappings(BASE, BASE + SIZE)


class TestMap:
    """Taking the range."""

    def test_nobody_gets_in_before_it_is_open(self, new_window: Callable[..., Window], backing: int) -> None:
        window = new_window()
        window.map(backing)
        (found,) = standing()
        assert (found.start, found.end, found.prot, found.shared) == (BASE, BASE + SIZE, sc.PROT_NONE, True)
        assert not window.is_open
        with pytest.raises(ValueError, match="the region is detached"):
            _ = window.view

    @pytest.mark.parametrize("at", [BASE, BASE + SIZE - PAGE_SIZE])
    def test_a_range_in_use_is_left_alone(self, new_window: Callable[..., Window], backing: int, at: int) -> None:
        sc.mmap(at, PAGE_SIZE, 3, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        ctypes.memset(at, 7, 1)
        before = standing()
        window = new_window()
        with pytest.raises(RangeInUseError, match="attach at another address") as caught:
            window.map(backing)
        assert caught.value.errno == errno.EINVAL
        assert f"{BASE:#x}" in str(caught.value)
        window.discard()
        assert standing() == before
        assert ctypes.string_at(at, 1) == b"\7"
        sc.munmap(at, PAGE_SIZE)

    def test_an_old_kernel_that_maps_elsewhere_is_found_out(
        self, new_window: Callable[..., Window], backing: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before Linux 4.17 MAP_FIXED_NOREPLACE was no flag, and the address a hint."""
        plain, elsewhere = sc.mmap, []

        def mmap(addr: int | None, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
            elsewhere.append(plain(None, length, prot, flags & ~sc.MAP_FIXED_NOREPLACE, fd, offset))
            return elsewhere[-1]

        monkeypatch.setattr(sc, "mmap", mmap)
        with pytest.raises(RangeInUseError):
            new_window().map(backing)
        assert [m for m in sc.own_mappings(elsewhere[0], elsewhere[0] + 1) if "backing" in m.path] == []

    def test_what_cannot_be_mapped_is_another_error(self, new_window: Callable[..., Window]) -> None:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            new_window().map(-1)
        assert not isinstance(caught.value, RangeInUseError)

    def test_a_readonly_one_is_private_and_never_written(self, new_window: Callable[..., Window], backing: int) -> None:
        """The kernel lets no userfaultfd see a shared mapping of a file that was opened for reading."""
        readonly = os.open(f"/proc/self/fd/{backing}", os.O_RDONLY)
        window = new_window(readonly=True)
        window.map(readonly)
        os.close(readonly)
        window.open()
        (found,) = standing()
        assert (found.prot, found.shared) == (sc.PROT_READ, False)
        os.pwrite(backing, b"seen", 0)
        assert bytes(window.view[:4]) == b"seen"
        assert window.view.readonly
        with pytest.raises(TypeError, match="read-only"):
            window.view[0] = 1


class TestView:
    """Looking through."""

    def test_it_is_all_of_the_memory_as_bytes(self, window: Window, backing: int) -> None:
        assert (len(window.view), window.view.format, window.view.readonly) == (SIZE, "B", False)
        window.view[:5] = b"hello"
        assert os.pread(backing, 5, 0) == b"hello"
        os.pwrite(backing, b"world", SIZE - 5)
        assert bytes(window.view[-5:]) == b"world"
        assert window.is_open

    def test_it_is_the_same_each_time(self, window: Window) -> None:
        assert window.view is window.view


class TestClose:
    """Unmapping when nobody looks."""

    def test_it_gives_the_range_back(self, window: Window) -> None:
        window.view[0] = 1
        window.close()
        assert not window.is_open
        assert standing() == []
        with pytest.raises(ValueError, match="detached"):
            _ = window.view

    def test_again_it_does_nothing(self, window: Window) -> None:
        window.close()
        sc.mmap(BASE, SIZE, 0, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED_NOREPLACE)
        window.close()
        window.discard()
        assert len(standing()) == 1
        sc.munmap(BASE, SIZE)

    @pytest.mark.parametrize(
        "look",
        [
            lambda view: view[1:5],
            lambda view: view[::2],
            lambda view: view.cast("I"),
            memoryview,
            lambda view: view.toreadonly(),
            lambda view: view[0:8][2:4],
            lambda view: (ctypes.c_char * 8).from_buffer(view),
            lambda view: (ctypes.c_uint64 * 2).from_buffer(view, 64),
            lambda view: ctypes.c_int.from_buffer(view[8:16]),
            lambda view: memoryview((ctypes.c_char * 8).from_buffer(view)),
        ],
    )
    def test_whoever_looks_keeps_it(self, window: Window, look: Callable[[memoryview], object]) -> None:
        """Unmapping under a view would crash whoever touches it later."""
        looking = look(window.view)
        with pytest.raises(BufferError):
            window.close()
        assert window.is_open
        window.view[3] = 9
        assert len(standing()) == 1
        with pytest.raises(BufferError):
            window.close()
        del looking
        gc.collect()
        window.close()
        assert standing() == []

    def test_a_view_that_was_released_looks_no_longer(self, window: Window) -> None:
        with window.view[1:5] as part:
            assert part[0] == 0
        other = window.view.cast("I")
        other.release()
        third = window.view[2:]
        with pytest.raises(BufferError):
            window.close()
        third.release()
        window.close()

    def test_views_that_the_collector_does_not_see_keep_it_too(self, window: Window, apart: Apart) -> None:
        """After gc.freeze(), which servers call before they fork."""

        def work() -> None:
            released, looking = window.view[1:5], window.view[2:3]
            released.release()
            gc.freeze()
            with pytest.raises(BufferError):
                window.close()
            assert looking[0] == 0

        apart(work)

    @pytest.mark.parametrize(
        "copy", [bytes, bytearray, list, lambda view: view[3], lambda view: array.array("B", view), bytes.fromhex]
    )
    def test_copies_look_at_nothing(self, window: Window, copy: Callable[[object], object]) -> None:
        kept = copy("00" if copy == bytes.fromhex else window.view)
        window.close()
        assert kept is not None

    def test_a_name_for_the_view_itself_is_released_with_it(self, window: Window) -> None:
        view = window.view
        window.close()
        with pytest.raises(ValueError, match="released"):
            _ = view[0]

    def test_a_readonly_one_too(self, new_window: Callable[..., Window], backing: int) -> None:
        window = new_window(readonly=True)
        window.map(backing)
        window.open()
        part = window.view[1:5]
        with pytest.raises(BufferError):
            window.close()
        part.release()
        window.close()
        assert standing() == []


class TestUserfaultfd:
    """This process's copy, and the anchor beside it."""

    def test_it_is_made_once_wanted_and_goes_with_the_window(self, new_window: Callable[..., Window]) -> None:
        window = new_window()
        window.make_userfaultfd(None)
        fd, anchor = window.userfaultfd, window.anchor
        assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
        (found,) = [m for m in sc.own_mappings(anchor, anchor + ANCHOR_SIZE) if m.start <= anchor]
        assert (found.prot, found.shared, found.inode) == (sc.PROT_NONE, False, 0)
        assert found.end >= anchor + ANCHOR_SIZE
        window.discard()
        assert (window.userfaultfd, window.anchor) == (-1, 0)
        assert [m for m in sc.own_mappings(anchor, anchor + 1) if m.start == anchor] == []
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)

    def test_a_forked_child_drops_its_copy_and_keeps_the_anchor(self, new_window: Callable[..., Window]) -> None:
        window = new_window()
        window.make_userfaultfd(None)
        anchor = window.anchor
        window.drop_userfaultfd()
        window.drop_userfaultfd()
        assert (window.userfaultfd, window.anchor) == (-1, anchor)
        window.make_userfaultfd(None)
        assert window.anchor == anchor

    def test_leaving_it_is_leaving_what_is_mapped_there(self, new_window: Callable[..., Window], backing: int) -> None:
        window = new_window()
        window.map(backing)
        window.make_userfaultfd(None)
        window.open()
        window.leave()
        window.discard()
        assert (window.is_open, window.userfaultfd) == (False, -1)
        assert [m.path for m in sc.own_mappings(window.address, window.address + window.size)] != []
        sc.munmap(window.address, window.size)

    def test_discarding_unmaps_whoever_looks_and_once(self, new_window: Callable[..., Window], backing: int) -> None:
        """For windows that were never open: nobody can look."""
        window = new_window()
        window.map(backing)
        window.make_userfaultfd(None)
        window.discard()
        fd = os.memfd_create("next")
        window.discard()
        os.close(fd)
        assert standing() == []
