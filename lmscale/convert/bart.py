"""BART: post-norm encoder and decoder with biases, shared embeddings, positions that begin at row 2."""

from __future__ import annotations

from typing import Any

from lmscale.config.model import ModelConfig
from lmscale.convert.family import Family, Ids, Weights
from lmscale.convert.hf_config import HfConfig, their_activation
from lmscale.convert.mapping import Entry, entry, grouped_kv, grouped_qkv, linear, padded_vocabulary, repeat
from lmscale.errors import ConversionError

_OFFSET = 2
_LOGITS_BIAS = "final_logits_bias"


def table(model: ModelConfig, hf: HfConfig) -> list[Entry]:
    """List the tensors."""
    encoder_layer = [
        *linear("attention.linear_qkv", [f"self_attn.{part}_proj" for part in "qkv"], grouped_qkv(model)),
        *linear("attention.linear_proj", "self_attn.out_proj"),
        *linear("attention_norm", "self_attn_layer_norm"),
        *linear("mlp.linear_fc1", "fc1"),
        *linear("mlp.linear_fc2", "fc2"),
        *linear("mlp_norm", "final_layer_norm"),
    ]
    decoder_layer = [
        *encoder_layer,
        *linear("cross_attention.linear_q", "encoder_attn.q_proj"),
        *linear("cross_attention.linear_kv", [f"encoder_attn.{part}_proj" for part in "kv"], grouped_kv(model)),
        *linear("cross_attention.linear_proj", "encoder_attn.out_proj"),
        *linear("cross_attention_norm", "encoder_attn_layer_norm"),
    ]
    return [
        entry("word_embedding.table.weight", "model.shared.weight", padded_vocabulary(model)),
        *_stack("encoder", encoder_layer, model),
        *_stack("decoder", decoder_layer, model),
    ]


def _stack(name: str, layer: list[Entry], model: ModelConfig) -> list[Entry]:
    return [
        entry(f"{name}_embedding.positions", f"model.{name}.embed_positions.weight"),
        *linear(f"{name}_embedding.norm", f"model.{name}.layernorm_embedding"),
        *repeat(layer, model.num_layers, name + "_layers.{}", f"model.{name}.layers." + "{}"),
    ]


def to_model(hf: HfConfig, weights: Weights) -> dict[str, Any]:
    """Translate config.json.

    Raises:
        ConversionError: for the variants of other models under BART's name, and for a bias on the logits.
    """
    for key, wanted in (
        ("scale_embedding", False),
        ("normalize_before", False),
        ("add_final_layer_norm", False),
        ("normalize_embedding", True),
        ("static_position_embeddings", False),
    ):
        hf.only(key, wanted)
    if _LOGITS_BIAS in weights.names and weights.read(_LOGITS_BIAS).any():
        raise ConversionError("is not zero, and a bart of lmscale has no bias on its logits", field=_LOGITS_BIAS)
    return {
        "architecture": "bart",
        "num_layers": hf.same("encoder_layers", "decoder_layers"),
        "hidden_size": hf.integer("d_model"),
        "num_attention_heads": hf.same("encoder_attention_heads", "decoder_attention_heads"),
        "ffn_hidden_size": hf.same("encoder_ffn_dim", "decoder_ffn_dim"),
        "vocab_size": hf.integer("vocab_size"),
        "max_position_embeddings": hf.integer("max_position_embeddings", 1024),
        "position_offset": _OFFSET,
        "activation": hf.activation("activation_function", "gelu"),
        "hidden_dropout": hf.get("dropout", 0.1),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "ffn_dropout": hf.get("activation_dropout", 0.0),
        "init": {"std": hf.get("init_std", 0.02)},
    }


def to_hf(model: ModelConfig, ids: Ids) -> dict[str, Any]:
    """Write config.json. The decoder starts with the end of the text, as in training."""
    known = {key: value for key, value in ids.items() if value is not None}
    end = known.get("eos_token_id")
    starts = {} if end is None else {"decoder_start_token_id": end, "forced_eos_token_id": end}
    return {
        "encoder_layers": model.num_layers,
        "decoder_layers": model.num_layers,
        "d_model": model.hidden_size,
        "encoder_attention_heads": model.num_attention_heads,
        "decoder_attention_heads": model.num_attention_heads,
        "encoder_ffn_dim": model.ffn_size,
        "decoder_ffn_dim": model.ffn_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "activation_function": their_activation(model),
        "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": model.ffn_dropout,
        "init_std": model.init.std,
        "scale_embedding": False,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        **starts,
        **known,
    }


FAMILY = Family(
    model_type="bart",
    architectures=("BartForConditionalGeneration", "BartModel"),
    prefix="model.",
    table=table,
    to_model=to_model,
    to_hf=to_hf,
    copies={
        "lm_head.weight": "model.shared.weight",
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    buffers=(_LOGITS_BIAS, r"model\.(encoder|decoder)\.version"),
)
