"""The learning rate and the weight decay as pure functions of the tokens consumed."""

from __future__ import annotations

import math

from lmscale.config.optim import CooldownConfig, CooldownStyle, OptimConfig, RewarmupConfig
from lmscale.errors import ConfigError


def lr_at(consumed_tokens: int, optim: OptimConfig, train_tokens: int) -> float:
    """Compute the rate of the step that ends at `consumed_tokens`.

    With t = consumed_tokens, W = lr_warmup_tokens, D = lr_decay_tokens (or train_tokens), C = lr_cooldown_tokens:

        t <  W        lr * t / W                          (lr_warmup_style constant: lr)
        W <= t < D    min_lr + (lr - min_lr) * shape((t - W) / (D - W))
                      cosine: shape(x) = (1 + cos(pi x)) / 2,  linear: 1 - x,  polynomial: (1 - x)^lr_decay_power,
                      constant: 1
        t >= D        min_lr                              (constant: lr)

        t >= W        max(min_lr, lr * sqrt(W / t))       lr_decay_style inverse_sqrt, which has no D

        W <= t < D-C  lr                                  lr_decay_style wsd (warm-up, stable, decay)
        D-C <= t < D  min_lr + (lr - min_lr) * cooldown((t - D + C) / C)

    Over that lie, where they are asked for: a cooldown from any point S over T tokens, in the place of the schedule from
    S on, with r the schedule's rate at S and e its end_lr (or min_lr); and a re-warm-up from S over T tokens, beginning
    at the fraction f, which multiplies what the others give:

        t > S         e + (r - e) * cooldown((t - S) / T)          e from S + T on
        S < t < S+T   f + (1 - f) (t - S) / T                      1 before and after

    t counts the tokens of the step itself, so the first step's rate is above 0, and the first step at the full rate is
    the one that completes the warm-up: ceil(W / tokens per step), counted from 1. A cooldown from a checkpoint at S
    leaves the steps up to S as they were. D is counted from the start of the run, so the cosine's half period is D - W,
    as in Megatron. The GPT-3 paper says "decay to 10% over 260 billion tokens" without saying from where; with W = 375M
    the two readings are 0.15 % of the period apart. The reference frameworks ask for the rate at the tokens before the
    step and make their first one at rate 0.

    T5's rate at its n-th step, 1 / sqrt(max(n, 10^4)), is inverse_sqrt with lr 0.01, a constant warm-up, and as W the
    tokens of 10^4 steps. With a linear warm-up the same is min(10^-6 n, 1 / sqrt(n)): warmup_init of fairseq's and
    transformers' Adafactor.

    The value lies in [0, lr], from the end of the warm-up on in [min_lr, lr] but for a re-warm-up and an end_lr, and is
    continuous in t where W < D, but for the fall at the begin of a re-warm-up.

    Args:
        consumed_tokens: tokens consumed, those of the step whose rate is asked included.
        optim: peak and final rate, warm-up and decay in tokens, shape.
        train_tokens: tokens of the whole run; the end of the decay where optim.lr_decay_tokens is left out.

    Raises:
        ConfigError: if consumed_tokens is negative.
    Source: Brown et al. 2020, arXiv:2005.14165, appendix B; Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine);
        Raffel et al. 2020, arXiv:1910.10683, sec. 3.1.2 (inverse square root); Hu et al. 2024 (MiniCPM),
        arXiv:2404.06395, sec. 4 (wsd); Hägele et al. 2024, arXiv:2405.18392 (cooldowns from any point, 1 - sqrt).
    """
    if consumed_tokens < 0:
        raise ConfigError("must be at least 0", field="consumed_tokens", value=consumed_tokens)
    rate, cooldown = _scheduled(consumed_tokens, optim, train_tokens), optim.lr_cooldown
    if cooldown is not None and consumed_tokens > cooldown.start_tokens:
        rate = _cooled(consumed_tokens, cooldown, optim, train_tokens)
    return rate if optim.lr_rewarmup is None else rate * _rewarmed(consumed_tokens, optim.lr_rewarmup)


