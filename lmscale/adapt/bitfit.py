"""BitFit trains biases, which plan.adaptation names; where queries' alone are meant, part of a fused one.

Of one adaptation they are the base's own. Of several side by side each bias has a row of values for each, beside the
base's, and a row of a batch is computed with its own.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from lmscale.adapt.parameters import parameter, zeros
from lmscale.adapt.specs import edit_kinds, edit_layers
from lmscale.config.adapt import BitFitConfig
from lmscale.models.block import TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.embedding import FinalNorm, InputEmbedding
from lmscale.models.fused import row_parts
from lmscale.models.specs import NamedSpecs
from lmscale.plan.adaptation import bitfit_shapes


def bitfit_specs(specs: NamedSpecs, context: ModelContext, adapt: BitFitConfig) -> NamedSpecs:
    """Give the rows of several adaptations biases of their own; hold back those of keys and values with which: query_fc1.

    Source: Ben Zaken et al. 2022, arXiv:2106.10199, sec. 4 (b_q and b_m2).
    """
    if adapt.entries > 1:
        chosen = frozenset(bitfit_shapes(context.model, adapt))
        put = functools.partial(_put_beside, context=context, adapt=adapt, chosen=chosen)
        return edit_kinds(specs, (TransformerLayer, FinalNorm, InputEmbedding), put)
    return specs if adapt.which == "all" else edit_layers(specs, _hold_keys_and_values)


def _put_beside(
    layer: TransformerLayer | FinalNorm | InputEmbedding,
    context: ModelContext,
    adapt: BitFitConfig,
    chosen: frozenset[str],
) -> None:
    for name, owner in list(layer.named_modules()):
        if f"{layer.key}.{name}.bias" in chosen:
            owner.row_bias = RowBias(context, owner, adapt.entries)
            if adapt.which == "query_fc1" and name == "attention.linear_qkv":
                _hold_back(owner.row_bias.bias, owner.bias)


class RowBias(nn.Module):
    """What each row's own values of a bias add to the base's: nothing at first.

    Shapes: bias [N, n/t] -> [b, 1, n/t], or [1, b, n/t] under sequence parallelism.

    Args:
        context: what the layers share.
        owner: the linear layer or the norm.
        entries: adaptations side by side, N.
    """

    def __init__(self, context: ModelContext, owner: nn.Module, entries: int):
        super().__init__()
        self._context = context
        base: nn.Parameter = owner.bias  # type: ignore[assignment]
        self._base = (base,)  # in a tuple, or it would be this module's parameter too
        is_split = bool(getattr(base, "tensor_model_parallel", False))
        whole = base.numel() * (context.topology.tp_size if is_split else 1)
        self.bias = parameter(
            context,
            (whole,),
            zeros,
            entries=entries,
            tp_dim=0 if is_split else None,
            tp_stride=int(getattr(base, "partition_stride", 1)) if is_split else 1,
            is_partial=bool(getattr(base, "sequence_parallel", False)),
        )

    def forward(self) -> torch.Tensor:
        """Return what is added to the rows."""
        added = self.bias[self._context.rows.ids] - self._base[0].detach()
        return added[None] if self._context.sequence_parallel else added[:, None]


def _hold_keys_and_values(layer: TransformerLayer) -> None:
    """Set the gradient of their rows to 0: no optimizer moves them then, as nothing decays biases here."""
    bias = layer.attention.linear_qkv.bias
    _hold_back(bias, bias)


def _hold_back(bias: nn.Parameter, fused: nn.Parameter) -> None:
    bias.register_hook(functools.partial(_of_queries, parts=row_parts(fused)))


def _of_queries(grad: torch.Tensor, parts: tuple[int, ...]) -> torch.Tensor:
    queries, _ = grad.view(-1, sum(parts)).split((parts[0], sum(parts[1:])), dim=1)
    return torch.nn.functional.pad(queries, (0, sum(parts[1:]))).reshape(grad.shape)
