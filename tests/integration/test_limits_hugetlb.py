"""An empty pool of huge pages: the documented errors, everybody else unharmed, and work that goes on with new pages."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from conftest import Client, Daemon
from hostile import GOOD, bystander
from hugepages import HUGE, SIGBUS, Pool, pages_left, pool, touch

pytestmark = pytest.mark.pool


def test_an_empty_pool(
    hugetlb: Daemon,
    creator: Client,
    before: Pool,
    client: Callable[..., Client],
    name: str,
    eventually: Callable[..., None],
) -> None:
    """A mapping is refused; a copy that a fork needs is a SIGBUS to who stores; nobody else notices."""
    with bystander(hugetlb, client(hugetlb, GOOD), f"{name}-by", eventually) as by:
        creator.do("r.munmap(4 * H, GIB - 4 * H); r.fork(name + 't')")
        twin, greedy = client(hugetlb), client(hugetlb)
        twin.do(f"H = 2 * MIB; t = mshare.mshare({name + 't'!r}, 0x6800_0000_0000, 0, RW)")
        greedy.do(
            f"H = 2 * MIB; g = mshare.mshare({name + 'g'!r}, None, 8 * GIB, CREATE, empty=True, backing='hugetlb')"
        )
        greedy.do(f"g.mmap({(pages_left() + 1) * HUGE}, offset=0); g.buf[0] = 9")
        assert pages_left() == 0
        error = creator.error_of("r.mmap(4 * H, offset=4 * H, flags=0x31)")
        assert (error.errno, "vm.nr_hugepages" in error.text) == (errno.ENOMEM, True)
        error = creator.error_of("mshare.mshare('more', None, GIB, CREATE, backing='hugetlb')")
        assert (error.errno, "vm.nr_hugepages" in error.text) == (errno.ENOMEM, True)
        assert (touch(creator, 0, store=True), twin.ask("fork('t.buf[H] = 5')")) == (SIGBUS, -SIGBUS)
        assert (creator.ask("r.buf[0]"), greedy.ask("g.buf[0]")) == (1, 9)
        by.check()
        greedy.do("g.munmap(H, 20 * H)")
        creator.do("r.mmap(H, offset=4 * H, flags=0x31); r.buf[4 * H] = 3; r.buf[0] = 2")
        twin.do("t.buf[H] = 5")
        assert creator.ask("(r.buf[0], r.buf[H], r.buf[4 * H])") == [2, 1, 3]
        assert twin.ask("(t.buf[0], t.buf[H])") == [1, 5]
        for c, each in ((greedy, "g"), (twin, "t")):
            c.do(f"{each}.detach(); mshare.remove({name + each!r})")
        creator.do("r.detach(); mshare.remove(name)")
    eventually(lambda: pool() == before)
