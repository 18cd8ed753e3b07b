"""Tiny random models of transformers, saved as users save them, and conversions there and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmscale.convert.exporting import export_hf
from lmscale.convert.importing import import_hf

VOCAB_SIZE, MAX_POSITIONS = 131, 32
Tensors = dict[str, torch.Tensor]

_GPT2 = {"vocab_size": VOCAB_SIZE, "n_positions": MAX_POSITIONS, "n_embd": 32, "n_layer": 3, "n_head": 4}
_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_ENCODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
_T5_V1_1 = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
NO_IDS = {"bos_token_id": None, "eos_token_id": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {**_GPT2, **NO_IDS}),
    "gpt2 untied, gelu": (
        "GPT2LMHeadModel",
        {**_GPT2, **NO_IDS, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 48},
    ),
    "llama": ("LlamaForCausalLM", {**_LLAMA, **NO_IDS, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama tied, biases, wide heads": (
        "LlamaForCausalLM",
        {
            **_LLAMA,
            **NO_IDS,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "rms_norm_eps": 1e-5,
        },
    ),
    "bert": ("BertForPreTraining", {**_ENCODER, "max_position_embeddings": MAX_POSITIONS}),
    "bert masked": ("BertForMaskedLM", {**_ENCODER, "max_position_embeddings": 20, "hidden_act": "gelu_new"}),
    "roberta": (
        "RobertaForMaskedLM",
        {**_ENCODER, "max_position_embeddings": MAX_POSITIONS + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "bart": ("BartForConditionalGeneration", {**_BART, "attention_dropout": 0.2, "activation_dropout": 0.3}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5 v1.1": ("T5ForConditionalGeneration", _T5_V1_1),
    "t5 v1.1 tied": ("T5ForConditionalGeneration", _T5_V1_1),
}
"""By name: the class, and keys of its config."""


def build(case: str, **changes: Any) -> Any:
    """Make a random model in fp32, with biases and norms that are not their neutral values."""
    import transformers

    architecture, keys = CASES[case]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(**{**keys, **changes}))
    if case == "t5 v1.1":
        # transformers 5 ties it whatever the config says, and unties it where a checkpoint holds both.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Save a model as users do, without the bar of progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory, **options)
    return directory


def stored(directory: Path) -> Tensors:
    """Read every tensor of a directory's safetensors."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def there_and_back(source: Path, home: Path, precision: str = "fp32") -> Path:
    """Import a directory and export the checkpoint."""
    import_hf(source, home / "checkpoint")
    export_hf(home / "checkpoint", home / "exported", precision)
    return home / "exported"


def reload(architecture: str, directory: Path) -> Any:
    """Load a directory with transformers, which must miss no tensor and find none left over."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # What transformers says of its own defaults is not about our files.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        model, info = getattr(transformers, architecture).from_pretrained(directory, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    return model.eval()
