"""GPT-2. Its linear layers are Conv1D, which keep [in, out]; query, key and value are one of them."""

from __future__ import annotations

from typing import Any

from lmscale.config.model import ModelConfig
from lmscale.convert.family import Family, Ids, Weights
from lmscale.convert.hf_config import HfConfig, their_activation
from lmscale.convert.mapping import Cut, Entry, Transpose, entry, grouped_qkv, linear, padded_vocabulary, repeat

CONV1D = Transpose()


def table(model: ModelConfig, hf: HfConfig) -> list[Entry]:
    """List the tensors."""
    layer = [
        *linear("attention_norm", "ln_1"),
        *linear("attention.linear_qkv", "attn.c_attn", CONV1D, Cut(3), grouped_qkv(model)),
        *linear("attention.linear_proj", "attn.c_proj", CONV1D),
        *linear("mlp_norm", "ln_2"),
        *linear("mlp.linear_fc1", "mlp.c_fc", CONV1D),
        *linear("mlp.linear_fc2", "mlp.c_proj", CONV1D),
    ]
    head = [] if model.tied_head else [entry("head.table.weight", "lm_head.weight", padded_vocabulary(model))]
    return [
        entry("word_embedding.table.weight", "transformer.wte.weight", padded_vocabulary(model)),
        entry("input_embedding.positions", "transformer.wpe.weight"),
        *repeat(layer, model.num_layers, "layers.{}", "transformer.h.{}"),
        *linear("final_norm.norm", "transformer.ln_f"),
        *head,
    ]


def to_model(hf: HfConfig, weights: Weights) -> dict[str, Any]:
    """Translate config.json."""
    for key, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        hf.only(key, wanted)
    hidden_size = hf.integer("n_embd")
    return {
        "architecture": "gpt",
        "num_layers": hf.integer("n_layer"),
        "hidden_size": hidden_size,
        "num_attention_heads": hf.integer("n_head"),
        "ffn_hidden_size": hf.get("n_inner", None) or 4 * hidden_size,
        "vocab_size": hf.integer("vocab_size"),
        "max_position_embeddings": hf.integer("n_positions", hf.get("n_ctx", 1024)),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": hf.activation("activation_function", "gelu_new"),
        "tied_head": hf.only("tie_word_embeddings", True, False),
        "hidden_dropout": hf.get("resid_pdrop", 0.1),
        "attention_dropout": hf.get("attn_pdrop", 0.1),
        "init": {"std": hf.get("initializer_range", 0.02)},
    }


def to_hf(model: ModelConfig, ids: Ids) -> dict[str, Any]:
    """Write config.json."""
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": None if model.ffn_size == 4 * model.hidden_size else model.ffn_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": their_activation(model),
        "tie_word_embeddings": model.tied_head,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init.std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        **ids,
    }


FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    table=table,
    to_model=to_model,
    to_hf=to_hf,
    copies={"lm_head.weight": "transformer.wte.weight"},
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
