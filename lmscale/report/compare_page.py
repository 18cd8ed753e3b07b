"""A comparison of two runs in words and tables, on the console and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from lmscale.report.charts import figure
from lmscale.report.marks import Mark
from lmscale.report.page import page, paragraph, table
from lmscale.report.run_charts import held_out_charts, run_charts
from lmscale.report.run_compare import KeyDifference, Pair, RunComparison
from lmscale.report.run_files import RunFiles

Table = tuple[str, list[str], list[list[str]]]
"""A title, columns, rows."""


def names_of(one: RunFiles, other: RunFiles) -> tuple[str, str]:
    """Call two runs by their directories' names, or by more where those are the same."""
    if one.name != other.name:
        return one.name, other.name
    return str(one.directory), str(other.directory)


def verdict(found: RunComparison) -> list[str]:
    """Say in sentences where two runs first differ."""
    if not found.num_steps:
        return ["The runs have no metric of a step in common: compare runs of the same train.log_interval."]
    first, beyond = found.first, found.first_beyond
    if first is None or first.first is None:
        return [f"No metric differs, bit for bit, at the {found.num_steps:,} steps that both runs have."]
    lines = [f"First difference: step {first.first.step:,}, {first.tag}: {_values(first.first)}."]
    if beyond is None or beyond.first_beyond is None:
        lines.append(f"No metric differs by more than {found.tolerance:g} (relative).")
    else:
        pair = beyond.first_beyond
        lines.append(f"First beyond {found.tolerance:g} (relative): step {pair.step:,}, {beyond.tag}: {_values(pair)}.")
    return lines


def tables(found: RunComparison, names: tuple[str, str]) -> list[Table]:
    """Put what differs into tables; those without a row are left out."""
    columns = [
        "metric",
        "steps in common",
        "first differs",
        f"first beyond {found.tolerance:g}",
        "most, relative",
        "at",
    ]
    rows = [
        [
            each.tag,
            f"{each.num_steps:,}",
            "never" if each.first is None else f"{each.first.step:,}",
            "never" if each.first_beyond is None else f"{each.first_beyond.step:,}",
            "" if each.largest is None else f"{each.largest.difference:.2g}",
            "" if each.largest is None or not each.largest.difference else f"{each.largest.step:,}",
        ]
        for each in found.metrics
    ]
    medians = [[each.tag, f"{each.one:.6g}", f"{each.other:.6g}"] for each in found.measured]
    every: list[Table] = [
        ("Config", ["key", *names], _keys(found.config)),
        ("Environment", ["", *names], _keys(found.environment)),
        ("Metrics", columns, rows),
        ("Measured, medians", ["", *names], medians),
        ("In one run alone", ["metric", "run"], [[tag, names[number]] for tag, number in found.only]),
    ]
    return [each for each in every if each[2]]


def compare_page(one: RunFiles, other: RunFiles, found: RunComparison) -> str:
    """Render the comparison as HTML, with the runs' curves laid over each other."""
    names = names_of(one, other)
    runs = list(zip(names, (one, other), strict=True))
    marks = _first_marks(found)
    charts = [*run_charts(runs, marks), *held_out_charts(runs, marks)]
    curves = f'<div class="charts">{"".join(figure(chart) for chart in charts)}</div>'
    sections = [(title, table(columns, rows, _numbers(title))) for title, columns, rows in tables(found, names)]
    lead = "".join(map(paragraph, verdict(found)))
    note = paragraph("Dashed: the step of the first difference beyond the tolerance.", "soft") if marks else ""
    return page(f"{names[0]} and {names[1]}", lead, [("Curves", note + curves), *sections])


def _first_marks(found: RunComparison) -> list[Mark]:
    beyond = found.first_beyond
    if beyond is None or beyond.first_beyond is None:
        return []
    return [Mark(beyond.first_beyond.step, "first", f"{beyond.tag} is first beyond {found.tolerance:g}")]


def _keys(differences: Sequence[KeyDifference]) -> list[list[str]]:
    return [[each.key, each.one or "(none)", each.other or "(none)"] for each in differences]


def _numbers(title: str) -> Sequence[int]:
    return {"Metrics": (1, 2, 3, 4, 5), "Measured, medians": (1, 2)}.get(title, ())


def _values(pair: Pair) -> str:
    return f"{pair.one!r} and {pair.other!r}"
