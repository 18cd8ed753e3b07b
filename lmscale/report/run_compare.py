"""Two runs held against each other: which keys differ, and from which step on their metrics do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmscale.report.run_files import STEP, RunFiles

TOLERANCE = 1.0e-3
"""Relative difference beyond which a value is told as different where the user names none: above what another layout of
the same run makes in fp32 and fp16, below what another seed makes."""
_MEASURED = ("perf/", "memory/", "checkpoint/")
"""Beginnings of the tags that measure a machine, and differ between two starts of one run too."""
_ABSENT = object()


@dataclass(frozen=True)
class KeyDifference:
    """A key that two runs hold different values of, as text; "" where one does not have it."""

    key: str
    one: str
    other: str


@dataclass(frozen=True)
class Pair:
    """Two values of a metric at one step; NaN where the run wrote null."""

    step: int
    one: float
    other: float

    @property
    def difference(self) -> float:
        """|a - b| / max(|a|, |b|); 0 of two that are both not finite, inf where one is."""
        if math.isnan(self.one) or math.isnan(self.other):
            return 0.0 if math.isnan(self.one) and math.isnan(self.other) else math.inf
        largest = max(abs(self.one), abs(self.other))
        return abs(self.one - self.other) / largest if largest else 0.0


@dataclass(frozen=True)
class MetricDifference:
    """A metric of two runs, over the steps at which both have it.

    Attributes:
        tag: of the metric.
        num_steps: in common.
        first: the first step at which it differs at all, None where it never does.
        first_beyond: the first at which it differs by more than the tolerance.
        largest: where it differs most, None without a step in common.
    """

    tag: str
    num_steps: int
    first: Pair | None
    first_beyond: Pair | None
    largest: Pair | None


@dataclass(frozen=True)
class Medians:
    """A measurement of two machines or times, by its median over each run."""

    tag: str
    one: float
    other: float


@dataclass(frozen=True)
class RunComparison:
    """What differs between two runs.

    Attributes:
        config: keys of config.yaml, without output_dir.
        environment: versions, commits, layout, devices, hosts and corpora.
        metrics: of what training computes; those that differ earliest first, then those that do not differ.
        measured: of what the machine did.
        only: tags that one of the runs alone has, and which: 0 or 1.
        tolerance: relative.
    """

    config: list[KeyDifference]
    environment: list[KeyDifference]
    metrics: list[MetricDifference]
    measured: list[Medians]
    only: list[tuple[str, int]]
    tolerance: float

    @property
    def first(self) -> MetricDifference | None:
        """The metric that differs first."""
        return next((each for each in self.metrics if each.first is not None), None)

    @property
    def first_beyond(self) -> MetricDifference | None:
        """The metric that is first beyond the tolerance."""
        found = [each for each in self.metrics if each.first_beyond is not None]
        return min(found, key=lambda each: each.first_beyond.step, default=None)  # type: ignore[union-attr]

    @property
    def num_steps(self) -> int:
        """The most steps that a metric has in common."""
        return max((each.num_steps for each in self.metrics), default=0)


def compare_runs(one: RunFiles, other: RunFiles, tolerance: float = TOLERANCE) -> RunComparison:
    """Compare two runs.

    Args:
        one, other: the runs.
        tolerance: relative; a difference beyond it is told apart from one that is only there.
    """
    both = [tag for tag in one.tags if tag in other.tags]
    trained = [_metric(tag, one, other, tolerance) for tag in both if not tag.startswith(_MEASURED)]
    trained.sort(key=lambda each: math.inf if each.first is None else each.first.step)
    measured = [Medians(tag, *(_median(run, tag) for run in (one, other))) for tag in both if tag.startswith(_MEASURED)]
    tags = (one.tags, other.tags)
    only = [(tag, number) for number in (0, 1) for tag in tags[number] if tag not in tags[1 - number]]
    return RunComparison(
        [each for each in _differences(one.keys, other.keys) if each.key != "output_dir"],
        list(_differences(_environment(one), _environment(other))),
        trained,
        measured,
        only,
        tolerance,
    )


def _metric(tag: str, one: RunFiles, other: RunFiles, tolerance: float) -> MetricDifference:
    values = _by_step(other, tag)
    pairs = [Pair(step, value, values[step]) for step, value in _by_step(one, tag).items() if step in values]
    return MetricDifference(
        tag,
        len(pairs),
        next((pair for pair in pairs if pair.difference > 0), None),
        next((pair for pair in pairs if pair.difference > tolerance), None),
        max(pairs, key=lambda pair: pair.difference, default=None),
    )


def _by_step(run: RunFiles, tag: str) -> dict[int, float]:
    found = {record[STEP]: record[tag] for record in run.records if tag in record}
    return {step: math.nan if value is None else float(value) for step, value in sorted(found.items())}


def _median(run: RunFiles, tag: str) -> float:
    values = [value for value in run.curve(tag).values if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def _environment(run: RunFiles) -> dict[str, Any]:
    return {name: run.manifest.get(name) or {} for name in ("versions", "git", "layout", "device", "hosts", "data")}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[KeyDifference]:
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    for key in dict.fromkeys([*ours, *theirs]):
        values = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if values[0] != values[1]:
            yield KeyDifference(key, *("" if value is _ABSENT else str(value) for value in values))


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings and lists."""
    if isinstance(values, Mapping | list) and values:
        entries = values.items() if isinstance(values, Mapping) else enumerate(values)
        for name, value in entries:
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif key and not (isinstance(values, Mapping) and not values):
        yield key, values
