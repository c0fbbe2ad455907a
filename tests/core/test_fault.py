"""Every outcome of a fault: served, woken, or answered with a signal."""

from __future__ import annotations

import attrs
import pytest

from msharefs.addr import PAGE_SIZE, PMD_SIZE, Address, AddrRange, FrameNo
from msharefs.effects import Allow, Deliver, Fill, Signal, ZeroFill
from msharefs.fault import Fault, Resolution, handle_fault
from msharefs.host_mm import HostMm
from msharefs.invariants import check_mm
from msharefs.perms import PROT_RW, Access, Prot
from msharefs.pte import Pte, PteFlag
from msharefs.vma import FileId, FileSource

BASE = 32 << 40
REGION = AddrRange.sized(BASE, 2 * PMD_SIZE)


def pages(first: int, end: int) -> AddrRange:
    return AddrRange.sized(BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def within(page: int) -> Address:
    """An address in the middle of a page."""
    return Address(BASE + page * PAGE_SIZE + 8)


def mm_with(prot: Prot, *, hole_signal: Signal = Signal.SIGBUS) -> HostMm:
    """Pages 2..5 mapped with ``prot``, the rest of the region a hole; every fault is seen."""
    mm = HostMm(REGION, paging_all=True, hole_signal=hole_signal)
    mm.mmap(pages(2, 6), 4 * PAGE_SIZE, prot, fixed=True)
    return mm


@pytest.mark.parametrize("hole_signal", Signal)
@pytest.mark.parametrize("access", Access)
@pytest.mark.parametrize("page", [0, 1, 6])
def test_a_touch_of_a_hole_gives_the_holes_signal_at_the_address(
    hole_signal: Signal, access: Access, page: int
) -> None:
    mm = mm_with(PROT_RW, hole_signal=hole_signal)
    resolution = handle_fault(mm, Fault(within(page), access))
    assert resolution.effect == Deliver(hole_signal, within(page))
    assert resolution.signal is hole_signal
    assert mm.table.resident == 0


@pytest.mark.parametrize(("prot", "access"), [(Prot.NONE, a) for a in Access] + [(Prot.READ, Access.WRITE)])
def test_an_access_that_the_protection_forbids_gives_sigsegv_whatever_holes_give(prot: Prot, access: Access) -> None:
    mm = mm_with(prot)
    resolution = handle_fault(mm, Fault(within(3), access))
    assert resolution.effect == Deliver(Signal.SIGSEGV, within(3))
    assert mm.table.resident == 0


@pytest.mark.parametrize("access", Access)
@pytest.mark.parametrize("prot", [PROT_RW, Prot.WRITE])
def test_a_first_touch_of_writable_memory_installs_a_zero_page(prot: Prot, access: Access) -> None:
    mm = mm_with(prot)
    resolution = handle_fault(mm, Fault(within(3), access))
    assert resolution.effect == ZeroFill(pages(3, 4))
    assert resolution.signal is None
    assert mm.table.walk(within(3)) == Pte(FrameNo(3), PteFlag.PRESENT | PteFlag.WRITE)
    check_mm(mm)


def test_a_first_read_of_read_only_memory_installs_a_protected_page() -> None:
    mm = mm_with(Prot.READ)
    resolution = handle_fault(mm, Fault(within(3), Access.READ))
    assert resolution.effect == ZeroFill(pages(3, 4), protected=True)
    assert mm.table.walk(within(3)) == Pte(FrameNo(3), PteFlag.PRESENT | PteFlag.UFFD_WP)
    check_mm(mm)


@pytest.mark.parametrize(
    ("prot", "access"), [(PROT_RW, Access.READ), (PROT_RW, Access.WRITE), (Prot.READ, Access.READ)]
)
def test_a_page_that_the_kernel_misses_is_missing_whatever_the_tables_say(prot: Prot, access: Access) -> None:
    """The second of two threads on a page asks too: for the kernel the page is there by then, and it only wakes."""
    mm = mm_with(prot)
    first = handle_fault(mm, Fault(within(3), Access.READ))
    installed = mm.table.walk(within(3))
    assert handle_fault(mm, Fault(within(3), access)) == first
    assert mm.table.walk(within(3)) == installed
    assert mm.table.pages == 1


@pytest.mark.parametrize("prot", [PROT_RW, Prot.WRITE])
def test_a_store_that_was_protected_when_it_stopped_and_may_go_on_now_is_only_woken(prot: Prot) -> None:
    mm = mm_with(prot)
    resolution = handle_fault(mm, Fault(within(3), Access.WRITE, protected=True))
    assert resolution.effect == Allow(pages(3, 4))
    assert resolution.signal is None
    assert mm.table.resident == 0


@pytest.mark.parametrize("prot", [Prot.READ, Prot.NONE])
def test_a_store_to_a_protected_page_that_stays_protected_gives_sigsegv(prot: Prot) -> None:
    mm = mm_with(prot)
    assert handle_fault(mm, Fault(within(3), Access.WRITE, protected=True)).signal is Signal.SIGSEGV


def test_a_page_that_the_kernel_misses_under_a_huge_leaf_splits_it() -> None:
    mm = HostMm(REGION)
    mm.mmap(REGION, REGION.size, fixed=True)
    mm.sync([REGION], huge=True)
    assert handle_fault(mm, Fault(within(700), Access.WRITE)).effect == ZeroFill(pages(700, 701))
    assert (mm.table.huge_pages, mm.table.pages) == (1, 512)
    check_mm(mm)


def test_the_page_faulted_in_is_the_one_page_around_the_address() -> None:
    mm = mm_with(PROT_RW)
    last_byte = Address(pages(4, 5).end - 1)
    assert handle_fault(mm, Fault(last_byte, Access.WRITE)).effect == ZeroFill(pages(4, 5))
    assert mm.table.walk(within(5)) is None


def test_a_fault_that_was_waiting_is_decided_by_what_is_mapped_now() -> None:
    mm = mm_with(PROT_RW)
    fault = Fault(within(3), Access.WRITE)
    mm.munmap(pages(3, 4))
    assert mm.fault(fault).signal is Signal.SIGBUS
    mm.mmap(pages(3, 4), PAGE_SIZE, Prot.READ, fixed=True)
    assert mm.fault(fault).signal is Signal.SIGSEGV
    mm.mprotect(pages(3, 4), PROT_RW)
    assert mm.fault(fault) == Resolution(ZeroFill(pages(3, 4)))


def mm_with_file(prot: Prot = PROT_RW, *, shared: bool = True) -> HostMm:
    """Pages 2..5 show pages 10..13 of a file, the rest of the region is a hole."""
    mm = HostMm(REGION)
    source = FileSource(FileId(1), 10 * PAGE_SIZE, shared, writable=True)
    mm.mmap(pages(2, 6), 4 * PAGE_SIZE, prot, fixed=True, source=source)
    return mm


FILL = Fill(pages(3, 4), FileId(1), 11 * PAGE_SIZE)
CLEAN = PteFlag.PRESENT | PteFlag.UFFD_WP
STORED = PteFlag.PRESENT | PteFlag.WRITE | PteFlag.DIRTY


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("prot", "access"), [(PROT_RW, Access.READ), (PROT_RW, Access.WRITE), (Prot.READ, Access.READ)]
)
def test_a_first_touch_of_a_file_asks_for_its_page_and_installs_nothing_yet(
    prot: Prot, access: Access, shared: bool
) -> None:
    mm = mm_with_file(prot, shared=shared)
    resolution = handle_fault(mm, Fault(within(3), access))
    assert (resolution.effect, resolution.signal) == (FILL, None)
    assert mm.table.resident == 0


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("protected", [True, False])
def test_a_store_to_a_file_that_may_only_be_read_gives_sigsegv(shared: bool, protected: bool) -> None:
    mm = mm_with_file(Prot.READ, shared=shared)
    mm.filled(pages(3, 4))
    assert handle_fault(mm, Fault(within(3), Access.WRITE, protected)).signal is Signal.SIGSEGV
    assert mm.dirty(REGION) == []


