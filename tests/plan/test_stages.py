"""What a rank holds, in numbers; tests/train/test_simulate.py builds the same ranks and counts."""

from __future__ import annotations

import itertools

import pytest
from deepspeed.runtime.utils import partition_balanced

from lmscale.config.model import ModelConfig
from lmscale.config.presets import PRESETS, with_defaults
from lmscale.errors import ConfigError
from lmscale.plan.params import num_parameters
from lmscale.plan.stages import planned_layers, stage_layers, stage_parameters


def model_of(preset: str) -> ModelConfig:
    return ModelConfig.model_validate(with_defaults({"preset": preset}))


@pytest.mark.parametrize("preset", PRESETS)
def test_one_rank_holds_the_whole_model(preset: str) -> None:
    model = model_of(preset)
    assert stage_parameters(model, 1, 1) == [num_parameters(model, padded=True)]


@pytest.mark.parametrize("preset", ["gpt3-1.3b", "bert-base", "bart-base", "t5-small", "t5-v1.1-base"])
@pytest.mark.parametrize("pp_size", [2, 3, 4])
def test_stages_are_those_that_deepspeed_makes(preset: str, pp_size: int) -> None:
    model = model_of(preset)
    weights = [int(layer.begins_stage) for layer in planned_layers(model)]
    parts = partition_balanced(weights=weights, num_parts=pp_size)
    lengths = [stop - start for start, stop in itertools.pairwise(parts)]
    assert [len(layers) for layers in stage_layers(model, pp_size)] == lengths


def test_gpt3_175b_over_pipeline_and_tensor_ranks() -> None:
    model = model_of("gpt3-175b")
    h, vocab, positions = 12288, 50304, 2048
    layer = (12 * h * h + 7 * h) // 8 + 2 * h + 4 * h  # split matrices and their biases, whole biases, norms
    held = stage_parameters(model, 8, 16)
    assert held[1:15] == [6 * layer] * 14
    assert held[0] == vocab * h // 8 + positions * h + 6 * layer
    assert held[15] == 6 * layer + 2 * h + vocab * h // 8


def test_layers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers = 12"):
        stage_parameters(model_of("bert-base"), 1, 5)
