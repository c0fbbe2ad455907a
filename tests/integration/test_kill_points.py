"""The daemon killed again and again, at points between deciding, writing down and doing, under a random workload.

Two processes change a family of regions: stores, changes of mappings, forks, ends, files. The daemon kills itself at
the n-th point it comes to, n being drawn anew for each life, or is killed at some moment, and the next one starts. No
call may fail for that, and nothing may be seen that the calls do not explain: after each death all pages of all regions
are looked at, by checksum.
KILL_POINTS is how many deaths there are, KILL_SEED has a run happen again, as far as that depends on us.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Client, Daemon
from kill_points import Workload, living

pytestmark = pytest.mark.pool


@pytest.mark.timeout(900)
def test_no_death_is_noticed(
    start_daemon: Callable[..., Daemon], client: Callable[..., Client], name: str, tmp_path: Path
) -> None:
    with living(start_daemon()) as lives:
        clients = [client(lives.daemon), client(lives.daemon)]
        workload = Workload(lives, clients, name, tmp_path / "file")
        workload.run(int(os.environ.get("KILL_POINTS", "200")))
        for region in list(workload.regions):
            for who in (0, 1):
                workload.do(who, f"mshare.mshare_unlink('{name}-{region.number}')")
        assert workload.ask(0, "connect(find_mount()).call(protocol.GetList(), protocol.Listing).regions") == []
