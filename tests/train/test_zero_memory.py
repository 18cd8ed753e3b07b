"""The bytes of parameters, gradients and optimizer state on each of two ranks are those of the formula.

Counted on the tensors that DeepSpeed holds, gradients after the first of two micro batches. What deviates, within the
2 %: padding of flat buffers, and under ZeRO 3 biases and norms, which stay whole on every rank.
"""

from __future__ import annotations

from typing import Any

import pytest

from lmscale.errors import ConfigError
from lmscale.plan.memory import StateBytes, zero_bytes
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

RANKS = 2
TOLERANCE = 0.02
MODEL = {
    "num_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
NUM_PARAMETERS = 14_186_496
LENGTH = 8


def held_bytes(stage: int, precision: str, optimizer: str = "adamw") -> tuple[int, StateBytes, StateBytes]:
    """Train a step of two micro batches; return the parameters, the bytes between the two and those after the step."""
    import torch

    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.memory import state_bytes

    keys: dict[str, Any] = {
        "model": MODEL,
        "data": {"train": [{"prefix": "unread"}], "seq_length": LENGTH},
        "precision": precision,
        "batch": {"micro_batch_size": 1, "global_batch_size": 2 * RANKS},
        "optim": {"name": optimizer, "lr": 1.0e-3},
        "train": {"train_tokens": 1000},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "output_dir": "unwritten",
    }
    if precision == "fp16":
        keys["loss_scale"] = {"initial": 1}  # nothing overflows, so the first step updates and makes the moments
    engine = build_engine(parse_run(keys), init_topology(1, 1), ZeroChoice(stage=stage))
    looks: list[StateBytes] = []
    step = engine.deepspeed.step

    def step_and_look() -> None:
        step()
        looks.append(state_bytes(engine))

    engine.deepspeed.step = step_and_look
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, LENGTH)}
    engine.train_step([batch, batch], 2, 1, 1.0e-3)
    engine.deepspeed.step = step
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    return num_parameters, looks[0], looks[1]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (1, "bf16"),
        (2, "bf16"),
        (3, "bf16"),
        (1, "fp16"),
        (3, "fp16"),
    ],
)
def test_each_rank_holds_what_the_formula_says(stage: int, precision: str) -> None:
    expected = zero_bytes(NUM_PARAMETERS, RANKS, stage, precision)
    for num_parameters, between, after in run_ranks(RANKS, held_bytes, stage, precision):
        assert num_parameters == NUM_PARAMETERS
        assert after.parameters == pytest.approx(expected.parameters, rel=TOLERANCE)
        assert between.gradients == pytest.approx(expected.gradients, rel=TOLERANCE)
        assert after.optimizer == pytest.approx(expected.optimizer, rel=TOLERANCE)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_adafactor_adds_little_to_the_master_weights(stage: int, precision: str) -> None:
    expected = zero_bytes(NUM_PARAMETERS, RANKS, stage, precision, moment_width=0)
    for _, _, after in run_ranks(RANKS, held_bytes, stage, precision, "adafactor"):
        assert after.optimizer == pytest.approx(expected.optimizer, rel=TOLERANCE)


def test_formula_agrees_with_the_papers_example() -> None:
    # 7.5 billion parameters over 64 ranks: 31.4 GB, 16.6 GB and 1.9 GB (table 1 of the ZeRO paper, with K = 12).
    paper = {1: 31.4e9, 2: 16.6e9, 3: 1.9e9}
    for stage, total in paper.items():
        assert zero_bytes(7_500_000_000, 64, stage, "fp16").total == pytest.approx(total, rel=0.02)


def test_half_precision_without_zero_has_no_formula() -> None:
    with pytest.raises(ConfigError, match="precision = 'bf16'"):
        zero_bytes(10, 1, 0, "bf16")
