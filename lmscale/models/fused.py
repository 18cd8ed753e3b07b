"""Tensors that hold several matrices: which of their rows belong to which.

megatron-core stores queries, keys and values as one tensor, keys and values of cross-attention too, and gate and up of a
gated feed-forward layer. Initialization and optimizers that look at whole matrices must tell them apart.
"""

from __future__ import annotations

import torch
from torch import nn

_MARK = "lmscale_row_parts"


def mark_row_parts(module: nn.Module, parts: tuple[int, ...]) -> None:
    """Say what the rows of a layer's weight, and of its bias, hold.

    Args:
        module: a parallel linear layer.
        parts: the local rows repeat in periods of sum(parts): of each, the first parts[0] belong to the first matrix, the
            next parts[1] to the second, and so on.
    """
    for parameter in module.parameters(recurse=False):
        if parameter.size(0) % sum(parts):
            raise AssertionError(f"{parameter.size(0)} rows are not periods of {parts}")
        setattr(parameter, _MARK, parts)


def row_parts(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the parts of a parameter's period; empty where it is one matrix."""
    parts: tuple[int, ...] = getattr(parameter, _MARK, ())
    return parts
