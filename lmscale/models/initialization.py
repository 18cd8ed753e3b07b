"""How each kind of parameter is drawn, by the model's `init.scheme`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lmscale.config.model import ModelConfig
from lmscale.parallel.seeds import WeightInit

Fill = Callable[[torch.Tensor], torch.Tensor]
"""Fills a whole (unsharded) tensor and returns it."""


def residual_std(model: ModelConfig) -> float:
    """Compute the standard deviation of the projections into the residual stream: std / sqrt(2 num_layers).

    Source: Radford et al. 2019 scale by 1/sqrt(N), N residual layers; each transformer layer adds two.
    """
    return model.init.std / math.sqrt(2 * model.num_layers) if model.init.scaled_residual else model.init.std


def matrix_init(model: ModelConfig, weights: WeightInit, std: float | None = None) -> Fill:
    """Return what draws a matrix [outputs, inputs]: N(0, std), or under t5 N(0, inputs^-1/2).

    T5's queries are smaller still, by the root of the head's width (`scale_queries`).

    Source: Raffel et al. 2020, arXiv:1910.10683, as its code initializes (mesh: transformer/attention.py).
    """
    if model.init.scheme == "t5":
        return lambda tensor: weights.normal(tensor.size(1) ** -0.5)(tensor)
    return weights.normal(std or model.init.std, truncated=model.init.scheme == "truncated_normal")


def embedding_init(model: ModelConfig, weights: WeightInit, std: float | None = None) -> Fill:
    """Return what draws a table of embeddings: N(0, std), or under t5 N(0, 1)."""
    if model.init.scheme == "t5":
        return weights.normal(1.0)
    return matrix_init(model, weights, std)


@torch.no_grad()
def scale_queries(model: ModelConfig, weight: torch.Tensor, heads_per_group: int) -> None:
    """Scale the query rows of a drawn projection to (inputs head_dim)^-1/2, T5's place of the scores' divisor.

    Args:
        model: the architecture; nothing is done but under init.scheme: t5.
        weight: [groups (heads_per_group + others) head_dim, h], this rank's part: queries come first in each group.
        heads_per_group: query heads of a group; the rows of `others` (keys, values) stay. 0: all rows are queries.
    """
    if model.init.scheme != "t5":
        return
    if heads_per_group:
        rows = weight.view(-1, heads_per_group + 2, model.head_size, weight.size(1))[:, :heads_per_group]
    else:
        rows = weight
    rows.mul_(model.head_size**-0.5)
