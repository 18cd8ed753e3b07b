"""What BERT and RoBERTa predict with: masked tokens, and whether one segment follows the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import nn

from lmscale.models.context import ModelContext
from lmscale.models.initialization import matrix_init
from lmscale.models.linear import linear
from lmscale.models.norm import Norm
from lmscale.models.transformer_config import ACTIVATIONS
from lmscale.models.wire import Packed


class Dense(nn.Module):
    """x weight^T + bias, whole on every rank."""

    def __init__(self, context: ModelContext, outputs: int):
        super().__init__()
        inputs = context.model.hidden_size
        fill = matrix_init(context.model, context.weights)
        self.weight = nn.Parameter(fill(torch.empty(outputs, inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return linear(hidden, self.weight, self.bias)


def first_token(hidden: torch.Tensor, prompt_places: torch.Tensor | None) -> torch.Tensor:
    """Take the state of each row's first token, behind a trained prompt: [b, s, h] -> [b, 1, h]."""
    if prompt_places is None:
        return hidden[:, :1]
    first = (prompt_places < 0).int().argmax(dim=1)
    return hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.size(2)))


class MaskedHead(nn.Module):
    """norm(activation(dense(hidden at masked positions))), and the next-sentence logits of the first token.

    Every tensor-parallel rank computes the same; the multiplication with the word table that follows is split.

    Shapes: hidden [b, s, h] or [s/t, b, h] -> [b, l, h]; sentence logits [b, 2].
    Collectives: a gather over the tensor-parallel group under sequence parallelism.
    Source: Devlin et al. 2019, arXiv:1810.04805, sec. 3.1, and its code (run_pretraining.py).
    """

    def __init__(self, context: ModelContext):
        super().__init__()
        self._context = context
        self._activation = ACTIVATIONS[context.model.activation]
        hidden_size = context.model.hidden_size
        with context.weights.layer("masked_head"):
            self.dense = Dense(context, hidden_size)
            self.norm = Norm(context, is_split=False)
            self.pooler = Dense(context, hidden_size) if context.model.next_sentence_head else None
            self.next_sentence = Dense(context, 2) if context.model.next_sentence_head else None

    def forward(self, packed: Packed) -> Packed:
        """Gather the masked positions and transform them."""
        context = self._context
        record = context.wire.unpack(packed)
        hidden = record.hidden
        if context.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=context.groups.tp
            ).transpose(0, 1)
        places = record.masked_positions
        assert places is not None
        masked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.size(2)))
        masked = self.norm(self._activation(self.dense(masked)))
        sentence_logits = None
        if self.pooler is not None and self.next_sentence is not None:
            first = first_token(hidden, record.prompt_places)[:, 0]
            sentence_logits = self.next_sentence(torch.tanh(self.pooler(first)))
        return context.wire.pack(replace(record, hidden=masked, sentence_logits=sentence_logits))


class OutputBias(nn.Module):
    """A bias for each entry of the vocabulary, split as the word table is.

    Shapes: logits [b, l, v/t].
    """

    def __init__(self, context: ModelContext):
        super().__init__()
        rows = context.model.padded_vocab_size // context.groups.tp.size()
        self.bias = nn.Parameter(torch.zeros(rows))
        set_tensor_model_parallel_attributes(self.bias, is_parallel=True, dim=0, stride=1)

    def forward(self, packed: Packed) -> Packed:
        """Add the bias to the logits; sentence logits, if there are any, pass by."""
        if isinstance(packed, tuple):
            return packed[0] + self.bias, *packed[1:]
        return packed + self.bias
