"""What the planner says of a run beside what the run has measured."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError, LmscaleError
from lmscale.monitor import metrics
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.adapted_size import stage_sizes
from lmscale.plan.candidates import Candidate
from lmscale.plan.device_types import DEVICE_TYPES, DeviceType, reported_type
from lmscale.plan.memory import DeviceBytes, StateBytes, device_bytes, moment_width, zero_bytes
from lmscale.plan.run_memory import chosen_layout, size
from lmscale.plan.step_time import predict_step_seconds
from lmscale.report.run_files import PROGRESS, STEP, STEP_TIMES, Json, RunFiles


@dataclass(frozen=True)
class PlannedRow:
    """A quantity, planned and measured.

    Attributes:
        what: with where it was measured.
        planned, measured: with their units.
        ratio: measured / planned; NaN where one is missing.
    """

    what: str
    planned: str
    measured: str
    ratio: float


def planned_rows(run: RunFiles) -> tuple[list[PlannedRow], str]:
    """Compare a run with its plan.

    Returns:
        (rows, a line on what the plan was made for).

    Raises:
        LmscaleError: if the run's config or its layout cannot be read.
    """
    config, layout = run.config, run.section("layout")
    if not isinstance(config, RunConfig):
        raise config
    if not all(isinstance(layout.get(name), int) for name in ("dp_size", "zero_stage")):
        raise ConfigError("has no layout with dp_size and zero_stage", field="manifest.json")
    kind = _device_type(run)
    candidate = chosen_layout(
        config, _zero(config, layout), layout["dp_size"], device_type="cpu" if kind == DEVICE_TYPES["cpu"] else "cuda"
    )
    rows = [*_times(run, config, candidate, kind), *_memory(run, config, candidate)]
    name = "a device that the planner does not know" if kind is None else kind.name
    if kind == DEVICE_TYPES["cpu"]:
        name = "cpu: a core of an ordinary machine, not calibrated"
    return rows, f"{candidate}, on {name}"


def _device_type(run: RunFiles) -> DeviceType | None:
    device = run.section("device")
    if device.get("type") == "cpu":
        return DEVICE_TYPES["cpu"]
    return reported_type(device["name"], device["memory_bytes"]) if {"name", "memory_bytes"} <= device.keys() else None


def _zero(config: RunConfig, layout: dict[str, int]) -> ZeroChoice:
    """Read the run's DeepSpeed keys; where their file is not here, the manifest knows the stage."""
    try:
        return check_deepspeed(load_deepspeed(config.deepspeed), config)
    except LmscaleError:
        return ZeroChoice(stage=layout["zero_stage"])


def _times(run: RunFiles, config: RunConfig, candidate: Candidate, kind: DeviceType | None) -> Iterator[PlannedRow]:
    seconds = _full_size_median(run, config, metrics.PERF_STEP_TIME_S)
    rate = _full_size_median(run, config, metrics.PERF_TOKENS_PER_SECOND)
    tokens = config.batch.global_batch_size * config.lengths.nominal
    predicted = math.nan
    if kind is not None:
        predicted = _predicted_seconds(config, candidate, kind)
    yield _row("step time, s", predicted, seconds, "{:.4g}")
    yield _row("tokens a second", tokens / predicted, rate, "{:,.0f}")
    stages, micro_batches = candidate.step.pp_size, candidate.step.num_micro_batches
    measured = run.extra(STEP_TIMES).get("bubble_fraction")
    if stages > 1:
        ideal = (stages - 1) / (micro_batches + stages - 1)
        found = math.nan if measured is None else float(measured)
        yield _row(f"pipeline bubble, (p - 1) / (m + p - 1), p = {stages}, m = {micro_batches}", ideal, found, "{:.3f}")


