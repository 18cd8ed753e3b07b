"""What cannot be converted is refused in one line that says where and why, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmscale.config.io import load_run, show
from lmscale.convert.exporting import export_hf
from lmscale.convert.importing import import_hf
from lmscale.convert.registry import FAMILIES
from lmscale.errors import CheckpointError, ConfigError, ConversionError
from tests.convert.models import CASES, build, save, stored
from tests.evaluate.checkpoints import reseal

Change = dict[str, Any]


def change_config(directory: Path, changes: Change) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = stored(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def refused(tmp_path: Path, source: Path, part: str, kind: type[Exception] = ConversionError) -> None:
    with pytest.raises(kind, match=re.escape(part)) as caught:
        import_hf(source, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


@pytest.mark.parametrize(
    ("case", "changes", "part"),
    [
        (
            "gpt2",
            {"model_type": "mamba"},
            "config.json: model_type = 'mamba': cannot be converted: there are gpt2, llama",
        ),
        ("gpt2", {"model_type": ["gpt2"]}, "config.json: model_type = ['gpt2']"),
        ("gpt2", {"model_type": None}, "config.json: model_type = None"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantized weights cannot be taken"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: must be False"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False: must be True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "silu"}, "config.json: activation_function = 'silu'"),
        ("gpt2", {"n_embd": "32"}, "config.json: n_embd = '32': must be a whole number"),
        ("gpt2", {"n_layer": 4}, "lacks transformer.h.3.attn.c_attn.bias"),
        ("gpt2", {"n_layer": 2}, "holds transformer.h.2.attn.c_attn.bias"),
        ("gpt2", {"n_positions": 64}, "transformer.wpe.weight: has the shape (32, 32), and by config.json (64, 32)"),
        ("gpt2", {"vocab_size": 130}, "transformer.wte.weight: has the shape (131, 32)"),
        ("gpt2", {"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ("gpt2 untied, gelu", {"tie_word_embeddings": True}, "lm_head.weight: differs from transformer.wte.weight"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json: rope_scaling = {"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "config.json: rope_scaling = {"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}}, "must be a number"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "config.json: rope_scaling = {"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "stretched rope is not built"),
        ("llama", {"sliding_window": 16}, "config.json: sliding_window = 16: attention over a window"),
        ("llama", {"attention_bias": True}, "config.json: mlp_bias = False: must equal attention_bias = True"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "lacks model.layers.0"),
        ("llama", {"hidden_act": "gelu"}, "config.json: hidden_act = 'gelu': must be 'silu'"),
        ("llama", {"num_key_value_heads": 3}, "k_proj.weight: has the shape (16, 48), and by config.json (24, 48)"),
        (
            "bert",
            {"architectures": ["BertForTokenClassification"]},
            "of bert there are BertForPreTraining, BertForMaskedLM",
        ),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert", {"is_decoder": True}, "config.json: is_decoder = True: must be False"),
        ("bert", {"hidden_act": "silu"}, "config.json: hidden_act = 'silu'"),
        ("bert", {"max_position_embeddings": 33}, "position_embeddings.weight: has the shape (32, 32)"),
        ("roberta", {"hidden_act": "relu"}, "config.json: hidden_act = 'relu': must be 'gelu'"),
        ("roberta", {"pad_token_id": None}, "config.json: pad_token_id = None: must be a whole number"),
        ("bart", {"decoder_layers": 3}, "config.json: decoder_layers = 3: must equal encoder_layers = 2"),
        ("bart", {"decoder_ffn_dim": 40}, "config.json: decoder_ffn_dim = 40: must equal encoder_ffn_dim = 48"),
        ("bart", {"scale_embedding": True}, "config.json: scale_embedding = True: must be False"),
        ("bart", {"normalize_before": True}, "config.json: normalize_before = True: must be False"),
        ("t5", {"num_decoder_layers": 1}, "config.json: num_decoder_layers = 1: must equal num_layers = 2"),
        ("t5", {"feed_forward_proj": "gated-relu"}, "config.json: feed_forward_proj = 'gated-relu'"),
        ("t5", {"feed_forward_proj": "gated-gelu"}, "lacks decoder.block.0.layer.2.DenseReluDense.wi_0.weight"),
        ("t5", {"tie_word_embeddings": False}, "lm_head.weight: is missing, and config.json says tie_word_embeddings"),
        ("t5 v1.1", {"scale_decoder_outputs": True}, "lm_head.weight: differs from the embedding, and scaled logits"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(tmp_path, case, changes, part):
    source = save(build(case), tmp_path / "source")
    change_config(source, changes)
    refused(tmp_path, source, part)


def test_sizes_that_do_not_fit_are_refused_by_the_rules_of_a_config(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    change_config(source, {"n_head": 5})
    refused(tmp_path, source, "model.hidden_size = 32: must be a multiple of", ConfigError)


def test_a_missing_and_a_leftover_tensor_are_named(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    change_tensors(source, lambda tensors: tensors.pop("transformer.ln_f.bias"))
    refused(tmp_path, source, "lacks transformer.ln_f.bias")
    change_tensors(source, lambda tensors: tensors.update({"transformer.ln_f.bias": torch.zeros(32)}))
    change_tensors(source, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    refused(tmp_path, source, "holds score.weight, which a gpt2 of lmscale has not; save it as GPT2LMHeadModel")


def test_buffers_and_equal_copies_are_no_leftovers(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    change_tensors(source, add)
    assert import_hf(source, tmp_path / "checkpoint").notes == ["without a tokenizer: the directory holds none"]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("bert", "cls.predictions.decoder.weight"),
        ("bert", "cls.predictions.decoder.bias"),
        ("roberta", "lm_head.decoder.weight"),
        ("bart", "lm_head.weight"),
        ("bart", "model.decoder.embed_tokens.weight"),
        ("t5", "encoder.embed_tokens.weight"),
    ],
)
def test_a_copy_of_the_embedding_must_be_one(tmp_path, case, name):
    source = save(build(case), tmp_path / "source")
    original = next(copy.copies[name] for copy in FAMILIES.values() if name in copy.copies and copy.model_type == case)
    change_tensors(source, lambda tensors: tensors.update({name: tensors[original].clone()}))
    import_hf(source, tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    change_tensors(source, lambda tensors: tensors[name].add_(1))
    refused(tmp_path, source, f"{name}: differs from {original}")


def test_a_bias_on_the_logits_of_bart_is_refused(tmp_path):
    source = save(build("bart"), tmp_path / "source")
    change_tensors(source, lambda tensors: tensors["final_logits_bias"].add_(1))
    refused(tmp_path, source, "final_logits_bias: is not zero")


def test_an_encoder_without_its_head_is_refused(tmp_path):
    source = save(build("bert").bert, tmp_path / "source")
    change_config(source, {"architectures": None})
    refused(tmp_path, source, "lacks cls.predictions.bias")


def test_a_pooler_that_nothing_trained_is_left_out_and_named(tmp_path):
    source = save(build("roberta"), tmp_path / "source")
    change_tensors(source, lambda tensors: tensors.update({"roberta.pooler.dense.bias": torch.ones(32)}))
    notes = import_hf(source, tmp_path / "checkpoint").notes
    assert "left out: roberta.pooler.dense.bias, which no objective trains" in notes


def test_quantized_values_are_refused(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    change_tensors(source, lambda tensors: tensors.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}))
    refused(tmp_path, source, "transformer.ln_f.bias: has the dtype I8")


def test_missing_and_torn_files_are_named(tmp_path):
    source = save(build("gpt2"), tmp_path / "source", max_shard_size="40KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    refused(tmp_path, source, f"{shard.name}: cannot be read")
    shard.unlink()
    refused(tmp_path, source, f"{shard.name} is missing")
    (source / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, source, "model.safetensors.index.json: cannot be read")
    (source / "config.json").unlink()
    refused(tmp_path, source, "config.json: is missing")


def test_pickles_are_refused_with_the_remedy(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(tmp_path, source, "call save_pretrained")
    (source / "pytorch_model.bin").unlink()
    refused(tmp_path, source, "holds no model.safetensors")


def test_an_index_does_not_lead_out_of_the_directory(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    refused(tmp_path, source, "must be the name of a file in the directory")


def test_a_target_that_exists_is_refused_and_stays(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConversionError, match="exists already"):
        import_hf(source, tmp_path / "checkpoint")
    (tmp_path / "checkpoint").rmdir()
    import_hf(source, tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match="exists already"):
        export_hf(tmp_path / "checkpoint", source)


def test_a_conversion_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    from lmscale.convert.native import NativeWriter

    source = save(build("gpt2"), tmp_path / "source")

    def fail(self, config_yaml):
        raise KeyboardInterrupt

    monkeypatch.setattr(NativeWriter, "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("case", "changes", "part"),
    [
        (
            "gpt2",
            {"norm_position": "post"},
            "model.norm_position = 'post': cannot be exported: transformers' gpt2 has 'pre'",
        ),
        ("gpt2", {"normalization": "rmsnorm"}, "model.normalization = 'rmsnorm'"),
        ("gpt2", {"activation": "swiglu"}, "model.activation = 'swiglu'"),
        ("gpt2", {"linear_bias": False}, "model.linear_bias = False"),
        ("gpt2", {"num_query_groups": 2}, "model.query_groups = 2"),
        ("gpt2", {"head_dim": 4}, "model.head_size = 4"),
        ("gpt2", {"embedding_norm": True}, "model.embedding_norm = True"),
        ("bert", {"position_offset": 1}, "model.position_offset = 1"),
        ("roberta", {"position_offset": 0}, "model.position_offset = 0: RoBERTa has at least 1"),
        ("roberta", {"activation": "relu"}, "config.json: hidden_act = 'relu': must be 'gelu'"),
        ("bart", {"position_offset": 0}, "model.position_offset = 0"),
        ("t5", {"linear_bias": True}, "model.linear_bias = True"),
        ("llama", {"activation": "gelu"}, "model.activation = 'gelu'"),
        ("llama", {"normalization": "layernorm"}, "model.normalization = 'layernorm'"),
        ("llama", {"hidden_size": 52}, "model.hidden_size = 52: Llama has multiples of num_attention_heads = 6"),
    ],
)
def test_a_model_that_transformers_cannot_express_is_refused(tmp_path, case, changes, part):
    edited(tmp_path, case, changes)
    with pytest.raises(ConversionError, match=re.escape(part)):
        export_hf(tmp_path / "checkpoint", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def edited(tmp_path: Path, case: str, changes: Change) -> None:
    """Import a model and change its config.yaml."""
    checkpoint = tmp_path / "checkpoint"
    import_hf(save(build(case), tmp_path / "source"), checkpoint)
    config = load_run(checkpoint / "config.yaml")
    model = config.model.model_copy(update=changes)
    (checkpoint / "config.yaml").write_text(show(config.model_copy(update={"model": model})))
    reseal(checkpoint)


def test_dropouts_that_have_no_key_are_noted(tmp_path):
    edited(tmp_path, "llama", {"hidden_dropout": 0.25})
    notes = export_hf(tmp_path / "checkpoint", tmp_path / "exported").notes
    assert "model.hidden_dropout = 0.25 becomes 0.0 in config.json" in notes
    source = save(build("gpt2"), tmp_path / "other")
    change_config(source, {"embd_pdrop": 0.5})
    assert "embd_pdrop = 0.5 becomes 0.1" in import_hf(source, tmp_path / "again").notes


def test_a_checkpoint_of_another_model_than_its_config_is_refused(tmp_path):
    edited(tmp_path, "gpt2", {"num_layers": 2})
    with pytest.raises(CheckpointError, match=re.escape("layers.2.attention.linear_proj.bias is (32,) in its files")):
        export_hf(tmp_path / "checkpoint", tmp_path / "exported")


def test_values_beyond_fp16_are_refused_and_leave_nothing(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    change_tensors(source, lambda tensors: tensors["transformer.ln_f.bias"].fill_(1e5))
    import_hf(source, tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match="use --dtype bf16"):
        export_hf(tmp_path / "checkpoint", tmp_path / "exported", "fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}


def test_every_case_names_a_class_that_is_taken():
    taken = {architecture for family in FAMILIES.values() for architecture in family.architectures}
    assert {architecture for architecture, _ in CASES.values()} <= taken
