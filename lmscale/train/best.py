"""The best checkpoint of a run by a metric, and when to stop looking for a better one."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lmscale.monitor.atomic import replaced


class Best:
    """Follows a metric over the evaluations of a run; the higher, the better, and of equal ones the first.

    Its state is a function of the run's records, so that a resumed run goes on as the uninterrupted one would.

    Args:
        tag: of the metric.
        patience: evaluations without a better value after which the run ends; None never ends it.

    Attributes:
        step: of the best evaluation so far; None before the first.
        value: the metric then.
    """

    def __init__(self, tag: str, patience: int | None):
        self._tag, self._patience = tag, patience
        self.step: int | None = None
        self.value = -math.inf
        self._since = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether as many evaluations as patience allows were no better."""
        return self._patience is not None and self._since >= self._patience

    def update(self, step: int, values: dict[str, float]) -> bool:
        """Take an evaluation's values, and tell whether it is the best so far; a value that is no number never is."""
        value = values.get(self._tag)
        if value is None:
            return False
        is_better = value > self.value
        if is_better:
            self.step, self.value, self._since = step, value, 0
        else:
            self._since += 1
        return is_better

    def restart(self, metrics_file: Path, until_step: int) -> None:
        """Forget what was followed, but for the evaluations that a run has recorded up to a step."""
        self.step, self.value, self._since = None, -math.inf, 0
        self.replay(metrics_file, until_step)

    def replay(self, metrics_file: Path, until_step: int) -> None:
        """Take the evaluations that a run has recorded up to a step."""
        if not until_step or not metrics_file.is_file():
            return
        for line in metrics_file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["step"] <= until_step:
                self.update(record["step"], {self._tag: _number(record[self._tag])} if self._tag in record else {})


def _number(value: float | None) -> float:
    """Read a recorded value: what is not finite is written as null."""
    return math.nan if value is None else value


def point_best(checkpoints: Path, step: int) -> None:
    """Write the name of the best checkpoint beside `latest`."""
    with replaced(checkpoints / "best") as file:
        file.write(f"step-{step:08d}\n".encode())
