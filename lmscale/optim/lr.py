"""The learning rate as a pure function of the tokens consumed."""

from __future__ import annotations

import math

from lmscale.config.optim import OptimConfig
from lmscale.errors import ConfigError


def lr_at(consumed_tokens: int, optim: OptimConfig, train_tokens: int) -> float:
    """Compute the rate of the step that ends at `consumed_tokens`.

    With t = consumed_tokens, W = lr_warmup_tokens, D = lr_decay_tokens (or train_tokens):

        t <  W        lr * t / W                          (lr_warmup_style constant: lr)
        W <= t < D    min_lr + (lr - min_lr) * shape((t - W) / (D - W))
                      cosine: shape(x) = (1 + cos(pi x)) / 2,  linear: shape(x) = 1 - x,  constant: shape(x) = 1
        t >= D        min_lr                              (constant: lr)

        t >= W        max(min_lr, lr * sqrt(W / t))       lr_decay_style inverse_sqrt, which has no D

    t counts the tokens of the step itself, so the first step's rate is above 0, and the first step at the full rate is
    the one that completes the warm-up: ceil(W / tokens per step), counted from 1. D is counted from the start of the
    run, so the cosine's half period is D - W, as in Megatron. The GPT-3 paper says "decay to 10% over 260 billion
    tokens" without saying from where; with W = 375M the two readings are 0.15 % of the period apart. The reference
    frameworks ask for the rate at the tokens before the step and make their first one at rate 0.

    T5's rate at its n-th step, 1 / sqrt(max(n, 10^4)), is inverse_sqrt with lr 0.01, a constant warm-up, and as W the
    tokens of 10^4 steps.

    The value lies in [0, lr], from the end of the warm-up on in [min_lr, lr], and is continuous in t where W < D.

    Args:
        consumed_tokens: tokens consumed, those of the step whose rate is asked included.
        optim: peak and final rate, warm-up and decay in tokens, shape.
        train_tokens: tokens of the whole run; the end of the decay where optim.lr_decay_tokens is left out.

    Raises:
        ConfigError: if consumed_tokens is negative.
    Source: Brown et al. 2020, arXiv:2005.14165, appendix B; Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine);
        Raffel et al. 2020, arXiv:1910.10683, sec. 3.1.2 (inverse square root).
    """
    if consumed_tokens < 0:
        raise ConfigError("must be at least 0", field="consumed_tokens", value=consumed_tokens)
    warmup_tokens = optim.lr_warmup_tokens
    if consumed_tokens < warmup_tokens:
        return optim.lr * (consumed_tokens / warmup_tokens if optim.lr_warmup_style == "linear" else 1.0)
    if optim.lr_decay_style == "constant":
        return optim.lr
    if optim.lr_decay_style == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(warmup_tokens / max(1, consumed_tokens)))
    decay_tokens = optim.lr_decay_tokens or train_tokens
    if consumed_tokens >= decay_tokens:
        return optim.min_lr
    fraction = (consumed_tokens - warmup_tokens) / (decay_tokens - warmup_tokens)
    shape = (1 + math.cos(math.pi * fraction)) / 2 if optim.lr_decay_style == "cosine" else 1 - fraction
    return optim.min_lr + (optim.lr - optim.min_lr) * shape