def test_a_store_to_a_clean_page_of_a_shared_file_makes_it_dirty() -> None:
    mm = mm_with_file()
    mm.filled(pages(2, 6))
    assert handle_fault(mm, Fault(within(3), Access.WRITE, protected=True)).effect == Allow(pages(3, 4))
    assert mm.table.walk(within(3)) == Pte(FrameNo(3), STORED)
    assert mm.table.walk(within(4)) == Pte(FrameNo(4), CLEAN)
    check_mm(mm)


def test_a_store_to_a_page_of_a_private_file_makes_nothing_dirty() -> None:
    """It was protected when the thread stopped, by a mapping that is gone."""
    mm = mm_with_file(shared=False)
    mm.filled(pages(2, 6))
    assert handle_fault(mm, Fault(within(3), Access.WRITE, protected=True)).effect == Allow(pages(3, 4))
    assert mm.table.walk(within(3)) == Pte(FrameNo(3), PteFlag.PRESENT | PteFlag.WRITE)


def test_a_page_of_a_file_that_the_kernel_misses_is_read_again_whatever_the_tables_say() -> None:
    """Who asked for the tables may have looked at the memory before the file was mapped over it."""
    mm = mm_with_file()
    mm.sync([pages(0, 8)], huge=False)
    assert mm.table.walk(within(3)) == Pte(FrameNo(3), CLEAN)
    assert handle_fault(mm, Fault(within(3), Access.READ)).effect == FILL
    assert mm.table.walk(within(3)) is None
    assert mm.table.walk(within(4)) == Pte(FrameNo(4), CLEAN)


def test_a_page_that_is_dirty_by_now_was_missing_once_and_stays_dirty() -> None:
    mm = mm_with_file()
    mm.filled(pages(3, 4))
    mm.stored_to(pages(3, 4))
    assert handle_fault(mm, Fault(within(3), Access.READ)).effect == attrs.evolve(FILL, there=True)
    assert mm.dirty(REGION) == [pages(3, 4)]
