"""BERT: post-norm encoder, the masked-token head, and with it the pooler and the next-sentence classifier."""

from __future__ import annotations

from typing import Any

from lmscale.config.model import ModelConfig
from lmscale.convert.family import Family, Ids, Weights
from lmscale.convert.hf_config import HfConfig, their_activation
from lmscale.convert.mapping import Entry, entry, grouped_qkv, linear, padded_vocabulary, repeat

_CLASSIFIER = "cls.seq_relationship"


def encoder_layers(model: ModelConfig, theirs: str) -> list[Entry]:
    """List the tensors of the layers, which RoBERTa shares."""
    attention = [f"attention.self.{part}" for part in ("query", "key", "value")]
    layer = [
        *linear("attention.linear_qkv", attention, grouped_qkv(model)),
        *linear("attention.linear_proj", "attention.output.dense"),
        *linear("attention_norm", "attention.output.LayerNorm"),
        *linear("mlp.linear_fc1", "intermediate.dense"),
        *linear("mlp.linear_fc2", "output.dense"),
        *linear("mlp_norm", "output.LayerNorm"),
    ]
    return repeat(layer, model.num_layers, "layers.{}", theirs)


def table(model: ModelConfig, hf: HfConfig) -> list[Entry]:
    """List the tensors."""
    pair = [*linear("masked_head.pooler", "bert.pooler.dense"), *linear("masked_head.next_sentence", _CLASSIFIER)]
    return [
        entry("word_embedding.table.weight", "bert.embeddings.word_embeddings.weight", padded_vocabulary(model)),
        entry("input_embedding.positions", "bert.embeddings.position_embeddings.weight"),
        entry("input_embedding.token_types", "bert.embeddings.token_type_embeddings.weight"),
        *linear("input_embedding.norm", "bert.embeddings.LayerNorm"),
        *encoder_layers(model, "bert.encoder.layer.{}"),
        *linear("masked_head.dense", "cls.predictions.transform.dense"),
        *linear("masked_head.norm", "cls.predictions.transform.LayerNorm"),
        entry("output_bias.bias", "cls.predictions.bias", padded_vocabulary(model)),
        *(pair if model.next_sentence_head else []),
    ]


def encoder_to_model(hf: HfConfig) -> dict[str, Any]:
    """Translate the keys of config.json that RoBERTa shares."""
    hf.only("position_embedding_type", "absolute")
    hf.only("is_decoder", False)
    hf.only("add_cross_attention", False)
    return {
        "num_layers": hf.integer("num_hidden_layers"),
        "hidden_size": hf.integer("hidden_size"),
        "num_attention_heads": hf.integer("num_attention_heads"),
        "ffn_hidden_size": hf.integer("intermediate_size"),
        "vocab_size": hf.integer("vocab_size"),
        "token_types": hf.integer("type_vocab_size", 2),
        "norm_eps": hf.get("layer_norm_eps", 1e-12),
        "hidden_dropout": hf.get("hidden_dropout_prob", 0.1),
        "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
        "init": {"std": hf.get("initializer_range", 0.02)},
    }


def to_model(hf: HfConfig, weights: Weights) -> dict[str, Any]:
    """Translate config.json. Whether there is a next-sentence classifier the weights tell, not `architectures`."""
    return {
        "architecture": "bert",
        **encoder_to_model(hf),
        "max_position_embeddings": hf.integer("max_position_embeddings", 512),
        "activation": hf.activation("hidden_act", "gelu"),
        "next_sentence_head": f"{_CLASSIFIER}.weight" in weights.names,
    }


def encoder_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of config.json that RoBERTa shares."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": their_activation(model),
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "initializer_range": model.init.std,
        "tie_word_embeddings": True,
    }


def to_hf(model: ModelConfig, ids: Ids) -> dict[str, Any]:
    """Write config.json."""
    return {
        "architectures": ["BertForPreTraining" if model.next_sentence_head else "BertForMaskedLM"],
        **encoder_to_hf(model),
        "max_position_embeddings": model.max_position_embeddings,
        **ids,
    }


FAMILY = Family(
    model_type="bert",
    architectures=("BertForPreTraining", "BertForMaskedLM"),
    prefix="bert.",
    table=table,
    to_model=to_model,
    to_hf=to_hf,
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    buffers=(r"bert\.embeddings\.(position_ids|token_type_ids)",),
    left_out=(r"bert\.pooler\.dense\.(weight|bias)",),
    generates=False,
)
