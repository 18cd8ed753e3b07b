"""The fault policy at work in the loop: asked at each step, heard on the console, in the records and by an alert."""

from __future__ import annotations

from typing import Any, NoReturn

from lmscale.config.run import RunConfig
from lmscale.errors import FaultError
from lmscale.log import get_logger
from lmscale.monitor import metrics
from lmscale.monitor.alert import alert
from lmscale.train.faults import FaultLog, Observed, Verdict, is_within, judge
from lmscale.train.progress import Progress

_log = get_logger(__name__)

_COUNTERS = {
    "skip": metrics.FAULTS_SKIP,
    "rewind": metrics.FAULTS_REWIND,
    "stop": metrics.FAULTS_STOP,
    "none": metrics.FAULTS_NOTED,
}
_VALUES = {
    "non_finite": metrics.FAULTS_NON_FINITE,
    "loss_spike": metrics.FAULTS_LOSS_SPIKE,
    "grad_norm_spike": metrics.FAULTS_GRAD_NORM_SPIKE,
    "overflow_storm": metrics.FAULTS_OVERFLOW_STORM,
}
_DONE = {
    "none": "nothing is done about it",
    "skip": "its update is withheld",
    "rewind": "the run goes back",
    "stop": "the run ends",
}


class FaultWatch:
    """Follows one step after the other: `begin`, `withholds` at the gate, `seen`, then what is to be done.

    Every rank has one and comes to the same conclusions; the first speaks.

    Args:
        config: the run.
        is_first: whether this is rank 0.
    """

    def __init__(self, config: RunConfig, is_first: bool):
        self._config, self._is_first = config, is_first
        self._skipped = config.train.skipped_ranges
        self._log, self._step = FaultLog(), 0
        self._observed: Observed | None = None
        self.verdict: Verdict | None = None
        """On the step just done; None where nothing is wrong."""
        self._values: dict[str, Any] = {}

    def begin(self, progress: Progress) -> None:
        """Take what is remembered before a step."""
        self._log, self._observed, self.verdict = progress.faults, None, None

    def passes_over(self, step: int) -> bool:
        """Tell whether a step is to be consumed without training, by train.skip_steps or a rewind."""
        return is_within(step, self._skipped) or is_within(step, self._log.skips)

    def withholds(self, observed: Observed) -> bool:
        """Judge a step between its backward pass and its update."""
        self._observed, self.verdict = observed, judge(self._config.faults, self._log, observed)
        return self.verdict is not None and self.verdict.withholds

    def seen(self, step: int) -> FaultLog:
        """Tell of a step's fault, if it has one, and return what is remembered from now on."""
        assert self._observed is not None
        log = self._log.after(self._config.faults, step, self._observed, self.verdict)
        self._step = step
        if self.verdict is not None:
            count = log.noted if self.verdict.action == "none" else log.count(self.verdict.action)
            self._values = {_COUNTERS[self.verdict.action]: count, _VALUES[self.verdict.kind]: self.verdict.value}
            self._tell(self.verdict, log)
        return log

    def _tell(self, verdict: Verdict, log: FaultLog) -> None:
        line = f"fault: step {self._step}: {verdict.finding}; {_DONE[verdict.action]}"
        if verdict.action in ("skip", "rewind"):
            used = log.count("skip", verdict.kind) + log.count("rewind", verdict.kind)
            line += f" ({used} of faults.{verdict.kind}.budget = {self._config.faults.policies()[verdict.kind].budget})"
        _log.warning("%s", line)
        if self._is_first and verdict.action != "stop":  # a stop is told as the failure that it is
            alert(self._config.monitor.alert_command, "fault", line, self._step, self._config.output_dir)

    @property
    def wants_rewind(self) -> bool:
        """Whether the run has to go back to a checkpoint now."""
        return self.verdict is not None and self.verdict.action == "rewind"

    def take_values(self) -> dict[str, Any]:
        """Return what the next record says of faults, once."""
        values, self._values = self._values, {}
        return values

    @property
    def wants_end(self) -> bool:
        """Whether the run has to end now, unsaved."""
        return self.verdict is not None and self.verdict.action == "stop"

    def end(self) -> NoReturn:
        """End the run.

        Raises:
            FaultError: on every rank.
        """
        assert self.verdict is not None
        kind = self.verdict.kind
        policy = self._config.faults.policies()[kind]
        line = f"step {self._step}: {self.verdict.finding}; the run ends, and the last checkpoint is the newest state"
        if self.verdict.is_budget_spent:
            raise FaultError(
                f"is spent: {line}",
                field=f"faults.{kind}.budget",
                value=policy.budget,
                remedy="look at the data of the steps in the checkpoint's manifest, lower optim.lr, or raise the budget",
            )
        raise FaultError(line, field=f"faults.{kind}.action", value="stop")
