"""A chart as inline SVG, drawn by matplotlib, in colours that the page decides, with the data for its hover.

matplotlib is a dependency already, and a page with it needs no network and no bundle of megabytes. It draws with marked
colours (`_COLOURS`), which become CSS variables, so that the same picture reads by day and by night.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

from lmscale.optim.preview import short
from lmscale.report.marks import Mark
from lmscale.report.thinning import MOST_POINTS, thin

_WIDTH, _HEIGHT = 6.4, 2.7
"""Inches, of 72 SVG units each."""
_COLOURS = {"ink": "#010101", "grid": "#020202"} | {f"series-{number}": f"#03030{number}" for number in range(6)}
_MARK_COLOURS = {"milestone": "#040401", "start": "#040402", "skip": "#040403", "fault": "#040404", "first": "#040405"}
_MARK_STYLES: dict[str, dict[str, Any]] = {
    "milestone": {"linestyle": ":", "linewidth": 0.9},
    "start": {"linestyle": "--", "linewidth": 1.2},
    "skip": {"ymax": 0.07, "linewidth": 1.2},  # of which a run may have many
    "fault": {"linestyle": "-.", "linewidth": 1.2},
    "first": {"linestyle": "--", "linewidth": 1.2},
}
_MOST_TEXTS = 3
"""Of marks in one place."""
NUM_COLOURS = 6
"""Series that have a colour of their own."""
_LOG_FROM = 100.0
"""Ratio of largest to smallest from which a chart of positive values has a logarithmic axis, where it may."""


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the legend.
        x: where; growing.
        y: NaN leaves a gap.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


class PlacedMark(NamedTuple):
    """A mark on an axis."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart before it is drawn.

    Attributes:
        key: its name in the page, for ids: letters, digits, - and _.
        title: above it.
        x_label, y_label: with units.
        series: at least one point in all.
        marks: drawn as lines across, those of a kind together.
        is_stepped: a value holds until the next.
        may_be_log: a wide range of positive values gets a logarithmic axis.
        starts_at_zero: the vertical axis does.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[PlacedMark] = field(default=())
    is_stepped: bool = False
    may_be_log: bool = False
    starts_at_zero: bool = False


def marks_on(marks: Sequence[Mark], steps: Sequence[int], xs: Sequence[float]) -> list[PlacedMark]:
    """Place marks on an axis.

    Args:
        marks: by step.
        steps: of the run's records.
        xs: where those are on the axis.

    Returns:
        Those within the records; one for each kind and place that can be told from others, with the texts of the first.
    """
    placed: dict[tuple[int, str], list[tuple[float, str]]] = {}
    for mark in marks:
        if steps and mark.step <= steps[-1]:
            x = _interpolated(mark.step, steps, xs)
            place = int(MOST_POINTS * x / xs[-1]) if xs[-1] else 0
            placed.setdefault((place, mark.kind), []).append((x, mark.text))
    return [PlacedMark(found[0][0], kind, _joined([text for _, text in found])) for (_, kind), found in placed.items()]


def _joined(texts: Sequence[str]) -> str:
    left = len(texts) - _MOST_TEXTS
    return "; ".join([*texts[:_MOST_TEXTS], *([f"and {left:,} more"] if left > 0 else [])])


def _interpolated(step: int, steps: Sequence[int], xs: Sequence[float]) -> float:
    from bisect import bisect_left

    place = bisect_left(steps, step)
    if place == 0:
        return xs[0] * step / steps[0] if steps[0] else xs[0]
    low, high = steps[place - 1], steps[place]
    return xs[place - 1] + (xs[place] - xs[place - 1]) * (step - low) / (high - low)


def figure(chart: Chart) -> str:
    """Draw a chart as an HTML figure: SVG, legend, a place for the value under the pointer, and the data of that."""
    thinned = [
        (line.name, [line.x[index] for index in kept], [line.y[index] for index in kept])
        for line in chart.series
        for kept in [thin(line.y)]
    ]
    svg, data = _draw(chart, thinned)
    legend = "".join(
        f'<span class="key"><i style="background:var(--series-{number % NUM_COLOURS})"></i>{escape(name)}</span>'
        for number, (name, _, _) in enumerate(thinned)
        if len(thinned) > 1
    )
    return (
        f'<figure class="chart" id="{chart.key}"><figcaption>{escape(chart.title)}</figcaption>'
        f'{svg}<div class="under">{legend}<output></output></div>'
        f'<script type="application/json">{_json(data)}</script></figure>'
    )


