"""Merged into its base, an adaptation gives the same logits; taken out again, the base."""

from __future__ import annotations

import json

import pytest
import torch

from lmscale.cli.main import main
from lmscale.convert.merging import merge_adaptation, unmerge_adaptation
from lmscale.errors import CheckpointError, ConfigError
from lmscale.train.adapted_show import describe
from lmscale.train.base import hash_weights
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.adapt.written import logits_of, write_adaptation, write_base
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b|: (W + s B A) x is added up in another order than W x + s B (A x)."""
ROUNDING = 4.0e-7
"""max |a - b| / max |merged|: the rounding of one fp32 addition and one subtraction, 2^-22 at most."""
CASES = {
    "gpt": {"targets": ["query", "value", "proj", "fc1", "fc2", "embedding"], "bias": "lora_only"},
    "llama": {"targets": ["key", "gate", "fc2"], "rslora": True},
    "bart": {"targets": ["qkv", "cross_query", "cross_value", "cross_proj"], "bias": "all"},
    "t5": {"targets": ["query", "cross_key", "fc1", "embedding"]},
    "bert": {"targets": ["query", "key", "value"], "alpha": 7.0},
}


@pytest.mark.parametrize("model", CASES)
def test_merged_lora_gives_the_logits_of_the_unmerged(tmp_path, model):
    base = write_base(tmp_path / "base", model)
    lora = write_adaptation(tmp_path / "lora", base, {"method": "lora", "rank": 3, **CASES[model]}, scale=0.5)
    merge_adaptation(lora, tmp_path / "merged")
    unmerged, merged = (run_ranks(1, logits_of, str(path))[0] for path in (lora, tmp_path / "merged"))
    assert _error(merged, unmerged) <= TOLERANCE
    assert _error(run_ranks(1, logits_of, str(base))[0], unmerged) > 1.0e-2, "the adaptation changes nothing"
    unmerge_adaptation(lora, tmp_path / "merged", tmp_path / "back")
    _check_same(tmp_path / "back", base, tmp_path / "merged")


def test_a_tasks_head_stays_where_lora_is_merged(tmp_path):
    base = write_base(tmp_path / "base", "bert")
    task = {"kind": "classification", "train": "nowhere.jsonl", "labels": ["yes", "no", "maybe"]}
    sections = {"task": task, "data": {"seq_length": 16}, "tokenizer": {"path": "nowhere"}}
    lora = write_adaptation(tmp_path / "lora", base, {"method": "lora", "rank": 3}, scale=0.5, **sections)
    merge_adaptation(lora, tmp_path / "merged")
    unmerged, merged = (run_ranks(1, _classify, str(path))[0] for path in (lora, tmp_path / "merged"))
    assert unmerged.shape == (2, 1, 3)
    assert _error(merged, unmerged) <= TOLERANCE


def _classify(checkpoint: str) -> torch.Tensor:
    import lmscale

    model = lmscale.load(checkpoint, "cpu", "fp32")
    tokens = torch.randint(8, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros_like(tokens)
    with torch.no_grad():
        return model.module(model.inputs_of({"tokens": tokens, "document_ids": zeros, "token_types": zeros}))


def test_merged_bitfit_is_the_base_with_the_trained_biases(tmp_path):
    base = write_base(tmp_path / "base", "gpt")
    bitfit = write_adaptation(tmp_path / "bitfit", base, {"method": "bitfit"})
    done = merge_adaptation(bitfit, tmp_path / "merged")
    unmerged, merged = (run_ranks(1, logits_of, str(path))[0] for path in (bitfit, tmp_path / "merged"))
    assert torch.equal(merged, unmerged)
    assert done.num_changed == 2 * 6 + 1, "six biases of a layer and the final norm's"
    unmerge_adaptation(bitfit, tmp_path / "merged", tmp_path / "back")
    assert hash_weights(CheckpointReader(tmp_path / "back")) == hash_weights(CheckpointReader(base))


def test_lora_beside_an_untied_embedding_is_merged_into_it(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    lora = write_adaptation(tmp_path / "lora", base, {"method": "lora", "rank": 2, "targets": ["embedding"]})
    merge_adaptation(lora, tmp_path / "merged")
    a, b = (CheckpointReader(lora).logical(PARAMETER, f"word_embedding.lora.embedding.{part}").clone() for part in "ab")
    name = "word_embedding.table.weight"
    before, after = (CheckpointReader(path).logical(PARAMETER, name) for path in (base, tmp_path / "merged"))
    assert torch.allclose(after, before + 8.0 * (b @ a).t(), atol=TOLERANCE)


def test_one_of_several_is_merged_by_its_number(tmp_path):
    base = write_base(tmp_path / "base", "gpt")
    lora = write_adaptation(tmp_path / "lora", base, {"method": "lora", "rank": 2, "entries": 3})
    with pytest.raises(ConfigError, match="holds 3 adaptations side by side"):
        merge_adaptation(lora, tmp_path / "merged")
    with pytest.raises(ConfigError, match="from #0"):
        merge_adaptation(f"{lora}#3", tmp_path / "merged")
    with pytest.raises(ConfigError, match="is none of its adaptations"):
        merge_adaptation(f"{lora}#anna", tmp_path / "merged")
    merge_adaptation(f"{lora}#2", tmp_path / "merged")
    read = CheckpointReader(lora)
    a, b = (read.logical(PARAMETER, f"layers.0.attention.linear_qkv.lora.query.{part}")[2].clone() for part in "ab")
    name = "layers.0.attention.linear_qkv.weight"
    before, after = (CheckpointReader(path).logical(PARAMETER, name) for path in (base, tmp_path / "merged"))
    # Four groups of one head: 8 rows of its query, 8 of its key, 8 of its value.
    queries = (after - before).unflatten(0, (4, 24))[:, :8].flatten(0, 1)
    assert torch.allclose(queries, 8.0 * b @ a, atol=TOLERANCE)
    assert not (after - before).unflatten(0, (4, 24))[:, 8:16].any(), "keys have no pair"


@pytest.mark.parametrize(
    "adapt",
    [{"method": "prompt_tuning"}, {"method": "prefix_tuning"}, {"method": "adapter"}, {"method": "p_tuning_v2"}],
)
def test_what_cannot_be_merged_is_refused(tmp_path, adapt):
    base = write_base(tmp_path / "base", "gpt")
    checkpoint = write_adaptation(
        tmp_path / "adapted", base, {"length": 4, **adapt} if "adapter" not in adapt.values() else adapt
    )
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge_adaptation(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_whole_models_and_other_bases_are_refused(tmp_path):
    base, other = write_base(tmp_path / "base", "gpt"), write_base(tmp_path / "other", "gpt", seed=9)
    lora = write_adaptation(tmp_path / "lora", base, {"method": "lora"})
    with pytest.raises(CheckpointError, match="is a whole model"):
        merge_adaptation(base, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="belongs to another base"):
        merge_adaptation(lora, tmp_path / "merged", other)


def test_inspect_and_merge_from_the_command_line(tmp_path, capsys):
    base = write_base(tmp_path / "base", "gpt")
    lora = write_adaptation(tmp_path / "lora", base, {"method": "lora", "rank": 4})
    assert main(["adapter", "inspect", str(lora), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "lora"
    assert facts["parameters"] == 2 * 2 * 4 * (32 + 32)
    assert facts["base"] == str(base)
    assert facts == describe(lora)
    assert main(["adapter", "inspect", str(lora)]) == 0
    assert "rank: 4" in capsys.readouterr().out
    assert main(["adapter", "merge", str(lora), str(tmp_path / "merged")]) == 0
    assert "lora merged, 2 tensors" in capsys.readouterr().out
    assert main(["adapter", "unmerge", str(lora), str(tmp_path / "merged"), str(tmp_path / "back")]) == 0
    assert main(["adapter", "merge", str(base), str(tmp_path / "again")]) == 2
    assert "is a whole model" in capsys.readouterr().err


def _error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def _check_same(back, base, merged) -> None:
    ours, theirs, between = CheckpointReader(back), CheckpointReader(base), CheckpointReader(merged)
    assert ours.shapes() == theirs.shapes()
    for name in theirs.shapes():
        wanted = theirs.logical(PARAMETER, name).clone()
        size = between.logical(PARAMETER, name).abs().max()
        assert float((ours.logical(PARAMETER, name) - wanted).abs().max()) <= ROUNDING * float(size), name
