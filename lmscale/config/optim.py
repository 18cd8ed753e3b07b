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


class BatchStage(Section):
    """Steps of one batch size."""

    batch_size: int = Field(gt=0)
    """Sequences of an optimizer step."""
    until_tokens: int = Field(gt=0)
    """Consumed tokens, from the start of the run, at which the next stage begins."""


class BatchConfig(Section):
    """Batch sizes in sequences."""

    micro_batch_size: int = Field(gt=0, le=100_000_000)
    """Sequences that one data-parallel rank computes at a time."""
    global_batch_size: int = Field(gt=0, le=100_000_000)
    """Sequences of an optimizer step, over all ranks and micro batches."""
    ramp: RampConfig | None = None
    """Grow to global_batch_size from a smaller batch by equal increments (Megatron's form)."""
    stages: list[BatchStage] = []
    """Batch sizes that come before global_batch_size, in order; the other form of a ramp. Without both, the batch is
    constant."""


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


CooldownStyle = Literal["linear", "cosine", "one_minus_sqrt", "exponential"]


class CooldownConfig(Section):
    """An end of the schedule that is put on later, from any checkpoint."""

    start_tokens: int = Field(ge=0)
    """Consumed tokens at which it begins, at the rate that the schedule has there: those of the checkpoint."""
    tokens: int = Field(gt=0)
    """Its tokens; the run ends with it or later."""
    style: CooldownStyle = "linear"
    """Its shape, as of lr_cooldown_style."""
    end_lr: float | None = Field(None, ge=0)
    """Rate at its end and after; left out, min_lr."""


class RewarmupConfig(Section):
    """A second warm-up, after a change: of the batch, the layout or whatever else unsettles the optimizer."""

    start_tokens: int = Field(gt=0)
    """Consumed tokens at which the rate falls: those of the checkpoint."""
    tokens: int = Field(gt=0)
    """Tokens after which the rate is the schedule's again."""
    fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the schedule's rate at which it begins."""


REGEX_PREFIX = "re:"


class GroupConfig(Section):
    """A rule that gives some parameters settings of their own. The first rule that matches a parameter decides."""

    name: str = Field(min_length=1)
    """What the table of groups calls it."""
    match: str = Field(min_length=1)
    """A glob over the whole logical names of parameters, which checkpoints show (layers.0.mlp.linear_fc1.weight); its *
    takes dots too. With re: before it, a regular expression, found anywhere in the name. A rule that takes no parameter
    of the model is an error."""
    lr_multiplier: float = Field(1.0, gt=0)
    """The rate is this times the schedule's."""
    weight_decay_multiplier: float = Field(1.0, ge=0)
    """The decay is this times optim.weight_decay; biases and norms keep none, unless optim.decay_biases_and_norms."""
    frozen: bool = False
    """Do not train these: no gradients, no optimizer state."""


class OptimConfig(Section):
    """The optimizer and the rate's schedule, on the clock of consumed tokens."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """adamw: Adam with decoupled weight decay; adam: with the decay added to the gradient (L2); sgd: gradient descent, with
    the decay added to the gradient; adafactor: T5's, with second moments factored into rows and columns;
    lion: the sign of a momentum, decoupled decay; muon: the orthogonalized momentum for the matrices of the transformer
    layers, AdamW for embeddings, head, norms and biases. The rules are in docs/optimizers.md."""
    implementation: Literal["auto", "apex", "deepspeed", "torch"] = "auto"
    """Whose code updates, for adamw and adam: NVIDIA's apex (a GPU), DeepSpeed (CPU Adam for state in host memory, or its
    fused Adam, compiled at its first use), torch (its fused kernel; lmscale's own form where torch has none). The others
    have one implementation. auto: DeepSpeed's for state in host memory, apex's on a GPU where it is installed, else
    torch's. The choice and its reason are printed."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Rate at the end of the decay or cooldown and after; the least rate of inverse_sqrt."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices and embeddings; of biases and norms with decay_biases_and_norms only."""
    weight_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight_decay moves to weight_decay_end over train.train_tokens."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end of the run; with weight_decay_style linear or cosine."""
    decay_biases_and_norms: bool = False
    """Decay parameters of fewer than two dimensions too, as fairseq did for RoBERTa and BART."""
    groups: list[GroupConfig] = []
    """Settings of their own for parameters that are named; the others are decayed or not by the two keys above."""
    sgd_momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd; 0 keeps no buffer."""
    sgd_nesterov: bool = False
    """Nesterov's momentum, with sgd_momentum above 0 only."""
    lion_beta1: float = Field(0.9, ge=0, lt=1)
    """Share of the momentum in lion's update."""
    lion_beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of lion's momentum."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of muon's momentum."""
    muon_nesterov: bool = True
    """Nesterov's momentum for muon."""
    muon_steps: int = Field(5, gt=0)
    """Newton-Schulz iterations of an orthogonalization."""
    muon_scale: Literal["adamw", "original"] = "adamw"
    """Scale of the update of a matrix [m, n]: adamw, 0.2 sqrt(max(m, n)), the size of an AdamW update, so that one lr
    serves both kinds of parameters; original, sqrt(max(1, m / n))."""
    muon_precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the iterations, and the type in which matrices are sent to the rank that does them."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment. The adam_ keys: adamw, adam, and the AdamW part of muon."""
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
    adafactor_beta1: float = Field(0.0, ge=0, lt=1)
    """Decay of a first moment of the updates, which costs a number for each parameter; 0: none, as T5."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled so that their global L2 norm is at most this; 0 turns clipping off."""
    lr_warmup_tokens: int = Field(0, ge=0)
    """Tokens of the warm-up."""
    lr_warmup_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of train.train_tokens that is the warm-up, in the place of lr_warmup_tokens."""
    lr_warmup_style: Literal["linear", "constant"] = "linear"
    """linear: the rate rises from 0, and the first step's is above it; constant: it is lr from the first step on. Read with
    lr_warmup_tokens above 0 only."""
    lr_decay_tokens: int | None = Field(None, gt=0)
    """Tokens, counted from the start of the run, at which the decay ends at min_lr; left out, train.train_tokens."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse_sqrt", "polynomial", "wsd"] = "cosine"
    """Shape of the decay after the warm-up; inverse_sqrt: lr sqrt(lr_warmup_tokens / tokens), which has no end; polynomial:
    (1 - x)^lr_decay_power; wsd: warm-up, stable, decay: lr until the last lr_cooldown_tokens."""
    lr_decay_power: float = Field(1.0, gt=0)
    """Power of polynomial; 1 is linear."""
    lr_cooldown_tokens: int | None = Field(None, gt=0)
    """Tokens of the decay of wsd, which ends at lr_decay_tokens; required there."""
    lr_cooldown_style: CooldownStyle = "linear"
    """Shape of the decay of wsd: 1 - x, (1 + cos(pi x)) / 2, 1 - sqrt(x), or 2 / 2^x - 1 (Megatron's exponential)."""
    lr_cooldown: CooldownConfig | None = None
    """Cool down from a checkpoint, whatever the schedule was; it takes the schedule's place from its start on."""
    lr_rewarmup: RewarmupConfig | None = None
    """Warm up again after a change; it multiplies the schedule's rate."""
