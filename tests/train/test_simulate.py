"""Ranks built at full size, on the meta device and over a pretended process group, against the planner's numbers."""

from __future__ import annotations

from typing import Any

import pytest

from lmscale.config.io import parse_run
from lmscale.config.presets import PRESETS
from lmscale.errors import ConfigError
from lmscale.plan.stages import stage_parameters
from lmscale.train.simulate import show_ranks, simulate_ranks


def run_of(preset: str, tp_size: int = 1, pp_size: int = 1, **parallel: Any) -> Any:
    """Make a run that reads no corpus."""
    return parse_run(
        {
            "model": {"preset": preset},
            "tokenizer": {"path": "unread"},
            "data": {"train": [{"prefix": "unread"}], "seq_length": 512},
            "parallel": {"tp_size": tp_size, "pp_size": pp_size, **parallel},
            "precision": "bf16",
            "batch": {"micro_batch_size": 1, "global_batch_size": 1024},
            "optim": {"lr": 1.0e-3},
            "train": {"train_tokens": 10**9},
            "output_dir": "unwritten",
        }
    )


LAYOUTS = [
    ("gpt3-125m", 1, 1, 2),
    ("gpt3-350m", 2, 2, 8),
    ("gpt3-760m", 4, 3, 24),
    ("gpt3-1.3b", 8, 4, 64),
    ("gpt3-2.7b", 4, 8, 128),
    ("gpt3-6.7b", 8, 8, 512),
    ("gpt3-13b", 8, 20, 800),
    ("gpt3-175b", 8, 16, 1024),
    ("bert-base", 2, 3, 6),
    ("bert-large", 4, 8, 1024),
    ("roberta-base", 4, 1, 8),
    ("roberta-large", 2, 4, 64),
    ("bart-base", 2, 12, 24),
    ("bart-large", 8, 4, 1024),
    ("t5-small", 4, 2, 16),
    ("t5-base", 2, 6, 48),
    ("t5-large", 8, 8, 256),
    ("t5-3b", 16, 4, 512),
    ("t5-11b", 32, 16, 1024),
    ("t5-11b", 1, 1, 1),
    ("t5-v1.1-small", 2, 4, 8),
    ("t5-v1.1-base", 4, 8, 64),
    ("t5-v1.1-large", 8, 2, 16),
    ("t5-v1.1-xl", 8, 16, 128),
    ("t5-v1.1-xxl", 32, 24, 768),
]


QUICK = ("gpt3-125m", "gpt3-175b", "bert-base", "bart-base", "t5-11b")
"""One of each architecture; `make test-all` runs the others."""


def test_the_grid_has_every_preset() -> None:
    assert {layout[0] for layout in LAYOUTS} == set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "tp_size", "pp_size", "world_size"),
    [pytest.param(*layout, marks=[] if layout[0] in QUICK else [pytest.mark.slow]) for layout in LAYOUTS],
)
def test_first_middle_and_last_rank_hold_the_planned_parameters(
    preset: str, tp_size: int, pp_size: int, world_size: int
) -> None:
    config = run_of(preset, tp_size, pp_size)
    expected = stage_parameters(config.model, tp_size, pp_size)
    ranks = sorted({0, world_size // 2, world_size - 1})
    rows = simulate_ranks(config, world_size, ranks)
    assert [row.stage for row in rows] == [rank // (world_size // pp_size) for rank in ranks]
    assert [row.num_parameters for row in rows] == [expected[row.stage] for row in rows]


def test_a_simulated_rank_names_its_layers_and_groups() -> None:
    (row,) = simulate_ranks(run_of("gpt3-175b", 8, 16, sequence_parallel=True), 1024, [1023])
    assert row.layers == [*(f"layers.{index}" for index in range(90, 96)), "final_norm", "head"]
    assert row.tp_ranks == list(range(1016, 1024))
    assert row.dp_ranks == list(range(967, 1024, 8))
    assert row.pp_ranks == list(range(63, 1024, 64))
    assert show_ranks([row]) == (
        "rank 1023: stage 15, 8 layers (layers.90 .. head), 1,436,752,896 parameters; tensor-parallel with "
        "1016, 1017 .. 1023, data-parallel with 967, 975 .. 1023, pipeline 63, 127 .. 1023"
    )


def test_nothing_of_a_simulation_stays() -> None:
    import torch.distributed as dist

    before = dist.is_initialized()
    simulate_ranks(run_of("gpt3-125m"), 4, [0])
    assert dist.is_initialized() == before


@pytest.mark.parametrize(("world_size", "rank", "field"), [(8, 8, "rank"), (8, -1, "rank"), (9, 0, "devices")])
def test_ranks_that_are_not_there_are_refused(world_size: int, rank: int, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = "):
        simulate_ranks(run_of("gpt3-125m", 2), world_size, [rank])
