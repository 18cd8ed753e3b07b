"""The transformer layer: attention, cross attention where an encoder feeds it, and feed-forward around a residual."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmscale.models.attention import AttentionInputs, AttentionMasks, CoreAttention
from lmscale.models.context import ModelContext
from lmscale.models.cross_attention import CrossAttention
from lmscale.models.fused import mark_row_parts
from lmscale.models.initialization import scale_fused
from lmscale.models.linear import ColumnParallelLinear, RowParallelLinear
from lmscale.models.mlp import FeedForward
from lmscale.models.norm import Norm
from lmscale.models.relative_bias import SharedBias
from lmscale.models.wire import Packed, Record


@dataclass(frozen=True)
class Stack:
    """What the layers of a stack share: a model has one, or an encoder's and a decoder's.

    Attributes:
        name: before the layer's number in parameter names.
        is_causal: tokens see what precedes them only.
        is_fed: its layers attend to an encoder's output too.
        bias: of relative positions, where the model has them.
    """

    name: str = "layers"
    is_causal: bool = True
    is_fed: bool = False
    bias: SharedBias | None = None
    masks: AttentionMasks = field(init=False)
    cross_masks: AttentionMasks = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", AttentionMasks(is_causal=self.is_causal))
        object.__setattr__(self, "cross_masks", AttentionMasks(is_causal=False))


class TransformerLayer(nn.Module):
    """Sub-layers f around a residual stream: x + f(norm(x)) with pre-norm, norm(x + f(x)) with post-norm.

    What adapts the layer is put into its slots by `edit`: `attention_adapter` and `mlp_adapter` change what a sub-layer
    adds, `parallel_adapter` adds to what the feed-forward makes of its input; those of its linear layers and core attention
    are described there.

    Shapes: hidden states [b, s, h], or [s/t, b, h] under sequence parallelism.

    Args:
        context: what the layers share.
        stack: the layer's.
        layer_index: in the stack, from 0.
        edit: called with the layer once it is built.
    """

    def __init__(
        self,
        context: ModelContext,
        stack: Stack,
        layer_index: int,
        edit: Callable[[TransformerLayer], None] | None = None,
    ):
        super().__init__()
        self._context, self._stack = context, stack
        self._key = f"{stack.name}.{layer_index}"
        self.reads: tuple[str, ...] = ()  # names in context.rows.made
        for slot in ("attention_adapter", "mlp_adapter", "parallel_adapter"):
            self.register_module(slot, None)
        self._is_pre = context.model.norm_position == "pre"
        with context.weights.layer(self._key):
            self.attention_norm = Norm(context)
            self.attention = self._self_attention(layer_index)
            if stack.is_fed:
                self.cross_attention_norm = Norm(context)
                self.cross_attention = self._cross_attention(layer_index)
            self.mlp_norm = Norm(context)
            self.mlp = FeedForward(context, self._key)
        if edit is not None:
            edit(self)
        self._run = torch.compile(self._layer) if context.compile else self._layer

    @property
    def key(self) -> str:
        """The layer's logical name."""
        return self._key

    @property
    def is_pre_norm(self) -> bool:
        """Whether norms come before the sub-layers."""
        return self._is_pre

    def _self_attention(self, layer_index: int) -> SelfAttention:
        context = self._context
        core = functools.partial(CoreAttention, context=context, masks=self._stack.masks, layer_key=self._key)
        attention = SelfAttention(
            config=context.transformer,
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=core, linear_proj=RowParallelLinear
            ),
            layer_number=layer_index + 1,
            attn_mask_type=AttnMaskType.causal if self._stack.is_causal else AttnMaskType.padding,
            pg_collection=context.groups,
        )
        model = context.model
        heads = model.num_attention_heads // model.query_groups
        mark_row_parts(attention.linear_qkv, (heads * model.head_size, model.head_size, model.head_size))
        scale_fused(model, attention.linear_qkv.weight, context.topology.tp_size, has_queries=True)
        return attention

    def _cross_attention(self, layer_index: int) -> CrossAttention:
        context = self._context
        core = functools.partial(CoreAttention, context=context, masks=self._stack.cross_masks, layer_key=self._key)
        attention = CrossAttention(
            config=context.transformer,
            submodules=CrossAttentionSubmodules(
                linear_q=ColumnParallelLinear,
                linear_kv=ColumnParallelLinear,
                core_attention=core,
                linear_proj=RowParallelLinear,
            ),
            layer_number=layer_index + 1,
            attn_mask_type=AttnMaskType.padding,
            pg_collection=context.groups,
        )
        mark_row_parts(attention.linear_kv, (context.model.head_size, context.model.head_size))
        scale_fused(context.model, attention.linear_kv.weight, context.topology.tp_size)
        scale_fused(context.model, attention.linear_q.weight, context.topology.tp_size, has_queries=True)
        return attention

    def forward(self, packed: Packed) -> Packed:
        """Read a packed record, transform its hidden states, pack it again."""
        context = self._context
        record = context.wire.unpack(packed)
        micro_batch = context.dropout.next_micro_batch(self._key) if self.training else 0
        bias = self._stack.bias.value if self._stack.bias is not None else None
        made = [context.rows.made[name] for name in self.reads]
        if context.recompute == "full" and torch.is_grad_enabled():
            # ZeRO 3 gathers parameters in hooks around each module's backward, which only a reentrant recompute runs.
            hidden = checkpoint(
                self._run,
                record.hidden,
                record.memory,
                bias,
                record,
                micro_batch,
                *made,
                use_reentrant=context.partitions_parameters,
                preserve_rng_state=False,
            )
        else:
            hidden = self._run(record.hidden, record.memory, bias, record, micro_batch, *made)
        return context.wire.pack(record.with_hidden(hidden), at_border=True)

    def _layer(
        self,
        hidden: torch.Tensor,
        memory: torch.Tensor | None,
        bias: torch.Tensor | None,
        record: Record,
        micro_batch: int,
        *made: torch.Tensor,
    ) -> torch.Tensor:
        """Run the sub-layers; what needs a gradient comes as an argument of its own, for the reentrant recompute."""
        rows = self._context.rows
        rows.ids, rows.micro_batch = record.adapter_ids, micro_batch
        rows.size = hidden.size(1 if self._context.sequence_parallel else 0)
        rows.given = dict(zip(self.reads, made, strict=True))
        inputs, cross_inputs = self._inputs(record, bias, micro_batch)
        out, added = self.attention(self._enter(self.attention_norm, hidden), attention_mask=inputs)
        adapter = self.attention_adapter
        hidden = self._add(hidden, out, added, micro_batch, "attention_out", self.attention_norm, adapter)
        if self._stack.is_fed:
            entering = self._enter(self.cross_attention_norm, hidden)
            out, added = self.cross_attention(entering, attention_mask=cross_inputs, key_value_states=memory)
            hidden = self._add(hidden, out, added, micro_batch, "cross_attention_out", self.cross_attention_norm)
        entering = self._enter(self.mlp_norm, hidden)
        out, added = self.mlp(entering, micro_batch)
        if self.parallel_adapter is not None:
            out = out + self.parallel_adapter(entering)
        return self._add(hidden, out, added, micro_batch, "mlp_out", self.mlp_norm, self.mlp_adapter)

    def _inputs(
        self, record: Record, bias: torch.Tensor | None, micro_batch: int
    ) -> tuple[AttentionInputs, AttentionInputs]:
        if not self._stack.is_fed:
            inputs = AttentionInputs(
                micro_batch, record.positions, record.document_ids, is_prefix=record.is_prefix, bias=bias
            )
            return inputs, inputs
        ids = record.decoder_document_ids
        # Where each row is one example, padding comes last, and causal attention alone keeps it out.
        own_ids = ids if record.decoder_positions is not None else None
        own = AttentionInputs(micro_batch, document_ids=own_ids, bias=bias)
        return own, AttentionInputs(micro_batch, document_ids=ids, key_document_ids=record.document_ids)

    def _enter(self, norm: Norm, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = norm(hidden) if self._is_pre else hidden
        return normed

    def _add(
        self,
        residual: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        micro_batch: int,
        site: str,
        norm: Norm,
        adapter: nn.Module | None = None,
    ) -> torch.Tensor:
        if bias is not None:
            out = out + bias
        out = drop_hidden(self, self._context, out, self._key, micro_batch, site)
        if adapter is not None:
            out = adapter(out, residual, norm)
        total = residual + out
        normed: torch.Tensor = total if self._is_pre else norm(total)
        return normed


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
