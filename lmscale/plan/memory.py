"""Bytes of the training state on one rank, by ZeRO stage and precision."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from lmscale.config.model import ModelConfig
from lmscale.config.optim import OptimConfig
from lmscale.errors import ConfigError
from lmscale.plan.activations import StepShape, activation_bytes
from lmscale.plan.names import fused_rows, is_layer_matrix, parameter_shapes
from lmscale.plan.stages import StageSize, stage_parameters


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds of the training state."""

    parameters: int
    """What forward and backward read."""
    gradients: int
    """What is kept from one micro batch to the next."""
    optimizer: int
    """Moments, and the fp32 master weights where the parameters are not that themselves."""

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.parameters + self.gradients + self.optimizer


def zero_bytes(
    num_parameters: int,
    dp_size: int,
    stage: int,
    precision: str,
    *,
    moment_width: float = 8,
    num_trainable: int | None = None,
) -> StateBytes:
    """Compute the bytes of N parameters, D data-parallel ranks sharing what the ZeRO stage splits.

        bytes of   stage 0   stage 1            stage 2       stage 3
        parameters  4 N       e N                e N           e N / D
        gradients   4 N       e N (bf16: 6 N)    a N / D       a N / D
        optimizer   w N       (4 + w) N / D      (4 + w) N / D (4 + w) N / D

    with e = 4 in fp32, 2 in bf16 and fp16; a, the width in which micro batches are summed, = 4 in fp32 and bf16, 2 in
    fp16; w is what `moment_width` says. Stage 1 keeps gradients whole; in bf16 they are summed
    into fp32 copies beside the bf16 ones (2 + 4). From stage 1 on the master weights are copies, in fp32 too. Left out:
    alignment of the flat buffers (some 100 bytes a parameter group), parameters below
    `stage3_param_persistence_threshold`, which stage 3 keeps whole, and the buckets of `reduce_bucket_size` elements
    that gradients pass through.

    Args:
        num_parameters: of this rank's part of the model, before ZeRO, rows of padding included.
        dp_size: data-parallel ranks.
        stage: ZeRO stage.
        precision: fp32, bf16 or fp16.
        moment_width: w, bytes that the optimizer keeps for each parameter.
        num_trainable: N of gradients and optimizer, where some parameters are frozen; left out, all of them.

    Raises:
        ConfigError: for half precision with stage 0, which is not trained (config.layouts).
    Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, sec. 5, whose 16 N are stage 0 in fp16; the sums in fp32
        and the copies are DeepSpeed's.
    """
    if stage == 0 and precision != "fp32":
        raise ConfigError("is trained with ZeRO 1 or more only", field="precision", value=precision)
    width = 4 if precision == "fp32" else 2
    summed_width = 2 if precision == "fp16" else 4
    trainable = num_parameters if num_trainable is None else num_trainable
    shard = trainable / dp_size
    parameters = width * num_parameters / (dp_size if stage == 3 else 1)
    whole_gradients = (6 if precision == "bf16" else width) * trainable
    gradients = summed_width * shard if stage >= 2 else whole_gradients
    optimizer = (4 + moment_width) * shard if stage else moment_width * trainable
    return StateBytes(round(parameters), round(gradients), round(optimizer))


FRAGMENTATION = 0.05
"""Share of all other bytes that is set aside for what the allocator cannot use."""
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's defaults of reduce_bucket_size and stage3_max_live_parameters, in elements."""


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes on one device at the peak of a step, by kind."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    """What DeepSpeed communicates through, as far as it is not there when the activations are gone."""
    allowance: int
    """For fragmentation: a fixed share of the rest."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        held = self.parameters + self.gradients + self.optimizer + self.activations
        return held + self.logits + self.buffers + self.allowance


