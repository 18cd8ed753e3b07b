"""The global batch size, and from it the number of steps, as pure functions of the samples consumed.

A ramp has few stages (at most global_batch_size / start), so every question about steps is answered by walking the
stages, never the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmscale.config.optim import BatchConfig
from lmscale.errors import ConfigError


def batch_size_at(consumed_samples: int, batch: BatchConfig) -> int:
    """Compute the global batch size, in sequences, of the step that starts at `consumed_samples`.

        min(global_batch_size, start + increment * floor(consumed_samples * n / ramp_samples)),
        n = (global_batch_size - start) / increment

    Megatron's rule, in integers: Megatron divides by the float ramp_samples / n, which can round across a border.

    Args:
        consumed_samples: samples consumed before the step.
        batch: the full batch and its ramp.

    Raises:
        ConfigError: if consumed_samples is negative.
    """
    _check_at_least(0, "consumed_samples", consumed_samples)
    num_increments = _num_increments(batch)
    if batch.ramp is None or num_increments == 0:
        return batch.global_batch_size
    increments = min(num_increments, consumed_samples * num_increments // batch.ramp.ramp_samples)
    return batch.ramp.start + batch.ramp.increment * increments


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of one batch size; the last stage of a plan does not end."""

    first_step: int
    """The stage's first step, counting from 1."""
    first_sample: int
    """Samples consumed before that step."""
    batch_size: int
    """Global batch size in sequences."""


@dataclass(frozen=True)
class StepPlan:
    """Which step consumes which samples. Steps count from 1; 0 stands for the start of the run."""

    stages: tuple[Stage, ...]

    def samples_after(self, step: int) -> int:
        """Return the samples consumed once `step` steps are done; 0 at step 0, strictly increasing.

        Raises:
            ConfigError: if step is negative.
        """
        _check_at_least(0, "step", step)
        stage = next((s for s in reversed(self.stages) if s.first_step <= step), self.stages[0])
        return stage.first_sample + (step - stage.first_step + 1) * stage.batch_size

    def steps_until(self, samples: int) -> int:
        """Return the fewest steps that together consume at least `samples` samples.

        Raises:
            ConfigError: if samples is negative.
        """
        _check_at_least(0, "samples", samples)
        # A stage's first_sample is consumed by the stages before it: a demand of exactly that many belongs to them.
        stage = next((s for s in reversed(self.stages) if s.first_sample < samples), self.stages[0])
        return stage.first_step - 1 + _ceil_divide(samples - stage.first_sample, stage.batch_size)

    def steps_until_tokens(self, tokens: int, seq_length: int) -> int:
        """Return the fewest steps that together consume at least `tokens` tokens, of `seq_length` in each sample."""
        return self.steps_until(_ceil_divide(tokens, seq_length))


def step_plan(batch: BatchConfig) -> StepPlan:
    """Cut a run into stages of constant batch size.

    Every step keeps the size that held at its start, so a stage ends with the first step that reaches its border, and
    a stage shorter than one step is passed over. `samples_after` and `steps_until` agree with stepping one by one.
    """
    stages = [Stage(1, 0, batch_size_at(0, batch))]
    while stages[-1].batch_size < batch.global_batch_size:
        last = stages[-1]
        steps = _ceil_divide(_next_border(last.first_sample, batch) - last.first_sample, last.batch_size)
        first_sample = last.first_sample + steps * last.batch_size
        stages.append(Stage(last.first_step + steps, first_sample, batch_size_at(first_sample, batch)))
    return StepPlan(tuple(stages))


def num_steps(batch: BatchConfig, seq_length: int, train_tokens: int) -> int:
    """Compute the steps of a run: the last is the first that reaches train_tokens.

    Without a ramp: ceil(train_tokens / (global_batch_size * seq_length)).

    Args:
        batch: the full batch and its ramp.
        seq_length: tokens of a sample.
        train_tokens: tokens to consume.
    """
    return step_plan(batch).steps_until_tokens(train_tokens, seq_length)


def progress_at_step(step: int, batch: BatchConfig) -> int:
    """Return the samples consumed once `step` steps are done."""
    return step_plan(batch).samples_after(step)


def _num_increments(batch: BatchConfig) -> int:
    if batch.ramp is None:
        return 0
    return (batch.global_batch_size - batch.ramp.start) // batch.ramp.increment


def _next_border(consumed_samples: int, batch: BatchConfig) -> int:
    """Return the fewest consumed samples at which the batch is larger than at `consumed_samples`."""
    assert batch.ramp is not None
    num_increments, ramp_samples = _num_increments(batch), batch.ramp.ramp_samples
    reached = consumed_samples * num_increments // ramp_samples
    return _ceil_divide((reached + 1) * ramp_samples, num_increments)


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ConfigError(f"must be at least {least}", field=name, value=value)
