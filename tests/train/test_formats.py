"""Checkpoints of the format before are read, and go on as they would have then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.train.checkpoint_files import FORMAT, read_manifest
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.distributed.runs import largest_difference, losses, pretrain_on_ranks, run_keys, write_corpus

GOLDEN = Path(__file__).parents[1] / "golden/checkpoint_format_1/step-00000002"
CORPUS = "made/corpus"
"""As the run that wrote it called it: that format has no hash by which to know it under another name."""
LOSSES = [6.205585956573486, 6.189338684082031, 6.1919450759887695, 6.177277565002441]
"""Of steps 3 to 6 of the run that wrote it."""
OTHER_CPU_TOLERANCE = 1.0e-6
"""Relative, fp32: the losses were measured on one CPU, and the test may run on another."""
KEYS = {
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 500,
        "max_position_embeddings": 32,
    },
    "deepspeed__zero_optimization__stage": 1,
    "checkpoint__save_interval": 2,
}


def test_every_tensor_of_the_format_before_is_read():
    reader = CheckpointReader(GOLDEN)
    assert reader.manifest["format"] == FORMAT - 1
    assert reader.progress.step == 2
    for name, shape in reader.shapes().items():
        for kind in (PARAMETER, "exp_avg", "exp_avg_sq"):
            assert tuple(reader.logical(kind, name).shape) == shape


@pytest.mark.distributed
def test_a_run_goes_on_from_the_format_before_and_saves_in_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(CORPUS).parent.mkdir()
    write_corpus(Path(CORPUS), np.random.default_rng(7), num_tokens=2_000)
    keys = run_keys(CORPUS, tmp_path / "run", **KEYS, checkpoint__resume=str(GOLDEN))
    assert largest_difference(losses(pretrain_on_ranks(2, keys)), LOSSES) < OTHER_CPU_TOLERANCE
    newest = find_checkpoint(tmp_path / "run/checkpoints")
    assert newest is not None
    assert read_manifest(newest)["format"] == FORMAT
