"""What a run tells of its first steps: the memory that it holds, and the plan beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmscale.config.run import RunConfig
from lmscale.train.engine import Engine, StepResult
from lmscale.train.forecast import Forecast
from lmscale.train.memory import StateWatch, describe_state


class FirstSteps:
    """Measures the training state over the first update, and the time of the steps that the forecast is compared with."""

    def __init__(self, config: RunConfig, engine: Engine):
        self._config, self._engine = config, engine
        self._forecast = Forecast(config, engine)
        self._watch: StateWatch | None = StateWatch(engine)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Run a step in this."""
        with self._forecast.timed():
            yield

    def report(self, result: StepResult, batch_size: int) -> tuple[list[str], dict[str, float]]:
        """Say what the step just done has shown; behind most steps, nothing.

        Args:
            result: of the step.
            batch_size: of the step.

        Returns:
            (lines for the console, values by metrics' tag).
        Collectives: maxima over all ranks, behind the first step that is not skipped; every rank must call.
        """
        lines = self._forecast.lines(batch_size)
        if self._watch is None or result.is_skipped:
            return lines, {}
        line, values = describe_state(self._engine, self._watch.finish(), self._config)
        self._watch = None
        return [line, *lines], values
