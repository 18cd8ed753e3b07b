"""The fault policy as pure functions: what was observed of a step, what it is judged to be, what is remembered of it.

A step is observed after its backward pass and before its update, the same numbers on every rank, so that every rank comes
to the same verdict. What the policy remembers is part of the run's progress: it is saved, and a resumed run judges as
the uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmscale.config.faults import FaultKind, FaultsConfig, OverflowStormPolicy, SpikePolicy

MAD_TO_SIGMA = 1.4826
"""Of a normal distribution, the standard deviation over the median absolute deviation: 1 / Phi^-1(3/4)."""
LEAST_SPREAD = 1.0e-3
"""Of the median: past values that hardly differ would make a spike of anything."""

_SEVERITY = ("none", "skip", "rewind", "stop")


@dataclass(frozen=True)
class Observed:
    """A step before its update, over all ranks: what is not finite is nan."""

    loss: float
    grad_norm: float
    """Global L2 norm before clipping, unscaled."""
    is_overflow: bool = False
    """fp16: the scaled gradients overflow and the loss does not; the loss scale answers that."""


@dataclass(frozen=True)
class Verdict:
    """A fault, and what is done about it."""

    kind: FaultKind
    action: str
    """none, skip, rewind or stop."""
    value: float
    """The robust z-score of a spike, the overflows of a storm; nan of what is not finite."""
    finding: str
    """What was found, as a clause."""
    is_budget_spent: bool = False
    """Whether it is stop because no budget is left for what the policy says."""

    @property
    def withholds(self) -> bool:
        """Whether the update must not happen."""
        return self.action != "none"


@dataclass(frozen=True)
class FaultAction:
    """Something that the policy did."""

    step: int
    kind: str
    action: str
    value: float | None
    """As of a verdict; None where it is not finite."""


@dataclass(frozen=True)
class FaultLog:
    """What the policy remembers of a run."""

    actions: tuple[FaultAction, ...] = ()
    """What it did, in order; a rewind does not undo them."""
    noted: int = 0
    """Faults about which nothing was to be done."""
    skips: tuple[tuple[int, int], ...] = ()
    """First and last step of what rewinds have left to be consumed without training."""
    losses: tuple[float, ...] = ()
    """Of the last good steps, where faults.loss_spike asks for them."""
    grad_norms: tuple[float, ...] = ()
    """Of the last good steps, where faults.grad_norm_spike asks for them."""
    overflows: tuple[int, ...] = ()
    """1 for each of the last steps that overflowed, 0 for each other, where faults.overflow_storm asks for them."""

    @classmethod
    def from_json(cls, keys: dict[str, Any]) -> FaultLog:
        """Read what `dataclasses.asdict` and JSON have made of one."""
        actions = tuple(FaultAction(**action) for action in keys.get("actions", ()))
        skips = tuple((first, last) for first, last in keys.get("skips", ()))
        windows = {name: tuple(keys.get(name, ())) for name in ("losses", "grad_norms", "overflows")}
        return cls(actions, keys.get("noted", 0), skips, **windows)

    def count(self, action: str, kind: str | None = None) -> int:
        """Count the actions of a name, of one kind of fault or of all."""
        return sum(done.action == action and kind in (None, done.kind) for done in self.actions)

    def after(self, config: FaultsConfig, step: int, observed: Observed, verdict: Verdict | None) -> FaultLog:
        """Return what is remembered after one more step.

        The windows take what was trained on; a step that overflowed, or whose update was withheld, leaves no trace there.
        """
        log = self
        if verdict is not None and verdict.withholds:
            value = verdict.value if math.isfinite(verdict.value) else None
            log = replace(log, actions=(*log.actions, FaultAction(step, verdict.kind, verdict.action, value)))
        elif verdict is not None:
            log = replace(log, noted=log.noted + 1)
        storm = config.overflow_storm
        if storm is not None:
            is_told = verdict is not None and verdict.kind == "overflow_storm"
            overflows = () if is_told else (*log.overflows, int(observed.is_overflow))[-storm.span :]
            log = replace(log, overflows=overflows)
        if observed.is_overflow or (verdict is not None and verdict.withholds):
            return log
        if config.loss_spike is not None:
            log = replace(log, losses=(*log.losses, observed.loss)[-config.loss_spike.window :])
        if config.grad_norm_spike is not None:
            log = replace(log, grad_norms=(*log.grad_norms, observed.grad_norm)[-config.grad_norm_spike.window :])
        return log


def judge(config: FaultsConfig, log: FaultLog, observed: Observed) -> Verdict | None:
    """Judge a step: the fault with the gravest answer, or None where there is none.

    Args:
        config: the policy.
        log: what is remembered of the steps before.
        observed: the step.
    """
    found = [verdict for verdict in _findings(config, log, observed) if verdict is not None]
    if not found:
        return None
    gravest = max(found, key=lambda verdict: _SEVERITY.index(verdict.action))
    if gravest.action in ("skip", "rewind"):
        budget = config.policies()[gravest.kind].budget
        spent = log.count("skip", gravest.kind) + log.count("rewind", gravest.kind)
        if spent >= budget:
            return replace(gravest, action="stop", is_budget_spent=True)
    return gravest


def _findings(config: FaultsConfig, log: FaultLog, observed: Observed) -> list[Verdict | None]:
    if observed.is_overflow:
        return [_storm(config.overflow_storm, log.overflows)]
    if not math.isfinite(observed.loss) or not math.isfinite(observed.grad_norm):
        culprit = "gradient norm" if math.isfinite(observed.loss) else "loss"
        return [Verdict("non_finite", config.non_finite.action, math.nan, f"the {culprit} is not finite")]
    return [
        _spike("loss_spike", config.loss_spike, "loss", observed.loss, log.losses),
        _spike("grad_norm_spike", config.grad_norm_spike, "gradient norm", observed.grad_norm, log.grad_norms),
    ]


def _storm(policy: OverflowStormPolicy | None, before: Sequence[int]) -> Verdict | None:
    if policy is None:
        return None
    overflows = 1 + sum((*before,)[-(policy.span - 1) :])
    if overflows < policy.overflows:
        return None
    finding = f"{overflows} of the last {policy.span} steps overflowed"
    return Verdict("overflow_storm", policy.action, overflows, finding)


def _spike(
    kind: FaultKind, policy: SpikePolicy | None, name: str, value: float, past: Sequence[float]
) -> Verdict | None:
    if policy is None or len(past) < policy.min_steps:
        return None
    score = robust_z(value, past)
    if score < policy.threshold:
        return None
    finding = f"the {name} {value:.6g} is {score:.1f} robust standard deviations above the past {len(past)} steps"
    return Verdict(kind, policy.action, score, finding)


def robust_z(value: float, past: Sequence[float]) -> float:
    """Compute how far a value is from past ones.

        z = (value - m) / max(1.4826 median(|past - m|), 0.001 |m|),   m = median(past)

    Args:
        value: finite.
        past: finite, at least one.

    Returns:
        z; infinite, or 0 for the median itself, where the past is all zeros.
    """
    middle = statistics.median(past)
    spread = MAD_TO_SIGMA * statistics.median([abs(other - middle) for other in past])
    spread = max(spread, LEAST_SPREAD * abs(middle))
    if spread == 0.0:
        return math.copysign(math.inf, value - middle) if value != middle else 0.0
    return (value - middle) / spread


def rewound(log: FaultLog, saved: FaultLog, kind: FaultKind, config: FaultsConfig, step: int, to_step: int) -> FaultLog:
    """Return what is remembered after going back to a checkpoint.

    The windows are the checkpoint's; what was done, and what is to be skipped, stays known. The steps that the run will skip
    now are the offending one and faults.<kind>.steps_before before it, of a storm its whole span; what the checkpoint
    has behind it is not undone.

    Args:
        log: of the run at the fault, its action included.
        saved: of the checkpoint.
        kind: of the fault.
        config: the policy.
        step: the offending one.
        to_step: of the checkpoint.
    """
    policy = config.policies()[kind]
    before = policy.steps_before + (policy.span - 1 if isinstance(policy, OverflowStormPolicy) else 0)
    first = max(to_step + 1, step - before)
    return replace(saved, actions=log.actions, noted=log.noted, skips=(*log.skips, (first, step)))


def is_within(step: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a step is in one of some ranges, both ends included."""
    return any(first <= step <= last for first, last in ranges)
