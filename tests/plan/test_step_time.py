"""What a predicted step is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmscale.config.io import parse_run
from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError
from lmscale.plan.activations import StepShape
from lmscale.plan.device_types import DEVICE_TYPES
from lmscale.plan.flops import forward_flops_per_token, model_flops_per_token
from lmscale.plan.step_time import StepTime, predict_step_seconds

A100 = DEVICE_TYPES["A100-80"]
LENGTHS = SampleLengths(2049, 2048, 0, 2048)
STEP = StepShape(LENGTHS, 4, 8)


def model(name: str = "gpt3-6.7b") -> ModelConfig:
    keys = {
        "model": {"preset": name},
        "data": {"train": [{"prefix": "unread"}], "seq_length": 512},
        "batch": {"micro_batch_size": 1, "global_batch_size": 8},
        "optim": {"lr": 1.0e-3},
        "train": {"train_tokens": 1000},
        "output_dir": "unwritten",
    }
    return parse_run(keys).model


def seconds(step: StepShape = STEP, name: str = "gpt3-6.7b", dp_size: int = 1, zero_stage: int = 1) -> StepTime:
    return predict_step_seconds(model(name), step, A100, dp_size=dp_size, zero_stage=zero_stage)


def test_arithmetic_takes_at_least_what_the_attainable_rate_gives() -> None:
    forward = forward_flops_per_token(model(), LENGTHS)
    flops = 3 * (forward["projections"] + forward["mlp"] + forward["head"]) * 2048 * 4 * 8
    least = flops / (A100.flops_per_second["bf16"] * A100.matmul_fraction)
    assert least < seconds().matmul < 1.3 * least


def test_a_large_model_on_one_device_reaches_a_believable_share_of_the_peak() -> None:
    mfu = model_flops_per_token(model(), LENGTHS) * 2048 * 32 / (seconds().total * A100.flops_per_second["bf16"])
    assert 0.55 < mfu < A100.matmul_fraction


def test_the_bubble_is_p_minus_1_beats() -> None:
    time = seconds(replace(STEP, pp_size=4))
    assert time.bubble == pytest.approx(time.beat / STEP.num_micro_batches * 3)
    assert seconds().bubble == 0


def test_full_recompute_runs_the_layers_forward_once_more() -> None:
    forward = forward_flops_per_token(model(), LENGTHS)
    layers = (forward["projections"] + forward["mlp"]) * 2048 * 4 * 8
    added = seconds(replace(STEP, recompute="full")).matmul - seconds().matmul
    assert added * A100.flops_per_second["bf16"] * A100.matmul_fraction == pytest.approx(layers, rel=0.2)


def test_tensor_parallelism_splits_work_and_adds_communication() -> None:
    alone, shared = seconds(), seconds(replace(STEP, tp_size=8))
    assert shared.matmul < alone.matmul / 6
    assert shared.tensor > 0 == alone.tensor


def test_a_data_parallel_group_over_nodes_sends_by_all_its_network_cards() -> None:
    # 16 ranks of one node each send by one card; 16 on two nodes by eight.
    spread = predict_step_seconds(model(), replace(STEP, tp_size=8), A100, dp_size=16, zero_stage=1).data
    packed = predict_step_seconds(model(), STEP, A100, dp_size=16, zero_stage=1).data
    assert packed == pytest.approx(spread, rel=0.01)  # 8 times the bytes by 8 cards


def test_an_offloaded_update_is_slower() -> None:
    here = predict_step_seconds(model(), STEP, A100, dp_size=8, zero_stage=2)
    there = predict_step_seconds(model(), STEP, A100, dp_size=8, zero_stage=2, offload_optimizer=True)
    assert there.optimizer > 10 * here.optimizer


@pytest.mark.parametrize("name", ["t5-large", "bart-large", "bert-large", "roberta-large"])
def test_other_architectures_are_predicted_by_their_own_flops(name: str) -> None:
    lengths = SampleLengths(512, 512, 128 if name[:2] in ("t5", "ba") else 0, 128)
    step = StepShape(lengths, 16, 4)
    time = predict_step_seconds(model(name), step, A100, dp_size=1, zero_stage=1)
    flops = model_flops_per_token(model(name), lengths) * lengths.nominal * 64
    assert 0.25 < flops / (time.total * A100.flops_per_second["bf16"]) < A100.matmul_fraction


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="V100 computes in fp16, fp32 only"):
        predict_step_seconds(model(), STEP, DEVICE_TYPES["V100"], dp_size=1, zero_stage=1)
