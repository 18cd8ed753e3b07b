"""The feed-forward sub-layer, with its activation recomputed on request."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP as MegatronMLP
from megatron.core.transformer.mlp import MLPSubmodules
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lmscale.models.context import ModelContext
from lmscale.models.fused import mark_row_parts
from lmscale.models.initialization import scale_fused
from lmscale.models.linear import ColumnParallelLinear, RowParallelLinear


class FeedForward(MegatronMLP):
    """fc2(activation(fc1(x))), from megatron-core's parallel layers.

    With selective recompute, backward keeps fc1's output and computes the activation again: f values less for each token
    without a gate, 3 f less with one (the gate's activation, the product, and the product's input).

    Shapes: input and output [..., h].
    """

    def __init__(self, context: ModelContext, key: str):
        super().__init__(
            config=context.transformer,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=context.transformer.ffn_hidden_size,
            tp_group=context.groups.tp,
        )
        if context.model.is_gated:
            rows = self.linear_fc1.weight.size(0) // 2
            mark_row_parts(self.linear_fc1, (rows, rows))
            scale_fused(context.model, self.linear_fc1.weight, context.topology.tp_size)
        self._context, self._key = context, key
        self._recompute = context.recompute == "selective"

    def forward(self, hidden: torch.Tensor, micro_batch: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output, bias still to be added or None); `micro_batch` seeds the dropout."""
        inner, bias = self.linear_fc1(hidden)
        if self._recompute and torch.is_grad_enabled():
            activated = checkpoint(
                self._activate, inner, bias, micro_batch, use_reentrant=False, preserve_rng_state=False
            )
            with _recomputed(activated, lambda: self._activate(inner, bias, micro_batch)):
                out: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(activated)
                return out
        out = self.linear_fc2(self._activate(inner, bias, micro_batch))
        return out

    def _activate(self, inner: torch.Tensor, bias: torch.Tensor | None, micro_batch: int) -> torch.Tensor:
        if bias is not None:
            inner = inner + bias
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation_func(gate) * up
        else:
            inner = self.activation_func(inner)
        probability = self._context.model.ffn_dropout
        if not self.training or not probability:
            return inner
        self._context.dropout.seed(inner.device, self._key, micro_batch, "ffn", differs_over_tp=True)
        return F.dropout(inner, probability)


class _recomputed(saved_tensors_hooks):
    """Inside the context, backward does not keep one tensor but a recipe for it."""

    def __init__(self, tensor: torch.Tensor, recipe: object):
        address, shape = tensor.data_ptr(), tensor.shape

        def pack(saved: torch.Tensor) -> object:
            if saved.data_ptr() == address and saved.numel() == shape.numel():
                return recipe, saved.shape
            return saved

        def unpack(packed: object) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            make, saved_shape = packed  # type: ignore[misc]
            with torch.no_grad():
                return make().view(saved_shape)

        super().__init__(pack, unpack)
