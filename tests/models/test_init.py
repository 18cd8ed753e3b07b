"""Initial weights: GPT-2's distributions, and the same values on every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lmscale.config.model import InitConfig, ModelConfig
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


def joined(parts: list[torch.Tensor], tp_dim: int | None, tp_stride: int) -> torch.Tensor:
    """Put the slices of all tensor-parallel ranks together: each holds its share of each of tp_stride blocks."""
    if tp_dim is None:
        return parts[0]
    by_rank = [part.chunk(tp_stride, dim=tp_dim) for part in parts]
    return torch.cat([blocks[index] for index in range(tp_stride) for blocks in by_rank], dim=tp_dim)


def _logical_weights(tp_size: int, pp_size: int, seed: int, model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """This rank's weights by logical name, the tensor-parallel slices joined."""
    from lmscale.models.build import build_model, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology
    from lmscale.train.fragments import logical_tensor

    topology = init_topology(tp_size, pp_size)
    context = build_context(model, topology, seed=seed)
    built = build_model(model_specs(context), context, LanguageModelLoss(context))
    found = {}
    for name, parameter in built.named_parameters():
        tensor = logical_tensor(built, name, parameter, tp_size)
        parts: list[Any] = [None] * tp_size
        torch.distributed.all_gather_object(parts, parameter.detach(), group=topology.tp_group)
        found[tensor.name] = joined(parts, tensor.tp_dim, tensor.tp_stride)
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


H, FFN, HEADS, HEAD, LAYERS, VOCAB = 128, 192, 8, 24, 2, 256
WIDTH = HEADS * HEAD
SIGMAS = 3.0
OUTPUTS_INPUTS = {
    "query": (WIDTH, H),
    "key": (WIDTH, H),
    "value": (WIDTH, H),
    "cross query": (WIDTH, H),
    "cross key": (WIDTH, H),
    "cross value": (WIDTH, H),
    "attention out": (H, WIDTH),
    "cross out": (H, WIDTH),
    "gate": (FFN, H),
    "up": (FFN, H),
    "ffn out": (H, FFN),
}
RESIDUAL = ("attention out", "cross out", "ffn out")


def matrices_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the fused tensors of a two-stack model apart, and put those of a kind together."""
    found: dict[str, list[torch.Tensor]] = {}
    kinds = {
        "attention.linear_qkv.weight": (HEADS, ("query", "key", "value")),
        "cross_attention.linear_kv.weight": (HEADS, ("cross key", "cross value")),
        "cross_attention.linear_q.weight": (1, ("cross query",)),
        "attention.linear_proj.weight": (1, ("attention out",)),
        "cross_attention.linear_proj.weight": (1, ("cross out",)),
        "mlp.linear_fc1.weight": (1, ("gate", "up")),
        "mlp.linear_fc2.weight": (1, ("ffn out",)),
        "word_embedding.table.weight": (1, ("words",)),
        "head.table.weight": (1, ("head",)),
    }
    for name, value in weights.items():
        key = name.split(".", 2)[-1] if "_layers." in name else name
        if key in kinds:
            groups, parts = kinds[key]
            for part, rows in zip(parts, value.unflatten(0, (groups, -1)).chunk(len(parts), dim=1), strict=True):
                found.setdefault(part, []).append(rows.flatten())
    return {kind: torch.cat(values) for kind, values in found.items()}


def expected_std(kind: str, scheme: str, residual: str) -> float:
    """The schemes' formulas, written out."""
    outputs, inputs = OUTPUTS_INPUTS.get(kind, (VOCAB, H))
    if kind == "words" and scheme in ("fan_in", "glorot_normal", "glorot_uniform", "t5"):
        return 1.0 if scheme == "t5" else 1 / math.sqrt(H)
    if kind in RESIDUAL and residual == "wang":
        return 2 / (LAYERS * math.sqrt(H))
    std = {
        "normal": 0.02,
        "truncated_normal": 0.02 * TRUNCATED,
        "small": math.sqrt(2 / (5 * H)),
        "fan_in": 1 / math.sqrt(inputs),
        "glorot_normal": math.sqrt(2 / (inputs + outputs)),
        "glorot_uniform": math.sqrt(2 / (inputs + outputs)),
        "t5": 1 / math.sqrt(inputs * HEAD) if "query" in kind else 1 / math.sqrt(inputs),
    }[scheme]
    return std / math.sqrt(2 * LAYERS) if kind in RESIDUAL and residual == "scaled" else std


TRUNCATED = math.sqrt(1 - 2 * 2 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation of N(0, 1) cut at two: 0.8796."""
FOURTH_MOMENTS = {"glorot_uniform": 1.8, "truncated_normal": 2.37}
"""Of the distribution, over its variance squared; 3 of a normal one. It decides how far a sample's variance strays."""


@pytest.mark.parametrize("tp_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("scheme", "residual"),
    [
        ("normal", "scaled"),
        ("truncated_normal", "none"),
        ("small", "wang"),
        ("fan_in", "none"),
        ("glorot_normal", "scaled"),
        ("glorot_uniform", "none"),
        ("t5", "none"),
    ],
)
def test_every_matrix_has_the_standard_deviation_of_its_scheme(scheme: str, residual: str, tp_size: int) -> None:
    model = ModelConfig(
        architecture="t5",
        position_embedding="relative",
        num_layers=LAYERS,
        hidden_size=H,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        head_dim=HEAD,
        vocab_size=VOCAB,
        activation="geglu",
        tied_head=False,
        linear_bias=False,
        init={"scheme": scheme, "residual": residual},
    )
    matrices = matrices_of(run_ranks(tp_size, _logical_weights, tp_size, 1, 1, model)[0])
    assert len(matrices) == len(OUTPUTS_INPUTS) + 2
    for kind, values in matrices.items():
        expected, count = expected_std(kind, scheme, residual), values.numel()
        spread = math.sqrt((FOURTH_MOMENTS.get(scheme, 3.0) - 1) / (4 * count))
        assert float(values.std()) == pytest.approx(expected, rel=SIGMAS * spread), kind
        assert abs(float(values.mean())) < SIGMAS * expected / math.sqrt(count), kind
        if scheme == "glorot_uniform" and kind != "words":
            assert float(values.abs().max()) <= math.sqrt(3) * expected * (1 + 1e-6), kind


def test_schemes_draw_the_same_on_every_layout() -> None:
    model = MODEL.model_copy(update={"init": InitConfig(scheme="glorot_uniform", residual="wang")})
    (whole,) = run_ranks(1, _logical_weights, 1, 1, 1, model)
    seen = set()
    for mine in run_ranks(4, _logical_weights, 2, 2, 1, model):
        for name, value in mine.items():
            assert torch.equal(value, whole[name]), name
            seen.add(name)
    assert seen == set(whole)


def test_relative_bias_of_t5_is_drawn_by_the_width() -> None:
    model = ModelConfig(
        architecture="t5",
        position_embedding="relative",
        num_layers=1,
        hidden_size=64,
        num_attention_heads=64,
        vocab_size=128,
        init={"scheme": "t5", "residual": "none"},
    )
    (drawn,) = run_ranks(1, _logical_weights, 1, 1, 1, model)
    tables = torch.cat([drawn[f"{stack}_relative_bias.table"].flatten() for stack in ("encoder", "decoder")])
    assert float(tables.std()) == pytest.approx(64**-0.5, rel=SIGMAS / math.sqrt(2 * tables.numel()))
