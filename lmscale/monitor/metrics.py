"""What a run reports: the tags, their units, how they are reduced over ranks, and the record that carries them.

The x axis of every tag is the step. A loss has a twin whose x axis is the consumed tokens, so that runs of different
batch sizes can be laid over each other: train/lm_loss_by_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TRAIN_LM_LOSS = "train/lm_loss"
TRAIN_GRAD_NORM = "train/grad_norm"
TRAIN_PARAM_NORM = "train/param_norm"
TRAIN_LR = "train/lr"
TRAIN_LOSS_SCALE = "train/loss_scale"
TRAIN_GLOBAL_BATCH_SIZE = "train/global_batch_size"
TRAIN_SKIPPED_STEPS = "train/skipped_steps"
PERF_TOKENS_PER_SECOND = "perf/tokens_per_second"
PERF_TOKENS_PER_SECOND_PER_DEVICE = "perf/tokens_per_second_per_device"
PERF_MODEL_FLOPS_PER_SECOND_PER_DEVICE = "perf/model_flops_per_second_per_device"
PERF_MFU_FRACTION = "perf/mfu_fraction"
PERF_HFU_FRACTION = "perf/hfu_fraction"
PERF_STEP_TIME_S = "perf/step_time_s"
PERF_DATA_WAIT_FRACTION = "perf/data_wait_fraction"
PERF_OWN_TIME_MAX_S = "perf/own_time_max_s"
PERF_OWN_TIME_MEDIAN_S = "perf/own_time_median_s"
PERF_SLOWEST_RANK = "perf/slowest_rank"
PERF_BUBBLE_FRACTION = "perf/bubble_fraction"
MEMORY_PEAK_BYTES = "memory/peak_bytes"
MEMORY_PARAMETER_BYTES = "memory/parameter_bytes"
MEMORY_GRADIENT_BYTES = "memory/gradient_bytes"
MEMORY_OPTIMIZER_BYTES = "memory/optimizer_bytes"
CHECKPOINT_STALL_S = "checkpoint/stall_s"
CHECKPOINT_FAILED_SAVES = "checkpoint/failed_saves"
PROGRESS_CONSUMED_TOKENS = "progress/consumed_tokens"
FAULTS_SKIP = "faults/skip"
FAULTS_REWIND = "faults/rewind"
FAULTS_STOP = "faults/stop"
FAULTS_NOTED = "faults/noted"
FAULTS_NON_FINITE = "faults/non_finite"
FAULTS_LOSS_SPIKE = "faults/loss_spike"
FAULTS_GRAD_NORM_SPIKE = "faults/grad_norm_spike"
FAULTS_OVERFLOW_STORM = "faults/overflow_storm"

BY_TOKENS_SUFFIX = "_by_tokens"


@dataclass(frozen=True)
class Metric:
    """A tag's meaning."""

    tag: str
    unit: str
    over_ranks: Literal["same", "sum", "max"]
    """How ranks combine: the same everywhere; a sum over data-parallel ranks (a loss as sum and count, divided once);
    the maximum, where the slowest or fullest rank decides."""
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric(TRAIN_LM_LOSS, "nats/token", "sum", "mean cross entropy of the counted labels of the step's global batch"),
    Metric(TRAIN_GRAD_NORM, "", "same", "global L2 norm of the gradient before clipping"),
    Metric(TRAIN_PARAM_NORM, "", "same", "global L2 norm of the parameters"),
    Metric(TRAIN_LR, "", "same", "learning rate of the step"),
    Metric(TRAIN_LOSS_SCALE, "", "same", "loss scale of the step, fp16 only"),
    Metric(TRAIN_GLOBAL_BATCH_SIZE, "sequences", "same", "global batch size of the step"),
    Metric(TRAIN_SKIPPED_STEPS, "steps", "same", "steps without an update: overflows, faults, train.skip_steps"),
    Metric("valid/<corpus>/lm_loss", "nats/token", "sum", "mean cross entropy on a held-out corpus"),
    Metric("valid/<corpus>/perplexity", "", "same", "exp of that"),
    Metric(PERF_TOKENS_PER_SECOND, "tokens/s", "same", "tokens trained in the window over its time"),
    Metric(PERF_TOKENS_PER_SECOND_PER_DEVICE, "tokens/s", "same", "the same, over the number of devices"),
    Metric(PERF_MODEL_FLOPS_PER_SECOND_PER_DEVICE, "FLOP/s", "same", "tokens/s per device x model FLOPs per token"),
    Metric(PERF_MFU_FRACTION, "", "same", "model FLOP/s per device over the device's peak"),
    Metric(PERF_HFU_FRACTION, "", "same", "the same with recomputation counted"),
    Metric(PERF_STEP_TIME_S, "s", "same", "mean time of a step in the window, evaluation and saving left out"),
    Metric(PERF_DATA_WAIT_FRACTION, "", "max", "share of the window's time spent waiting for data"),
    Metric(PERF_OWN_TIME_MAX_S, "s", "max", "time of a step without waiting for others, of the slowest rank"),
    Metric(
        PERF_OWN_TIME_MEDIAN_S,
        "s",
        "same",
        "the same, of the rank in the middle; with monitor.step_times, as all of these",
    ),
    Metric(PERF_SLOWEST_RANK, "", "same", "the rank of perf/own_time_max_s"),
    Metric(
        PERF_BUBBLE_FRACTION,
        "",
        "same",
        "share of the pipeline's time in which a rank computes nothing, mean over ranks",
    ),
    Metric(MEMORY_PEAK_BYTES, "bytes", "max", "most device memory allocated so far"),
    Metric(MEMORY_PARAMETER_BYTES, "bytes", "max", "weights that forward and backward read; with the first record"),
    Metric(MEMORY_GRADIENT_BYTES, "bytes", "max", "the most gradients held in the first update; with the first record"),
    Metric(MEMORY_OPTIMIZER_BYTES, "bytes", "max", "moments and fp32 master weights; with the first record"),
    Metric(CHECKPOINT_STALL_S, "s", "max", "time that training has stood for saves since this start"),
    Metric(CHECKPOINT_FAILED_SAVES, "saves", "same", "saves that have failed since this start"),
    Metric(PROGRESS_CONSUMED_TOKENS, "tokens", "same", "consumed samples x nominal length"),
    Metric(
        FAULTS_SKIP,
        "updates",
        "same",
        "withheld by the fault policy so far; with the record of a fault, as all of these",
    ),
    Metric(FAULTS_REWIND, "rewinds", "same", "to a checkpoint so far; with the first record behind it"),
    Metric(FAULTS_STOP, "stops", "same", "1 where the policy ends the run"),
    Metric(FAULTS_NOTED, "faults", "same", "about which nothing was to be done, so far"),
    Metric(
        FAULTS_NON_FINITE, "", "same", "there where the step's loss or gradient norm is not finite, itself never finite"
    ),
    Metric(FAULTS_LOSS_SPIKE, "", "same", "robust z-score of the step's loss, where it is a spike"),
    Metric(FAULTS_GRAD_NORM_SPIKE, "", "same", "robust z-score of the step's gradient norm, where it is a spike"),
    Metric(FAULTS_OVERFLOW_STORM, "steps", "same", "that overflowed, where they are a storm"),
)


