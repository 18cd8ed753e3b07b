"""The charts of a run's metrics, of one run or of several laid over each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmscale.monitor import metrics
from lmscale.report.charts import Chart, PlacedMark, Series, marks_on
from lmscale.report.marks import Mark
from lmscale.report.run_files import STEP, TOKENS, RunFiles

_GIB = 2.0**30
_STEPS, _TOKENS = "step", "tokens consumed"


@dataclass(frozen=True)
class _Panel:
    """How a metric is drawn."""

    tag: str
    title: str
    y_label: str
    unit: float = 1.0
    is_stepped: bool = False
    may_be_log: bool = False
    starts_at_zero: bool = False


_PANELS = (
    _Panel(metrics.TRAIN_LR, "Learning rate", "learning rate", starts_at_zero=True),
    _Panel(metrics.TRAIN_GLOBAL_BATCH_SIZE, "Batch size", "sequences", is_stepped=True, starts_at_zero=True),
    _Panel(metrics.TRAIN_GRAD_NORM, "Gradient norm, before clipping", "L2 norm", may_be_log=True),
    _Panel(metrics.TRAIN_PARAM_NORM, "Parameter norm", "L2 norm"),
    _Panel(metrics.TRAIN_LOSS_SCALE, "Loss scale", "loss scale", is_stepped=True, may_be_log=True),
    _Panel(metrics.PERF_TOKENS_PER_SECOND, "Throughput, all devices", "tokens/s", starts_at_zero=True),
    _Panel(metrics.PERF_MFU_FRACTION, "Model FLOPs utilization", "% of the peak", 0.01, starts_at_zero=True),
    _Panel(metrics.PERF_STEP_TIME_S, "Step time", "s", starts_at_zero=True),
    _Panel(metrics.PERF_DATA_WAIT_FRACTION, "Waiting for data, worst rank", "% of the time", 0.01, starts_at_zero=True),
    _Panel(metrics.PERF_OWN_TIME_MAX_S, "Own time of a step, slowest rank", "s", starts_at_zero=True),
    _Panel(metrics.PERF_SLOWEST_RANK, "The slowest rank", "rank", is_stepped=True, starts_at_zero=True),
    _Panel(metrics.PERF_BUBBLE_FRACTION, "Pipeline bubble, measured", "% of the time", 0.01, starts_at_zero=True),
    _Panel(metrics.MEMORY_PEAK_BYTES, "Memory, fullest rank, most so far", "GiB", _GIB, starts_at_zero=True),
    _Panel(metrics.CHECKPOINT_STALL_S, "Standing for saves, since the start", "s", starts_at_zero=True),
)
_NOT_DRAWN = {
    metrics.TRAIN_SKIPPED_STEPS,  # marked in every chart
    metrics.PROGRESS_CONSUMED_TOKENS,
    metrics.PERF_TOKENS_PER_SECOND_PER_DEVICE,
    metrics.PERF_MODEL_FLOPS_PER_SECOND_PER_DEVICE,
    metrics.PERF_HFU_FRACTION,
    metrics.PERF_OWN_TIME_MEDIAN_S,
    metrics.CHECKPOINT_FAILED_SAVES,  # too
    metrics.MEMORY_PARAMETER_BYTES,
    metrics.MEMORY_GRADIENT_BYTES,
    metrics.MEMORY_OPTIMIZER_BYTES,
}


def run_charts(runs: Sequence[tuple[str, RunFiles]], marks: Sequence[Mark] = ()) -> Iterator[Chart]:
    """Make the charts of what runs have measured.

    Args:
        runs: with the name of each; one, or several that are laid over each other.
        marks: drawn in every chart over steps or tokens.
    """
    yield from _losses(runs, marks)
    for panel in _PANELS:
        if _is_measured(runs, panel.tag):
            yield _chart(runs, marks, panel)
    for tag in _others(runs):
        unit = next((metric.unit for metric in metrics.METRICS if metric.tag == tag), "")
        yield _chart(runs, marks, _Panel(tag, tag, unit or tag.rpartition("/")[2]))


def held_out_charts(runs: Sequence[tuple[str, RunFiles]], marks: Sequence[Mark] = ()) -> Iterator[Chart]:
    """Make the charts of what was measured on held-out data, a chart for each of its metrics."""
    tags = dict.fromkeys(tag for _, run in runs for tag in run.tags if tag.startswith("valid/"))
    for name in dict.fromkeys(tag.split("/", 2)[-1] for tag in tags):
        if name == "perplexity":  # says what the loss says
            continue
        lines = [tag for tag in tags if tag.split("/", 2)[-1] == name]
        series = [
            Series(_legend(label, runs, tag.split("/")[1]), *_steps_of(run, tag))
            for tag in lines
            for label, run in runs
            if tag in run.tags
        ]
        is_loss = name == "lm_loss"
        title = "Held-out loss" if is_loss else f"Held-out {name}"
        yield Chart(
            _key(f"valid-{name}"), title, _STEPS, "nats/token" if is_loss else name, series, _on_steps(runs, marks)
        )


def _losses(runs: Sequence[tuple[str, RunFiles]], marks: Sequence[Mark]) -> Iterator[Chart]:
    tag = metrics.TRAIN_LM_LOSS
    if not _is_measured(runs, tag):
        return
    by_steps = [Series(name, *_steps_of(run, tag)) for name, run in runs]
    by_tokens = [Series(name, run.curve(tag).tokens, run.curve(tag).values) for name, run in runs]
    unit = "nats/token"
    yield Chart("loss-by-steps", "Training loss by steps", _STEPS, unit, by_steps, _on_steps(runs, marks))
    yield Chart("loss-by-tokens", "Training loss by tokens", _TOKENS, unit, by_tokens, _on_tokens(runs, marks))


def _chart(runs: Sequence[tuple[str, RunFiles]], marks: Sequence[Mark], panel: _Panel) -> Chart:
    series = []
    for name, run in runs:
        if panel.tag in run.tags:
            steps, values = _steps_of(run, panel.tag)
            series.append(Series(name, steps, [value / panel.unit for value in values]))
    return Chart(
        _key(panel.tag),
        panel.title,
        _STEPS,
        panel.y_label,
        series,
        _on_steps(runs, marks),
        panel.is_stepped,
        panel.may_be_log,
        panel.starts_at_zero,
    )


def _others(runs: Sequence[tuple[str, RunFiles]]) -> list[str]:
    """List the tags that have no panel of their own, of which there is more than a point."""
    known = {panel.tag for panel in _PANELS} | _NOT_DRAWN | {metrics.TRAIN_LM_LOSS}
    tags = dict.fromkeys(tag for _, run in runs for tag in run.tags)
    return [
        tag
        for tag in tags
        if tag not in known
        and not tag.startswith(("valid/", "faults/"))
        and max(len(run.curve(tag).values) for _, run in runs) > 1
    ]


def _is_measured(runs: Sequence[tuple[str, RunFiles]], tag: str) -> bool:
    return any(math.isfinite(value) for _, run in runs for value in run.curve(tag).values)


def _steps_of(run: RunFiles, tag: str) -> tuple[list[float], list[float]]:
    curve = run.curve(tag)
    return list(curve.steps), curve.values


def _on_steps(runs: Sequence[tuple[str, RunFiles]], marks: Sequence[Mark]) -> list[PlacedMark]:
    steps = _longest(runs, STEP)
    return marks_on(marks, steps, steps)


def _on_tokens(runs: Sequence[tuple[str, RunFiles]], marks: Sequence[Mark]) -> list[PlacedMark]:
    return marks_on(marks, _longest(runs, STEP), _longest(runs, TOKENS))


def _longest(runs: Sequence[tuple[str, RunFiles]], key: str) -> list[int]:
    longest = max((run for _, run in runs), key=lambda run: run.records[-1][STEP])
    return [record[key] for record in longest.records]


def _legend(label: str, runs: Sequence[tuple[str, RunFiles]], corpus: str) -> str:
    return corpus if len(runs) == 1 else f"{label}, {corpus}"


def _key(tag: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", tag)
