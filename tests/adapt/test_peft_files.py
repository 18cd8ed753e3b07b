"""PEFT loads what we export, on the exported base, and gives our logits; we load what PEFT saves, and give its."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.convert.exporting import export_hf
from lmscale.convert.peft import export_peft, import_peft
from lmscale.errors import ConversionError
from tests.adapt.written import logits_of, write_adaptation, write_base
from tests.distributed.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT calls of transformers is deprecated there
    import peft

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOLERANCE = 1.0e-5
"""max |a - b| / max |b|, both in fp32: the two add up in different orders."""
CLASSES = {
    "gpt": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "bart": "BartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}
LORA = {
    "gpt": {"targets": ["query", "value", "proj", "fc1"], "bias": "all"},
    "gpt rslora": {"targets": ["key", "value"], "rslora": True, "alpha": 5.0},
    "gpt whole": {"targets": ["qkv", "fc2"]},
    "llama": {"targets": ["query", "value", "gate", "up", "fc2"]},
    "llama whole": {"targets": ["qkv", "fc1"], "alpha": 3.0},
    "bert": {"targets": ["query", "value", "proj", "fc2"], "bias": "lora_only"},
    "roberta": {"targets": ["qkv", "fc1"], "bias": "lora_only"},
    "bart": {"targets": ["query", "cross_query", "cross_value", "cross_proj", "fc2"], "bias": "all"},
    "t5": {"targets": ["value", "cross_key", "cross_value", "fc1"]},
}
PROMPTS = {
    "gpt prefix": {"method": "prefix_tuning", "length": 5, "projection": None},
    "llama prefix": {"method": "p_tuning_v2", "length": 4},
    "bert prefix": {"method": "p_tuning_v2", "length": 4},
    "roberta prefix": {"method": "prefix_tuning", "length": 3, "projection": None},
    "gpt prompt": {"method": "prompt_tuning", "length": 6},
    "bert prompt": {"method": "prompt_tuning", "length": 4},
    "t5 prompt": {"method": "prompt_tuning", "length": 5},
}


def _hf(directory: Path, architecture: str) -> Any:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    return getattr(transformers, CLASSES[architecture]).from_pretrained(directory).eval()


def _peft_on(model: Any, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of its own imports and of models without a name
        return peft.PeftModel.from_pretrained(model, str(directory)).eval()


def _tokens(num_rows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of tests.adapt.written.model_logits."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(8, 120, (num_rows, length), generator=generator)
    return tokens, torch.randint(8, 120, (num_rows, 7), generator=generator)


@torch.no_grad()
def _peft_logits(hf: Any, directory: Path, architecture: str, is_lora: bool) -> torch.Tensor:
    tokens, decoder_tokens = _tokens()
    if architecture in ("bart", "t5"):
        return _peft_on(hf, directory)(input_ids=tokens, decoder_input_ids=decoder_tokens, use_cache=False).logits
    if architecture in ("bert", "roberta") and not is_lora:
        # PEFT's prompts of encoders are for the model below the head.
        trunk = hf.bert if architecture == "bert" else hf.roberta
        mask = torch.ones_like(tokens)
        hidden = _peft_on(trunk, directory)(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (hf.cls if architecture == "bert" else hf.lm_head)(hidden[:, -tokens.size(1) :])
    logits = _peft_on(hf, directory)(input_ids=tokens).logits
    return logits[:, -tokens.size(1) :]


def _error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def _ours(checkpoint: Path) -> torch.Tensor:
    return run_ranks(1, logits_of, str(checkpoint))[0]


def _export_both(tmp_path: Path, architecture: str, adapt: dict[str, Any]) -> tuple[Path, Path]:
    """Write a random base and an adaptation, and export both; return (base, adaptation)."""
    base = write_base(tmp_path / "base", architecture)
    adapted = write_adaptation(tmp_path / "adapted", base, adapt, scale=0.5)
    export_hf(base, tmp_path / "hf")
    export_peft(adapted, tmp_path / "peft")
    return base, adapted


@pytest.mark.parametrize("case", LORA)
def test_peft_gives_the_logits_of_our_lora_and_ours_come_back(tmp_path, case):
    architecture = case.split()[0]
    base, adapted = _export_both(tmp_path, architecture, {"method": "lora", "rank": 3, **LORA[case]})
    truth = _peft_logits(_hf(tmp_path / "hf", architecture), tmp_path / "peft", architecture, is_lora=True)
    assert _error(_ours(adapted), truth) <= TOLERANCE
    import_peft(tmp_path / "peft", tmp_path / "again", base)
    assert _error(_ours(tmp_path / "again"), truth) <= TOLERANCE
    assert _error(_ours(base), truth) > 1.0e-2, "the adaptation changes nothing"


@pytest.mark.parametrize("case", PROMPTS)
def test_peft_gives_the_logits_of_our_prefixes_and_prompts_and_ours_come_back(tmp_path, case):
    architecture = case.split()[0]
    base, adapted = _export_both(tmp_path, architecture, PROMPTS[case])
    hf = _hf(tmp_path / "hf", architecture)
    truth = _peft_logits(hf, tmp_path / "peft", architecture, is_lora=False)
    assert _error(_ours(adapted), truth) <= TOLERANCE
    assert _error(_ours(base), truth) > 1.0e-2, "the adaptation changes nothing"
    trunk = {"bert": "bert", "roberta": "roberta"}.get(architecture)
    _save(_peft_on(getattr(hf, trunk) if trunk else hf, tmp_path / "peft"), tmp_path / "theirs")
    import_peft(tmp_path / "theirs", tmp_path / "again", base)
    assert torch.equal(_ours(tmp_path / "again"), _ours(adapted))


def test_a_prefix_network_is_exported_as_what_it_makes(tmp_path):
    keys = {"method": "prefix_tuning", "length": 4, "projection": 6}
    _, adapted = _export_both(tmp_path, "gpt", keys)
    truth = _peft_logits(_hf(tmp_path / "hf", "gpt"), tmp_path / "peft", "gpt", is_lora=False)
    assert _error(_ours(adapted), truth) <= TOLERANCE


THEIRS = {
    "gpt": {"target_modules": ["c_attn"], "lora_alpha": 6},
    "gpt ranks": {
        "target_modules": ["attn.c_proj", "mlp.c_fc"],
        "rank_pattern": {"h.1.mlp.c_fc": 5},
        "alpha_pattern": {"c_proj": 9},
    },
    "llama": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "use_rslora": True},
    "bert": {"target_modules": ["query", "attention.output.dense"], "bias": "all"},
    "t5": {"target_modules": ["EncDecAttention.k", "wi_0"]},
}


@pytest.mark.parametrize("case", THEIRS)
def test_lora_that_peft_made_is_taken(tmp_path, case):
    architecture = case.split()[0]
    base = write_base(tmp_path / "base", architecture)
    export_hf(base, tmp_path / "hf")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_hf(tmp_path / "hf", architecture), peft.LoraConfig(r=3, **THEIRS[case]))
    is_trained = ("lora_", "layer.0.attention.self.query.base_layer.bias", "layer.1.output.LayerNorm.bias")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in is_trained):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    _save(model, tmp_path / "theirs")
    import_peft(tmp_path / "theirs", tmp_path / "ours", base)
    truth = _peft_logits(_hf(tmp_path / "hf", architecture), tmp_path / "theirs", architecture, is_lora=True)
    assert _error(_ours(tmp_path / "ours"), truth) <= TOLERANCE
    assert _error(_ours(base), truth) > 1.0e-2, "the adaptation changes nothing"


def _save(model: Any, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("a_key_of_tomorrow", 0.5),
    ],
)
def test_keys_that_change_the_arithmetic_are_refused_by_name(tmp_path, key, value):
    base, _ = _export_both(tmp_path, "gpt", {"method": "lora"})
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ConversionError, match=f"{key}.*cannot be taken"):
        import_peft(tmp_path / "peft", tmp_path / "again", base)


def test_every_field_of_pefts_lora_config_is_accounted_for():
    """A field that is new in a version of PEFT must be looked at, not passed over where it is off by default."""
    from lmscale.convert import peft_files, peft_lora

    known = peft_files._DESCRIPTIVE | peft_lora._HONOURED
    neutral = peft_files._NEUTRAL
    for name, value in peft.LoraConfig().to_dict().items():
        assert name in known or value in neutral or value in ({}, []), name


def test_what_peft_cannot_hold_is_refused(tmp_path):
    for number, (architecture, adapt, match) in enumerate(
        [
            ("bart", {"method": "prefix_tuning", "projection": None}, "neither the encoder"),
            ("gpt", {"method": "bitfit"}, "PEFT has no such method"),
            ("t5", {"method": "lora", "targets": ["embedding"]}, "has other uses"),
        ]
    ):
        base = write_base(tmp_path / f"base {number}", architecture)
        adapted = write_adaptation(tmp_path / f"adapted {number}", base, adapt)
        with pytest.raises(ConversionError, match=match):
            export_peft(adapted, tmp_path / "peft")


def test_lora_of_another_base_is_refused(tmp_path):
    _export_both(tmp_path, "gpt", {"method": "lora"})
    with pytest.raises(ConversionError, match="lmscale has none there"):
        import_peft(tmp_path / "peft", tmp_path / "again", write_base(tmp_path / "llama", "llama"))


@pytest.mark.parametrize("architecture", ["gpt", "llama"])
def test_target_modules_are_short_and_exact(tmp_path, architecture):
    _export_both(tmp_path, architecture, {"method": "lora", "targets": ["proj"]})
    keys = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert keys["target_modules"] == {"gpt": ["attn.c_proj"], "llama": ["self_attn.o_proj"]}[architecture]
    assert keys["fan_in_fan_out"] is (architecture == "gpt")


def test_lora_beside_the_embedding_is_pefts(tmp_path):
    base, _ = _export_both(tmp_path, "llama", {"method": "lora", "rank": 3, "targets": ["embedding"]})
    import_peft(tmp_path / "peft", tmp_path / "again", base)
    export_peft(tmp_path / "again", tmp_path / "once more")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "once more"))
    assert first == second
    from lmscale.convert.merging import merge_adaptation

    merge_adaptation(tmp_path / "again", tmp_path / "merged")
    truth = _peft_logits(_hf(tmp_path / "hf", "llama"), tmp_path / "peft", "llama", is_lora=True)
    assert _error(_ours(tmp_path / "merged"), truth) <= TOLERANCE
