"""The measurement of adaptations: on a tiny model, ours and PEFT's contenders train on the same batch to the same loss."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest

from lmscale.config.model import ModelConfig
from tests.distributed.ranks import run_ranks

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TINY = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, max_position_embeddings=64)
TOLERANCE = 1.0e-5
"""Relative, of losses in fp32: sums in another order."""
ROWS, LENGTH = 4, 16

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]  # of the library that is measured


def first_losses(home: str) -> dict[str, tuple[float, float]]:
    """Take a step of each contender on this rank of a pool: losses of ours and of PEFT's."""
    sys.path.insert(0, str(TOOLS))
    bench = importlib.import_module("bench_adaptation")
    bench.SMALL = TINY
    bench.make_base(home, TINY)
    adapts = {**bench.ADAPTS, "full": bench.FULL}
    found = {
        name: (bench.our_step(home, adapt, ROWS, LENGTH)(), bench.peft_step(home, adapt, ROWS, LENGTH)())
        for name, adapt in adapts.items()
    }
    many = {**bench.ADAPTS["LoRA, fused query, key, value"], "entries": ROWS}
    found["rows"] = (bench.our_step(home, many, ROWS, LENGTH, "sgd")(), found["full"][1])
    for forward in (bench.our_forward(home, many, ROWS, LENGTH), bench.peft_forward(home, ROWS, ROWS, LENGTH)):
        forward()
    return found


def test_contenders_train_the_same_model_on_the_same_batch(tmp_path: Path) -> None:
    (found,) = run_ranks(1, first_losses, str(tmp_path))
    assert all(math.isfinite(loss) for pair in found.values() for loss in pair)
    for name in (
        "full",
        "LoRA, query and value",
        "LoRA, fused query, key, value",
        "rows",
    ):  # equal to the base at first
        ours, theirs = found[name]
        assert ours == pytest.approx(theirs, rel=TOLERANCE), name
