"""What is frozen takes no gradients and no optimizer state, on any ZeRO stage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lmscale.config.io import parse_run
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.memory import zero_bytes
from tests.adapt.bases import Bases
from tests.distributed.runs import Keys, pretrain_on_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 0.05
"""Relative: padding of flat buffers, and a step count for each tensor."""
METHODS: dict[str, Keys] = {
    "lora": {"method": "lora", "rank": 8, "targets": ["qkv", "proj", "fc1", "fc2"]},
    "adapter": {"method": "adapter", "width": 32},
}


@pytest.mark.parametrize(
    ("method", "stage", "precision"),
    [
        ("lora", 0, "fp32"),
        ("lora", 2, "bf16"),
        ("lora", 3, "fp32"),
        pytest.param("lora", 1, "fp32", marks=pytest.mark.slow),
        pytest.param("adapter", 1, "bf16", marks=pytest.mark.slow),
        pytest.param("adapter", 3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_ranks_hold_gradients_and_moments_of_what_is_trained_alone(
    method: str, stage: int, precision: str, bases: Bases, tmp_path: Path
) -> None:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    keys = bases.keys(
        "gpt",
        tmp_path,
        METHODS[method],
        precision=precision,
        train__stop_at_step=1,
        deepspeed={"zero_optimization": zero},
    )
    first = pretrain_on_ranks(2, keys)[0]
    adaptation = adaptation_of(parse_run(keys))
    assert adaptation is not None
    sizes = {name: math.prod(shape) for name, shape in adaptation.shapes().items()}
    trained = sum(size for name, size in sizes.items() if adaptation.trains(name))
    assert trained < sum(sizes.values()) / 2
    expected = zero_bytes(sum(sizes.values()), 2, stage, precision, num_trainable=trained)
    for kind in ("parameters", "gradients", "optimizer"):
        tag = f"memory/{kind.rstrip('s')}_bytes"
        assert first[tag] == pytest.approx(getattr(expected, kind), rel=TOLERANCE), kind
