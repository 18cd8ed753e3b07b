"""Parameters of adaptations: drawn whole, cut for the rank, one for each of several adaptations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from lmscale.models.context import ModelContext


def parameter(
    context: ModelContext,
    shape: tuple[int, ...],
    fill: Callable[[torch.Tensor], torch.Tensor],
    *,
    entries: int = 1,
    tp_dim: int | None = None,
    tp_stride: int = 1,
    is_partial: bool = False,
) -> nn.Parameter:
    """Make this rank's part of a parameter.

    Args:
        context: what the layers share.
        shape: logical, of one adaptation.
        fill: fills the whole tensor of one adaptation, and returns it.
        entries: adaptations side by side, N; above 1 the parameter is [N, *shape].
        tp_dim: the dimension of `shape` that tensor parallelism cuts; None where every rank has all.
        tp_stride: blocks along it that are cut each.
        is_partial: each tensor-parallel rank sees a part of the sequence under sequence parallelism: gradients are summed.
    """
    drawn = [fill(torch.empty(shape)) for _ in context.weights.entries(entries)]
    whole = torch.stack(drawn) if entries > 1 else drawn[0]
    if tp_dim is None:
        made = nn.Parameter(whole)
        made.sequence_parallel = is_partial and context.sequence_parallel
        return made
    dim = tp_dim + (entries > 1)
    blocks = whole.chunk(tp_stride, dim=dim)
    tp_size, tp_rank = context.topology.tp_size, context.topology.tp_rank
    made = nn.Parameter(torch.cat([block.chunk(tp_size, dim=dim)[tp_rank] for block in blocks], dim=dim).contiguous())
    set_tensor_model_parallel_attributes(made, is_parallel=True, dim=dim, stride=tp_stride)
    return made


def zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with 0."""
    return tensor.zero_()
