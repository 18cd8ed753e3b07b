"""Floating-point operations of training, for MFU, HFU and the planner's times.

Matrix multiplications only (norms, activations, softmax and biases are below 1 % of a large model); a multiplication
and an addition count as two. A backward pass costs two forward passes: one for the inputs' gradients, one for the
weights'.
"""

from __future__ import annotations

from typing import Literal

from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError


def forward_flops_per_token(model: ModelConfig, seq_length: int, causal_half: bool = False) -> dict[str, int]:
    """Count the FLOPs of one forward pass per token, by kind.

    With L layers, h hidden, f ffn, n heads, g query groups, d head dim, V vocabulary, s sequence:

        projections   2 L (h (n + 2 g) d + n d h)     query, key, value, output; g < n is grouped-query attention
        core          4 L n d s                       Q K^T and probabilities V, every query with all s keys;
                                                      each of the n heads, whatever g is; 2 L n d s with causal_half
        mlp           4 L h f, swiglu: 6 L h f
        head          2 h V                           tied or not: the multiplication is the same
        embedding     none: a look-up

    Args:
        model: the architecture. V is its vocab_size: rows of padding are no work of the model's.
        seq_length: tokens of a sample.
        causal_half: count a causal model's core attention as half of the square, which is what a kernel that skips
            the masked half computes (exactly (s + 1) / 2 keys a query, taken as s / 2). The field's convention, and
            the default here, is the full square, so that figures compare: PaLM and Megatron count it so.

    Raises:
        ConfigError: if seq_length is not above 0.
    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix; Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, app. B.
    """
    if seq_length <= 0:
        raise ConfigError("must be above 0", field="seq_length", value=seq_length)
    hidden, layers = model.hidden_size, model.num_layers
    query_width = model.num_attention_heads * model.head_size
    kv_width = model.query_groups * model.head_size
    mlp_matrices = 3 if model.activation == "swiglu" else 2
    core = 4 * query_width * seq_length
    return {
        "projections": layers * 2 * hidden * (2 * query_width + 2 * kv_width),
        "core": layers * (core // 2 if causal_half else core),
        "mlp": layers * 2 * hidden * model.ffn_size * mlp_matrices,
        "head": 2 * hidden * model.vocab_size,
    }


def model_flops_per_token(model: ModelConfig, seq_length: int, causal_half: bool = False) -> int:
    """Count the FLOPs that training one token needs, whatever the implementation does: the numerator of MFU.

        3 * sum(forward_flops_per_token)

    For GPT-3's shape (f = 4 h, n d = h, g = n) that is 72 L h^2 (1 + s / (6 h) + V / (12 h L)), Megatron's formula; and
    6 N + 12 L h s with N the parameters in matrices, PaLM's.

    Args and Raises: as of `forward_flops_per_token`.
    """
    return 3 * sum(forward_flops_per_token(model, seq_length, causal_half).values())


def hardware_flops_per_token(
    model: ModelConfig,
    seq_length: int,
    recompute: Literal["none", "selective", "full"] = "none",
    causal_half: bool = False,
    kernel_keeps_scores: bool = False,
) -> int:
    """Count the FLOPs that training one token executes, recomputation included: the numerator of HFU.

        model_flops_per_token + recomputed,
        recomputed = none: 0, full: projections + core + mlp, selective: core where the kernel keeps scores, else 0

    full runs each layer's forward once more (the head and the loss are outside the layers). selective repeats an
    activation function, which is no matrix multiplication, and the core attention only where its kernel keeps the
    scores. What a flash kernel recomputes inside its own backward is not counted, by the field's convention.

    Args:
        model: the architecture.
        seq_length: tokens of a sample.
        recompute: parallel.recompute.
        causal_half: as of `forward_flops_per_token`.
        kernel_keeps_scores: the core attention is unfused and keeps its scores and probabilities.
    """
    forward = forward_flops_per_token(model, seq_length, causal_half)
    recomputed = 0
    if recompute == "full":
        recomputed = forward["projections"] + forward["core"] + forward["mlp"]
    elif recompute == "selective" and kernel_keeps_scores:
        recomputed = forward["core"]
    return 3 * sum(forward.values()) + recomputed