def valid_loss_tag(corpus: str) -> str:
    """Name the held-out loss of a corpus."""
    return f"valid/{corpus}/lm_loss"


def valid_perplexity_tag(corpus: str) -> str:
    """Name the held-out perplexity of a corpus."""
    return f"valid/{corpus}/perplexity"


def valid_corpus(tag: str) -> str | None:
    """Return the corpus of a held-out loss's tag, or None for any other tag."""
    parts = tag.split("/")
    return parts[1] if len(parts) == 3 and parts[0] == "valid" and parts[2] == "lm_loss" else None


@dataclass(frozen=True)
class Record:
    """The metrics of one step, and how far the run is at its end."""

    step: int
    """Optimizer steps done, skipped ones included."""
    consumed_samples: int
    consumed_tokens: int
    values: Mapping[str, float] = field(default_factory=dict)
    """Tag to value, in the tag's unit."""

    def scalars(self) -> dict[str, float]:
        """Return the values with progress/consumed_tokens, which every record has."""
        return {**self.values, PROGRESS_CONSUMED_TOKENS: self.consumed_tokens}


@dataclass(frozen=True)
class Point:
    """One value of one curve."""

    tag: str
    value: float
    axis: Literal["step", "samples", "tokens"]
    x: int


def has_token_twin(tag: str) -> bool:
    """Say whether a tag is a loss, which is also drawn by tokens (train/loss_scale is not one)."""
    return tag.endswith("loss")


def points(record: Record) -> list[Point]:
    """List a record's points: every tag by step, every loss by tokens too."""
    scalars = record.scalars()
    by_step = [Point(tag, value, "step", record.step) for tag, value in scalars.items()]
    by_tokens = [
        Point(tag + BY_TOKENS_SUFFIX, value, "tokens", record.consumed_tokens)
        for tag, value in scalars.items()
        if has_token_twin(tag)
    ]
    return by_step + by_tokens
