"""What a run's schedules will do, step by step, before it starts: `lmscale preview`. Pure arithmetic, without torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lmscale.config.check import CROSS_SECTION_RULES, dp_size_of
from lmscale.config.run import RunConfig
from lmscale.optim.batch_ramp import sizes_of
from lmscale.optim.lr import check_cooldown, lr_at, weight_decay_at
from lmscale.optim.steps import StepPlan, step_plan

_NUM_POINTS = 400


@dataclass(frozen=True)
class Point:
    """A step and what holds in it."""

    step: int
    """Counting from 1."""
    consumed_samples: int
    """After the step."""
    consumed_tokens: int
    """After the step."""
    lr: float
    """Rate of its update."""
    batch_size: int
    """Sequences."""
    seq_length: int
    """Nominal tokens of a sample."""
    weight_decay: float
    """Of its update."""


@dataclass(frozen=True)
class Preview:
    """The course of a run."""

    steps: int
    """Optimizer steps, from the start to train_tokens or stop_at_step."""
    samples: int
    """Samples that they consume."""
    tokens: int
    """Tokens that they consume."""
    milestones: tuple[tuple[str, Point], ...]
    """What happens, at the first step at which it holds, in order."""
    points: tuple[Point, ...]
    """Some hundred steps from the first to the last, those around milestones among them."""

    def as_json(self) -> dict[str, Any]:
        """Return the preview as objects, lists and numbers."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "tokens": self.tokens,
            "milestones": [{"what": what, **asdict(point)} for what, point in self.milestones],
            "points": [asdict(point) for point in self.points],
        }


def short(count: float) -> str:
    """Write a count with four digits: 375.1M, 12.00B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:#.4g}".rstrip(".") + name
    return f"{count:.4g}"


def preview(config: RunConfig) -> Preview:
    """Compute the course of a run from its start. It walks the stages of the run, not its steps.

    Raises:
        ConfigError: if the run's sections contradict each other, or its batches cannot be divided into micro batches.
    """
    for rule in CROSS_SECTION_RULES:
        rule(config)
    dp_size_of(config, config.parallel.tp_size * config.parallel.pp_size)
    check_cooldown(config.optim, config.train.train_tokens)
    plan = step_plan(sizes_of(config))
    total = plan.steps_until_tokens(config.train.train_tokens)
    last = min(total, config.train.stop_at_step or total)
    found = sorted(((step, what) for what, step in _events(config, plan) if 1 <= step < last), key=lambda item: item[0])
    events = [(1, "first step"), *found, (last, "last step" if last == total else "train.stop_at_step")]
    spread = {1 + (last - 1) * number // (_NUM_POINTS - 1) for number in range(_NUM_POINTS)}
    around = {near for step, _ in events for near in (step - 1, step, step + 1) if 1 <= near <= last}
    return Preview(
        last,
        plan.samples_after(last),
        plan.tokens_after(last),
        tuple((what, _point(step, config, plan)) for step, what in events),
        tuple(_point(step, config, plan) for step in sorted(spread | around)),
    )


def _point(step: int, config: RunConfig, plan: StepPlan) -> Point:
    tokens, size = plan.tokens_after(step), plan.stage_of(step).size
    clock = (tokens, config.optim, config.train.train_tokens)
    rates = lr_at(*clock), weight_decay_at(*clock)
    return Point(step, plan.samples_after(step), tokens, rates[0], size.batch_size, size.seq_length, rates[1])


def _events(config: RunConfig, plan: StepPlan) -> Iterator[tuple[str, int]]:
    """Yield (what happens, the first step at which it does), also of what the run does not reach."""
    optim, until = config.optim, plan.steps_until_tokens
    if optim.lr_warmup_tokens:
        yield "warm-up ends", until(optim.lr_warmup_tokens)
    yield from _size_events(config, plan)
    end = optim.lr_decay_tokens or config.train.train_tokens
    # An event after T tokens is felt by the step that goes beyond them.
    if optim.lr_decay_style == "wsd" and optim.lr_cooldown is None:
        yield "cooldown begins", until(end - (optim.lr_cooldown_tokens or 0) + 1)
    if optim.lr_decay_style not in ("constant", "inverse_sqrt") and optim.lr_cooldown is None:
        yield "decay ends", until(end)
    for name, part in (("cooldown", optim.lr_cooldown), ("re-warm-up", optim.lr_rewarmup)):
        if part is not None:
            yield f"{name} begins", until(part.start_tokens + 1)
            yield f"{name} ends", until(part.start_tokens + part.tokens)


def _size_events(config: RunConfig, plan: StepPlan) -> Iterator[tuple[str, int]]:
    full = config.batch.global_batch_size
    for one, other in itertools.pairwise(plan.stages):
        if one.size.batch_size != other.size.batch_size:
            if other.size.batch_size == full:
                yield f"batch ramp ends: {full:,}", other.first_step
            elif config.batch.ramp is None:
                yield f"batch: {other.size.batch_size:,}", other.first_step
        if one.size.seq_length != other.size.seq_length:
            yield f"length {other.size.seq_length:,}", other.first_step
