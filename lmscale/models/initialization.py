"""How each kind of parameter is drawn, by the model's `init.scheme`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lmscale.config.model import ModelConfig
from lmscale.models.fused import row_parts
from lmscale.parallel.seeds import WeightInit

Fill = Callable[[torch.Tensor], torch.Tensor]
"""Fills a whole (unsharded) tensor and returns it."""


def matrix_std(model: ModelConfig, outputs: int, inputs: int) -> float:
    """Compute the standard deviation of a matrix of the given logical size, by the model's scheme.

    Source: normal: Radford et al. 2019 (GPT-2). truncated_normal: Devlin et al. 2019, arXiv:1810.04805, its code. small:
        Nguyen and Salazar 2019, arXiv:1910.05895, sec. 2.2: sqrt(2 / (d + 4 d)). fan_in: LeCun et al. 1998, Efficient
        BackProp, sec. 4.6. glorot: Glorot and Bengio 2010, eq. 16. t5: Raffel et al. 2020, arXiv:1910.10683, as its code
        initializes (mesh: transformer/attention.py).
    """
    init = model.init
    if init.scheme in ("fan_in", "t5"):
        return inputs**-0.5
    if init.scheme in ("glorot_normal", "glorot_uniform"):
        return math.sqrt(2 / (inputs + outputs))
    return math.sqrt(2 / (5 * model.hidden_size)) if init.scheme == "small" else init.std


def residual_std(model: ModelConfig, outputs: int, inputs: int) -> float:
    """Compute the standard deviation of a projection into the residual stream, by init.residual.

    Source: scaled: Radford et al. 2019 scale by 1/sqrt(N), N residual layers; each transformer layer adds two, and cross
        attention's third is not counted. wang: Ben Wang's GPT-J, which GPT-NeoX kept (Black et al. 2022,
        arXiv:2204.06745, sec. 2.2).
    """
    if model.init.residual == "wang":
        return 2 / (model.num_layers * math.sqrt(model.hidden_size))
    std = matrix_std(model, outputs, inputs)
    return std / math.sqrt(2 * model.num_layers) if model.init.residual == "scaled" else std


def matrix_init(model: ModelConfig, weights: WeightInit, *, is_residual: bool = False) -> Fill:
    """Return what draws a matrix [outputs, inputs], whole; one that feeds the residual stream where `is_residual`.

    Several matrices in one tensor are drawn as one, and then scaled (`scale_fused`).
    """
    std_of = residual_std if is_residual else matrix_std

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        std = std_of(model, *tensor.shape)
        if model.init.scheme == "glorot_uniform":
            return weights.uniform(std * math.sqrt(3))(tensor)
        return weights.normal(std, truncated=model.init.scheme == "truncated_normal")(tensor)

    return fill


def embedding_init(model: ModelConfig, weights: WeightInit, std: float | None = None) -> Fill:
    """Return what draws a table of embeddings [entries, h]: N(0, std), where it is given.

    Otherwise by the scheme: normal, truncated_normal and small as matrices; fan_in and glorot N(0, h^-1/2), which of a
    tied table is an output matrix's fan-in; t5 N(0, 1).
    """
    if std is None:
        std = {"t5": 1.0, **dict.fromkeys(_BY_SIZE, model.hidden_size**-0.5)}.get(model.init.scheme)
    if std is None:
        std = matrix_std(model, 0, 0)  # the size does not matter here
    return weights.normal(std, truncated=model.init.scheme == "truncated_normal")


_BY_SIZE = ("fan_in", "glorot_normal", "glorot_uniform")


@torch.no_grad()
def scale_fused(model: ModelConfig, weight: torch.Tensor, tp_size: int, *, has_queries: bool = False) -> None:
    """Scale the matrices that one drawn tensor holds to the standard deviation that each has alone.

    Glorot's depends on the number of outputs, which the whole has more of. T5's queries are (inputs head_dim)^-1/2, its
    place of the scores' divisor; other schemes leave all as it is.

    Args:
        model: the architecture.
        weight: this rank's part of the tensor, [outputs/t, inputs], its matrices marked (`models.fused`).
        tp_size: t.
        has_queries: its first, or only, matrix makes queries.
    """
    local_rows, inputs = weight.shape
    parts = row_parts(weight) or (local_rows,)
    of_whole = matrix_std(model, local_rows * tp_size, inputs)
    for index, rows in enumerate(weight.view(-1, sum(parts), inputs).split(parts, dim=1)):
        factor = matrix_std(model, local_rows * tp_size * parts[index] // sum(parts), inputs) / of_whole
        if model.init.scheme == "t5" and has_queries and index == 0:
            factor *= model.head_size**-0.5
        if factor != 1.0:
            rows.mul_(factor)
