"""Floating-point operations of training, for MFU, HFU and the planner's times.

Matrix multiplications only (norms, activations, softmax and biases are below 1 % of a large model); a multiplication
and an addition count as two. A backward pass costs two forward passes: one for the inputs' gradients, one for the
weights'.
"""

from __future__ import annotations

from typing import Literal

from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError


def forward_flops_per_token(
    model: ModelConfig, length: int | SampleLengths, causal_half: bool = False, *, prefix_length: int = 0
) -> dict[str, int]:
    """Count the FLOPs of one forward pass per token, by kind.

    With L layers, h hidden, f ffn, n heads, g query groups, d head dim, V vocabulary, s sequence:

        projections   2 L (h (n + 2 g) d + n d h)     query, key, value, output; g < n is grouped-query attention
        core          4 L n d s                       Q K^T and probabilities V, every query with all s keys;
                                                      each of the n heads, whatever g is; 2 L n d s with causal_half
        mlp           4 L h f, gated: 6 L h f
        head          2 h V                           tied or not: the multiplication is the same
        embedding     none: a look-up

    Encoder-only models make logits of the l predicted tokens alone: head (2 h V + 2 h^2) l / s. In bart and t5, with e
    tokens in the encoder and q in the decoder, both stacks count as above, each over its own length; cross attention
    adds L (4 h n d (q + e) + 4 n d q e); and the sum is divided by the sample's e + q tokens. The p keys and values of a
    trained prefix add 4 L n d p to the core, 4 L n d p (e + 2 q) / (e + q) in bart and t5; a network that makes them while
    they are trained does so once a micro batch, and is left out.

    Args:
        model: the architecture. V is its vocab_size: rows of padding are no work of the model's.
        length: tokens of a sample, or the lengths of a sample of any architecture.
        causal_half: count causal core attention as half of the square, which is what a kernel that skips the masked half
            computes (exactly (s + 1) / 2 keys a query, taken as s / 2). The field's convention, and the default here, is
            the full square, so that figures compare: PaLM and Megatron count it so.
        prefix_length: trained keys in front of every attention's, p.

    Raises:
        ConfigError: if the length is not above 0.
    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix; Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, app. B.
    """
    lengths = SampleLengths(length + 1, length, 0, length) if isinstance(length, int) else length
    if lengths.nominal <= 0:
        raise ConfigError("must be above 0", field="seq_length", value=lengths.nominal)
    hidden, encoder, decoder = model.hidden_size, lengths.encoder, lengths.decoder
    width = model.num_attention_heads * model.head_size
    half = 2 if causal_half else 1
    totals = {
        "projections": 2 * hidden * (2 * width + 2 * model.query_groups * model.head_size) * lengths.nominal,
        "core": 4 * width * encoder * encoder // (half if model.architecture == "gpt" else 1),
        "mlp": 2 * hidden * model.ffn_size * (3 if model.is_gated else 2) * lengths.nominal,
    }
    if decoder:
        totals["projections"] += 4 * hidden * width * (encoder + decoder)
        totals["core"] += 4 * width * decoder * decoder // half + 4 * width * encoder * decoder
    totals["core"] += 4 * width * prefix_length * (encoder + 2 * decoder)
    totals = {kind: model.num_layers * flops for kind, flops in totals.items()}
    transform = 2 * hidden * hidden if model.is_encoder_only else 0
    totals["head"] = (2 * hidden * model.vocab_size + transform) * lengths.labels
    return {kind: flops // lengths.nominal for kind, flops in totals.items()}


def model_flops_per_token(
    model: ModelConfig, length: int | SampleLengths, causal_half: bool = False, *, prefix_length: int = 0
) -> int:
    """Count the FLOPs that training one token needs, whatever the implementation does: the numerator of MFU.

        3 * sum(forward_flops_per_token)

    For GPT-3's shape (f = 4 h, n d = h, g = n) that is 72 L h^2 (1 + s / (6 h) + V / (12 h L)), Megatron's formula; and
    6 N + 12 L h s with N the parameters in matrices, PaLM's.

    Args and Raises: as of `forward_flops_per_token`.
    """
    return 3 * sum(forward_flops_per_token(model, length, causal_half, prefix_length=prefix_length).values())


def hardware_flops_per_token(
    model: ModelConfig,
    length: int | SampleLengths,
    recompute: Literal["none", "selective", "full"] = "none",
    causal_half: bool = False,
    kernel_keeps_scores: bool = False,
    *,
    prefix_length: int = 0,
) -> int:
    """Count the FLOPs that training one token executes, recomputation included: the numerator of HFU.

        model_flops_per_token + recomputed,
        recomputed = none: 0, full: projections + core + mlp, selective: core where the kernel keeps scores, else 0

    full runs each layer's forward once more (the head and the loss are outside the layers). selective repeats an
    activation function, which is no matrix multiplication, and the core attention only where its kernel keeps the
    scores. What a flash kernel recomputes inside its own backward is not counted, by the field's convention.

    Args:
        model: the architecture.
        length: tokens of a sample, or the lengths of a sample of any architecture.
        recompute: parallel.recompute.
        causal_half: as of `forward_flops_per_token`.
        kernel_keeps_scores: the core attention is unfused and keeps its scores and probabilities.
        prefix_length: as of `forward_flops_per_token`.
    """
    forward = forward_flops_per_token(model, length, causal_half, prefix_length=prefix_length)
    recomputed = 0
    if recompute == "full":
        recomputed = forward["projections"] + forward["core"] + forward["mlp"]
    elif recompute == "selective" and kernel_keeps_scores:
        recomputed = forward["core"]
    return 3 * sum(forward.values()) + recomputed
