"""The list of names and shapes is that of the built models."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmscale.config.model import ModelConfig
from lmscale.config.presets import PRESETS, with_defaults
from lmscale.plan.names import parameter_shapes
from lmscale.plan.params import num_parameters
from tests.distributed.ranks import run_ranks

SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 190,
    "max_position_embeddings": 24,
}
MODELS: list[dict[str, Any]] = [
    {},
    {"tied_head": False, "position_embedding": "rope", "num_query_groups": 2, "activation": "swiglu"},
    {"linear_bias": False, "normalization": "rmsnorm", "head_dim": 12, "norm_position": "post"},
    {"architecture": "bert"},
    {"architecture": "bert", "norm_position": "pre", "next_sentence_head": False},
    {"architecture": "roberta"},
    {"architecture": "bart"},
    {"architecture": "bart", "norm_position": "pre", "embedding_norm": False},
    {"architecture": "t5", "head_dim": 6},
    {"architecture": "t5", "activation": "geglu", "tied_head": False, "scaled_logits": False},
]


def built_shapes(models: list[ModelConfig]) -> list[dict[str, tuple[int, ...]]]:
    """Build models and list their parameters by logical name."""
    from lmscale.models.build import build_model, logical_name, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology

    topology = init_topology(1, 1)
    found = []
    for model in models:
        context = build_context(model, topology, seed=1)
        built = build_model(model_specs(context), context, LanguageModelLoss(context))
        found.append({logical_name(built, name): tuple(p.shape) for name, p in built.named_parameters()})
    return found


@pytest.mark.distributed
def test_names_and_shapes_are_those_of_the_built_model() -> None:
    models = [ModelConfig.model_validate(with_defaults({**SIZES, **keys})) for keys in MODELS]
    (built,) = run_ranks(1, built_shapes, models)
    for keys, model, shapes in zip(MODELS, models, built, strict=True):
        assert parameter_shapes(model) == shapes, keys


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("padded", [False, True])
def test_shapes_of_a_preset_add_up_to_its_count(name: str, padded: bool) -> None:
    model = ModelConfig.model_validate(with_defaults({"preset": name}))
    assert sum(math.prod(shape) for shape in parameter_shapes(model, padded).values()) == num_parameters(model, padded)
