"""Compiled layers train as the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.runs import LLAMA, largest_difference, losses, norms, pretrain_on_ranks, run_keys, write_corpus

pytestmark = pytest.mark.distributed

COMPILED_TOLERANCE = 1.0e-5
BF16_COMPILED_TOLERANCE = 1.0e-3
"""Fused kernels keep intermediate values in fp32 that the others round to bf16."""


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
def test_compiled_layers_follow_the_uncompiled(changes: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    write_corpus(prefix, np.random.default_rng(0), 6_000)
    length = {"train__train_tokens": 8 * 32 * 3}
    runs = [
        pretrain_on_ranks(1, run_keys(str(prefix), tmp_path / name, train__compile=compiled, **length, **changes))
        for name, compiled in (("compiled", True), ("eager", False))
    ]
    assert largest_difference(losses(runs[0]), losses(runs[1])) < tolerance
    if tolerance == COMPILED_TOLERANCE:
        assert largest_difference(norms(runs[0]), norms(runs[1])) < tolerance
