"""Bottlenecks one by one: how they are drawn, and what they make of a sub-layer's output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmscale.config.adapt import AdapterConfig
from tests.adapt.bases import Bases, checkpoint_of
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import pretrain_on_ranks

pytestmark = pytest.mark.distributed

HIDDEN, WIDTH = 256, 64
NEAR = 1.0e-3
"""A houlsby adapter adds up to about 0.001^2 x sqrt(256 x 64) = 1.3e-4 at first."""


def build(variant: str, norm_position: str, **keys: object) -> nn.Module:
    """Build a bottleneck of one rank."""
    from lmscale.adapt.bottleneck import BehindSublayer, BesideSublayer
    from lmscale.config.model import ModelConfig
    from lmscale.models.context import build_context
    from lmscale.parallel.topology import init_topology

    model = ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        vocab_size=128,
        norm_position=norm_position,
    )
    context = build_context(model, init_topology(1, 1), seed=1)
    kind = BesideSublayer if variant == "parallel" else BehindSublayer
    return kind(context, AdapterConfig(variant=variant, width=WIDTH, **keys), "layers.0.mlp_adapter")


def inspect(variant: str, norm_position: str, keys: dict[str, object]) -> dict[str, torch.Tensor]:
    """Return a bottleneck's parameters, and what it makes of some output, on this rank of a pool."""
    module = build(variant, norm_position, **keys)
    out, residual = torch.randn(2, 2, 5, HIDDEN, generator=torch.Generator().manual_seed(2)).unbind()
    norm = nn.LayerNorm(HIDDEN)
    with torch.no_grad():
        made = module(out) if variant == "parallel" else module(out, residual, norm)
    return {"out": out, "residual": residual, "made": made} | {n: p.detach() for n, p in module.named_parameters()}


def run(variant: str, norm_position: str = "pre", **keys: object) -> dict[str, torch.Tensor]:
    (found,) = run_ranks(1, inspect, variant, norm_position, keys)
    return found


def test_houlsby_starts_near_its_base() -> None:
    found = run("houlsby")
    assert 0.0 < (found["made"] - found["out"]).abs().max() < NEAR
    for name in ("down", "up"):
        weight = found[f"{name}.weight"]
        assert weight.abs().max() <= 0.002
        assert weight.std() == pytest.approx(0.00088, rel=0.02)  # of a normal that is cut at two deviations
        assert not found[f"{name}.bias"].any()


def test_zero_up_draws_down_by_kaiming_and_adds_nothing() -> None:
    found = run("pfeiffer", init="zero_up")
    assert torch.equal(found["made"], found["out"])
    assert not found["up.weight"].any()
    assert found["down.weight"].abs().max() == pytest.approx(HIDDEN**-0.5, rel=0.01)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_pfeiffer_reads_the_norm_of_output_and_residual_in_post_norm_models(norm_position: str) -> None:
    found = run("pfeiffer", norm_position)
    assert found["down.weight"].std() == pytest.approx(0.02, rel=0.02)
    read = F.layer_norm(found["out"] + found["residual"], (HIDDEN,)) if norm_position == "post" else found["out"]
    added = torch.relu(read @ found["down.weight"].t()) @ found["up.weight"].t()
    torch.testing.assert_close(found["made"], found["out"] + added)


def test_parallel_scales_what_it_adds() -> None:
    found = run("parallel", init="normal", activation="swish")
    added = F.silu(found["out"] @ found["down.weight"].t()) @ found["up.weight"].t()
    torch.testing.assert_close(found["made"], 4.0 * added)
    assert AdapterConfig(variant="parallel").chosen_init == "zero_up"
    assert AdapterConfig(variant="parallel", scale=1.5).chosen_scale == 1.5


@pytest.mark.parametrize(("ranks", "tp_size"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_bitfit_of_queries_leaves_the_rows_of_keys_and_values(
    ranks: int, tp_size: int, bases: Bases, tmp_path: Path
) -> None:
    from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

    adapt = {"method": "bitfit", "which": "query_fc1"}
    pretrain_on_ranks(ranks, bases.keys("llama-with-biases", tmp_path, adapt, parallel__tp_size=tp_size))
    name, groups, size = "layers.1.attention.linear_qkv.bias", 2, 8
    before, after = (
        CheckpointReader(Path(path)).logical(PARAMETER, name).view(groups, 4, size)
        for path in (bases.path("llama-with-biases"), checkpoint_of(tmp_path))
    )
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert (before[:, :2] != after[:, :2]).all()