def cooldown_shape(x: float, style: CooldownStyle) -> float:
    """Compute the share of a cooldown's fall that is left at x of its way: 1 at 0, 0 at 1, and falling between.

    linear: 1 - x; cosine: (1 + cos(pi x)) / 2; one_minus_sqrt: 1 - sqrt(x); exponential: 2 / 2^x - 1, Megatron's form of
    MiniCPM's, which reaches its end.
    """
    if style == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    if style == "one_minus_sqrt":
        return 1 - math.sqrt(x)
    return 2 * 0.5**x - 1 if style == "exponential" else 1 - x


def weight_decay_at(consumed_tokens: int, optim: OptimConfig, train_tokens: int) -> float:
    """Compute the weight decay of the step that ends at `consumed_tokens`.

    With a = weight_decay, b = weight_decay_end and x = min(1, consumed_tokens / train_tokens):

        constant  a
        linear    a + (b - a) x
        cosine    a + (b - a) (1 - cos(pi x)) / 2

    Args:
        consumed_tokens: tokens consumed, those of the step included.
        optim: both ends and the style.
        train_tokens: tokens of the whole run.

    Source: as Megatron's OptimizerParamScheduler.get_wd, in tokens.
    """
    begin, end = optim.weight_decay, optim.weight_decay_end
    if optim.weight_decay_style == "constant" or end is None:
        return begin
    x = min(1.0, consumed_tokens / train_tokens)
    return begin + (end - begin) * (x if optim.weight_decay_style == "linear" else (1 - math.cos(math.pi * x)) / 2)


def check_cooldown(optim: OptimConfig, train_tokens: int) -> None:
    """Check that a cooldown from a checkpoint begins above its end.

    Raises:
        ConfigError: if the schedule's rate at its start is at its end already, or below.
    """
    if optim.lr_cooldown is None:
        return
    rate, end = lr_at(optim.lr_cooldown.start_tokens, optim, train_tokens), _end_rate(optim.lr_cooldown, optim)
    if rate <= end:
        raise ConfigError(
            f"the schedule's rate there is {rate:g}, and the cooldown is to end at {end:g}",
            field="optim.lr_cooldown.start_tokens",
            value=optim.lr_cooldown.start_tokens,
            remedy="begin earlier, or lower optim.lr_cooldown.end_lr",
        )


def _scheduled(t: int, optim: OptimConfig, train_tokens: int) -> float:
    """Compute the rate of warm-up and decay alone."""
    warmup_tokens, style = optim.lr_warmup_tokens, optim.lr_decay_style
    if t < warmup_tokens:
        return optim.lr * (t / warmup_tokens if optim.lr_warmup_style == "linear" else 1.0)
    if style == "constant":
        return optim.lr
    if style == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(warmup_tokens / max(1, t)))
    decay_tokens = optim.lr_decay_tokens or train_tokens
    if t >= decay_tokens:
        return optim.min_lr
    begin = warmup_tokens if style != "wsd" else decay_tokens - (optim.lr_cooldown_tokens or 0)
    if t <= begin:
        return optim.lr
    return optim.min_lr + (optim.lr - optim.min_lr) * _shape((t - begin) / (decay_tokens - begin), optim)


def _shape(x: float, optim: OptimConfig) -> float:
    if optim.lr_decay_style == "wsd":
        return cooldown_shape(x, optim.lr_cooldown_style)
    if optim.lr_decay_style == "polynomial":
        return float((1 - x) ** optim.lr_decay_power)
    return cooldown_shape(x, "cosine" if optim.lr_decay_style == "cosine" else "linear")


def _cooled(t: int, cooldown: CooldownConfig, optim: OptimConfig, train_tokens: int) -> float:
    begin, end = _scheduled(cooldown.start_tokens, optim, train_tokens), _end_rate(cooldown, optim)
    x = (t - cooldown.start_tokens) / cooldown.tokens
    return end if x >= 1 else end + (begin - end) * cooldown_shape(x, cooldown.style)


def _end_rate(cooldown: CooldownConfig, optim: OptimConfig) -> float:
    return optim.min_lr if cooldown.end_lr is None else cooldown.end_lr


def _rewarmed(t: int, rewarmup: RewarmupConfig) -> float:
    x = (t - rewarmup.start_tokens) / rewarmup.tokens
    return rewarmup.fraction + (1 - rewarmup.fraction) * x if 0 < x < 1 else 1.0
