"""T5's relative position bias: a number for each head and bucket of distances, added to the scores.

All layers of a stack share one table. It stands before each layer as a tied layer, so that each pipeline stage has a
copy; the first one of a stage computes the bias of a micro batch, and the layers behind it read it.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from lmscale.models.attention import AttentionInputs, AttentionMasks
from lmscale.models.context import ModelContext
from lmscale.models.wire import Packed, Record


class SharedBias:
    """Where the bias of the micro batch that runs is found: [1 or b, n/t, s, k], the mask included.

    There are as many keys as queries, or more where the keys before are in a cache.
    """

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


class PlaceCache:
    """Positions and document ids of the tokens before, for generation."""

    def __init__(self) -> None:
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(self, positions: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store those of the new tokens, int64 [b, s], and return those of all tokens so far."""
        before = self._all
        self._all = (
            (positions, ids)
            if before is None
            else (torch.cat((before[0], positions), 1), torch.cat((before[1], ids), 1))
        )
        return self._all


class RelativeBias(nn.Module):
    """bias[h, i, j] = table[h, bucket(j - i)].

    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.1, and its code (mesh: transformer/transformer_layers.py).
    """

    def __init__(self, context: ModelContext, key: str, shared: SharedBias, masks: AttentionMasks):
        super().__init__()
        self._context, self._shared, self._masks = context, shared, masks
        self._first: int | None = None
        self.cache: PlaceCache | None = None
        model, topology = context.model, context.topology
        heads, buckets = model.num_attention_heads, model.relative_buckets
        with context.weights.layer(key):
            # Drawn as [heads, buckets]; a row is a head, and each tensor-parallel rank keeps its heads'.
            whole = context.weights.normal(model.hidden_size**-0.5)(torch.empty(heads, buckets))
        self.table = nn.Parameter(whole.chunk(topology.tp_size)[topology.tp_rank].clone())
        set_tensor_model_parallel_attributes(self.table, is_parallel=True, dim=0, stride=1)

    def new_cache(self, capacity: int) -> PlaceCache | None:
        """Make a cache for generation; None in an encoder, which reads its tokens once."""
        return PlaceCache() if self._masks.is_causal else None

    def forward(self, packed: Packed, layer_index: int = 0) -> Packed:
        """Compute the bias where this is the stage's first; pass the record on as it is."""
        if self._first is None:
            self._first = layer_index
        if self._first == layer_index:
            self._shared.value = self._bias(self._context.wire.unpack(packed))
        return packed

    def _bias(self, record: Record) -> torch.Tensor:
        is_decoder = self._masks.is_causal
        ids = record.decoder_document_ids if is_decoder else record.document_ids
        positions = record.decoder_positions if is_decoder else record.positions
        assert ids is not None
        if positions is None:
            positions = torch.arange(ids.size(1), device=ids.device)[None]
        all_positions, all_ids = (positions, ids) if self.cache is None else self.cache.append(positions, ids)
        distance = all_positions[:, None, :] - positions[:, :, None]
        model = self._context.model
        buckets = bucket_of(distance, model.relative_buckets, model.relative_max_distance, not is_decoder)
        bias = self.table.t()[buckets].permute(0, 3, 1, 2)
        inputs = AttentionInputs(0, document_ids=ids)
        mask = self._masks.of(inputs) if all_ids is ids else self._masks.cached(ids, all_ids)
        assert mask is not None
        return bias.masked_fill(~mask, -torch.inf)


def bucket_of(distance: torch.Tensor, num_buckets: int, max_distance: int, is_bidirectional: bool) -> torch.Tensor:
    """Sort distances (key position - query position, int64) into buckets.

    Half of the buckets (of those of a sign) hold one distance each, the others grow in logarithmic steps up to
    max_distance. Bidirectional, positive distances have the upper half of the buckets; otherwise they share bucket 0.

    Returns: int64 of the same shape, in [0, num_buckets).
    """
    offset = torch.zeros_like(distance)
    if is_bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    logarithm = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)
