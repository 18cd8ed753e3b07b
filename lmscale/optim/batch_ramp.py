"""The size of a step, batch times sequence length, as a pure function of the samples and tokens consumed before it."""

from __future__ import annotations

from typing import NamedTuple

from lmscale.config.data import SeqLengthStage
from lmscale.config.optim import BatchConfig
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError


class StepSize(NamedTuple):
    """How much a step consumes."""

    batch_size: int
    """Samples of the global batch."""
    seq_length: int
    """Nominal tokens of a sample: its length, or the encoder's and the decoder's together."""

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.batch_size * self.seq_length


class Sizes(NamedTuple):
    """What decides the sizes of a run's steps."""

    batch: BatchConfig
    """The full batch, its ramp or its stages."""
    seq_length: int
    """Nominal tokens of a sample at full length."""
    stages: tuple[SeqLengthStage, ...] = ()
    """Shorter lengths that come first."""

    def at(self, consumed_samples: int, consumed_tokens: int) -> StepSize:
        """Return the size of the step that starts there."""
        return StepSize(
            batch_size_at(consumed_samples, self.batch, consumed_tokens),
            seq_length_at(consumed_tokens, self.stages, self.seq_length),
        )


def sizes_of(config: RunConfig) -> Sizes:
    """Take from a run what decides the sizes of its steps."""
    return Sizes(config.batch, config.lengths.nominal, tuple(config.data.seq_length_stages))


def batch_size_at(consumed_samples: int, batch: BatchConfig, consumed_tokens: int = 0) -> int:
    """Compute the global batch size, in sequences, of the step that starts at `consumed_samples`.

        ramp:     min(global_batch_size, start + increment * floor(consumed_samples * n / ramp_samples)),
                  n = (global_batch_size - start) / increment
        stages:   that of the first stage whose until_tokens is above consumed_tokens, else global_batch_size

    The ramp is Megatron's rule, in integers: Megatron divides by the float ramp_samples / n, which can round across a
    border.

    Args:
        consumed_samples: samples consumed before the step; a ramp reads them.
        batch: the full batch and its ramp or stages.
        consumed_tokens: tokens consumed before the step; stages read them.

    Raises:
        ConfigError: if either is negative.
    """
    check_at_least(0, "consumed_samples", consumed_samples)
    check_at_least(0, "consumed_tokens", consumed_tokens)
    for stage in batch.stages:
        if consumed_tokens < stage.until_tokens:
            return stage.batch_size
    num_increments = _num_increments(batch)
    if batch.ramp is None or num_increments == 0:
        return batch.global_batch_size
    increments = min(num_increments, consumed_samples * num_increments // batch.ramp.ramp_samples)
    return batch.ramp.start + batch.ramp.increment * increments


def seq_length_at(consumed_tokens: int, stages: tuple[SeqLengthStage, ...], full: int) -> int:
    """Compute the tokens of a sample in the step that starts at `consumed_tokens`.

    That of the first stage whose until_tokens is above consumed_tokens, else the full length.
    """
    return next((stage.seq_length for stage in stages if consumed_tokens < stage.until_tokens), full)


def ramp_border(consumed_samples: int, batch: BatchConfig) -> int | None:
    """Return the fewest consumed samples at which a ramp's batch is larger than here; None where it grows no more."""
    num_increments = _num_increments(batch)
    if batch.ramp is None or batch_size_at(consumed_samples, batch) == batch.global_batch_size:
        return None
    reached = consumed_samples * num_increments // batch.ramp.ramp_samples
    return -(-(reached + 1) * batch.ramp.ramp_samples // num_increments)


def _num_increments(batch: BatchConfig) -> int:
    if batch.ramp is None:
        return 0
    return (batch.global_batch_size - batch.ramp.start) // batch.ramp.increment


def check_at_least(least: int, name: str, value: int) -> None:
    """Check a count.

    Raises:
        ConfigError: if it is below the least.
    """
    if value < least:
        raise ConfigError(f"must be at least {least}", field=name, value=value)
