"""What the fault policy finds, remembers and decides, against numpy and by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from lmscale.config.faults import FaultsConfig
from lmscale.train.faults import FaultAction, FaultLog, Observed, Verdict, is_within, judge, rewound, robust_z
from lmscale.train.progress import Progress

EXACT_TOLERANCE = 1.0e-12
"""The same formula in doubles, summed by nobody."""


def config(**sections: Any) -> FaultsConfig:
    return FaultsConfig.model_validate(sections)


def run(
    policy: FaultsConfig, steps: list[Observed], log: FaultLog | None = None
) -> tuple[list[Verdict | None], FaultLog]:
    """Judge steps one after the other, from step 1."""
    log, verdicts = log or FaultLog(), []
    for step, observed in enumerate(steps, 1):
        verdicts.append(judge(policy, log, observed))
        log = log.after(policy, step, observed, verdicts[-1])
    return verdicts, log


def series(losses: Any) -> list[Observed]:
    return [Observed(float(loss), 1.0) for loss in losses]


@pytest.mark.parametrize("size", [4, 5, 32, 127])
def test_robust_z_score_is_numpys(size: int) -> None:
    rng = np.random.default_rng(size)
    past = rng.lognormal(size=size)
    middle = np.median(past)
    expected = (9.0 - middle) / (1.4826 * np.median(np.abs(past - middle)))
    assert robust_z(9.0, past.tolist()) == pytest.approx(expected, rel=EXACT_TOLERANCE)


def test_robust_z_score_of_a_normal_series_is_the_ordinary_one() -> None:
    past = np.random.default_rng(0).normal(3.0, 0.5, size=20_001)
    assert robust_z(5.0, past.tolist()) == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize(("past", "score"), [([2.0] * 8, 500.0), ([0.0] * 8, math.inf)])
def test_past_that_never_differs_has_a_least_spread(past: list[float], score: float) -> None:
    assert robust_z(past[0] + 1.0, past) == pytest.approx(score)
    assert robust_z(past[0], past) == 0.0


def test_spikes_of_a_synthetic_series_are_found_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    losses = 4.0 * np.exp(-np.arange(400) / 2000) + 2.0 + rng.normal(0.0, 0.03, size=400)
    spikes = [90, 91, 92, 250, 399]
    losses[spikes] += 1.0
    policy = config(loss_spike={"action": "skip", "window": 64, "min_steps": 16, "threshold": 8})
    verdicts, log = run(policy, series(losses))
    assert [index for index, verdict in enumerate(verdicts) if verdict] == spikes
    assert [(done.step, done.kind, done.action) for done in log.actions] == [
        (n + 1, "loss_spike", "skip") for n in spikes
    ]
    good = np.delete(losses, spikes)[-64:]
    assert log.losses == tuple(good)
    assert log.actions[0].value == pytest.approx(robust_z(losses[90], losses[26:90].tolist()))


def test_fall_of_the_loss_is_no_spike() -> None:
    policy = config(loss_spike={"action": "stop", "window": 16, "min_steps": 4})
    verdicts, _ = run(policy, series([3.0, 3.1, 2.9, 3.0, 3.1, 0.1]))
    assert verdicts == [None] * 6


def test_no_step_is_judged_before_there_are_enough() -> None:
    policy = config(loss_spike={"action": "skip", "window": 8, "min_steps": 5})
    verdicts, _ = run(policy, series([1.0, 1.01, 0.99, 50.0, 1.0, 50.0]))
    assert [verdict is not None for verdict in verdicts] == [False] * 5 + [True]


def test_spike_that_is_only_noted_is_trained_on_and_remembered() -> None:
    policy = config(loss_spike={"window": 8, "min_steps": 4})
    verdicts, log = run(policy, series([1.0, 1.01, 0.99, 1.0, 50.0]))
    assert verdicts[-1] is not None
    assert not verdicts[-1].withholds
    assert (log.noted, log.actions, log.losses[-1]) == (1, (), 50.0)


def test_gradient_norm_has_a_window_and_a_threshold_of_its_own() -> None:
    policy = config(grad_norm_spike={"action": "rewind", "window": 8, "min_steps": 4})
    steps = [Observed(1.0, norm) for norm in (1.0, 1.1, 0.9, 1.0, 9.0)]
    verdicts, log = run(policy, steps)
    assert verdicts[-1] is not None
    assert (verdicts[-1].kind, verdicts[-1].action) == ("grad_norm_spike", "rewind")
    assert log.grad_norms == (1.0, 1.1, 0.9, 1.0)
    assert log.losses == ()


@pytest.mark.parametrize(
    ("observed", "finding"),
    [
        (Observed(math.nan, 1.0), "the loss is not finite"),
        (Observed(1.0, math.nan), "the gradient norm is not finite"),
    ],
)
def test_step_that_is_not_finite_is_skipped_by_default(observed: Observed, finding: str) -> None:
    verdict = judge(FaultsConfig(), FaultLog(), observed)
    assert verdict is not None
    assert (verdict.kind, verdict.action, verdict.finding) == ("non_finite", "skip", finding)


def test_overflow_by_itself_is_no_fault() -> None:
    verdicts, log = run(FaultsConfig(), [Observed(1.0, math.nan, is_overflow=True)] * 50)
    assert verdicts == [None] * 50
    assert log == FaultLog()


@pytest.mark.parametrize(
    ("storm", "overflows", "found"),
    [
        ({"overflows": 3}, "010111101", [5]),
        ({"overflows": 3, "of_steps": 5}, "110111100", [3, 6]),  # told of, a storm is over
        ({"overflows": 3, "of_steps": 5}, "100100100", []),
    ],
)
def test_storm_of_overflows_is_found(storm: dict[str, Any], overflows: str, found: list[int]) -> None:
    policy = config(overflow_storm={**storm, "action": "none"})
    steps = [Observed(1.0, math.nan if one == "1" else 1.0, is_overflow=one == "1") for one in overflows]
    verdicts, _ = run(policy, steps)
    assert [index for index, verdict in enumerate(verdicts) if verdict] == found


def test_spent_budget_stops() -> None:
    policy = config(non_finite={"budget": 2})
    verdicts, log = run(policy, [Observed(math.nan, 1.0)] * 3)
    assert [(v.action, v.is_budget_spent) for v in verdicts if v] == [("skip", False), ("skip", False), ("stop", True)]
    assert [done.action for done in log.actions] == ["skip", "skip", "stop"]


def test_budget_is_of_one_kind() -> None:
    policy = config(non_finite={"budget": 1}, loss_spike={"action": "skip", "window": 8, "min_steps": 4, "budget": 1})
    steps = series([1.0, 1.01, 0.99, 1.0, 9.0])
    verdicts, _ = run(policy, [*steps, Observed(math.nan, 1.0)])
    assert [verdict.action for verdict in verdicts if verdict] == ["skip", "skip"]


def test_gravest_of_two_faults_decides() -> None:
    keys = {"window": 8, "min_steps": 4}
    policy = config(loss_spike={**keys, "action": "skip"}, grad_norm_spike={**keys, "action": "stop"})
    verdicts, _ = run(policy, [Observed(v, v) for v in (1.0, 1.01, 0.99, 1.0, 900.0)])
    assert verdicts[-1] is not None
    assert (verdicts[-1].kind, verdicts[-1].action) == ("grad_norm_spike", "stop")


@pytest.mark.parametrize(
    ("steps_before", "to_step", "skips"), [(0, 4, (9, 9)), (2, 4, (7, 9)), (20, 4, (5, 9)), (0, 8, (9, 9))]
)
def test_rewind_skips_the_offending_step_and_those_before_it(
    steps_before: int, to_step: int, skips: tuple[int, int]
) -> None:
    policy = config(non_finite={"action": "rewind", "steps_before": steps_before})
    action = FaultAction(9, "non_finite", "rewind", None)
    log = FaultLog(actions=(action,), skips=((2, 3),), losses=(1.0, 2.0))
    after = rewound(log, FaultLog(losses=(1.0,)), "non_finite", policy, 9, to_step)
    assert after == FaultLog(actions=(action,), skips=((2, 3), skips), losses=(1.0,))


def test_rewind_from_a_storm_skips_all_of_it() -> None:
    policy = config(overflow_storm={"action": "rewind", "overflows": 3, "of_steps": 5})
    assert rewound(FaultLog(), FaultLog(), "overflow_storm", policy, 30, 10).skips == ((26, 30),)


def test_what_is_remembered_survives_a_manifest() -> None:
    log = FaultLog((FaultAction(3, "non_finite", "skip", None),), 2, ((5, 9),), (1.1, 0.1 + 0.2), (3.0,), (0, 1))
    progress = Progress(10, 80, 2560, 1, log)
    assert Progress(**json.loads(json.dumps(dataclasses.asdict(progress), allow_nan=False))) == progress


def test_manifest_from_before_there_was_a_policy_is_read() -> None:
    keys = {"step": 3, "consumed_samples": 24, "consumed_tokens": 768, "skipped_steps": 1}
    assert Progress(**keys).faults == FaultLog()


def test_ranges_include_both_ends() -> None:
    assert [step for step in range(1, 12) if is_within(step, ((2, 3), (9, 9)))] == [2, 3, 9]