def _json(data: Any) -> str:
    """Write JSON that may stand inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _draw(chart: Chart, lines: list[tuple[str, list[float], list[float]]]) -> tuple[str, dict[str, Any]]:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    ink, grid = _COLOURS["ink"], _COLOURS["grid"]
    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.key,  # ids of the same picture stay, and differ from those of others in the page
        "svg.image_inline": True,
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.edgecolor": grid,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": grid,
        "grid.linewidth": 0.5,
        "path.simplify": False,
    }
    with matplotlib.rc_context(look):
        drawing = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", facecolor="none")
        axes = drawing.subplots()
        axes.set_facecolor("none")
        axes.grid(True)
        axes.spines[["top", "right"]].set_visible(False)
        style: dict[str, Any] = {"drawstyle": "steps-pre"} if chart.is_stepped else {}
        for number, (_, x, y) in enumerate(lines):
            dotted: dict[str, Any] = {"marker": "o", "markersize": 3} if len(x) < 30 else {}
            colour = _COLOURS[f"series-{number % NUM_COLOURS}"]
            axes.plot(x, y, color=colour, linewidth=1.3, gid=f"curve-{chart.key}-{number}", **style, **dotted)
        _scale(axes, chart, [value for _, _, y in lines for value in y if math.isfinite(value)])
        _draw_marks(axes, chart)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        drawing.draw_without_rendering()  # lays the axes out, so that data have places
        data = _places(axes, chart, lines)
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(text.getvalue(), chart), data


def _scale(axes: Any, chart: Chart, values: list[float]) -> None:
    if chart.may_be_log and values and min(values) > 0 and max(values) / min(values) >= _LOG_FROM:
        axes.set_yscale("log")
    elif chart.starts_at_zero:
        axes.set_ylim(bottom=0)


def _draw_marks(axes: Any, chart: Chart) -> None:
    """Draw the marks of a kind as one: a thousand lines of their own would take a minute."""
    from matplotlib.collections import LineCollection

    for kind in dict.fromkeys(mark.kind for mark in chart.marks):
        style = dict(_MARK_STYLES[kind])
        top = style.pop("ymax", 1.0)
        lines = [[(mark.x, 0.0), (mark.x, top)] for mark in chart.marks if mark.kind == kind]
        across = axes.get_xaxis_transform()
        gid = f"mark-{chart.key}-{kind}"
        drawn = LineCollection(lines, colors=_MARK_COLOURS[kind], transform=across, gid=gid, zorder=1, **style)
        axes.add_collection(drawn, autolim=False)
    axes.update_datalim([(mark.x, 0.0) for mark in chart.marks], updatey=False)
    axes.autoscale_view(scaley=False)


def _tick(value: float) -> str:
    if abs(value) < 1000:
        return f"{value:.4g}"
    text = short(abs(value))
    return ("-" if value < 0 else "") + text[:-1].rstrip("0").rstrip(".") + text[-1]


def _places(axes: Any, chart: Chart, lines: list[tuple[str, list[float], list[float]]]) -> dict[str, Any]:
    """Return what the hover needs: the lines' values, and where their x are in SVG units."""
    scale = 72.0 / axes.figure.dpi
    box = axes.get_window_extent()
    height = _HEIGHT * 72.0
    series = []
    for name, x, y in lines:
        places = axes.transData.transform([(value, axes.get_ylim()[0]) for value in x]) if x else []
        series.append(
            {
                "name": name,
                "x": [_rounded(value) for value in x],
                "y": [_rounded(value) if math.isfinite(value) else None for value in y],
                "at": [round(float(place[0]) * scale, 1) for place in places],
            }
        )
    return {
        "x": chart.x_label,
        "top": round(height - box.y1 * scale, 1),
        "bottom": round(height - box.y0 * scale, 1),
        "series": series,
        "marks": [
            [round(float(axes.transData.transform((mark.x, axes.get_ylim()[0]))[0]) * scale, 1), mark.text]
            for mark in chart.marks
        ],
    }


def _rounded(value: float) -> float | int:
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")


def _themed(svg: str, chart: Chart) -> str:
    """Cut an SVG file down to its element, and give its marked colours to the page's variables."""
    svg = svg[svg.index("<svg") :]
    for name, colour in (_COLOURS | _MARK_COLOURS).items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    # Groups' own names repeat from picture to picture; an id may stand once in a page.
    svg = re.sub(r' id="(figure|axes|patch|matplotlib\.axis|xtick|ytick|text|line2d|PathCollection)_\d+"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(chart.title, quote=True)}"', 1)
