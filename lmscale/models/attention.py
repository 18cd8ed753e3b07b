"""Core attention over torch's scaled_dot_product_attention, in megatron-core's `core_attention` slot.

megatron-core's own needs CUDA buffers and materializes the scores; SDPA is flash attention where the device has it.
This is the one place where masks have a polarity (SDPA's: True may attend) and where rotary embeddings, the key/value
cache and attention dropout live.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmscale.batch import PADDING_ID
from lmscale.models.context import ModelContext
from lmscale.parallel.device import multiplies_slowly


@dataclass(frozen=True)
class AttentionInputs:
    """What core attention needs besides q, k, v; it travels in megatron-core's `attention_mask` argument.

    Shapes: s queries, k keys; None where it does without.
        positions: int64 [b, s], for rope; 0 .. s-1 where None.
        document_ids: int64 [b, s], of the queries, and, in self attention, of the keys.
        key_document_ids: int64 [b, k], of the keys of cross attention.
        is_prefix: int64 [b, s].
        bias: [1 or b, n/t, s, k], added to the scores; it holds the mask already.
    """

    micro_batch: int
    positions: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    key_document_ids: torch.Tensor | None = None
    is_prefix: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class KeyValueCache:
    """Keys, values and document ids of the tokens before, for generation.

    Shapes: keys, values [b, g/t, capacity, d]; document_ids int64 [b, capacity].
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._document_ids: torch.Tensor | None = None

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, document_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store the new tokens' keys, values and document ids and return those of all tokens so far: views."""
        batch, groups, new, width = keys.shape
        if self._keys is None or self._values is None or self._document_ids is None:
            self._keys = keys.new_empty(batch, groups, self.capacity, width)
            self._values = values.new_empty(batch, groups, self.capacity, width)
            self._document_ids = document_ids.new_empty(batch, self.capacity)
        end = self.length + new
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self._document_ids[:, self.length : end] = document_ids
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end], self._document_ids[:, :end]


class CoreAttention(nn.Module):
    """softmax(scale q k^T + bias + mask) v.

    `prefix`, where an adaptation puts it, is called for keys and values [b or 1, g/t, p, d] that every query sees before all
    others, and for which of them are there, bool [b, p] or None for all. They are not rotated. `observer`, where one is
    set, is shown the keys and values [b, g/t, s, d] of the tokens, the keys rotated.

    Causal without documents, the mask is SDPA's own, which the flash kernels skip blocks by; otherwise it is made once
    for each micro batch and shared by the layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        context: ModelContext,
        masks: AttentionMasks,
        layer_key: str,
    ):
        super().__init__()
        self._context = context
        self._masks = masks
        self._layer_key = layer_key
        self._site = "attention" if attention_type == "self" else "cross_attention"
        self._scale = softmax_scale
        self._dropout = config.attention_dropout
        self._can_cache = attention_type == "self" and masks.is_causal
        self._rotary = RotaryTable(context.model.rope_theta, context.model.head_size) if _uses_rope(context) else None
        self.cache: KeyValueCache | None = None
        self.observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.register_module("prefix", None)

    @property
    def key(self) -> str:
        """The logical name of the module."""
        return f"{self._layer_key}.{self._site}.core_attention"

    def new_cache(self, capacity: int) -> KeyValueCache | None:
        """Make a cache for generation; None where a token's keys depend on what follows it, or are of another stack."""
        return KeyValueCache(capacity) if self._can_cache else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: AttentionInputs,
        /,
        **_: Any,
    ) -> torch.Tensor:
        """Attend.

        Shapes: query [b, s, n/t, d] ([s, b, ...] under sequence parallelism), key and value with g/t heads; the result
        has the first two dimensions of query and n/t * d.
        """
        inputs = attention_mask
        batch_first = not self._context.sequence_parallel
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        query_bnsd, key_bgsd, value_bgsd = (tensor.permute(order) for tensor in (query, key, value))
        if self._rotary is not None:
            shift = self._context.rows.shift
            query_bnsd, key_bgsd = self._rotary.rotate(query_bnsd, key_bgsd, inputs.positions, shift)
        mask, is_causal = inputs.bias, False
        if self.cache is not None:
            assert inputs.document_ids is not None
            is_prompt = self.cache.length == 0
            key_bgsd, value_bgsd, all_ids = self.cache.append(key_bgsd, value_bgsd, inputs.document_ids)
            if mask is None:
                mask = self._masks.of(inputs) if is_prompt else self._masks.cached(inputs.document_ids, all_ids)
        elif mask is None:
            mask = self._masks.of(inputs)
            is_causal = mask is None and self._masks.is_causal
        if self.observer is not None:
            self.observer(key_bgsd, value_bgsd)
        if self.prefix is not None and not self._context.rows.is_base:
            keys, values, is_there = self.prefix()
            mask, is_causal = self._masks.behind_prefix(mask, is_causal, query_bnsd, keys.size(2), is_there), False
            key_bgsd, value_bgsd = _behind(keys, key_bgsd), _behind(values, value_bgsd)
        out_bnsd = self._attend(query_bnsd, key_bgsd, value_bgsd, mask, is_causal, inputs.micro_batch)
        back = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        return out_bnsd.permute(back).flatten(2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        micro_batch: int,
    ) -> torch.Tensor:
        dropout = self._dropout if self.training else 0.0
        grouped = query.size(1) != key.size(1)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if dropout:
                self._context.dropout.seed(q.device, self._layer_key, micro_batch, self._site, differs_over_tp=True)
            dtype = q.dtype
            if multiplies_slowly(q):
                q, k, v = q.float(), k.float(), v.float()
            added = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=added, dropout_p=dropout, is_causal=is_causal, scale=self._scale, enable_gqa=grouped
            ).to(dtype)

        is_selective = self._context.recompute == "selective" and torch.is_grad_enabled()
        if is_selective and keeps_scores(query, key, value, mask, dropout, is_causal, grouped):
            result: torch.Tensor = checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=False)
            return result
        return attend(query, key, value)


