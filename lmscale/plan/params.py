"""The number of parameters of a model, exactly, by kind."""

from __future__ import annotations

from lmscale.config.model import ModelConfig


def parameter_table(model: ModelConfig, padded: bool = False) -> dict[str, int]:
    """Count the parameters of the whole model, over all ranks, by kind.

    With L layers, h hidden, f ffn, n heads, g query groups, d head dim, V vocabulary, P positions, T token types, and
    c = 2 for layernorm (weight, bias), 1 for rmsnorm; S = 2 stacks in bart and t5, else 1; D = 1 with a decoder that an
    encoder feeds, else 0:

        embedding   V h
        positions   S (P + offset) h with learned positions, T h; S n buckets with relative ones
        attention   S L (h (n + 2 g) d + n d h)          + S L ((n + 2 g) d + h) with linear_bias
                    and D L (4 n d h)                    + D L (3 n d + h) with linear_bias
        mlp         S L 2 h f, gated: S L 3 h f          + S L (f + h), gated: S L (2 f + h), with linear_bias
        norms       ((2 S + D) L + S) c h, post-norm: (2 S + D) L c h; + S c h with embedding_norm
        head        untied: V h; bert and roberta: h^2 + h + c h + V; next_sentence_head: h^2 + h + 2 h + 2

    Args:
        model: the architecture.
        padded: count the rows of padding of the embedding and the head, which checkpoints and memory hold; published
            sizes leave them out.

    Returns:
        A dictionary of the six kinds, in the order above.
    """
    vocab_size = model.padded_vocab_size if padded else model.vocab_size
    stacks = 2 if model.has_decoder_stack else 1
    cross = _cross_attention_parameters(model) if model.has_decoder_stack else 0
    return {
        "embedding": vocab_size * model.hidden_size,
        "positions": stacks * _position_parameters(model) + model.token_types * model.hidden_size,
        "attention": model.num_layers * (stacks * _attention_parameters(model) + cross),
        "mlp": stacks * model.num_layers * _mlp_parameters(model),
        "norms": _num_norms(model) * _norm_parameters(model),
        "head": _head_parameters(model, vocab_size),
    }


def num_parameters(model: ModelConfig, padded: bool = False) -> int:
    """Count the parameters of the whole model: the sum of `parameter_table`."""
    return sum(parameter_table(model, padded).values())


def _position_parameters(model: ModelConfig) -> int:
    """Count one stack's."""
    if model.position_embedding == "learned":
        return (model.max_position_embeddings + model.position_offset) * model.hidden_size
    return model.num_attention_heads * model.relative_buckets if model.position_embedding == "relative" else 0


def _num_norms(model: ModelConfig) -> int:
    stacks, fed = (2, 1) if model.has_decoder_stack else (1, 0)
    in_layers = (2 * stacks + fed) * model.num_layers
    return in_layers + (stacks if model.norm_position == "pre" else 0) + (stacks if model.embedding_norm else 0)


def _head_parameters(model: ModelConfig, vocab_size: int) -> int:
    hidden = model.hidden_size
    total = 0 if model.tied_head else vocab_size * hidden
    if model.is_encoder_only:
        total += hidden * hidden + hidden + _norm_parameters(model) + vocab_size
    if model.next_sentence_head:
        total += hidden * hidden + hidden + 2 * hidden + 2
    return total


def _cross_attention_parameters(model: ModelConfig) -> int:
    width = model.num_attention_heads * model.head_size
    return 4 * width * model.hidden_size + (3 * width + model.hidden_size if model.linear_bias else 0)


def _attention_parameters(model: ModelConfig) -> int:
    query_width = model.num_attention_heads * model.head_size
    qkv_width = query_width + 2 * model.query_groups * model.head_size
    biases = qkv_width + model.hidden_size if model.linear_bias else 0
    return model.hidden_size * (qkv_width + query_width) + biases


def _mlp_parameters(model: ModelConfig) -> int:
    input_width = 2 * model.ffn_size if model.is_gated else model.ffn_size
    biases = input_width + model.hidden_size if model.linear_bias else 0
    return model.hidden_size * (input_width + model.ffn_size) + biases


def _norm_parameters(model: ModelConfig) -> int:
    return (2 if model.normalization == "layernorm" else 1) * model.hidden_size
