"""Token ids to hidden states, and hidden states to logits with the same table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    VocabParallelEmbedding,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import nn

from lmscale.models.block import drop_hidden
from lmscale.models.context import ModelContext
from lmscale.models.initialization import embedding_init, matrix_init
from lmscale.models.linear import linear
from lmscale.models.norm import Norm
from lmscale.models.wire import Packed, Record

WORD_EMBEDDING = "word_embedding"
"""The key under which the stages that use it tie the table."""


class WordEmbedding(nn.Module):
    """The word table alone, so that a tied copy on another stage carries nothing else.

    `lora`, where `edit` puts it, adds to what is looked up and to the logits.

    Args:
        context: what the layers share.
        edit: called with the module once it is built.
    """

    def __init__(self, context: ModelContext, edit: Callable[[WordEmbedding], None] | None = None):
        super().__init__()
        self._context = context
        with context.weights.layer(WORD_EMBEDDING):
            self.table = _vocabulary_table(context, embedding_init(context.model, context.weights))
        self.register_module("lora", None)
        if edit is not None:
            edit(self)

    def forward(self, packed: Packed, use: Callable[[WordEmbedding, Record], Packed] | None = None) -> Packed:
        """Look tokens up, [b, s] -> [b, s, h]; or do what `use` does with the table."""
        record = self._context.wire.unpack(packed)
        self._context.rows.ids = record.adapter_ids
        if use is not None:
            return use(self, record)
        return self._context.wire.pack(record.with_hidden(self._look_up(record.hidden)))

    def _look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.table(tokens)
        return found if self.lora is None else found + self.lora(tokens)

    def feed_decoder(self, record: Record) -> Packed:
        """Keep the hidden states as the decoder's memory and look the decoder's tokens up."""
        hidden = self._look_up(record.decoder_tokens)
        return self._context.wire.pack(replace(record, hidden=hidden, memory=record.hidden))

    def logits(self, record: Record, is_whole: bool = False) -> Packed:
        """Make logits [b, s, v/t] of hidden states; `is_whole` where the sequence is not split any more."""
        context, hidden = self._context, record.hidden
        if context.model.scaled_logits:
            hidden = hidden * context.model.hidden_size**-0.5
        out = parallel_logits(context, hidden, self.table.weight, is_whole)
        if self.lora is not None:
            out = out + self.lora(hidden, is_whole)
        return out if record.sentence_logits is None else (out, record.sentence_logits)


def feed_decoder(embedding: WordEmbedding, packed: Packed) -> Packed:
    """Start the decoder; the forward function of its tied embedding."""
    return embedding(packed, WordEmbedding.feed_decoder)


def tied_head(embedding: WordEmbedding, packed: Packed) -> Packed:
    """Make logits with the tied word table; the forward function of the head's spec."""
    return embedding(packed, WordEmbedding.logits)


def masked_head(embedding: WordEmbedding, packed: Packed) -> Packed:
    """Make logits of hidden states that were gathered at masked positions."""
    return embedding(packed, functools.partial(WordEmbedding.logits, is_whole=True))


class UntiedHead(nn.Module):
    """An output matrix of its own, split over the vocabulary."""

    def __init__(self, context: ModelContext):
        super().__init__()
        self._context = context
        with context.weights.layer("head"):
            self.table = _vocabulary_table(context, matrix_init(context.model, context.weights))

    def forward(self, packed: Packed) -> torch.Tensor:
        """Make logits [b, s, v/t]."""
        return parallel_logits(self._context, self._context.wire.unpack(packed).hidden, self.table.weight)


def _vocabulary_table(context: ModelContext, init: Callable[[torch.Tensor], torch.Tensor]) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(
        context.model.padded_vocab_size,
        context.model.hidden_size,
        init_method=init,
        config=context.transformer,
        tp_group=context.groups.tp,
    )


@dataclass(frozen=True)
class InputNames:
    """Which fields of a record an input embedding reads, and the name of its parameters."""

    key: str = "input_embedding"
    positions: str = "positions"