def keeps_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    grouped: bool,
) -> bool:
    """Tell whether SDPA will take the math kernel, which keeps the [s, s] scores for backward; the others do not."""
    choice = torch._fused_sdp_choice(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
    )
    return int(choice) == int(torch.nn.attention.SDPBackend.MATH)


class AttentionMasks:
    """Makes the mask of one kind of attention once for each micro batch, for all layers of a stage.

    Tokens see those of the same document id; causal, themselves and what precedes them. In cross attention padding sees
    everything, so that no row is without a key.
    """

    def __init__(self, *, is_causal: bool) -> None:
        self.is_causal = is_causal
        self._made_for: tuple[torch.Tensor, torch.Tensor] | None = None
        self._mask: torch.Tensor | None = None
        self._widened: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def of(self, inputs: AttentionInputs) -> torch.Tensor | None:
        """Return bool [b, 1, s, k], True where a query may attend; None where a plain (causal) attention is meant."""
        ids, keys = inputs.document_ids, inputs.key_document_ids
        if ids is not None and keys is not None:
            return self._remember(ids, keys, lambda: _same(ids, keys) | (ids == PADDING_ID)[:, None, :, None])
        if inputs.is_prefix is not None:
            prefix = inputs.is_prefix
            return self._remember(prefix, prefix, lambda: self._with_prefix(ids, prefix))
        if ids is None:
            return None
        return self.cached(ids, ids) if self.is_causal else self._remember(ids, ids, lambda: _same(ids, ids))

    def cached(self, new_ids: torch.Tensor, all_ids: torch.Tensor) -> torch.Tensor:
        """Return the causal mask of the last s tokens of a key/value cache.

        Args:
            new_ids: int64 [b, s], document ids of the new tokens; another tensor for each pass through the model.
            all_ids: int64 [b, total], those of all tokens so far, the new ones last.

        Returns:
            bool [b, 1, s, total]: True where a new token may attend.
        """
        return self._remember(new_ids, all_ids, lambda: _same(new_ids, all_ids) & _preceding(new_ids, all_ids))

    def behind_prefix(
        self,
        mask: torch.Tensor | None,
        is_causal: bool,
        query: torch.Tensor,
        length: int,
        is_there: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Widen a mask by keys that stand before all others; made once for each mask, for all layers.

        Args:
            mask: bool or floating-point [b or 1, n or 1, s, k], or None.
            is_causal: what None means: whether queries see what precedes them alone, or everything.
            query: [b, n, s, d].
            length: keys in front, p.
            is_there: bool [b, p], those that a row has; None where each has all.

        Returns:
            The same with p + k keys; None where every query sees everything.
        """
        if mask is None and not is_causal and is_there is None:
            return None
        key = (mask, is_causal, query.size(2), length, is_there)
        if self._widened is None or not all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(self._widened[0], key, strict=True)
        ):
            self._widened = key, _widen(mask, is_causal, query, length, is_there)
        return self._widened[1]

    def _with_prefix(self, ids: torch.Tensor | None, prefix: torch.Tensor) -> torch.Tensor:
        mask = _preceding(prefix, prefix) | (prefix == 1)[:, None, None, :] & (prefix == 1)[:, None, :, None]
        return mask if ids is None else mask & _same(ids, ids)

    def _remember(self, queries: torch.Tensor, keys: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        made_for = self._made_for
        is_same = made_for is not None and made_for[0] is queries and made_for[1].size(1) == keys.size(1)
        if not is_same or self._mask is None:
            self._made_for, self._mask = (queries, keys), make()
        return self._mask


def _widen(
    mask: torch.Tensor | None, is_causal: bool, query: torch.Tensor, length: int, is_there: torch.Tensor | None
) -> torch.Tensor:
    num_queries = query.size(2)
    if mask is None:
        mask = torch.ones(1, 1, num_queries, num_queries, dtype=torch.bool, device=query.device)
        mask = mask.tril() if is_causal else mask
    front = mask.new_zeros(1, 1, 1, length) if mask.is_floating_point() else mask.new_ones(1, 1, 1, length)
    if is_there is not None:
        hidden = -torch.inf if mask.is_floating_point() else False
        front = front.masked_fill(~is_there[:, None, None, :], hidden)
        mask = mask.expand(len(is_there), -1, -1, -1)
    return torch.cat((front.expand(*mask.shape[:-1], length), mask), dim=-1)


def _behind(front: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Put keys or values [b or 1, g, p, d] before others [b, g, k, d]."""
    return torch.cat((front.expand(rest.size(0), -1, -1, -1).to(rest.dtype), rest), dim=2)


def _same(query_ids: torch.Tensor, key_ids: torch.Tensor) -> torch.Tensor:
    return query_ids[:, None, :, None] == key_ids[:, None, None, :]


def _preceding(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Bool [s, k]: True up to the query's own place, the queries being the last s of the keys."""
    new, total = queries.size(1), keys.size(1)
    return torch.ones(new, total, dtype=torch.bool, device=keys.device).tril(total - new)


def _uses_rope(context: ModelContext) -> bool:
    return context.model.position_embedding == "rope"


class RotaryTable:
    """Rotary position embedding with rotated halves, as Llama applies it.

    Dimension i of the first half and i of the second turn by position * theta^(-2i/d).

    Source: Su et al. 2021, arXiv:2104.09864; the half layout is GPT-NeoX's and Llama's.
    """

    def __init__(self, theta: float, head_size: int):
        self._theta, self._head_size = theta, head_size
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        positions: torch.Tensor | None,
        shift: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn query [b, n, s, d] and key [b, g, s, d] by their positions int64 [b, s] (0 .. s-1 where None) + shift."""
        if positions is None and isinstance(shift, int):
            cos, sin = self._plain(shift + query.size(2), query.device)
            cos, sin = cos[shift:], sin[shift:]
        else:
            if positions is None:
                positions = torch.arange(query.size(2), device=query.device)[None]
            cos, sin = self._angles(positions + shift)
            cos, sin = cos[:, None], sin[:, None]
        return _turn(query, cos, sin), _turn(key, cos, sin)

    def _plain(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._table is None or self._table[0].size(0) != length or self._table[0].device != device:
            self._table = self._angles(torch.arange(length, device=device))
        return self._table

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, fp32 [..., s, d]."""
        exponent = torch.arange(0, self._head_size, 2, device=positions.device, dtype=torch.float32) / self._head_size
        angle = positions[..., None].float() * self._theta**-exponent
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)
