"""Batch, optimizer, schedules and loss scale."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lmscale.config.base import Section


class RampConfig(Section):
    """Batch-size ramp: start, then one increment more after every equal share of ramp_samples."""

    start: int = Field(gt=0)
    """Global batch size of the first step, in sequences."""
    increment: int = Field(gt=0)
    """Sequences added at each stage."""
    ramp_samples: int = Field(gt=0)
    """Samples consumed when the full batch is reached."""


class BatchConfig(Section):
    """Batch sizes in sequences."""

    micro_batch_size: int = Field(gt=0)
    """Sequences that one data-parallel rank computes at a time."""
    global_batch_size: int = Field(gt=0)
    """Sequences of an optimizer step, over all ranks and micro batches."""
    ramp: RampConfig | None = None
    """Grow to global_batch_size from a smaller batch; left out, the batch is constant."""


class LossScaleConfig(Section):
    """Dynamic loss scaling; fp16 only."""

    initial: int = Field(65536, gt=0)
    """First scale, a power of two."""
    window: int = Field(1000, gt=0)
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = Field(2, gt=0)
    """Overflows that are borne before the scale is halved."""
    minimum: int = Field(1, gt=0)
    """Lowest scale; an overflow at it stops the run."""


class OptimConfig(Section):
    """The optimizer and the rate's schedule, on the clock of consumed tokens."""

    name: Literal["adamw", "sgd", "adafactor"] = "adamw"
    """adamw: Adam with decoupled weight decay; sgd: plain gradient descent with decoupled weight decay; adafactor: T5's,
    with second moments factored into rows and columns, without momentum."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Rate at the end of the decay and after; the least rate of inverse_sqrt."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices and embeddings; biases and norms are not decayed."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(1.0e-8, gt=0)
    """Added to the root of the second moment."""
    adam_eps_mode: Literal["corrected", "raw"] = "corrected"
    """corrected: eps is added behind the bias correction (the paper, torch); raw: before it (fairseq's RoBERTa and BART).
    Read with adam_bias_correction: true only; without a correction there is no difference."""
    adam_bias_correction: bool = True
    """Correct the moments for their start at zero; BERT did not."""
    adafactor_decay_exponent: float = Field(0.8, gt=0, le=1)
    """The second moments' decay at the t-th update is 1 - t^-exponent. This and the following: adafactor only."""
    adafactor_eps1: float = Field(1.0e-30, gt=0)
    """Added to squared gradients."""
    adafactor_eps2: float = Field(1.0e-3, gt=0)
    """Least scale of a parameter."""
    adafactor_clip: float = Field(1.0, gt=0)
    """An update is scaled down so that its root mean square is at most this, before the rate."""
    adafactor_scale_parameter: bool = True
    """Multiply the rate by each parameter's root mean square."""
    adafactor_min_dim: int = Field(128, gt=0)
    """Matrices whose smaller dimension is below this keep their second moment whole."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled so that their global L2 norm is at most this; 0 turns clipping off."""
    lr_warmup_tokens: int = Field(0, ge=0)
    """Tokens of the warm-up."""
    lr_warmup_style: Literal["linear", "constant"] = "linear"
    """linear: the rate rises from 0, and the first step's is above it; constant: it is lr from the first step on. Read with
    lr_warmup_tokens above 0 only."""
    lr_decay_tokens: int | None = Field(None, gt=0)
    """Tokens, counted from the start of the run, at which the decay ends at min_lr; left out, train.train_tokens."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Shape of the decay after the warm-up; inverse_sqrt: lr sqrt(lr_warmup_tokens / tokens), which has no end."""
