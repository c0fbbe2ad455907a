"""All groups of measurements, in the order in which they run."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.group import Group
from benchmarks.groups import (
    attach,
    changes,
    control,
    faults,
    files_shared,
    growth,
    refpages,
    scaling,
    snapshots,
    touch,
)

ALL: Final[tuple[Group[Any], ...]] = (
    touch.GROUP,
    attach.GROUP,
    growth.GROUP,
    files_shared.GROUP,
    scaling.GROUP,
    changes.GROUP,
    faults.GROUP,
    control.GROUP,
    snapshots.GROUP,
    refpages.GROUP,
)
