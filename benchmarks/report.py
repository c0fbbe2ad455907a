"""From results to tables, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final

import attrs

from benchmarks.results import GroupResults, Measured, Metric, Results, Row

_STAR: Final = "*"
_WIDEST: Final = 44


@attrs.frozen
class Table:
    """A heading, names of columns, and rows whose first cell is their name."""

    heading: str
    columns: list[str]
    rows: list[list[str]]


def text(group: GroupResults) -> str:
    """For the terminal."""
    blocks = [f"== {group.name}: {group.compares}"]
    for table in _tables(group):
        lines = [table.columns, *table.rows] if any(table.columns) else table.rows
        widths = [max(len(line[n]) for line in lines) for n in range(len(table.columns))]
        aligned = [_aligned(line, widths) for line in lines]
        blocks.append("\n".join([table.heading, *(f"  {line}" for line in aligned)]))
    return "\n\n".join([*blocks, *_remarks(group)]) + "\n"


def markdown(results: Results) -> str:
    """For a document: every table, with what a reader must know of the machine and the method."""
    parts = ["# Measurements", "\n".join(f"- {key}: {value}" for key, value in results.machine.items())]
    if results.quick:
        parts.append("A quick run: less memory, fewer rounds, figures of less worth.")
    for group in results.groups:
        parts += [f"## {group.name}: {group.compares}", group.method]
        parts += [f"![{name}]({name}.svg)" for name in group.pictures]
        for table in _tables(group):
            lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
            parts.append("\n".join([f"{table.heading}:", "", *(f"| {' | '.join(line)} |" for line in lines)]))
        parts += _remarks(group)
    return "\n\n".join(parts) + "\n"


def _tables(group: GroupResults) -> Iterator[Table]:
    """One for each metric with an axis; what has none, and the same peer, comes together."""
    found = [measured for measured in group.measured if measured.rows]
    for (over, _), part in groupby(found, key=lambda measured: (measured.metric.over, measured.metric.peer)):
        together = list(part)
        if over:
            yield from map(_over, together)
        elif len(together) > 1:
            yield _folded(together)
        else:
            yield _plain(together[0])


def _remarks(group: GroupResults) -> list[str]:
    star = [f"{_STAR} computed, not measured"] if any(row.computed for m in group.measured for row in m.rows) else []
    error = [f"This group failed: {group.error}"] if group.error else []
    return [*star, *(f"Note: {note}" for note in group.notes), *error]


def _folded(together: list[Measured]) -> Table:
    """A row for each metric, a column for each series."""
    series = list(dict.fromkeys(name for measured in together for name in measured.series))
    rows = []
    for measured in together:
        found = {row.series: _cell(row, measured.metric) for row in measured.rows}
        rows.append([f"{measured.metric.heading}, {measured.metric.unit}", *(found.get(name, "") for name in series)])
    return Table(_legend(together[0], "median"), ["", *series], rows)


def _plain(measured: Measured) -> Table:
    """A row for each series."""
    metric = measured.metric
    rows = [[row.series, _cell(row, metric)] for row in measured.rows]
    return Table(_legend(measured, f"{metric.heading}, {metric.unit}: median"), ["", ""], rows)


def _legend(measured: Measured, text: str) -> str:
    compared = any(row.ratio is not None for row in measured.rows)
    better = f", times better than {measured.metric.peer}" if compared else ""
    return f"{text} ± half of the spread{better}"


def _cell(row: Row, metric: Metric) -> str:
    """Median, half of the spread in per cent of it, and how many times better than the peer."""
    spread = f" ±{50 * (row.most - row.least) / row.median:.0f}%" if len(row.samples) > 1 and row.median > 0 else ""
    times = f", {_times(row.ratio)}" if row.ratio is not None and row.series != metric.peer else ""
    return f"{_median(row)}{spread}{times}"


def _over(measured: Measured) -> Table:
    """A column for each place of the axis; a row for each series with its medians, one more with its ratios."""
    metric, places = measured.metric, measured.places
    rows = []
    for series, found in measured.series.items():
        at = {row.at: row for row in found}
        rows.append([series, *(_median(at.get(place)) for place in places)])
        if series != metric.peer and any(row.ratio is not None for row in found):
            ratios = [_ratio(at.get(place)) for place in places]
            rows.append([f"... times better than {metric.peer}", *ratios])
    columns = [metric.over, *(number(place) for place in places)]
    return Table(f"{metric.heading}, {metric.unit}", columns, rows)


def _median(row: Row | None) -> str:
    return "" if row is None else number(row.median) + (_STAR if row.computed else "")


def _ratio(row: Row | None) -> str:
    return "" if row is None or row.ratio is None else _times(row.ratio)


def _aligned(line: list[str], widths: list[int]) -> str:
    first, *others = line
    cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
    return "  ".join([f"{first:<{max(widths[0], _WIDEST)}}", *cells]).rstrip()


def _times(ratio: float) -> str:
    """How many times better; a fraction if worse."""
    return f"{number(ratio)}x" if ratio >= 1 or ratio <= 0 else f"1/{number(1 / ratio)}"


def number(value: float) -> str:
    """Three digits, as far as they say something."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
