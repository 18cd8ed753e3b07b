"""Llama: rope, RMSNorm, SwiGLU, grouped queries; biases on all projections or on none."""

from __future__ import annotations

from typing import Any

from lmscale.config.model import ModelConfig
from lmscale.convert.family import Family, Ids, Weights
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.mapping import Entry, entry, grouped_qkv, linear, padded_vocabulary, repeat, stacked_gate
from lmscale.errors import ConversionError

_PLAIN_ROPE = (None, "default")


def table(model: ModelConfig, hf: HfConfig) -> list[Entry]:
    """List the tensors."""
    bias = model.linear_bias
    attention = [f"self_attn.{part}_proj" for part in "qkv"]
    layer = [
        *linear("attention_norm", "input_layernorm", bias=False),
        *linear("attention.linear_qkv", attention, grouped_qkv(model), bias=bias),
        *linear("attention.linear_proj", "self_attn.o_proj", bias=bias),
        *linear("mlp_norm", "post_attention_layernorm", bias=False),
        *linear("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), stacked_gate(model), bias=bias),
        *linear("mlp.linear_fc2", "mlp.down_proj", bias=bias),
    ]
    head = [] if model.tied_head else [entry("head.table.weight", "lm_head.weight", padded_vocabulary(model))]
    return [
        entry("word_embedding.table.weight", "model.embed_tokens.weight", padded_vocabulary(model)),
        *repeat(layer, model.num_layers, "layers.{}", "model.layers.{}"),
        *linear("final_norm.norm", "model.norm", bias=False),
        *head,
    ]


def to_model(hf: HfConfig, weights: Weights) -> dict[str, Any]:
    """Translate config.json."""
    hf.only("hidden_act", "silu")
    hf.only("sliding_window", None, rule="attention over a window is not built in lmscale")
    bias = hf.only("attention_bias", False, True)
    if hf.get("mlp_bias", False) != bias:
        raise hf.wrong("mlp_bias", f"must equal attention_bias = {bias}: lmscale has biases on all projections or none")
    heads = hf.integer("num_attention_heads")
    return {
        "architecture": "gpt",
        "num_layers": hf.integer("num_hidden_layers"),
        "hidden_size": hf.integer("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads", None) or heads,
        "head_dim": hf.get("head_dim", None),
        "ffn_hidden_size": hf.integer("intermediate_size"),
        "vocab_size": hf.integer("vocab_size"),
        "max_position_embeddings": hf.integer("max_position_embeddings", 2048),
        "position_embedding": "rope",
        "rope_theta": _rope_theta(hf),
        "normalization": "rmsnorm",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "linear_bias": bias,
        "tied_head": hf.only("tie_word_embeddings", False, True),
        "attention_dropout": hf.get("attention_dropout", 0.0) or 0.0,
        "init": {"std": hf.get("initializer_range", 0.02), "residual": "none"},
    }


def _rope_theta(hf: HfConfig) -> float:
    """Find rope's base: in rope_parameters since transformers 5, beside rope_scaling before.

    Raises:
        ConversionError: if rope is stretched; ours is plain.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key, None) or {}
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else "unknown"
        if kind not in _PLAIN_ROPE or (kind is None and isinstance(rope, dict) and "factor" in rope):
            raise hf.wrong(key, "stretched rope is not built in lmscale: only the type 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise hf.wrong(key, "lmscale rotates whole heads: partial_rotary_factor must be 1.0")
    rope = hf.get("rope_parameters", None) or {}
    theta = rope.get("rope_theta") or hf.get("rope_theta", None) or 10000.0
    if not isinstance(theta, int | float):
        raise hf.wrong("rope_theta", "must be a number")
    return float(theta)


def to_hf(model: ModelConfig, ids: Ids) -> dict[str, Any]:
    """Write config.json.

    Raises:
        ConversionError: if transformers would refuse the sizes.
    """
    if model.hidden_size % model.num_attention_heads:
        raise ConversionError(
            f"Llama has multiples of num_attention_heads = {model.num_attention_heads} only",
            field="model.hidden_size",
            value=model.hidden_size,
        )
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
        "tie_word_embeddings": model.tied_head,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init.std,
        **ids,
    }


FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    prefix="model.",
    table=table,
    to_model=to_model,
    to_hf=to_hf,
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
