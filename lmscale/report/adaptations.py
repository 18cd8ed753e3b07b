"""Several ways to adapt a model to one task, side by side: quality on each set, parameters, memory, time."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.errors import DataError

FULL = "full"
"""The method that the others are held against."""
Results = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean and its standard deviation (of the sample; 0 of a single one)."""

    mean: float
    deviation: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Take it over some values."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class MethodRow:
    """What a method came to, over its seeds.

    Attributes:
        name: as the user named it.
        sets: the deciding metric on each set, by name.
        trainable, total: parameters.
        peak_bytes: of the fullest rank.
        seconds: of training.
        seeds: how many.
    """

    name: str
    sets: dict[str, Spread]
    trainable: int
    total: int
    peak_bytes: float
    seconds: float
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """The methods of one task, best on dev (or the first set) first.

    Attributes:
        metric: that decides.
        domains: in or out, of each set by name, in order.
        rows: of the methods.
    """

    metric: str
    domains: dict[str, str]
    rows: list[MethodRow]

    @property
    def full(self) -> MethodRow | None:
        """The row of full fine-tuning."""
        return next((row for row in self.rows if row.name == FULL), None)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON holds it."""
        return {
            "metric": self.metric,
            "domains": self.domains,
            "methods": {
                row.name: {
                    "sets": {name: {"mean": s.mean, "deviation": s.deviation} for name, s in row.sets.items()},
                    "trainable_parameters": row.trainable,
                    "total_parameters": row.total,
                    "peak_bytes": row.peak_bytes,
                    "seconds": row.seconds,
                    "seeds": row.seeds,
                }
                for row in self.rows
            },
        }


def read_results(path: Path) -> Results:
    """Read a run's results.json.

    Raises:
        DataError: if there is none, or it is none of ours.
    """
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        results["metric"], results["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError("holds no results of a task", field=str(path), remedy="run lmscale train on it first") from None
    return results


def compare(runs: Iterable[tuple[str, Results]]) -> Comparison:
    """Put runs side by side; those of one name are seeds of one method.

    Raises:
        DataError: if they are of different tasks: the metric or the sets differ.
    """
    by_name: dict[str, list[Results]] = {}
    for name, results in runs:
        by_name.setdefault(name, []).append(results)
    first = next(iter(by_name.values()))[0]
    domains = {name: split["domain"] for name, split in first["splits"].items()}
    for name, each in by_name.items():
        for results in each:
            theirs = {split: values["domain"] for split, values in results["splits"].items()}
            if results["metric"] != first["metric"] or theirs != domains:
                raise DataError("is of another task: its metric or its sets differ", field=name)
    rows = [_row(name, each, first["metric"]) for name, each in by_name.items()]
    leading = next(iter(domains), None)
    if leading is not None:
        rows.sort(key=lambda row: -row.sets[leading].mean)
    return Comparison(first["metric"], domains, rows)


def _row(name: str, seeds: list[Results], metric: str) -> MethodRow:
    sets = {split: Spread.of([results["splits"][split][metric] for results in seeds]) for split in seeds[0]["splits"]}
    return MethodRow(
        name,
        sets,
        seeds[0]["trainable_parameters"],
        seeds[0]["total_parameters"],
        max(results["peak_bytes"] for results in seeds),
        statistics.fmean(results["seconds"] for results in seeds),
        len(seeds),
    )


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of text: each set's metric, out of domain also less that of full fine-tuning."""
    columns = ["method"]
    for name, domain in comparison.domains.items():
        columns.append(f"{name} ({domain})")
        columns += ["less full"] if domain == "out" and comparison.full else []
    columns += ["trained", "share", "peak MB", "seconds", "seeds"]
    rows = []
    for row in comparison.rows:
        cells = [row.name]
        for name, domain in comparison.domains.items():
            cells.append(str(row.sets[name]))
            if domain == "out" and comparison.full:
                cells.append(f"{row.sets[name].mean - comparison.full.sets[name].mean:+.3f}")
        cells += [f"{row.trainable:,}", f"{row.trainable / row.total:.3%}"]
        rows.append([*cells, f"{row.peak_bytes / 2**20:,.0f}", f"{row.seconds:.1f}", str(row.seeds)])
    return columns, rows


def markdown(comparison: Comparison) -> str:
    """Render the table for a document."""
    columns, rows = table(comparison)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plot(comparison: Comparison, path: Path) -> None:
    """Draw the metric of each set against the share of parameters that is trained."""
    import matplotlib

    matplotlib.use("Agg")  # no display is asked for
    from matplotlib import pyplot

    count = max(1, len(comparison.domains))
    figure, panels = pyplot.subplots(1, count, figsize=(4.5 * count, 4.0), layout="constrained", squeeze=False)
    for panel, (name, domain) in zip(panels[0], comparison.domains.items(), strict=True):
        for row in comparison.rows:
            spread = row.sets[name]
            share = max(row.trainable / row.total, 1.0e-9)
            panel.errorbar(share, spread.mean, yerr=spread.deviation, fmt="o", capsize=3)
            panel.annotate(row.name, (share, spread.mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        panel.set(xscale="log", xlabel="share of parameters trained", title=f"{name} ({domain} domain)")
        values = [row.sets[name].mean for row in comparison.rows]
        if values and all(map(math.isfinite, values)):
            panel.margins(x=0.25, y=0.15)
    panels[0][0].set_ylabel(comparison.metric)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
