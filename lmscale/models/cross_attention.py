"""Cross attention whose keys and values, for generation, are computed once for each encoder output."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import CrossAttention as MegatronCrossAttention


class MemoryCache:
    """Keys and values of an encoder's output, [b, s, n/t, d] each; None until they are computed."""

    def __init__(self) -> None:
        self.key_value: tuple[torch.Tensor, torch.Tensor] | None = None


class CrossAttention(MegatronCrossAttention):
    """megatron-core's cross attention. With a cache, later passes read the keys and values of the first."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.cache: MemoryCache | None = None

    def new_cache(self, capacity: int) -> MemoryCache:
        """Make a cache for generation."""
        return MemoryCache()

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project hidden states to queries and, the first time, the encoder's output to keys and values."""
        cache = self.cache
        if cache is None or cache.key_value is None:
            query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states, *args, **kwargs)
            if cache is not None:
                cache.key_value = key, value
            return query, key, value
        flat, _ = self.linear_q(hidden_states)
        heads = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        return flat.view(*flat.shape[:-1], *heads), *cache.key_value