def device_bytes(
    model: ModelConfig,
    step: StepShape,
    *,
    dp_size: int,
    zero_stage: int,
    stage: int,
    moment_width: float = 8,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    size: StageSize | None = None,
    reduce_bucket: int = REDUCE_BUCKET,
    live_parameters: int = LIVE_PARAMETERS,
) -> DeviceBytes:
    """Compute what one device of a pipeline stage holds at the peak of a step.

    Model states by `zero_bytes` of the stage's parameters, activations by `plan.activations`; buffers by
    `_buffer_bytes`. What is offloaded to the host counts nothing here.

    Args:
        model: the architecture.
        step: sizes and kernels.
        dp_size: data-parallel ranks.
        zero_stage: ZeRO stage.
        stage: the pipeline stage, from 0.
        moment_width: bytes that the optimizer keeps for each parameter.
        offload_optimizer: moments and master weights are in host memory.
        offload_param: the partitions of parameters are in host memory.
        size: what the stage holds and trains; left out, all of the model's part, and all of it.
        reduce_bucket: zero_optimization.reduce_bucket_size, elements.
        live_parameters: zero_optimization.stage3_max_live_parameters, elements.

    Raises:
        ConfigError: for what `zero_bytes` refuses, or layers that do not divide over the stages.
    """
    whole = stage_parameters(model, step.tp_size, step.pp_size)[stage]
    size = size or StageSize(whole, whole)
    states = zero_bytes(
        size.held, dp_size, zero_stage, step.precision, moment_width=moment_width, num_trainable=size.trained
    )
    alive = activation_bytes(model, step, stage)
    activations = alive["layers"] + alive["embedding"] + alive["wire"]
    in_backward, in_update = _buffer_bytes(size, dp_size, zero_stage, step, reduce_bucket, live_parameters)
    buffers = max(in_backward, in_update - activations - alive["logits"])
    parameters = 0 if offload_param else states.parameters
    gradients = 0 if offload_optimizer and zero_stage >= 2 else states.gradients
    optimizer = 0 if offload_optimizer else states.optimizer
    held = parameters + gradients + optimizer + activations + alive["logits"] + buffers
    return DeviceBytes(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=alive["logits"],
        buffers=buffers,
        allowance=round(FRAGMENTATION * held),
    )


def _buffer_bytes(
    size: StageSize, dp_size: int, zero_stage: int, step: StepShape, reduce_bucket: int, live_parameters: int
) -> tuple[int, int]:
    """Return bytes of communication buffers during the backward pass, and during reduction and update after it."""
    sums_later = zero_stage == 1 and step.precision == "bf16"  # DeepSpeed's BF16_Optimizer
    if zero_stage == 0 or sums_later:
        return 0, 4 * min(size.trained, reduce_bucket) if dp_size > 1 else 0
    shard = 4 * size.trained // dp_size
    if zero_stage < 3:
        bucket = reduce_bucket * (4 if zero_stage == 1 else step.width)
        return (0, bucket + shard) if step.pp_size > 1 else (bucket, shard)
    return step.width * (reduce_bucket + min(size.held, live_parameters)), shard


def moment_width(optim: OptimConfig, model: ModelConfig) -> float:
    """Return the bytes of an optimizer's fp32 moments for a parameter, on average over the model."""
    if optim.name in ("muon", "adafactor"):
        return _mean_width(_Moments.of(optim), model)
    return moment_bytes(optim, model, "", ())


@dataclass(frozen=True)
class _Moments:
    """What of an optimizer's settings decides its moments' size; it can be a key, as an OptimConfig cannot."""

    optimizer: str
    has_momentum: bool
    has_first: bool
    min_dim: int

    @classmethod
    def of(cls, optim: OptimConfig) -> _Moments:
        return cls(optim.name, optim.sgd_momentum > 0, optim.adafactor_beta1 > 0, optim.adafactor_min_dim)

    def width(self, model: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
        if self.optimizer == "sgd":
            return 4 if self.has_momentum else 0
        if self.optimizer == "adafactor":
            return self._second_moment(model, name, shape) + (4 if self.has_first else 0)
        is_single = self.optimizer == "lion" or (self.optimizer == "muon" and is_layer_matrix(name, len(shape)))
        return 4 if is_single else 8

    def _second_moment(self, model: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
        rows = fused_rows(model, name, shape[0])
        if len(shape) != 2 or min(*rows, shape[1]) < self.min_dim:
            return 4
        return 4 * (shape[0] + len(rows) * shape[1]) / math.prod(shape)


@functools.lru_cache
def _mean_width(moments: _Moments, model: ModelConfig) -> float:
    """Average over a model's parameters; kept, since a search asks for every layout, and large models have thousands."""
    shapes = parameter_shapes(model)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(counts[name] * moments.width(model, name, shape) for name, shape in shapes.items())
    return total / sum(counts.values())


def moment_bytes(optim: OptimConfig, model: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
    """Return the bytes of an optimizer's fp32 moments for each number of a parameter.

    Adam 8; Lion 4; SGD 4 with momentum, else 0; Muon 4 for the matrices of the transformer layers and 8 for the rest;
    Adafactor 4 (m + p n) / (m n) for a tensor [m, n] of p matrices that it factors and 4 for others, and 4 more with
    adafactor_beta1. Every rank that updates a part of a factored matrix holds its statistics; the formula counts them once.

    Args:
        optim: the optimizer.
        model: the architecture.
        name: logical name of the parameter.
        shape: its logical shape.
    """
    return _Moments.of(optim).width(model, name, shape)
