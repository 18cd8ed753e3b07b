"""The transformer layer: attention and feed-forward around a residual stream."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmscale.models.attention import AttentionInputs, CoreAttention, DocumentMasks
from lmscale.models.context import ModelContext
from lmscale.models.linear import ColumnParallelLinear, RowParallelLinear
from lmscale.models.mlp import FeedForward
from lmscale.models.norm import Norm
from lmscale.models.wire import Record


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Shapes: hidden states [b, s, h], or [s/t, b, h] under sequence parallelism.
    """

    def __init__(self, context: ModelContext, masks: DocumentMasks, layer_index: int):
        super().__init__()
        self._context = context
        self._key = f"layers.{layer_index}"
        core = functools.partial(CoreAttention, context=context, masks=masks, layer_key=self._key)
        with context.weights.layer(self._key):
            self.attention_norm = Norm(context)
            self.attention = SelfAttention(
                config=context.transformer,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=core, linear_proj=RowParallelLinear
                ),
                layer_number=layer_index + 1,
                attn_mask_type=AttnMaskType.causal,
                pg_collection=context.groups,
            )
            self.mlp_norm = Norm(context)
            self.mlp = FeedForward(context)
        self._run = torch.compile(self._layer) if context.compile else self._layer

    def forward(self, packed: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Read a packed record, transform its hidden states, pack it again."""
        context = self._context
        record = context.wire.unpack(packed)
        micro_batch = context.dropout.next_micro_batch(self._key) if self.training and _has_dropout(context) else 0
        if context.recompute == "full" and torch.is_grad_enabled():
            # ZeRO 3 gathers parameters in hooks around each module's backward, which only a reentrant recompute runs.
            hidden = checkpoint(
                self._run,
                record.hidden,
                record,
                micro_batch,
                use_reentrant=context.partitions_parameters,
                preserve_rng_state=False,
            )
        else:
            hidden = self._run(record.hidden, record, micro_batch)
        return context.wire.pack(record.with_hidden(hidden))

    def _layer(self, hidden: torch.Tensor, record: Record, micro_batch: int) -> torch.Tensor:
        inputs = AttentionInputs(record.positions, record.document_ids, micro_batch)
        out, bias = self.attention(self.attention_norm(hidden), attention_mask=inputs)
        hidden = self._add(hidden, out, bias, micro_batch, "attention_out")
        out, bias = self.mlp(self.mlp_norm(hidden))
        return self._add(hidden, out, bias, micro_batch, "mlp_out")

    def _add(
        self, residual: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, micro_batch: int, site: str
    ) -> torch.Tensor:
        if bias is not None:
            out = out + bias
        return residual + drop_hidden(self, self._context, out, self._key, micro_batch, site)


def drop_hidden(
    module: nn.Module, context: ModelContext, hidden: torch.Tensor, key: str, micro_batch: int, site: str
) -> torch.Tensor:
    """Apply hidden dropout in training.

    The same mask on tensor-parallel ranks that hold the same tensor, others where sequence parallelism splits it.
    """
    probability = context.model.hidden_dropout
    if not module.training or not probability:
        return hidden
    context.dropout.seed(hidden.device, key, micro_batch, site, differs_over_tp=context.sequence_parallel)
    return F.dropout(hidden, probability)


def _has_dropout(context: ModelContext) -> bool:
    return bool(context.model.hidden_dropout or context.model.attention_dropout)
