"""Normalization that knows about sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lmscale.models.context import ModelContext


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the hidden dimension, by the model's config.

    megatron-core's own wrapper refuses sequence parallelism without Transformer Engine. Under it each tensor-parallel
    rank sees its part of the sequence, so these parameters' gradients are partial sums: they are marked
    `sequence_parallel`, and `models.build` sums them over the tensor-parallel group.

    `row_bias`, where it is put, adds to the rows of a batch.

    Shapes: input and output [..., h].

    Args:
        context: what the layers share.
        is_split: False where every rank sees the whole sequence even under sequence parallelism.
    """

    def __init__(self, context: ModelContext, is_split: bool = True):
        super().__init__()
        is_split = is_split and context.sequence_parallel
        hidden_size = context.model.hidden_size
        self.eps = context.model.norm_eps
        self._apex = _apex_functions() if context.apex_norms else None
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = is_split  # type: ignore[attr-defined]
        if context.model.normalization == "layernorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size))
            self.bias.sequence_parallel = is_split  # type: ignore[attr-defined]
        else:
            self.register_parameter("bias", None)
        self.register_module("row_bias", None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        out = self._normalized(hidden)
        return out if self.row_bias is None else out + self.row_bias()

    def _normalized(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._apex is not None:
            layer_norm, rms_norm = self._apex
            if self.bias is None:
                return rms_norm(hidden, self.weight, self.weight.shape, self.eps)
            return layer_norm(hidden, self.weight, self.bias, self.weight.shape, self.eps)
        if self.bias is None:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


def _apex_functions() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Import apex's layer norm and RMS norm, which take the statistics in fp32 as torch's do."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    return fused_layer_norm_affine, fused_rms_norm_affine
