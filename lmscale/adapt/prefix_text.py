"""Prefixes that begin as the keys and values of a text: networks are fitted to them before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from lmscale.adapt.prefix import NETWORK_PARAMETERS, PrefixConfig, make_table, network_key
from lmscale.config.model import ModelConfig
from lmscale.parallel.seeds import WeightInit
from lmscale.plan.adaptation import attentions

Tensors = dict[str, torch.Tensor]
FIT_STEPS, FIT_RATE = 500, 1.0e-4


def from_text(
    tables: Mapping[str, torch.Tensor], model: ModelConfig, adapt: PrefixConfig, weights: WeightInit
) -> Tensors:
    """Turn the keys and values of a text into the logical tensors of a prefix.

    Args:
        tables: [p, 2, g, d] of each core attention, by its logical name.
        model: the base's architecture.
        adapt: the method.
        weights: what the run draws its weights from.

    Returns:
        Copies of the tables where they are trained directly; else the networks, fitted to them. Several adaptations begin
        alike but for what their networks are drawn as.
    """
    if adapt.entries > 1:
        tables = {name: table.expand(adapt.entries, *table.shape) for name, table in tables.items()}
    if adapt.projection is None:
        return {f"{name}.prefix.table": table for name, table in tables.items()}
    return fit(draw_networks(model, adapt, weights), tables, model)


def draw_networks(model: ModelConfig, adapt: PrefixConfig, weights: WeightInit) -> Tensors:
    """Draw the whole tensors that the modules of a prefix (adapt.prefix) are cut from."""
    assert adapt.projection is not None
    hidden, middle, width = model.hidden_size, adapt.projection, 2 * model.query_groups * model.head_size

    def stacked(shape: tuple[int, ...], fill: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        drawn = torch.stack([fill(torch.empty(shape)) for _ in range(adapt.entries)])
        return drawn if adapt.entries > 1 else drawn[0]

    drawn: Tensors = {}
    for name, kind, _ in attentions(model):
        key = network_key(kind)
        if f"{key}.inputs" not in drawn:
            with weights.layer(key):
                draw = weights.uniform(hidden**-0.5)
                drawn[f"{key}.inputs"] = stacked((adapt.length, hidden), weights.normal(1.0))
                drawn[f"{key}.weight"] = stacked((middle, hidden), draw)
                drawn[f"{key}.bias"] = stacked((middle,), draw)
        with weights.layer(f"{name}.prefix"):
            draw = weights.uniform(middle**-0.5)
            drawn[f"{name}.prefix.weight"] = stacked((width, middle), draw)
            drawn[f"{name}.prefix.bias"] = stacked((width,), draw)
    return drawn


def fit(tensors: Tensors, tables: Mapping[str, torch.Tensor], model: ModelConfig) -> Tensors:
    """Train networks for 500 steps of Adam, rate 1e-4, to make the tables: the mean squared error of each kind of attention.

    Nothing is drawn and no rank is asked: equal arguments give equal results.

    Source: Li and Liang 2021, arXiv:2101.00190, sec. 7.4, and its code: prefixes initialized with real words.
    """
    trained = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=FIT_RATE)
    places = attentions(model)
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            loss = torch.stack([_error(trained, tables[name], name, kind, model) for name, kind, _ in places]).sum()
            (loss / model.num_layers).backward()
            optimizer.step()
    return {name: tensor.detach() for name, tensor in trained.items()}


def _error(tensors: Tensors, table: torch.Tensor, name: str, kind: str, model: ModelConfig) -> torch.Tensor:
    network = [tensors[f"{network_key(kind)}.{part}"] for part in NETWORK_PARAMETERS]
    layer = (tensors[f"{name}.prefix.weight"], tensors[f"{name}.prefix.bias"])
    return F.mse_loss(make_table(*network, *layer, model), table)
