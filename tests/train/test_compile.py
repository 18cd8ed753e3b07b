"""Compiled layers train as the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LLAMA, largest_difference, losses, norms, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed

COMPILED_TOLERANCE = 1.0e-5
BF16_COMPILED_TOLERANCE = 1.0e-3
"""Fused kernels keep intermediate values in fp32 that the others round to bf16."""


def num_graphs() -> int:
    """Count the graphs that this rank has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, COMPILED_TOLERANCE),
        ({"model": dict(LLAMA), "data__reset_attention_mask": True}, COMPILED_TOLERANCE),
        ({"parallel__recompute": "full"}, COMPILED_TOLERANCE),
        ({"precision": "bf16", "deepspeed__zero_optimization__stage": 1}, BF16_COMPILED_TOLERANCE),
    ],
    ids=["gpt", "llama-isolated-documents", "recompute-full", "bf16"],
)
def test_compiled_layers_follow_the_uncompiled(
    changes: dict[str, Any], tolerance: float, corpus: str, tmp_path: Path
) -> None:
    length = {"train__train_tokens": 8 * 32 * 3}

    def train(name: str, compiled: bool) -> list[dict[str, Any]]:
        return pretrain_on_ranks(1, run_keys(corpus, tmp_path / name, train__compile=compiled, **length, **changes))

    (before,) = run_ranks(1, num_graphs)
    compiled = train("compiled", True)
    (after,) = run_ranks(1, num_graphs)
    assert after > before
    eager = train("eager", False)
    assert largest_difference(losses(compiled), losses(eager)) < tolerance
    if tolerance == COMPILED_TOLERANCE:
        assert largest_difference(norms(compiled), norms(eager)) < tolerance
