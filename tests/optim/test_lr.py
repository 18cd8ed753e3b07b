"""The learning rate over consumed tokens."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.optim import CooldownConfig, OptimConfig, RewarmupConfig
from lmscale.errors import ConfigError
from lmscale.optim.lr import check_cooldown, cooldown_shape, lr_at

STYLES = ["linear", "cosine", "one_minus_sqrt", "exponential"]
WARMUP, DECAY, TRAIN = 375_000_000, 260_000_000_000, 300_000_000_000
GPT3 = OptimConfig(lr=6.0e-4, min_lr=6.0e-5, lr_warmup_tokens=WARMUP, lr_decay_tokens=DECAY)


@st.composite
def schedules(draw):
    lr = draw(st.floats(1e-6, 1.0))
    style = draw(st.sampled_from(["cosine", "linear", "constant", "inverse_sqrt", "polynomial", "wsd"]))
    warmup = draw(st.integers(1 if style == "inverse_sqrt" else 0, 10**9))
    decay = draw(st.integers(1, 10**12))
    return OptimConfig(
        lr_decay_power=draw(st.floats(1, 4)),
        lr_cooldown_tokens=draw(st.integers(1, decay)) if style == "wsd" else None,
        lr_cooldown_style=draw(st.sampled_from(STYLES)),
        lr=lr,
        min_lr=lr * draw(st.floats(0, 1)),
        lr_warmup_tokens=warmup,
        lr_decay_tokens=warmup + decay,
        lr_decay_style=style,
        lr_warmup_style=draw(st.sampled_from(["linear", "constant"])),
    )


@pytest.mark.parametrize(("sequences", "step"), [(256, 716), (512, 358), (1024, 179)])
def test_first_step_at_the_full_rate_is_the_one_that_completes_the_warmup(sequences, step):
    # The cosine has fallen by less than 1e-8 of the peak within that step, so "full" is a comparison with a tolerance.
    rates = [lr_at(n * sequences * 2048, GPT3, TRAIN) for n in range(1, step + 1)]
    assert rates[-1] == pytest.approx(GPT3.lr, rel=1e-7)
    assert all(rate < GPT3.lr * (1 - 1e-4) for rate in rates[:-1])


def test_first_step_does_not_have_rate_zero():
    assert lr_at(256 * 2048, GPT3, TRAIN) == pytest.approx(6.0e-4 * 256 * 2048 / WARMUP)


def test_gpt3_schedule_at_its_corners():
    assert lr_at(0, GPT3, TRAIN) == 0
    assert lr_at(WARMUP, GPT3, TRAIN) == 6.0e-4
    assert lr_at((WARMUP + DECAY) // 2, GPT3, TRAIN) == pytest.approx((6.0e-4 + 6.0e-5) / 2)
    assert lr_at(DECAY, GPT3, TRAIN) == 6.0e-5
    assert lr_at(TRAIN, GPT3, TRAIN) == 6.0e-5


def test_decay_ends_with_the_run_where_its_end_is_left_out():
    optim = GPT3.model_copy(update={"lr_decay_tokens": None})
    assert lr_at(DECAY, optim, TRAIN) > 6.1e-5
    assert lr_at(TRAIN, optim, TRAIN) == 6.0e-5


def test_linear_decay_is_a_straight_line():
    optim = OptimConfig(lr=1.0, min_lr=0.2, lr_warmup_tokens=100, lr_decay_tokens=500, lr_decay_style="linear")
    assert [lr_at(t, optim, 1000) for t in (100, 200, 300, 400, 500, 900)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    )


def test_constant_stays_at_the_peak_past_the_decay():
    optim = OptimConfig(lr=1.0, lr_warmup_tokens=100, lr_decay_tokens=500, lr_decay_style="constant")
    assert [lr_at(t, optim, 1000) for t in (50, 100, 500, 2000)] == [0.5, 1.0, 1.0, 1.0]


def test_t5s_rate_is_one_over_the_root_of_the_step_from_ten_thousand_on():
    tokens = 128 * 626  # of a step
    optim = OptimConfig(
        lr=0.01, lr_warmup_tokens=10_000 * tokens, lr_warmup_style="constant", lr_decay_style="inverse_sqrt"
    )
    for step in (1, 5_000, 10_000, 10_001, 40_000, 2**19):
        assert lr_at(step * tokens, optim, TRAIN) == pytest.approx(1 / math.sqrt(max(step, 10_000)), rel=1e-12)


@pytest.mark.parametrize(("style", "warmup_init"), [("linear", True), ("constant", False)])
def test_relative_step_of_adafactor_is_a_schedule(style: str, warmup_init: bool):
    from transformers.optimization import Adafactor

    tokens = 512
    optim = OptimConfig(lr=0.01, lr_warmup_tokens=10_000 * tokens, lr_warmup_style=style, lr_decay_style="inverse_sqrt")
    group = {"lr": None, "relative_step": True, "warmup_init": warmup_init, "scale_parameter": False}
    for step in (1, 7, 9_999, 10_000, 10_001, 10**6):
        theirs = Adafactor._get_lr(group, {"step": step})
        assert lr_at(step * tokens, optim, TRAIN) == pytest.approx(theirs, rel=1e-12)


def test_inverse_root_rises_with_a_linear_warmup_and_stops_at_the_minimum():
    optim = OptimConfig(lr=1.0, min_lr=0.4, lr_warmup_tokens=100, lr_decay_style="inverse_sqrt")
    assert [lr_at(t, optim, 1000) for t in (25, 100, 400, 625, 10_000)] == pytest.approx([0.25, 1.0, 0.5, 0.4, 0.4])


def test_constant_warmup_is_flat_and_its_decay_begins_behind_it():
    optim = OptimConfig(
        lr=1.0, lr_warmup_tokens=100, lr_decay_tokens=500, lr_warmup_style="constant", lr_decay_style="linear"
    )
    assert [lr_at(t, optim, 1000) for t in (1, 99, 100, 300, 500)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


def test_without_warmup_the_first_step_starts_the_decay():
    optim = OptimConfig(lr=1.0, lr_decay_tokens=100)
    assert lr_at(0, optim, 100) == 1.0
    assert lr_at(10, optim, 100) == pytest.approx((1 + math.cos(math.pi / 10)) / 2)


@settings(deadline=None)  # a busy machine is no failure
@given(schedules(), st.integers(0, 2 * 10**12))
def test_rate_is_bounded_by_the_peak_and_by_the_minimum_after_the_warmup(optim, tokens):
    rate = lr_at(tokens, optim, 10**12)
    lowest = 0 if tokens < optim.lr_warmup_tokens else optim.min_lr
    assert lowest * (1 - 1e-12) <= rate <= optim.lr * (1 + 1e-12)


@settings(deadline=None)  # a busy machine is no failure
@given(schedules(), st.integers(0, 2 * 10**12))
def test_rate_is_continuous_in_tokens(optim, tokens):
    # One token moves the rate by at most its steepest slope: that of the warm-up, or pi/2 of the decay's mean slope.
    # Of a power the slope is that many times the mean; a root is infinitely steep, and moves by 1 / sqrt(span) at most.
    span = optim.lr_cooldown_tokens or optim.lr_decay_tokens - optim.lr_warmup_tokens
    steepest = optim.lr / max(1, optim.lr_warmup_tokens) + optim.lr * max(math.pi / 2, optim.lr_decay_power) / span
    if optim.lr_decay_style == "wsd" and optim.lr_cooldown_style == "one_minus_sqrt":
        steepest = optim.lr / max(1, optim.lr_warmup_tokens) + optim.lr / math.sqrt(span)
    change = abs(lr_at(tokens + 1, optim, 10**12) - lr_at(tokens, optim, 10**12))
    assert change <= steepest * (1 + 1e-9) + 1e-12


@settings(deadline=None)  # a busy machine is no failure
@given(schedules(), st.integers(0, 10**12), st.integers(0, 10**12))
def test_rate_rises_in_the_warmup_and_never_after(optim, one, other):
    early, late = sorted((one, other))
    if late <= optim.lr_warmup_tokens:
        assert lr_at(early, optim, 10**12) <= lr_at(late, optim, 10**12)
    elif early >= optim.lr_warmup_tokens:
        assert lr_at(early, optim, 10**12) >= lr_at(late, optim, 10**12) * (1 - 1e-12)


def test_negative_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"consumed_tokens = -1: must be at least 0"):
        lr_at(-1, GPT3, TRAIN)


def test_wsd_is_stable_until_its_last_tokens():
    optim = OptimConfig(lr=1.0, min_lr=0.2, lr_warmup_tokens=100, lr_decay_style="wsd", lr_cooldown_tokens=400)
    assert [lr_at(t, optim, 1000) for t in (50, 100, 600, 800, 1000, 2000)] == pytest.approx([0.5, 1, 1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    ("style", "at_a_quarter"),
    [("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2), ("one_minus_sqrt", 0.5), ("exponential", 2**0.75 - 1)],
)
def test_cooldown_shapes_fall_from_one_to_zero(style, at_a_quarter):
    x = [n / 1000 for n in range(1001)]
    shape = [cooldown_shape(each, style) for each in x]
    assert (shape[0], shape[-1]) == (1.0, pytest.approx(0.0, abs=1e-15))
    assert all(one > other for one, other in itertools.pairwise(shape))
    assert shape[250] == pytest.approx(at_a_quarter)


@settings(deadline=None)  # a busy machine is no failure
@given(schedules(), st.integers(0, 10**12), st.integers(1, 10**12), st.sampled_from(STYLES), st.floats(0, 1))
def test_cooldown_leaves_what_was_and_falls_from_there(optim, start, tokens, style, share):
    rate = lr_at(start, optim, 10**12)
    cooldown = CooldownConfig(start_tokens=start, tokens=tokens, style=style, end_lr=rate * share)
    cooled = optim.model_copy(update={"lr_cooldown": cooldown})
    assert lr_at(start // 2, cooled, 10**12) == lr_at(start // 2, optim, 10**12)
    assert lr_at(start, cooled, 10**12) == rate
    x = tokens // 3 / tokens
    assert lr_at(start + tokens // 3, cooled, 10**12) == pytest.approx(
        rate * (share + (1 - share) * cooldown_shape(x, style)), rel=1e-9
    )
    assert [lr_at(start + t, cooled, 10**12) for t in (tokens, 2 * tokens)] == pytest.approx([rate * share] * 2)


def test_cooldown_ends_at_the_minimum_where_nothing_else_is_said():
    cooldown = CooldownConfig(start_tokens=400, tokens=100)
    optim = OptimConfig(lr=1.0, min_lr=0.1, lr_decay_style="constant", lr_cooldown=cooldown)
    assert [lr_at(t, optim, 500) for t in (400, 450, 500)] == pytest.approx([1.0, 0.55, 0.1])


def test_cooldown_that_begins_at_its_end_is_refused():
    cooldown = CooldownConfig(start_tokens=500, tokens=100)
    optim = OptimConfig(lr=1.0, min_lr=0.1, lr_decay_tokens=500, lr_cooldown=cooldown)
    with pytest.raises(ConfigError, match=r"lr_cooldown.start_tokens = 500: the schedule's rate there is 0.1, and"):
        check_cooldown(optim, 600)
    check_cooldown(optim.model_copy(update={"lr_decay_tokens": 501}), 600)


def test_rewarmup_multiplies_the_schedule_from_its_fraction_to_one():
    rewarmup = RewarmupConfig(start_tokens=200, tokens=100, fraction=0.2)
    optim = OptimConfig(lr=1.0, lr_decay_style="linear")
    warmed = optim.model_copy(update={"lr_rewarmup": rewarmup})
    factors = [lr_at(t, warmed, 1000) / lr_at(t, optim, 1000) for t in (100, 200, 201, 225, 250, 275, 300, 900)]
    assert factors == pytest.approx([1, 1, 0.208, 0.4, 0.6, 0.8, 1, 1])
