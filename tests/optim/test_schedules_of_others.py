"""Rates and weight decay against megatron-core's scheduler and transformers', point by point."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmscale.config.optim import OptimConfig
from lmscale.optim.lr import lr_at, weight_decay_at

LR, MIN_LR, WARMUP, DECAY, COOLDOWN, STEP = 3.0e-3, 2.0e-4, 1_000, 20_000, 6_000, 125
"""The tokens of a step are STEP; the reference frameworks' rate at n steps done is ours at n x STEP tokens."""
POINTS = range(0, 25_000, STEP)


def ours(style: str, **more: Any) -> OptimConfig:
    decay = {} if style == "inverse_sqrt" else {"lr_decay_tokens": DECAY}
    return OptimConfig(
        **{"lr": LR, "min_lr": MIN_LR, "lr_warmup_tokens": WARMUP, "lr_decay_style": style, **decay, **more}
    )


def of_megatron(
    style: str, cooldown_style: str | None = None, weight_decay: tuple[float, float, str] = (0, 0, "linear")
):
    """Walk megatron-core's scheduler, its counter in tokens, and return (rate, weight decay) at each point."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group: dict[str, float] = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        **{"init_lr": 0.0, "max_lr": LR, "min_lr": MIN_LR, "lr_warmup_steps": WARMUP, "lr_decay_steps": DECAY},
        **{"lr_decay_style": style, "wsd_decay_steps": COOLDOWN, "lr_wsd_decay_style": cooldown_style},
        **{"start_wd": weight_decay[0], "end_wd": weight_decay[1], "wd_incr_style": weight_decay[2]},
        wd_incr_steps=DECAY,
    )
    found = []
    for _ in POINTS:
        found.append((group["lr"], group["weight_decay"]))
        scheduler.step(STEP)
    return found


@pytest.mark.parametrize(
    ("style", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("inverse_sqrt", "inverse-square-root")]
)
def test_decays_are_megatrons(style: str, theirs: str) -> None:
    # Beyond its decay Megatron sets even the inverse root to the minimum; ours has no end.
    points = [t for t in POINTS if t <= DECAY or style != "inverse_sqrt"]
    expected = [rate for rate, _ in of_megatron(theirs)][: len(points)]
    assert [lr_at(t, ours(style), DECAY) for t in points] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "theirs"),
    [
        ("linear", "linear"),
        ("cosine", "cosine"),
        ("exponential", "exponential"),
        ("one_minus_sqrt", "minus_sqrt"),
    ],
)
def test_warmup_stable_decay_is_megatrons(style: str, theirs: str) -> None:
    optim = ours("wsd", lr_cooldown_tokens=COOLDOWN, lr_cooldown_style=style)
    expected = [rate for rate, _ in of_megatron("WSD", theirs)]
    assert [lr_at(t, optim, DECAY) for t in POINTS] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_grows_as_megatrons(style: str) -> None:
    optim = ours("cosine", weight_decay=0.05, weight_decay_end=0.3, weight_decay_style=style)
    expected = [decay for _, decay in of_megatron("cosine", weight_decay=(0.05, 0.3, style))]
    assert [weight_decay_at(t, optim, DECAY) for t in POINTS] == pytest.approx(expected, rel=1e-12)


def test_weight_decay_falls_where_its_end_is_lower() -> None:
    optim = ours("cosine", weight_decay=0.4, weight_decay_end=0.0, weight_decay_style="linear")
    assert [weight_decay_at(t, optim, 1000) for t in (0, 250, 1000, 2000)] == pytest.approx([0.4, 0.3, 0.0, 0.0])
    assert weight_decay_at(500, ours("cosine", weight_decay=0.4), 1000) == 0.4


@pytest.mark.parametrize(
    ("optim", "name", "arguments"),
    [
        (ours("linear", min_lr=0.0), "get_linear_schedule_with_warmup", {}),
        (ours("cosine", min_lr=0.0), "get_cosine_schedule_with_warmup", {}),
        (ours("polynomial", lr_decay_power=2.5), "get_polynomial_decay_schedule_with_warmup", {"lr_end": MIN_LR, "power": 2.5}),
        (ours("polynomial"), "get_polynomial_decay_schedule_with_warmup", {"lr_end": MIN_LR, "power": 1.0}),
        *(
            (
                ours("wsd", min_lr=0.0, lr_cooldown_tokens=COOLDOWN, lr_cooldown_style=style),
                "get_wsd_schedule",
                {"num_decay_steps": COOLDOWN // STEP, "decay_type": theirs},
            )
            for style, theirs in (("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt"))
        ),
    ],
    ids=lambda value: value.lr_decay_style if isinstance(value, OptimConfig) else str(value)[:60],
)  # fmt: skip
def test_schedules_are_those_of_transformers(optim: OptimConfig, name: str, arguments: dict[str, Any]) -> None:
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    counts = {"num_warmup_steps": WARMUP // STEP, "num_training_steps": DECAY // STEP}
    factor = getattr(transformers, name)(optimizer, **counts, **arguments).lr_lambdas[0]
    points = [t for t in POINTS if t <= DECAY]  # beyond, their cosine rises again
    expected = [LR * factor(t // STEP) for t in points]
    assert [lr_at(t, optim, DECAY) for t in points] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_inverse_root_is_that_of_transformers() -> None:
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    factor = transformers.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=WARMUP // STEP).lr_lambdas[0]
    rates = [lr_at(t, ours("inverse_sqrt", min_lr=0.0), DECAY) for t in POINTS]
    assert rates == pytest.approx([LR * factor(t // STEP) for t in POINTS], rel=1e-12)