def _predicted_seconds(config: RunConfig, candidate: Candidate, kind: DeviceType) -> float:
    try:
        return predict_step_seconds(
            config.model,
            candidate.step,
            kind,
            dp_size=candidate.dp_size,
            zero_stage=candidate.zero.stage,
            moment_width=moment_width(config.optim, config.model),
            offload_optimizer=candidate.zero.offload_optimizer,
            offload_param=candidate.zero.offload_param,
        ).total
    except ConfigError:  # a precision that the table of devices does not have
        return math.nan


def _full_size_median(run: RunFiles, config: RunConfig, tag: str) -> float:
    """Take the median over the last start's records of full batch size and length, without the first, which warms up.

    A record is over the steps behind the one before: what these have consumed tells their batch size and length.
    """
    full, length = config.batch.global_batch_size, config.lengths.nominal
    values = []
    for before, record in itertools.pairwise(each for each in _of_last_start(run) if each.get(tag) is not None):
        steps, samples, tokens = (record[key] - before[key] for key in PROGRESS)
        if samples == full * steps and tokens == length * samples:
            values.append(record[tag])
    return statistics.median(values) if values else math.nan


def _of_last_start(run: RunFiles) -> list[Json]:
    """List the records of the start that the plan is for: those before it may be of another layout."""
    begun = run.manifest.get("resume_step") or 0
    return [record for record in run.records if record[STEP] > begun]


def _memory(run: RunFiles, config: RunConfig, candidate: Candidate) -> Iterator[PlannedRow]:
    stages = range(candidate.step.pp_size)
    states = [_states(config, candidate, stage) for stage in stages]
    for tag, kind in (
        (metrics.MEMORY_PARAMETER_BYTES, "parameters"),
        (metrics.MEMORY_GRADIENT_BYTES, "gradients"),
        (metrics.MEMORY_OPTIMIZER_BYTES, "optimizer"),
    ):
        yield _bytes_row(f"{kind}, of the rank with most", max(getattr(each, kind) for each in states), run, tag)
    peak = max(_device_bytes(config, candidate, stage) for stage in stages)
    is_cpu = run.section("device").get("type") == "cpu"
    what = "peak of the process, interpreter and libraries included" if is_cpu else "peak, of the rank with most"
    yield _bytes_row(what, peak, run, metrics.MEMORY_PEAK_BYTES)


def _states(config: RunConfig, candidate: Candidate, stage: int) -> StateBytes:
    step = candidate.step
    held = stage_sizes(config.model, config.optim, adaptation_of(config), step.tp_size, step.pp_size)[stage]
    return zero_bytes(
        held.held,
        candidate.dp_size,
        candidate.zero.stage,
        step.precision,
        moment_width=moment_width(config.optim, config.model),
        num_trainable=held.trained,
    )


def _device_bytes(config: RunConfig, candidate: Candidate, stage: int) -> int:
    """Predict the peak of a step, without what is set aside for fragmentation."""
    step = candidate.step
    planned: DeviceBytes = device_bytes(
        config.model,
        step,
        dp_size=candidate.dp_size,
        zero_stage=candidate.zero.stage,
        stage=stage,
        moment_width=moment_width(config.optim, config.model),
        offload_optimizer=candidate.zero.offload_optimizer,
        offload_param=candidate.zero.offload_param,
        reduce_bucket=candidate.zero.reduce_bucket,
        live_parameters=candidate.zero.live_parameters,
        size=stage_sizes(config.model, config.optim, adaptation_of(config), step.tp_size, step.pp_size)[stage],
    )
    return planned.total - planned.allowance


def _bytes_row(what: str, planned: int, run: RunFiles, tag: str) -> PlannedRow:
    found = (record.get(tag) for record in _of_last_start(run))
    measured = max((value for value in found if value is not None and math.isfinite(value)), default=math.nan)
    shown = "not measured" if math.isnan(measured) else size(measured)
    return PlannedRow(what, size(planned), shown, measured / planned if planned else math.nan)


def _row(what: str, planned: float, measured: float, form: str) -> PlannedRow:
    shown = ["" if math.isnan(value) else form.format(value) for value in (planned, measured)]
    return PlannedRow(what, shown[0] or "not known", shown[1] or "not measured", measured / planned)
