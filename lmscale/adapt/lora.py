"""LoRA: products of two thin matrices beside the model's matrices, under tensor and sequence parallelism.

Beside a matrix that is split along its outputs, A is whole on every rank and B is split as the matrix is; beside one that
is split along its inputs, A is split and B whole. What travels between ranks is A x, r numbers a token.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn

from lmscale.adapt.parameters import parameter, zeros
from lmscale.adapt.specs import edit_layers, edit_words
from lmscale.config.adapt import LoraConfig
from lmscale.models.block import TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.embedding import WORD_EMBEDDING, WordEmbedding
from lmscale.models.fused import row_parts
from lmscale.models.linear import linear
from lmscale.models.specs import NamedSpecs
from lmscale.parallel.device import multiplies_slowly
from lmscale.plan.lora import PARTS, Target, chosen_targets, lora_scale


def lora_specs(specs: NamedSpecs, context: ModelContext, adapt: LoraConfig) -> NamedSpecs:
    """Put LoRA beside the targets of every transformer layer, and beside the word table."""
    if "embedding" in adapt.targets:
        beside_table = functools.partial(_put_beside_table, context=context, adapt=adapt)
        specs = edit_words(specs, beside_table, ("lora.embedding.a", "lora.embedding.b"))
    return edit_layers(specs, functools.partial(_put_beside, context=context, adapt=adapt))


def _put_beside(layer: TransformerLayer, context: ModelContext, adapt: LoraConfig) -> None:
    is_fed = hasattr(layer, "cross_attention")
    targets = chosen_targets(context.model, adapt, is_fed)
    for place in dict.fromkeys(target[0] for target in targets):
        module = layer.get_submodule(place)
        pairs = [target for target in targets if target[0] == place]
        key = f"{layer.key}.{place}.lora"
        module.lora = Lora(context, adapt, key, pairs, row_parts(module.weight))


def _put_beside_table(embedding: WordEmbedding, context: ModelContext, adapt: LoraConfig) -> None:
    embedding.lora = EmbeddingLora(context, adapt, f"{WORD_EMBEDDING}.lora")


class Lora(nn.Module):
    """scale B A x for the matrices that one tensor holds, in the place that each has in the tensor's output.

    Shapes: x [b, s, i] -> [b, s, o/t] beside a matrix that is split along its outputs, [b, s, i/t] -> [b, s, o] beside one
        that is split along its inputs; under sequence parallelism [s/t, b, i] -> [s, b, o/t], [s, b, i/t] -> [s/t, b, o].

    Args:
        context: what the layers share.
        adapt: the method.
        key: the module's logical name.
        pairs: what is added to.
        parts: rows of each matrix in a period of the tensor's local rows (models.fused); empty where it is one matrix.
    """

    def __init__(self, context: ModelContext, adapt: LoraConfig, key: str, pairs: list[Target], parts: tuple[int, ...]):
        super().__init__()
        self._parts = parts
        self._places: dict[str, int | None] = {}
        for _, name, outputs, inputs in pairs:
            # A target that is the whole of a fused tensor has rows in the tensor's order, and no place to be put at.
            self._places[name] = PARTS.get(name) if parts else None
            self.add_module(name, LowRank(context, adapt, f"{key}.{name}", outputs, inputs, parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the tensor's output."""
        made = {place: self.get_submodule(name)(x) for name, place in self._places.items()}
        if None in made:
            return made[None]
        leading = next(iter(made.values())).shape[:-1]
        rows = [self._rows(made.get(index), part, leading) for index, part in enumerate(self._parts)]
        periods = next(delta.size(-1) // self._parts[place] for place, delta in made.items() if place is not None)
        like = next(iter(made.values()))
        filled = [
            like.new_zeros(*leading, periods, part) if row is None else row
            for row, part in zip(rows, self._parts, strict=True)
        ]
        return torch.cat(filled, dim=-1).flatten(-2)

    @staticmethod
    def _rows(delta: torch.Tensor | None, part: int, leading: torch.Size) -> torch.Tensor | None:
        return None if delta is None else delta.view(*leading, -1, part)


class LowRank(nn.Module):
    """scale B A x of one matrix.

    A is drawn from U(-1/sqrt(i), 1/sqrt(i)) (Kaiming's uniform with a = sqrt(5)), B is 0: at first nothing is added.

    Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1, and its code (loralib/layers.py).
    """

    def __init__(
        self,
        context: ModelContext,
        adapt: LoraConfig,
        key: str,
        outputs: int,
        inputs: int,
        parts: tuple[int, ...] = (),
    ):
        super().__init__()
        self._context, self._key = context, key
        self._scale, self._dropout = lora_scale(adapt), adapt.dropout
        self._splits_inputs = key.endswith(("proj", "fc2"))
        with context.weights.layer(key):
            self.a = parameter(
                context,
                (adapt.rank, inputs),
                context.weights.uniform(inputs**-0.5),
                entries=adapt.entries,
                tp_dim=1 if self._splits_inputs else None,
                is_partial=True,
            )
        # Rows of a gated pair are cut as the tensor's are: a part of the gate and a part of the other on each rank.
        stride = len(parts) if key.endswith("fc1") and parts else 1
        self.b = parameter(
            context,
            (outputs, adapt.rank),
            zeros,
            entries=adapt.entries,
            tp_dim=None if self._splits_inputs else 0,
            tp_stride=stride,
            is_partial=True,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute scale B A x.

        Collectives: one over the tensor-parallel group, of [.., r], in forward or backward.
        """
        context = self._context
        if self.training and self._dropout:
            split = self._splits_inputs or context.sequence_parallel
            context.dropout.seed(x.device, self._key, context.rows.micro_batch, "lora", differs_over_tp=split)
            x = F.dropout(x, self._dropout)
        thin = multiply(x, self.a, context) * self._scale  # r numbers a token; behind B they would be as many as W's
        return multiply(self._communicate(thin), self.b, context)

    def _communicate(self, thin: torch.Tensor) -> torch.Tensor:
        """Bring A x to where B is applied: whole, and its gradient summed."""
        context, group = self._context, self._context.groups.tp
        if group.size() == 1:
            return thin
        if self._splits_inputs:
            if context.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(thin, group=group)
            return reduce_from_tensor_model_parallel_region(thin, group=group)
        if context.sequence_parallel:
            return gather_from_sequence_parallel_region(thin, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(thin, group=group)


class EmbeddingLora(nn.Module):
    """Beside the word table: scale B a(token), and, where the table makes logits too, scale A^T B^T x.

    The table [v, h] is the transpose of B A: A [r, v/t] is 0 and split as the table is, B [h, r] is drawn from N(0, 1).
    The method's dropout is not applied.

    Shapes: tokens int64 [b, s] -> [b, s, h]; hidden [b, s, h], or [s/t, b, h] under sequence parallelism -> [b, s, v/t].

    Source: the code of Hu et al. 2021 (loralib/layers.py, Embedding).
    """

    def __init__(self, context: ModelContext, adapt: LoraConfig, key: str):
        super().__init__()
        self.embedding = _TablePair(context, adapt, f"{key}.embedding")

    def forward(self, x: torch.Tensor, is_whole: bool = False) -> torch.Tensor:
        """Compute what is added to the embeddings of tokens, or to the logits of hidden states."""
        added: torch.Tensor = self.embedding(x, is_whole)
        return added


class _TablePair(nn.Module):
    def __init__(self, context: ModelContext, adapt: LoraConfig, key: str):
        super().__init__()
        self._context, self._scale = context, lora_scale(adapt)
        model, entries = context.model, adapt.entries
        with context.weights.layer(key):
            self.a = parameter(context, (adapt.rank, model.padded_vocab_size), zeros, entries=entries, tp_dim=1)
            self.b = parameter(context, (model.hidden_size, adapt.rank), context.weights.normal(1.0), entries=entries)

    def forward(self, x: torch.Tensor, is_whole: bool) -> torch.Tensor:
        """Tell tokens from hidden states.

        Collectives: over the tensor-parallel group; every token's gradient of B is whole on every rank.
        """
        return self._logits(x, is_whole) if x.is_floating_point() else self._look_up(x)

    def _look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        group, ids = self._context.groups.tp, self._context.rows.ids
        columns = self.a.size(-1)
        local = tokens - columns * group.rank()
        is_here = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        if self.a.dim() == 2:
            thin, b = F.embedding(local, self.a.t()), self.b
        else:
            thin, b = self.a.transpose(1, 2)[ids[:, None], local], self.b[ids].transpose(1, 2)
        thin = thin * (self._scale * is_here[..., None]).to(thin.dtype)
        if group.size() > 1:
            thin = reduce_from_tensor_model_parallel_region(thin, group=group)
        return linear(thin, b) if self.a.dim() == 2 else torch.matmul(thin, b)

    def _logits(self, hidden: torch.Tensor, is_whole: bool) -> torch.Tensor:
        context, group = self._context, self._context.groups.tp
        if context.sequence_parallel and not is_whole:
            # A gather that gives each rank its own part of the gradient back: what follows sums it over the ranks already.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
            hidden = hidden.transpose(0, 1)
        a, b = self.a.transpose(-1, -2), self.b.transpose(-1, -2)
        if self.a.dim() == 3:
            a, b = a[context.rows.ids], b[context.rows.ids]
        thin = (linear(hidden, b) if b.dim() == 2 else torch.matmul(hidden, b.transpose(1, 2))) * self._scale
        if group.size() > 1:
            thin = copy_to_tensor_model_parallel_region(thin, group=group)
        return linear(thin, a) if a.dim() == 2 else torch.matmul(thin, a.transpose(1, 2))


def multiply(x: torch.Tensor, matrix: torch.Tensor, context: ModelContext) -> torch.Tensor:
    """Multiply rows by a matrix, or by the matrix of the adaptation that each names.

    Shapes: x [b, s, i] or, under sequence parallelism, [s, b, i]; matrix [o, i] or [N, o, i]; result [.., o].
    """
    if matrix.dim() == 2:
        return linear(x, matrix)
    ids = context.rows.ids
    assert ids is not None
    chosen, dtype = matrix[ids], x.dtype
    if multiplies_slowly(x):
        x, chosen = x.float(), chosen.float()
    if context.sequence_parallel:
        return torch.einsum("sbi,boi->sbo", x, chosen).to(dtype)
    return torch.matmul(x, chosen.transpose(1, 2)).to(dtype)
