"""Initial weights: GPT-2's distributions, and the same values on every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lmscale.config.model import ModelConfig
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

STD = 0.02
RELATIVE_ERROR = 0.03
"""Of a standard deviation over at least 16,384 draws: 5 sigma."""
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=500,
    max_position_embeddings=128,
    activation="swiglu",
    init={"std": STD, "position_std": 0.01},
)


def _logical_weights(tp_size: int, pp_size: int, seed: int) -> dict[str, torch.Tensor]:
    """This rank's weights by logical name, the tensor-parallel slices joined."""
    from lmscale.models.build import build_model
    from lmscale.models.context import build_context
    from lmscale.models.decoder import decoder_specs
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology
    from lmscale.train.checkpoint_reader import _join
    from lmscale.train.fragments import logical_tensor

    topology = init_topology(tp_size, pp_size)
    context = build_context(MODEL, topology, seed=seed)
    model = build_model(decoder_specs(context), context, LanguageModelLoss(context))
    found = {}
    for name, parameter in model.named_parameters():
        tensor = logical_tensor(model, name, parameter, tp_size)
        parts: list[Any] = [None] * tp_size
        torch.distributed.all_gather_object(parts, parameter.detach(), group=topology.tp_group)
        found[tensor.name] = _join(parts, tensor.tp_dim, tensor.tp_stride)
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return run_ranks(1, _logical_weights, 1, 1, 1)[0]


def test_weights_follow_the_config(weights: dict[str, torch.Tensor]) -> None:
    residual = STD / math.sqrt(2 * MODEL.num_layers)
    for name, expected in {
        "word_embedding.table.weight": STD,
        "input_embedding.positions": 0.01,
        "layers.0.attention.linear_qkv.weight": STD,
        "layers.3.mlp.linear_fc1.weight": STD,
        "layers.0.attention.linear_proj.weight": residual,
        "layers.3.mlp.linear_fc2.weight": residual,
    }.items():
        assert float(weights[name].std()) == pytest.approx(expected, rel=RELATIVE_ERROR), name
        assert abs(float(weights[name].mean())) < 5 * expected / math.sqrt(weights[name].numel()), name


def test_biases_start_at_zero_and_norms_at_one(weights: dict[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        if name.endswith(".bias"):
            assert not value.any(), name
        if "norm" in name and name.endswith(".weight"):
            assert torch.equal(value, torch.ones_like(value)), name


@pytest.mark.parametrize(("world_size", "tp_size", "pp_size"), [(2, 2, 1), (2, 1, 2), (4, 2, 2), (2, 1, 1)])
def test_every_layout_draws_the_same_weights(
    world_size: int, tp_size: int, pp_size: int, weights: dict[str, torch.Tensor]
) -> None:
    seen = set()
    for mine in run_ranks(world_size, _logical_weights, tp_size, pp_size, 1):
        for name, value in mine.items():
            assert torch.equal(value, weights[name]), name
            seen.add(name)
    assert seen == set(weights)


def test_another_seed_draws_other_weights(weights: dict[str, torch.Tensor]) -> None:
    other = run_ranks(1, _logical_weights, 1, 1, 2)[0]
    assert not torch.equal(other["word_embedding.table.weight"], weights["word_embedding.table.weight"])


def test_layers_are_not_copies_of_one_another(weights: dict[str, torch.Tensor]) -> None:
    first, second = (weights[f"layers.{index}.mlp.linear_fc1.weight"] for index in (0, 1))
    assert not torch.equal(first, second)
