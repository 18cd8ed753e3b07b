"""Compiled layers train as the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LLAMA, largest_difference, losses, norms, pretrain_in_rank, records, run_keys

pytestmark = pytest.mark.distributed

COMPILED_TOLERANCE = 1.0e-5
BF16_COMPILED_TOLERANCE = 1.0e-3
"""Fused kernels keep intermediate values in fp32 that the others round to bf16."""


def pretrain_counting_graphs(keys: dict[str, Any]) -> int:
    """Train a run on this rank and return how many graphs it compiled."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # a graph that an earlier job of this process left would be used again
    counters.clear()
    assert pretrain_in_rank(keys) == 0
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, COMPILED_TOLERANCE),
        pytest.param(
            {"model": dict(LLAMA), "data__reset_attention_mask": True}, COMPILED_TOLERANCE, marks=pytest.mark.slow
        ),
        pytest.param({"parallel__recompute": "full"}, COMPILED_TOLERANCE, marks=pytest.mark.slow),
        ({"precision": "bf16", "deepspeed__zero_optimization__stage": 1}, BF16_COMPILED_TOLERANCE),
    ],
    ids=["gpt", "llama-isolated-documents", "recompute-full", "bf16"],
)
def test_compiled_layers_follow_the_uncompiled(
    changes: dict[str, Any], tolerance: float, corpus: str, tmp_path: Path
) -> None:
    length = {"train__train_tokens": 8 * 32 * 3}

    def keys_of(name: str, compiled: bool) -> dict[str, Any]:
        return run_keys(corpus, tmp_path / name, train__compile=compiled, **length, **changes)

    (num_graphs,) = run_ranks(1, pretrain_counting_graphs, keys_of("compiled", True))
    assert num_graphs > 0
    (num_graphs,) = run_ranks(1, pretrain_counting_graphs, keys_of("eager", False))
    assert num_graphs == 0
    compiled, eager = records(keys_of("compiled", True)), records(keys_of("eager", False))
    assert largest_difference(losses(compiled), losses(eager)) < tolerance
    if tolerance == COMPILED_TOLERANCE:
        assert largest_difference(norms(compiled), norms(eager)) < tolerance
