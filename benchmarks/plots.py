"""From results to pictures, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import machine
from benchmarks.report import number
from benchmarks.results import GroupResults, Measured, Results, Row

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW_TO_HAVE_THEM: Final = "no plots: matplotlib is not installed; `pip install matplotlib`, then --render draws them"
_COLOURS: Final = {
    "msharefs, thp": "#1f5fa8",
    "msharefs, hugetlb": "#1a8a4a",
    "msharefs, 4k": "#7fb2e5",
    "multiprocessing.shared_memory": "#c8501e",
    "memfd + mmap": "#8c8c8c",
    "msharefs, a mapped file": "#1f5fa8",
    "mmap of the file": "#c8501e",
    "read() into fresh memory": "#8c8c8c",
    "msharefs, thp, again": "#7fb2e5",
    "msharefs, hugetlb, again": "#8fd0aa",
    "a message to each, the same region": "#e2a03f",
    "a message to each, shm": "#c8501e",
}
_OTHERS: Final = ("#7b4fa3", "#b58900", "#2a9d8f", "#d1495b", "#5c677d", "#8d6b4f")
_WIDTH, _HEIGHT, _COLUMNS = 4.6, 3.2, 3
_APART: Final = 1.9
"""How many times larger the next number on a logarithmic axis must be, so that both can be read."""
_MOST: Final = 6
"""Panels of bars, above which they share one."""
_SETTINGS: Final[Any] = {
    "font.size": 9,
    "svg.hashsalt": "benchmarks",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: Results, directory: Path) -> list[Path]:
    """Draw every picture; the files. Raises ImportError where matplotlib is missing."""
    import matplotlib as mpl

    mpl.use("svg")
    found = []
    with mpl.rc_context(_SETTINGS):
        for group in results.groups:
            for name, metrics in group.pictures.items():
                panels = [each for metric in metrics for each in group.measured if each.metric.name == metric]
                panels = [each for each in panels if each.rows]
                if panels:
                    path = directory / f"{name}.svg"
                    _figure(group, panels, results).savefig(path, metadata={"Date": None}, bbox_inches="tight")
                    found.append(path)
    return found


def _figure(group: GroupResults, panels: list[Measured], results: Results) -> Figure:
    from matplotlib.figure import Figure

    if len(panels) > _MOST and not any(panel.metric.over for panel in panels):
        figure = Figure((2 * _WIDTH, 0.5 * len(panels) + 1.2), layout="constrained")
        _calls(figure.add_subplot(), panels)
    else:
        columns = min(len(panels), _COLUMNS if len(panels) != 4 else 2)
        rows = -(-len(panels) // columns)
        figure = Figure((_WIDTH * columns, _HEIGHT * rows + 0.8), layout="constrained")
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            (_lines if panel.metric.over else _bars)(axes, panel)
            axes.set_title(_wrapped(panel.metric.heading), fontsize=9)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(map(str, labels), lines, strict=True))
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    quick = "; a quick run" if results.quick else ""
    figure.suptitle(f"{group.compares}\n{machine.one_line(results.machine)}{quick}", fontsize=10)
    return figure


def _lines(axes: Axes, measured: Measured) -> None:
    """A line for each series; dashed and hollow where it is computed."""
    colours = _colours(list(measured.series))
    for name, rows in measured.series.items():
        shown = [row for row in rows if row.median > 0 or "y" not in measured.metric.log]
        sure = [row for row in shown if not row.computed]
        more = [*sure[-1:], *(row for row in shown if row.computed)]
        style: dict[str, Any] = {"color": colours[name], "marker": "o", "markersize": 4}
        axes.plot(*_medians(sure), label=name, **style)
        axes.fill_between(
            [row.at for row in sure],
            [row.least for row in sure],
            [row.most for row in sure],
            color=colours[name],
            alpha=0.15,
            linewidth=0,
        )
        if len(more) > 1:
            axes.plot(*_medians(more), linestyle="--", markerfacecolor="white", label=f"{name}, computed", **style)
    metric = measured.metric
    axes.set_xlabel(_wrapped(metric.over))
    axes.set_ylabel(metric.unit)
    if "x" in metric.log:
        axes.set_xscale("log")
    if "y" in metric.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    ticks = _ticks(measured.places, least_ratio=_APART if "x" in metric.log else 1)
    axes.set_xticks(ticks, [number(place) for place in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)


def _bars(axes: Axes, measured: Measured) -> None:
    """A bar for each series, with the spread."""
    rows = measured.rows[::-1]
    names = [row.series for row in rows]
    colours = _colours([row.series for row in measured.rows])
    medians = [row.median for row in rows]
    spread = [[row.median - row.least for row in rows], [row.most - row.median for row in rows]]
    axes.barh(names, medians, xerr=spread, color=[colours[name] for name in names], height=0.6, ecolor="#333333")
    for place, row in enumerate(rows):
        axes.annotate(number(row.median), (row.most, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_xlabel(measured.metric.unit)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.7, max(2.7, len(rows) - 0.3))
    axes.tick_params(axis="y", labelsize=8, length=0)


def _calls(axes: Axes, panels: list[Measured]) -> None:
    """A group of bars for each of many metrics of one unit, on a logarithmic axis."""
    series = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = _colours(series)
    height = 0.8 / len(series)
    for index, name in enumerate(series):
        found = [(place, panel.series[name][0].median) for place, panel in enumerate(panels) if name in panel.series]
        places = [-place - index * height for place, _ in found]
        bars = axes.barh(places, [median for _, median in found], height, color=colours[name], label=name)
        axes.bar_label(bars, [number(median) for _, median in found], padding=3, fontsize=8)
    axes.set_yticks([-place - 0.4 + height / 2 for place in range(len(panels))], [each.metric.name for each in panels])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axes.set_xlabel(f"{panels[0].metric.unit}, median")
    axes.tick_params(axis="y", length=0)


def _ticks(places: list[float], least_ratio: float) -> list[float]:
    """Places that have room for their number on the axis, the last first."""
    found: list[float] = []
    for place in reversed(places):
        if not found or found[-1] >= place * least_ratio:
            found.append(place)
    return found


def _medians(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row.at for row in rows], [row.median for row in rows]


def _colours(names: list[str]) -> dict[str, str]:
    """The colour that a series always has, or the next one."""
    others = iter(_OTHERS * len(names))
    return {name: _COLOURS.get(name) or next(others) for name in names}


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 52))
