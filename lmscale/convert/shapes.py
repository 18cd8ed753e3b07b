"""The shape of each of our tensors, from its name and the model's config: what both directions are checked against."""

from __future__ import annotations

from lmscale.config.model import ModelConfig

Shape = tuple[int, ...]


def logical_shape(model: ModelConfig, name: str) -> Shape:
    """Compute the shape of a logical tensor.

    Args:
        model: the architecture.
        name: as in checkpoints: "layers.0.attention.linear_qkv.weight".

    Raises:
        KeyError: if no model of ours has such a tensor.
    """
    owner, _, kind = name.rpartition(".")
    part, hidden = owner.rpartition(".")[2], model.hidden_size
    if kind in ("positions", "token_types") or (kind == "table" and part.endswith("relative_bias")):
        return {
            "positions": (model.max_position_embeddings + model.position_offset, hidden),
            "token_types": (model.token_types, hidden),
            "table": (model.num_attention_heads, model.relative_buckets),
        }[kind]
    if part == "norm" or part.endswith("_norm"):
        return (hidden,)
    rows = _rows(model)[part]
    return (rows, _columns(model).get(part, hidden)) if kind == "weight" else (rows,)


def _rows(model: ModelConfig) -> dict[str, int]:
    heads, groups, width = model.num_attention_heads, model.query_groups, model.head_size
    return {
        "table": model.padded_vocab_size,
        "output_bias": model.padded_vocab_size,
        "linear_qkv": (heads + 2 * groups) * width,
        "linear_q": heads * width,
        "linear_kv": 2 * groups * width,
        "linear_proj": model.hidden_size,
        "linear_fc1": (2 if model.is_gated else 1) * model.ffn_size,
        "linear_fc2": model.hidden_size,
        "dense": model.hidden_size,
        "pooler": model.hidden_size,
        "next_sentence": 2,
    }


def _columns(model: ModelConfig) -> dict[str, int]:
    return {"linear_proj": model.num_attention_heads * model.head_size, "linear_fc2": model.ffn_size}
