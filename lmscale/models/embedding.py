"""Token ids to hidden states, and hidden states to logits with the same table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    VocabParallelEmbedding,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import nn

from lmscale.models.block import drop_hidden
from lmscale.models.context import ModelContext
from lmscale.models.linear import linear
from lmscale.models.norm import Norm

WORD_EMBEDDING = "word_embedding"
"""The key under which the first and the last stage tie the table."""


class WordEmbedding(nn.Module):
    """The word table alone, so that a tied copy on the last stage carries nothing else."""

    def __init__(self, context: ModelContext):
        super().__init__()
        self._context = context
        with context.weights.layer(WORD_EMBEDDING):
            self.table = VocabParallelEmbedding(
                context.model.padded_vocab_size,
                context.model.hidden_size,
                init_method=context.weights.normal(context.model.init.std),
                config=context.transformer,
                tp_group=context.groups.tp,
            )

    def forward(
        self, packed: torch.Tensor | tuple[torch.Tensor, ...], as_head: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Look tokens up, [b, s] -> [b, s, h]; or, as head, make logits [b, s, v/t] of hidden states."""
        record = self._context.wire.unpack(packed)
        if as_head:
            return parallel_logits(self._context, record.hidden, self.table.weight)
        return self._context.wire.pack(record.with_hidden(self.table(record.hidden)))


def tied_head(
    embedding: WordEmbedding, packed: torch.Tensor | tuple[torch.Tensor, ...]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Make logits with the tied word table; the forward function of the head's spec."""
    return embedding(packed, as_head=True)


class UntiedHead(nn.Module):
    """An output matrix of its own, split over the vocabulary."""

    def __init__(self, context: ModelContext):
        super().__init__()
        self._context = context
        with context.weights.layer("head"):
            self.table = VocabParallelEmbedding(
                context.model.padded_vocab_size,
                context.model.hidden_size,
                init_method=context.weights.normal(context.model.init.std),
                config=context.transformer,
                tp_group=context.groups.tp,
            )

    def forward(self, packed: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Make logits [b, s, v/t]."""
        return parallel_logits(self._context, self._context.wire.unpack(packed).hidden, self.table.weight)


class InputEmbedding(nn.Module):
    """Adds learned positions, drops out, and splits the sequence where sequence parallelism does.

    Shapes: [b, s, h] -> [b, s, h], or [s/t, b, h] under sequence parallelism.
    """

    def __init__(self, context: ModelContext):
        super().__init__()
        self._context = context
        self._key = "input_embedding"
        if context.model.position_embedding == "learned":
            std = context.model.init.position_std or context.model.init.std
            table = torch.empty(context.model.max_position_embeddings, context.model.hidden_size)
            with context.weights.layer(self._key):
                self.positions = nn.Parameter(context.weights.normal(std)(table))
        else:
            self.register_parameter("positions", None)

    def forward(self, packed: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Turn word embeddings into the first layer's input."""
        context = self._context
        record = context.wire.unpack(packed)
        hidden = record.hidden
        if self.positions is not None:
            if record.positions is None:
                hidden = hidden + self.positions[: hidden.size(1)]
            else:
                hidden = hidden + F.embedding(record.positions, self.positions)
        if context.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden.transpose(0, 1).contiguous(), group=context.groups.tp)
        if self.training and context.model.hidden_dropout:
            micro_batch = context.dropout.next_micro_batch(self._key)
            hidden = drop_hidden(self, context, hidden, self._key, micro_batch, "embedding")
        return context.wire.pack(record.with_hidden(hidden))


def parallel_logits(context: ModelContext, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply hidden states by this rank's rows of the output matrix.

    Shapes: hidden [b, s, h] or [s/t, b, h]; weight [v/t, h]; result [b, s, v/t].
    Collectives: over the tensor-parallel group, in backward and, under sequence parallelism, in forward.
    """
    if context.groups.tp.size() == 1:
        return linear(hidden, weight)
    if context.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=context.groups.tp
        ).transpose(0, 1)
    return linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=not context.sequence_parallel,
        sequence_parallel=False,
        tp_group=context.groups.tp,
    )


class FinalNorm(nn.Module):
    """The norm before the head."""

    def __init__(self, context: ModelContext):
        super().__init__()
        self._context = context
        self.norm = Norm(context)

    def forward(self, packed: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Normalize the hidden states."""
        record = self._context.wire.unpack(packed)
        return self._context.wire.pack(record.with_hidden(self.norm(record.hidden)))
