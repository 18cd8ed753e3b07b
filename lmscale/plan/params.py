"""The number of parameters of a model, exactly, by kind."""

from __future__ import annotations

from lmscale.config.model import ModelConfig


def parameter_table(model: ModelConfig, padded: bool = False) -> dict[str, int]:
    """Count the parameters of the whole model, over all ranks, by kind.

    With L layers, h hidden, f ffn, n heads, g query groups, d head dim, V vocabulary, P positions, and c = 2 for
    layernorm (weight, bias), 1 for rmsnorm:

        embedding   V h
        positions   P h                                  learned positions only
        attention   L (h (n + 2 g) d + n d h)            + L ((n + 2 g) d + h) with linear_bias
        mlp         L 2 h f, swiglu: L 3 h f             + L (f + h),  swiglu: L (2 f + h), with linear_bias
        norms       (2 L + 1) c h
        head        V h, tied: 0

    Args:
        model: the architecture.
        padded: count the rows of padding of the embedding and the head, which checkpoints and memory hold; published
            sizes leave them out.

    Returns:
        A dictionary of the six kinds, in the order above.
    """
    vocab_size = model.padded_vocab_size if padded else model.vocab_size
    embedding = vocab_size * model.hidden_size
    has_positions = model.position_embedding == "learned"
    return {
        "embedding": embedding,
        "positions": model.max_position_embeddings * model.hidden_size if has_positions else 0,
        "attention": model.num_layers * _attention_parameters(model),
        "mlp": model.num_layers * _mlp_parameters(model),
        "norms": (2 * model.num_layers + 1) * _norm_parameters(model),
        "head": 0 if model.tied_head else embedding,
    }


def num_parameters(model: ModelConfig, padded: bool = False) -> int:
    """Count the parameters of the whole model: the sum of `parameter_table`."""
    return sum(parameter_table(model, padded).values())


def _attention_parameters(model: ModelConfig) -> int:
    query_width = model.num_attention_heads * model.head_size
    qkv_width = query_width + 2 * model.query_groups * model.head_size
    biases = qkv_width + model.hidden_size if model.linear_bias else 0
    return model.hidden_size * (qkv_width + query_width) + biases


def _mlp_parameters(model: ModelConfig) -> int:
    input_width = 2 * model.ffn_size if model.activation == "swiglu" else model.ffn_size
    biases = input_width + model.hidden_size if model.linear_bias else 0
    return model.hidden_size * (input_width + model.ffn_size) + biases


def _norm_parameters(model: ModelConfig) -> int:
    return (2 if model.normalization == "layernorm" else 1) * model.hidden_size
