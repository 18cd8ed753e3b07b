"""The run's own comparison of plan and measurement."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lmscale.plan.device_types import DEVICE_TYPES
from lmscale.plan.memory import zero_bytes
from lmscale.train.forecast import REPORT_AT, device_type_here
from tests.distributed.ranks import run_ranks

MODEL = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
}
LENGTH = 8


def messages(tp_size: int) -> list[list[str]]:
    """Train some steps and return what the forecast says behind each. Runs in a rank."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.forecast import Forecast

    keys: dict[str, Any] = {
        "model": MODEL,
        "data": {"train": [{"prefix": "unread"}], "seq_length": LENGTH},
        "parallel": {"tp_size": tp_size},
        "batch": {"micro_batch_size": 1, "global_batch_size": 1},
        "optim": {"lr": 1.0e-3},
        "train": {"train_tokens": 1000},
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "output_dir": "unwritten",
    }
    config = parse_run(keys)
    engine = build_engine(config, init_topology(tp_size, 1), ZeroChoice(stage=1))
    forecast = Forecast(config, engine)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, LENGTH)}
    said = []
    for step in range(1, REPORT_AT + 3):
        with forecast.timed():
            engine.train_step([batch], 1, step, 1.0e-3)
        said.append(forecast.lines(1))
    return said


@pytest.mark.distributed
def test_the_tenth_step_alone_is_followed_by_the_comparison() -> None:
    (said,) = run_ranks(1, messages, 1)
    assert [len(lines) for lines in said] == [0] * (REPORT_AT - 1) + [2, 0, 0]
    line, seconds = said[REPORT_AT - 1]
    predicted, measured = (float(number) for number in re.findall(r"([\d.]+) MiB (?:predicted|measured)", line)[:2])
    count = 4096 * 256 + 64 * 256 + 2 * (12 * 256**2 + 13 * 256) + 2 * 256
    expected = zero_bytes(count, 1, 1, "fp32")
    assert predicted == pytest.approx((expected.parameters + expected.optimizer) / 2**20, rel=0.01)
    assert measured == pytest.approx(predicted, rel=0.02)
    assert "interpreter and libraries included" in line
    predicted, measured = (float(number) for number in re.findall(r"([\d.e-]+) s (?:predicted|measured)", seconds))
    flops = 6 * (count - 64 * 256) * LENGTH
    assert flops / DEVICE_TYPES["cpu"].flops_per_second["fp32"] < predicted < 1.0
    assert 0.0 < measured < 10.0
    assert "not calibrated" in seconds


def test_a_cpu_is_the_planners_core_and_another_device_is_unknown() -> None:
    assert device_type_here(torch.device("cpu")) is DEVICE_TYPES["cpu"]
    assert device_type_here(torch.device("meta")) is None
