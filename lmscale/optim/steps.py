"""Steps against samples and tokens, under a batch ramp and a curriculum, without walking the steps.

A run has few stages of constant step size (a ramp at most global_batch_size / start), so every question about steps is
answered by walking the stages, never the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lmscale.optim.batch_ramp import Sizes, StepSize, check_at_least, ramp_border


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of one size; the last stage of a plan does not end."""

    first_step: int
    """The stage's first step, counting from 1."""
    first_sample: int
    """Samples consumed before that step."""
    first_token: int
    """Tokens consumed before that step."""
    size: StepSize
    """Batch and sequence length."""

    @property
    def batch_size(self) -> int:
        """Global batch size in sequences."""
        return self.size.batch_size


@dataclass(frozen=True)
class StepPlan:
    """Which step consumes which samples and tokens. Steps count from 1; 0 stands for the start of the run."""

    stages: tuple[Stage, ...]

    def samples_after(self, step: int) -> int:
        """Return the samples consumed once `step` steps are done; 0 at step 0, strictly increasing.

        Raises:
            ConfigError: if step is negative.
        """
        stage = self.stage_of(step)
        return stage.first_sample + (step - stage.first_step + 1) * stage.size.batch_size

    def tokens_after(self, step: int) -> int:
        """Return the tokens consumed once `step` steps are done; 0 at step 0, strictly increasing.

        Raises:
            ConfigError: if step is negative.
        """
        stage = self.stage_of(step)
        return stage.first_token + (step - stage.first_step + 1) * stage.size.tokens

    def stage_of(self, step: int) -> Stage:
        """Return the stage that a step belongs to; step 0 to the first.

        Raises:
            ConfigError: if step is negative.
        """
        check_at_least(0, "step", step)
        return next((s for s in reversed(self.stages) if s.first_step <= step), self.stages[0])

    def steps_until(self, samples: int) -> int:
        """Return the fewest steps that together consume at least `samples` samples.

        Raises:
            ConfigError: if samples is negative.
        """
        check_at_least(0, "samples", samples)
        return self._until(samples, lambda s: s.first_sample, lambda s: s.size.batch_size)

    def steps_until_tokens(self, tokens: int) -> int:
        """Return the fewest steps that together consume at least `tokens` tokens.

        Raises:
            ConfigError: if tokens is negative.
        """
        check_at_least(0, "tokens", tokens)
        return self._until(tokens, lambda s: s.first_token, lambda s: s.size.tokens)

    def _until(self, amount: int, first: Callable[[Stage], int], each: Callable[[Stage], int]) -> int:
        # What is consumed before a stage's first step belongs to the stages before it.
        stage = next((s for s in reversed(self.stages) if first(s) < amount), self.stages[0])
        return stage.first_step - 1 + _ceil_divide(amount - first(stage), each(stage))


def step_plan(sizes: Sizes) -> StepPlan:
    """Cut a run into stages of constant step size.

    Every step keeps the size that held at its start, so a stage ends with the first step that reaches a border, and a
    stage shorter than one step is passed over. The plan's answers agree with stepping one by one.
    """
    stages = [Stage(1, 0, 0, sizes.at(0, 0))]
    while (steps := _steps_to_border(stages[-1], sizes)) is not None:
        last = stages[-1]
        samples = last.first_sample + steps * last.size.batch_size
        tokens = last.first_token + steps * last.size.tokens
        stages.append(Stage(last.first_step + steps, samples, tokens, sizes.at(samples, tokens)))
    return StepPlan(tuple(stages))


def num_steps(sizes: Sizes, train_tokens: int) -> int:
    """Compute the steps of a run: the last is the first that reaches train_tokens.

    Without ramp and curriculum: ceil(train_tokens / (global_batch_size * seq_length)).
    """
    return step_plan(sizes).steps_until_tokens(train_tokens)


class Step(NamedTuple):
    """What a step reads."""

    first_sample: int
    """Samples consumed before it."""
    batch_size: int
    """Samples of the global batch."""
    seq_length: int
    """Nominal tokens of a sample."""


@dataclass(frozen=True)
class Steps:
    """The steps from a checkpoint to the end of a run, one after the other; can be walked more than once.

    Those that are not to be trained are left out: they consume their samples, which nobody reads.
    """

    sizes: Sizes
    """What decides them."""
    samples: int
    """Samples consumed before the first of them."""
    tokens: int
    """Tokens consumed before the first of them."""
    train_tokens: int
    """The last step is the one that reaches this."""
    done: int = 0
    """Steps before the first of them."""
    skipped: tuple[tuple[int, int], ...] = ()
    """First and last number of the steps that are left out, counting from 1."""

    def __iter__(self) -> Iterator[Step]:
        samples, tokens, number = self.samples, self.tokens, self.done
        while tokens < self.train_tokens:
            size, number = self.sizes.at(samples, tokens), number + 1
            if not any(first <= number <= last for first, last in self.skipped):
                yield Step(samples, size.batch_size, size.seq_length)
            samples, tokens = samples + size.batch_size, tokens + size.tokens


def _steps_to_border(stage: Stage, sizes: Sizes) -> int | None:
    """Count the steps of a stage: until the ramp grows, or a stage of the batch or the curriculum ends."""
    counts = []
    border = ramp_border(stage.first_sample, sizes.batch)
    if border is not None:
        counts.append(_ceil_divide(border - stage.first_sample, stage.size.batch_size))
    ends = [s.until_tokens for s in sizes.batch.stages] + [s.until_tokens for s in sizes.stages]
    ends = [end for end in ends if end > stage.first_token]
    counts += [_ceil_divide(min(ends) - stage.first_token, stage.size.tokens)] if ends else []
    return min(counts) if counts else None


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
