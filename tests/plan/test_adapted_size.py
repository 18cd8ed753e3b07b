"""What stages hold and train of adapted models, against the planner's other counts and what ranks hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.adapt import (
    AdaptConfig,
    AdapterConfig,
    BitFitConfig,
    FullConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from lmscale.config.optim import OptimConfig
from lmscale.config.presets import PRESETS
from lmscale.plan.adaptation import Adaptation, Head, own_shapes
from lmscale.plan.adapted_size import stage_sizes
from lmscale.plan.groups import num_trainable
from lmscale.plan.stages import stage_parameters
from tests.adapt import conftest
from tests.adapt.bases import Bases
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys
from tests.plan.test_stages import model_of

bases = conftest.bases
OPTIM = OptimConfig(lr=1.0e-3)
METHODS: list[AdaptConfig] = [
    LoraConfig(targets=["query", "proj", "fc1", "fc2", "embedding"]),
    AdapterConfig(),
    PrefixTuningConfig(length=4, projection=8),
    PrefixTuningConfig(length=4, projection=None),
    PromptTuningConfig(length=4),
    BitFitConfig(),
    BitFitConfig(entries=3),
    FullConfig(top_layers=1),
]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2)])
def test_by_names_a_model_is_as_large_as_by_its_layers(name: str, tp_size: int, pp_size: int) -> None:
    model = model_of(name)
    sizes = stage_sizes(model, OPTIM, Adaptation(model), tp_size, pp_size)
    assert [size.held for size in sizes] == stage_parameters(model, tp_size, pp_size)
    assert all(size.held == size.trained for size in sizes)


@pytest.mark.parametrize("adapt", METHODS, ids=lambda adapt: f"{adapt.method}")
@pytest.mark.parametrize("name", ["gpt3-125m", "bert-base", "bart-base"])
def test_one_rank_trains_what_the_table_of_groups_says(adapt: AdaptConfig, name: str) -> None:
    model = model_of(name)
    (size,) = stage_sizes(model, OPTIM, Adaptation(model, adapt), 1, 1)
    padding = model.padded_vocab_size - model.vocab_size
    rows = adapt.rank * padding if isinstance(adapt, LoraConfig) else 0
    rows += padding if isinstance(adapt, FullConfig) and model.is_encoder_only else 0
    assert size.trained == num_trainable(model, OPTIM, Adaptation(model, adapt))[0] + rows
    own = sum(math.prod(shape) for shape in own_shapes(model, adapt).values())
    assert size.held == stage_parameters(model, 1, 1)[0] + own


def test_a_tasks_head_takes_the_place_of_the_word_tables_second_copy() -> None:
    model = model_of("bert-base")
    whole = stage_parameters(model, 1, 2)
    sizes = stage_sizes(model, OPTIM, Adaptation(model, LoraConfig(), Head("classes", 3)), 1, 2)
    hidden, lora = model.hidden_size, 6 * 2 * 8 * 2 * model.hidden_size
    dense = hidden * hidden + hidden
    head = model.padded_vocab_size * (hidden + 1) + 2 * dense + 2 * hidden + 2 * hidden + 2
    assert sizes[1].held == whole[1] - head + dense + 3 * hidden + 3 + lora
    assert sizes[0].trained == lora


def count_on_rank(keys: Keys) -> dict[str, Any]:
    """Build a run's engine; count the numbers that this rank holds and trains, and say what is planned."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.models.build import IDLE
    from lmscale.parallel.topology import init_topology
    from lmscale.plan.adaptation import adaptation_of
    from lmscale.pretrain import build_engine

    config = parse_run(keys)
    parallel = config.parallel
    topology = init_topology(parallel.tp_size, parallel.pp_size)
    engine = build_engine(config, topology, ZeroChoice())
    mine = [p for name, p in engine.model.named_parameters() if not name.startswith(IDLE)]
    sizes = stage_sizes(config.model, config.optim, adaptation_of(config), parallel.tp_size, parallel.pp_size)
    counted = (sum(p.numel() for p in mine), sum(p.numel() for p in mine if p.requires_grad))
    planned = sizes[topology.pp_rank]
    return {"counted": counted, "planned": (planned.held, planned.trained)}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shape", "adapt"),
    [
        ("gpt", {"method": "prefix_tuning", "length": 3, "projection": 8}),
        ("t5", {"method": "prefix_tuning", "length": 3, "projection": 8}),
        ("gpt", {"method": "prompt_tuning", "length": 3, "init": "uniform_sym"}),
        ("bart", {"method": "lora", "targets": ["query", "cross_value", "proj", "fc2", "embedding"]}),
        ("gpt", {"method": "bitfit", "entries": 3}),
        ("bert", {"method": "adapter", "width": 4}),
    ],
)
def test_ranks_hold_what_is_planned(shape: str, adapt: Keys, bases: Bases, tmp_path: Path) -> None:
    changes = {"deepspeed__zero_optimization__stage": 0, "parallel__tp_size": 2, "parallel__pp_size": 2}
    for found in run_ranks(4, count_on_rank, bases.keys(shape, tmp_path, adapt, **changes)):
        assert found["counted"] == found["planned"]