class InputEmbedding(nn.Module):
    """Adds learned positions and token types, normalizes, drops out, and splits the sequence under sequence parallelism.

    `prompt`, where `edit` puts it, changes the word embeddings before that.

    Shapes: [b, s, h] -> [b, s, h], or [s/t, b, h] under sequence parallelism.

    Args:
        context: what the layers share.
        names: what it reads, and of its parameters.
        edit: called with the module once it is built.
    """

    def __init__(
        self,
        context: ModelContext,
        names: InputNames = InputNames(),
        edit: Callable[[InputEmbedding], None] | None = None,
    ):
        super().__init__()
        self._context, self._names = context, names
        model = context.model
        self.register_parameter("positions", None)
        self.register_parameter("token_types", None)
        with context.weights.layer(names.key):
            if model.position_embedding == "learned":
                rows = model.max_position_embeddings + model.position_offset
                self.positions = self._table(rows, model.init.position_std)
            if model.token_types:
                self.token_types = self._table(model.token_types)
        self.norm = Norm(context) if model.embedding_norm else None
        self.register_module("prompt", None)
        if edit is not None:
            edit(self)

    @property
    def key(self) -> str:
        """The logical name of the module."""
        return self._names.key

    def _table(self, rows: int, std: float | None = None) -> nn.Parameter:
        context = self._context
        fill = embedding_init(context.model, context.weights, std)
        return nn.Parameter(fill(torch.empty(rows, context.model.hidden_size)))

    def forward(self, packed: Packed) -> Packed:
        """Turn word embeddings into the first layer's input."""
        context = self._context
        record = context.wire.unpack(packed)
        context.rows.ids = record.adapter_ids
        hidden = self._sum(record)
        if context.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden.transpose(0, 1).contiguous(), group=context.groups.tp)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.training and context.model.hidden_dropout:
            key = self._names.key
            hidden = drop_hidden(self, context, hidden, key, context.dropout.next_micro_batch(key), "embedding")
        if context.starts_gradients and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return context.wire.pack(record.with_hidden(hidden), at_border=True)

    def _sum(self, record: Record) -> torch.Tensor:
        hidden = record.hidden
        if self.prompt is not None:
            hidden = self.prompt(hidden, record.prompt_places)
        if self.positions is not None:
            places = getattr(record, self._names.positions)
            first = self._context.model.position_offset + self._context.rows.shift
            if places is None and isinstance(first, int):
                hidden = hidden + self.positions[first : first + hidden.size(1)]
            else:
                places = torch.arange(hidden.size(1), device=hidden.device)[None] if places is None else places
                hidden = hidden + F.embedding(places + first, self.positions)
        if self.token_types is not None:
            if record.token_types is None:
                hidden = hidden + self.token_types[0]
            else:
                hidden = hidden + F.embedding(record.token_types, self.token_types)
        return hidden


def parallel_logits(
    context: ModelContext, hidden: torch.Tensor, weight: torch.Tensor, is_whole: bool = False
) -> torch.Tensor:
    """Multiply hidden states by this rank's rows of the output matrix.

    Shapes: hidden [b, s, h] or, unless `is_whole`, [s/t, b, h]; weight [v/t, h]; result [b, s, v/t].
    Collectives: over the tensor-parallel group, in backward and, under sequence parallelism, in forward.
    """
    if context.groups.tp.size() == 1:
        return linear(hidden, weight)
    is_split = context.sequence_parallel and not is_whole
    if is_split:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=context.groups.tp
        ).transpose(0, 1)
    multiply = linear_with_grad_accumulation_and_async_allreduce if weight.requires_grad else linear_with_frozen_weight
    return multiply(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=not is_split,
        sequence_parallel=False,
        tp_group=context.groups.tp,
    )


class FinalNorm(nn.Module):
    """The norm behind the last layer of a pre-norm stack; T5 drops out behind it.

    Args:
        context: what the layers share.
        key: the module's logical name.
        edit: called with the module once it is built.
    """

    def __init__(self, context: ModelContext, key: str = "final_norm", edit: Callable[[FinalNorm], None] | None = None):
        super().__init__()
        self._context, self._key = context, key
        self.norm = Norm(context)
        if edit is not None:
            edit(self)

    @property
    def key(self) -> str:
        """The logical name of the module."""
        return self._key

    def forward(self, packed: Packed) -> Packed:
        """Normalize the hidden states."""
        context = self._context
        record = context.wire.unpack(packed)
        context.rows.ids = record.adapter_ids
        hidden = self.norm(record.hidden)
        if context.model.architecture == "t5" and self.training and context.model.hidden_dropout:
            micro_batch = context.dropout.next_micro_batch(self._key)
            hidden = drop_hidden(self, context, hidden, self._key, micro_batch, "out")
        return context.wire.pack(record.with_hidden(hidden))
