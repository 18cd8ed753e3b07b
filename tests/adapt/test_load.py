"""An adaptation's checkpoint is loaded with its base, whatever layout wrote either, and with no other base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmscale.errors import CheckpointError, ConfigError
from lmscale.train.checkpoint_files import PARAMETER
from tests.adapt.bases import adapt_keys, pretrain_base
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import pretrain_on_ranks
from tests.evaluate.checkpoints import reseal

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: tensor parallelism adds up in another order."""
LORA = {"method": "lora", "rank": 4, "targets": ["query", "value", "proj", "fc1", "fc2"], "bias": "lora_only"}


def checkpoint_of(keys: dict[str, Any]) -> str:
    return str(next(Path(keys["output_dir"], "checkpoints").glob("step-*")))


@pytest.fixture(scope="module", params=["gpt", pytest.param("llama", marks=pytest.mark.slow)])
def trained(request, corpus, tmp_path_factory):
    """A base and LoRA trained on it on two tensor-parallel ranks: (base, checkpoint)."""
    home = tmp_path_factory.mktemp(request.param)
    base = pretrain_base(corpus, home, request.param)
    adapt = LORA if request.param == "gpt" else {**LORA, "targets": ["query", "gate", "up", "fc2"], "bias": "none"}
    keys = adapt_keys(corpus, base, home / "lora", adapt, parallel__tp_size=2)
    pretrain_on_ranks(2, keys)
    return base, checkpoint_of(keys)


def _logits(checkpoint: str, base: str | None = None) -> torch.Tensor:
    import lmscale

    tokens = torch.randint(0, 500, (3, 12), generator=torch.Generator().manual_seed(0))
    return lmscale.load(checkpoint, "cpu", base=base).logits(tokens)


def _error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def test_an_adaptation_loads_on_one_rank_and_on_two(trained):
    base, adapted = trained
    on_one, of_base = run_ranks(1, _logits, adapted)[0], run_ranks(1, _logits, base)[0]
    for logits in run_ranks(2, _logits, adapted):
        assert _error(logits, on_one) <= TOLERANCE
    assert _error(on_one, of_base) > 100 * TOLERANCE, "the adaptation changes nothing"


def test_the_loss_of_a_loaded_adaptation_is_the_one_that_training_measured(trained, corpus):
    base, adapted = trained
    measured = run_ranks(1, _loss, adapted, corpus)[0]
    assert measured < run_ranks(1, _loss, base, corpus)[0], "four steps at a high rate lower the loss"


def _loss(checkpoint: str, corpus: str) -> float:
    import lmscale
    from lmscale.evaluate.perplexity import measure_corpus

    return measure_corpus(lmscale.load(checkpoint, "cpu"), corpus, 8).loss


def test_another_base_is_refused_with_the_names_of_both(trained, tmp_path, corpus):
    base, adapted = trained
    other = tmp_path / "other"
    shutil.copytree(base, other)
    file = other / "rank-00000.safetensors"
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if key.startswith(PARAMETER))[0] += 1.0
    save_file(tensors, file)
    reseal(other)
    with pytest.raises(CheckpointError, match="belongs to another base") as caught:
        _logits(adapted, base=other)
    assert base in str(caught.value)
    assert str(other) in str(caught.value)


def test_a_base_that_moved_is_named_by_hand(trained, tmp_path):
    base, adapted = trained
    moved, lonely = tmp_path / "moved", tmp_path / "lonely"
    shutil.copytree(base, moved)
    shutil.copytree(adapted, lonely)
    manifest = json.loads((lonely / "manifest.json").read_text())
    reseal(lonely, base={**manifest["base"], "path": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match="which is not there"):
        _logits(str(lonely))
    assert torch.equal(run_ranks(1, _logits, str(lonely), str(moved))[0], run_ranks(1, _logits, adapted)[0])


def test_a_whole_model_has_no_base(trained):
    base, adapted = trained
    with pytest.raises(ConfigError, match="read with an adaptation only"):
        _logits(base, base=base)
    with pytest.raises(CheckpointError, match="is an adaptation itself"):
        _logits(adapted, base=adapted)
