"""What a run has found, as it is kept in JSON; tables and plots are made from that alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import cattrs

from benchmarks.memory import Kind


@attrs.frozen
class Metric:
    """A quantity. It is sampled in base units (seconds, bytes, or counts), and shown in ``unit``, times ``scale``.

    ``over`` says what it is a function of, if of anything. ``peer`` is the series that others are compared with.
    ``log`` names the axes of its plot that are logarithmic: x, y, both, or none.
    """

    name: str
    heading: str
    unit: str
    scale: float
    over: str = ""
    peer: str = Kind.SHM.label
    more_is_better: bool = False
    log: str = ""


@attrs.frozen
class Row:
    """All samples of one series at one place of the metric's axis (0 if it has none), in the metric's unit.

    ``computed``: not measured, worked out from what was. ``ratio``: how many times better than the peer.
    """

    series: str
    at: float
    median: float
    least: float
    most: float
    samples: list[float]
    computed: bool
    ratio: float | None


@attrs.frozen
class Measured:
    """A metric and what was found of it."""

    metric: Metric
    rows: list[Row]

    @property
    def series(self) -> dict[str, list[Row]]:
        """The rows of each series, in the order of the axis; series in the order of their coming."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.series, []).append(row)
        return {name: sorted(rows, key=lambda row: row.at) for name, rows in found.items()}

    @property
    def places(self) -> list[float]:
        """Where on its axis there is anything, in ascending order."""
        return sorted({row.at for row in self.rows})


@attrs.frozen
class GroupResults:
    """What a group has found. ``error``: why it has not come to its end, if so."""

    name: str
    compares: str
    method: str
    plan: dict[str, Any]
    pictures: dict[str, list[str]]
    measured: list[Measured]
    notes: list[str]
    error: str | None
    seconds: float


@attrs.frozen
class Results:
    """What a run has found, and on which machine."""

    machine: dict[str, str]
    quick: bool
    groups: list[GroupResults]

    def save(self, path: Path) -> None:
        """Write it all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cattrs.unstructure(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read it again."""
        return cattrs.structure(json.loads(path.read_text()), cls)
