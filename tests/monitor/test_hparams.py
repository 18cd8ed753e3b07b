"""What a sweep may vary, as TensorBoard's table has it."""

from __future__ import annotations

from pathlib import Path

from lmscale.config.io import parse_run
from lmscale.monitor.hparams import hparams_of
from tests.distributed.runs import run_keys


def test_what_decides_the_result_is_listed_flat(tmp_path: Path) -> None:
    found = hparams_of(parse_run(run_keys("corpus", tmp_path, optim__lr=5e-4)))
    assert found["optim.lr"] == 5e-4
    assert found["model.num_layers"] == 4
    assert found["model.tied_head"] is True
    assert found["precision"] == "fp32"
    assert found["deepspeed.zero_optimization.stage"] == 0
    assert found["train.seed"] == 1234
    assert all(isinstance(value, bool | int | float | str) for value in found.values())
    assert not [key for key in found if key.startswith(("output_dir", "checkpoint", "monitor", "train.log"))]
