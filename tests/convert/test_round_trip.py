"""From transformers to a checkpoint and back: the same tensors, to the bit, and a directory that loads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lmscale.config.io import load_run
from lmscale.convert import roberta
from lmscale.convert.exporting import export_hf
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.importing import import_hf
from tests.convert.models import CASES, MAX_POSITIONS, VOCAB_SIZE, build, reload, save, stored, there_and_back

NOT_KEPT = {
    "transformers_version",
    "use_cache",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "reorder_and_upcast_attn",
    "pretraining_tp",
    "add_cross_attention",
    "is_decoder",
    "classifier_dropout",
    "id2label",
    "label2id",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "is_gated_act",
    "initializer_factor",
    "dense_act_fn",
}
"""Keys of config.json that say nothing about a language model's weights or arithmetic."""


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_to_the_bit_and_loads_whole(tmp_path, case):
    architecture, _ = CASES[case]
    model = build(case)
    source = save(model, tmp_path / "source")
    exported = there_and_back(source, tmp_path)
    theirs, ours = stored(source), stored(exported)
    theirs.pop("final_logits_bias", None)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    loaded = reload(architecture, exported)
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_config_json_comes_back(tmp_path, case):
    source = save(build(case), tmp_path / "source")
    exported = there_and_back(source, tmp_path)
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (source, exported))
    if case == "t5 v1.1":
        # It is untied; transformers 5 says that it is tied, and means whether the logits are scaled.
        assert (ours["tie_word_embeddings"], ours["scale_decoder_outputs"]) == (False, False)
        theirs["tie_word_embeddings"] = False
    # Without a tokenizer nothing says what the special ids are.
    ours = {key: value for key, value in ours.items() if not key.endswith("_token_id")}
    kept = {key: value for key, value in theirs.items() if key in ours}
    assert {key: value for key, value in ours.items() if key in theirs and value != theirs[key]} == {}
    assert {key for key in theirs.keys() - kept.keys() - NOT_KEPT if not key.endswith("_token_id")} == set()


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_gives_the_checkpoint_of_the_whole_one(tmp_path, case):
    model = build(case)
    whole, shards = save(model, tmp_path / "whole"), save(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    for source in (whole, shards):
        import_hf(source, source / "checkpoint")
    files = sorted(path.name for path in (whole / "checkpoint").iterdir())
    assert files == ["config.yaml", "manifest.json", "rank-00000.json", "rank-00000.safetensors"]
    for name in files:
        assert (whole / "checkpoint" / name).read_bytes() == (shards / "checkpoint" / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_weights_in_bf16_are_taken_exactly_and_written_back(tmp_path, case):
    model = build(case).to(torch.bfloat16)
    source = save(model, tmp_path / "source")
    exported = there_and_back(source, tmp_path, "bf16")
    theirs, ours = stored(source), stored(exported)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in stored(tmp_path / "checkpoint").values()} == {torch.float32}


def test_the_rows_that_pad_the_vocabulary_are_zero_and_go_again(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    exported = there_and_back(source, tmp_path)
    table = stored(tmp_path / "checkpoint")["param/word_embedding.table.weight"].view(256, 32)
    assert not table[VOCAB_SIZE:].any()
    assert stored(exported)["transformer.wte.weight"].shape == (VOCAB_SIZE, 32)


@pytest.mark.parametrize(("case", "part", "name"), [("gpt2", "transformer", "wte"), ("bart", "model", "shared")])
def test_a_model_saved_without_its_head_is_taken(tmp_path, case, part, name):
    model = build(case)
    whole, base = save(model, tmp_path / "whole"), save(getattr(model, part), tmp_path / "base")
    assert f"{name}.weight" in stored(base)
    for source in (whole, base):
        import_hf(source, source / "checkpoint")
    weights = "rank-00000.safetensors"
    assert (whole / "checkpoint" / weights).read_bytes() == (base / "checkpoint" / weights).read_bytes()


def test_the_old_names_of_norms_are_taken(tmp_path):
    source = save(build("bert"), tmp_path / "source")
    import_hf(source, tmp_path / "new")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored(source).items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, source / "model.safetensors")
    import_hf(source, tmp_path / "old")
    weights = "rank-00000.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (tmp_path / "old" / weights).read_bytes()


def test_the_published_v1_1_of_t5_is_untied_and_not_scaled(tmp_path):
    source = save(build("t5 v1.1"), tmp_path / "source")
    keys = json.loads((source / "config.json").read_text())
    del keys["scale_decoder_outputs"]
    (source / "config.json").write_text(json.dumps({**keys, "tie_word_embeddings": False}))
    import_hf(source, tmp_path / "checkpoint")
    model = load_run(tmp_path / "checkpoint" / "config.yaml").model
    assert (model.tied_head, model.scaled_logits, model.activation) == (False, False, "geglu")


@pytest.mark.parametrize("pad_id", [0, 4])
def test_positions_of_roberta_follow_the_padding_of_the_tokenizer(tmp_path, pad_id):
    model = build("roberta")
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    config = load_run(tmp_path / "checkpoint" / "config.yaml").model
    keys = roberta.to_hf(config, {"pad_token_id": pad_id})
    table = roberta.table(config, HfConfig(keys))
    (positions,) = (one for one in table if one.ours == "input_embedding.positions")
    (theirs,) = positions.to_theirs(model.roberta.embeddings.position_embeddings.weight.detach())
    assert keys["max_position_embeddings"] == len(theirs) == MAX_POSITIONS + pad_id + 1
    assert torch.equal(theirs[pad_id + 1 :], model.roberta.embeddings.position_embeddings.weight[2:])


def test_large_checkpoints_and_exports_lie_in_several_files(tmp_path, monkeypatch):
    from lmscale.convert import hf_shards, native

    monkeypatch.setattr(native.NativeWriter.__init__, "__defaults__", (1500,))
    monkeypatch.setattr(hf_shards.ShardWriter.__init__, "__defaults__", (20_000,))
    model = build("llama")
    source = save(model, tmp_path / "source")
    exported = there_and_back(source, tmp_path)
    shards = sorted(path.name for path in exported.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    for file in (tmp_path / "checkpoint").glob("*.safetensors"):
        assert file.stat().st_size <= 4 * 1500 + 1500
    theirs, ours = stored(source), stored(exported)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    loaded = reload("LlamaForCausalLM", exported).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_the_config_of_an_imported_checkpoint_is_a_valid_run(tmp_path):
    import_hf(save(build("llama"), tmp_path / "source"), tmp_path / "checkpoint")
    model = load_run(tmp_path / "checkpoint" / "config.yaml").model
    assert (model.num_layers, model.hidden_size, model.query_groups, model.head_size) == (3, 48, 2, 8)
    assert (model.position_embedding, model.rope_theta, model.normalization) == ("rope", 5e5, "rmsnorm")
    assert (model.activation, model.linear_bias, model.tied_head) == ("swiglu", False, False)


def test_an_export_counts_the_parameters_that_transformers_counts(tmp_path):
    model = build("gpt2")
    imported = import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    exported = export_hf(tmp_path / "checkpoint", tmp_path / "exported")
    assert imported.num_parameters == exported.num_parameters == model.num_parameters()
