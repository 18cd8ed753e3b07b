"""The parameters of a model by name and shape, whatever the layout, without building it."""

from __future__ import annotations

from collections.abc import Iterator

from lmscale.config.model import ModelConfig

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def parameter_shapes(model: ModelConfig, padded: bool = True) -> dict[str, Shape]:
    """List the logical names and shapes of a model's parameters, as checkpoints hold them; tied ones once.

    Args:
        model: the architecture.
        padded: count the rows of padding of vocabulary-sized tensors, which checkpoints and memory hold.
    """
    vocab_size = model.padded_vocab_size if padded else model.vocab_size
    shapes: dict[str, Shape] = {"word_embedding.table.weight": (vocab_size, model.hidden_size)}
    stacks = ("encoder_", "decoder_") if model.has_decoder_stack else ("",)
    for stack in stacks:
        shapes |= _embedding(model, "input_embedding" if not stack else f"{stack}embedding")
        if model.position_embedding == "relative":
            shapes[f"{stack}relative_bias.table"] = (model.num_attention_heads, model.relative_buckets)
        layer = dict(_layer(model, is_fed=stack == "decoder_"))
        for index in range(model.num_layers):
            shapes |= {f"{stack}layers.{index}.{name}": shape for name, shape in layer.items()}
        if model.norm_position == "pre":
            shapes |= _norm(model, "encoder_norm.norm" if stack == "encoder_" else "final_norm.norm")
    return shapes | dict(_head(model, vocab_size))


def fused_rows(model: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """Return the rows of each matrix that a tensor holds: queries, keys and values; keys and values; gate and up.

    Args:
        model: the architecture.
        name: its logical name.
        rows: its rows.
    """
    kv_width = model.query_groups * model.head_size
    if name.endswith("attention.linear_qkv.weight"):
        return model.num_attention_heads * model.head_size, kv_width, kv_width
    if name.endswith("cross_attention.linear_kv.weight"):
        return kv_width, kv_width
    return (model.ffn_size,) * 2 if model.is_gated and name.endswith("mlp.linear_fc1.weight") else (rows,)


def is_layer_matrix(name: str, num_dims: int) -> bool:
    """Tell whether a parameter is a matrix of a transformer layer: no embedding, head, norm or bias.

    Args:
        name: its logical name.
        num_dims: its dimensions.
    """
    return num_dims == 2 and name.startswith(("layers.", "encoder_layers.", "decoder_layers."))


def _embedding(model: ModelConfig, name: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    if model.position_embedding == "learned":
        shapes[f"{name}.positions"] = (model.max_position_embeddings + model.position_offset, model.hidden_size)
    if model.token_types:
        shapes[f"{name}.token_types"] = (model.token_types, model.hidden_size)
    return shapes | (_norm(model, f"{name}.norm") if model.embedding_norm else {})


def _layer(model: ModelConfig, is_fed: bool) -> Named:
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_size
    kv_width, inputs = model.query_groups * model.head_size, 2 if model.is_gated else 1
    bias = model.linear_bias
    yield from _norm(model, "attention_norm").items()
    yield from _linear("attention.linear_qkv", width + 2 * kv_width, hidden, bias)
    yield from _linear("attention.linear_proj", hidden, width, bias)
    if is_fed:
        yield from _norm(model, "cross_attention_norm").items()
        yield from _linear("cross_attention.linear_q", width, hidden, bias)
        yield from _linear("cross_attention.linear_kv", 2 * kv_width, hidden, bias)
        yield from _linear("cross_attention.linear_proj", hidden, width, bias)
    yield from _norm(model, "mlp_norm").items()
    yield from _linear("mlp.linear_fc1", inputs * model.ffn_size, hidden, bias)
    yield from _linear("mlp.linear_fc2", hidden, model.ffn_size, bias)


def _head(model: ModelConfig, vocab_size: int) -> Named:
    hidden = model.hidden_size
    if not model.tied_head:
        yield "head.table.weight", (vocab_size, hidden)
    if not model.is_encoder_only:
        return
    yield from _linear("masked_head.dense", hidden, hidden, bias=True)
    yield from _norm(model, "masked_head.norm").items()
    if model.next_sentence_head:
        yield from _linear("masked_head.pooler", hidden, hidden, bias=True)
        yield from _linear("masked_head.next_sentence", 2, hidden, bias=True)
    yield "output_bias.bias", (vocab_size,)


def _norm(model: ModelConfig, name: str) -> dict[str, Shape]:
    kinds = ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (model.hidden_size,) for kind in kinds}


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)
