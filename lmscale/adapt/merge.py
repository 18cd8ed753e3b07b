"""An adaptation's effect on the logical tensors of its base, where it has one: what can be merged, and how.

Shapes: of the whole tensors, whatever the layout: o outputs, i inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmscale.config.adapt import AdaptConfig, BitFitConfig, FullConfig, LoraConfig
from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError
from lmscale.plan.lora import PARTS, Target, lora_pairs, lora_scale

Read = Callable[[str], torch.Tensor]
"""Reads a trained tensor of one adaptation by its logical name."""

EMBEDDING = "word_embedding"


def check_can_merge(adapt: AdaptConfig) -> None:
    """Check that an adaptation is a change of its base's own tensors.

    Raises:
        ConfigError: if it adds to the base what the base has no tensor for, or is a whole model already.
    """
    if isinstance(adapt, FullConfig):
        raise ConfigError("is a whole model already", field="adapt.method", value="full", remedy="use it as it is")
    if not isinstance(adapt, LoraConfig | BitFitConfig):
        raise ConfigError(
            "cannot be merged: what it adds is no change of the base's own tensors",
            field="adapt.method",
            value=adapt.method,
            remedy="load the adaptation with its base; lora and bitfit can be merged",
        )


def merged_places(model: ModelConfig, adapt: LoraConfig) -> dict[str, list[Target]]:
    """List the pairs that change each tensor, by the tensor's logical name."""
    places: dict[str, list[Target]] = {}
    for pair in lora_pairs(model, adapt):
        weight = f"{pair[0]}.table.weight" if pair[0] == EMBEDDING else f"{pair[0]}.weight"
        places.setdefault(weight, []).append(pair)
    return places


def lora_delta(model: ModelConfig, adapt: LoraConfig, pairs: list[Target], read: Read) -> torch.Tensor:
    """Compute what LoRA adds to one tensor: scale B A, in the rows that each pair has there.

    Args:
        model: the base.
        adapt: the method.
        pairs: those of the tensor.
        read: reads A [r, i] and B [o, r].

    Returns:
        fp32 [rows, i]; of the embedding [v, h].
    """
    total: torch.Tensor | None = None
    for place, name, _, _ in pairs:
        key = f"{place}.lora.{name}"
        delta = spread_rows(model, place, name, read(f"{key}.b").float()) @ read(f"{key}.a").float()
        total = delta if total is None else total + delta
    assert total is not None
    total = total * lora_scale(adapt)
    return total.t() if pairs[0][0] == EMBEDDING else total


def spread_rows(model: ModelConfig, place: str, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Put the rows of one matrix where they are in the tensor that holds several; the other rows are 0.

    Shapes: [o, ...] -> [rows of the tensor, ...].
    """
    fused = fused_rows(model, place)
    if name not in PARTS or not fused:
        return rows
    periods, parts = fused
    own = rows.unflatten(0, (periods, -1))
    blocks = [
        own if index == PARTS[name] else own.new_zeros(periods, part, *rows.shape[1:])
        for index, part in enumerate(parts)
    ]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def fused_rows(model: ModelConfig, place: str) -> tuple[int, tuple[int, ...]] | None:
    """Return how the rows of a whole tensor are shared by the matrices that it holds: (periods, rows of each in one)."""
    heads, groups, width = model.num_attention_heads, model.query_groups, model.head_size
    if place.endswith("attention.linear_qkv"):
        return groups, (heads // groups * width, width, width)
    if place.endswith("cross_attention.linear_kv"):
        return groups, (width, width)
    if place.endswith("mlp.linear_fc1") and model.is_gated:
        return 1, (model.ffn_size, model.ffn_size)
    return None
