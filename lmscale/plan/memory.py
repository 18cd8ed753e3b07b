"""Bytes of the training state on one rank, by ZeRO stage and precision."""

from __future__ import annotations

from dataclasses import dataclass

from lmscale.errors import ConfigError


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


def zero_bytes(num_parameters: int, dp_size: int, stage: int, precision: str, *, moment_width: int = 8) -> StateBytes:
    """Compute the bytes of N parameters, D data-parallel ranks sharing what the ZeRO stage splits.

        bytes of   stage 0   stage 1            stage 2       stage 3
        parameters  4 N       e N                e N           e N / D
        gradients   4 N       e N (bf16: 6 N)    a N / D       a N / D
        optimizer   w N       (4 + w) N / D      (4 + w) N / D (4 + w) N / D

    with e = 4 in fp32, 2 in bf16 and fp16; a, the width in which micro batches are summed, = 4 in fp32 and bf16, 2 in
    fp16; w = 8 for Adam's two moments, and 0 for SGD and for Adafactor, of which the 4 (m + n) bytes for a matrix of
    m x n, on each rank that updates a part of it, are left out. Stage 1 keeps gradients whole; in bf16 they are summed
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

    Raises:
        ConfigError: for half precision with stage 0, which is not trained (config.layouts).
    Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, sec. 5, whose 16 N are stage 0 in fp16; the sums in fp32
        and the copies are DeepSpeed's.
    """
    if stage == 0 and precision != "fp32":
        raise ConfigError("is trained with ZeRO 1 or more only", field="precision", value=precision)
    width = 4 if precision == "fp32" else 2
    summed_width = 2 if precision == "fp16" else 4
    shard = num_parameters / dp_size
    parameters = width * (shard if stage == 3 else num_parameters)
    whole_gradients = (6 if precision == "bf16" else width) * num_parameters
    gradients = summed_width * shard if stage >= 2 else whole_gradients
    optimizer = (4 + moment_width) * shard if stage else moment_width * num_parameters
    return StateBytes(round(parameters), round(gradients), round(optimizer))
