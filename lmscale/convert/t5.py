"""T5, v1.0 and v1.1: no biases, relative positions, one table of them in the first layer of each stack.

Whether the head is tied, and whether logits are scaled, is told apart by config.json and the weights. v1.0 is tied and
scaled. The published v1.1 say tie_word_embeddings: false, which means both untied and not scaled. transformers 5 writes
tie_word_embeddings: true into every config, says scale_decoder_outputs beside it, and ties only where lm_head.weight is
absent or equal to the embedding.
"""

from __future__ import annotations

from typing import Any

import torch

from lmscale.config.model import ModelConfig
from lmscale.convert.family import Family, Ids, Weights
from lmscale.convert.hf_config import FILE, HfConfig, their_activation
from lmscale.convert.mapping import (
    Entry,
    Transpose,
    entry,
    grouped_kv,
    grouped_qkv,
    linear,
    padded_vocabulary,
    repeat,
    stacked_gate,
)
from lmscale.errors import ConversionError

_PROJECTIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
"""Their feed_forward_proj and our activation."""
_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"


def table(model: ModelConfig, hf: HfConfig) -> list[Entry]:
    """List the tensors."""
    attention = _attention(model)
    cross = [
        *linear("cross_attention.linear_q", "layer.1.EncDecAttention.q", bias=False),
        *linear(
            "cross_attention.linear_kv",
            [f"layer.1.EncDecAttention.{part}" for part in "kv"],
            grouped_kv(model),
            bias=False,
        ),
        *linear("cross_attention.linear_proj", "layer.1.EncDecAttention.o", bias=False),
        *linear("cross_attention_norm", "layer.1.layer_norm", bias=False),
    ]
    head = [] if model.tied_head else [entry("head.table.weight", _HEAD, padded_vocabulary(model))]
    return [
        entry("word_embedding.table.weight", _EMBEDDING, padded_vocabulary(model)),
        *_stack("encoder", [*attention, *_feed_forward(model, 1)], model),
        *linear("encoder_norm.norm", "encoder.final_layer_norm", bias=False),
        *_stack("decoder", [*attention, *cross, *_feed_forward(model, 2)], model),
        *linear("final_norm.norm", "decoder.final_layer_norm", bias=False),
        *head,
    ]


def _stack(name: str, layer: list[Entry], model: ModelConfig) -> list[Entry]:
    relative = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        entry(f"{name}_relative_bias.table", relative, Transpose()),
        *repeat(layer, model.num_layers, name + "_layers.{}", name + ".block.{}"),
    ]


def _attention(model: ModelConfig) -> list[Entry]:
    parts = [f"layer.0.SelfAttention.{part}" for part in "qkv"]
    return [
        *linear("attention_norm", "layer.0.layer_norm", bias=False),
        *linear("attention.linear_qkv", parts, grouped_qkv(model), bias=False),
        *linear("attention.linear_proj", "layer.0.SelfAttention.o", bias=False),
    ]


def _feed_forward(model: ModelConfig, position: int) -> list[Entry]:
    inner = f"layer.{position}.DenseReluDense"
    if model.is_gated:
        first = linear("mlp.linear_fc1", (f"{inner}.wi_0", f"{inner}.wi_1"), stacked_gate(model), bias=False)
    else:
        first = linear("mlp.linear_fc1", f"{inner}.wi", bias=False)
    return [
        *linear("mlp_norm", f"layer.{position}.layer_norm", bias=False),
        *first,
        *linear("mlp.linear_fc2", f"{inner}.wo", bias=False),
    ]


def to_model(hf: HfConfig, weights: Weights) -> dict[str, Any]:
    """Translate config.json."""
    dropout = hf.get("dropout_rate", 0.1)
    is_tied, is_scaled = _tied_and_scaled(hf, weights)
    return {
        "architecture": "t5",
        "num_layers": hf.same("num_layers", "num_decoder_layers")
        if hf.get("num_decoder_layers", None) is not None
        else hf.integer("num_layers"),
        "hidden_size": hf.integer("d_model"),
        "num_attention_heads": hf.integer("num_heads"),
        "head_dim": hf.integer("d_kv"),
        "ffn_hidden_size": hf.integer("d_ff"),
        "vocab_size": hf.integer("vocab_size"),
        "max_position_embeddings": hf.integer("n_positions", 512),
        "relative_buckets": hf.integer("relative_attention_num_buckets", 32),
        "relative_max_distance": hf.integer("relative_attention_max_distance", 128),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-6),
        "activation": _PROJECTIONS[hf.only("feed_forward_proj", *_PROJECTIONS)],
        "tied_head": is_tied,
        "scaled_logits": is_scaled,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "ffn_dropout": dropout,
    }


def _tied_and_scaled(hf: HfConfig, weights: Weights) -> tuple[bool, bool]:
    says_tied = hf.only("tie_word_embeddings", True, False)
    is_scaled = hf.only("scale_decoder_outputs", True, False, default=says_tied)
    has_head = _HEAD in weights.names
    if not says_tied and not has_head:
        raise ConversionError(f"is missing, and {FILE} says tie_word_embeddings: false", field=_HEAD)
    is_tied = says_tied and (not has_head or torch.equal(weights.read(_HEAD), weights.read(_EMBEDDING)))
    if is_scaled and not is_tied:
        raise ConversionError(
            "differs from the embedding, and scaled logits go with a tied head only in lmscale", field=_HEAD
        )
    return is_tied, is_scaled


def to_hf(model: ModelConfig, ids: Ids) -> dict[str, Any]:
    """Write config.json. The decoder starts with the padding, as in training."""
    known = {key: value for key, value in ids.items() if value is not None}
    return {
        "num_layers": model.num_layers,
        "num_decoder_layers": model.num_layers,
        "d_model": model.hidden_size,
        "num_heads": model.num_attention_heads,
        "d_kv": model.head_size,
        "d_ff": model.ffn_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": their_activation(model, _PROJECTIONS),
        "dropout_rate": model.hidden_dropout,
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tied_head,
        "scale_decoder_outputs": model.scaled_logits,
        "decoder_start_token_id": known.get("pad_token_id", 0),
        **known,
    }


FAMILY = Family(
    model_type="t5",
    architectures=("T5ForConditionalGeneration", "T5Model"),
    prefix="",
    table=table,
    to_model=to_model,
    to_hf=to_hf,
    copies=dict.fromkeys((_HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), _EMBEDDING),
    # Cross-attention has no positions; the published checkpoints carry a table that nothing reads.
    buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
