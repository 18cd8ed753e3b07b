"""What a run shows beside its metrics, where it is asked to: step times by rank, a timeline, histograms, samples."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lmscale.log import get_logger
from lmscale.monitor import metrics
from lmscale.monitor.atomic import replaced
from lmscale.monitor.event_files import SAMPLES_PREFIX
from lmscale.train.histograms import parameter_histograms
from lmscale.train.step_clock import RankTime, StepClock
from lmscale.train.trace import Trace

if TYPE_CHECKING:
    from lmscale.train.loop import Run

_log = get_logger(__name__)

STEP_TIMES = "step_times.json"
"""In the run's directory: means over this start's steps, the slowest rank first."""
_MOST_ROWS = 16
"""Ranks in the table on the console, the slowest."""


class Watching:
    """Looks at a run, in and between its steps. What was not asked for costs a comparison or two a step.

    Collectives: with monitor.step_times, those of `StepClock`; every rank must make one, and `close` it.
    """

    def __init__(self, run: Run):
        self._run, self._monitor = run, run.config.monitor
        topology, trace = run.engine.topology, self._monitor.trace
        output_dir = Path(run.config.output_dir)
        if topology.rank == 0:
            with suppress(OSError):  # what a former start measured is not of this one
                (output_dir / STEP_TIMES).unlink(missing_ok=True)
        self._clock = StepClock(run.engine) if self._monitor.step_times else None
        self._trace = trace and Trace(trace, output_dir, topology.rank, topology.device, run.progress.step)
        self._times: list[RankTime] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a step in this."""
        number = self._run.progress.step + 1
        if self._trace:
            self._trace.before(number)
        with self._clock.step() if self._clock else nullcontext():
            yield
        if self._trace:
            self._trace.after(number)

    def values(self) -> dict[str, float]:
        """Return what the ranks' times have to say in a record.

        Collectives: with monitor.step_times, a gather of some numbers; every rank must call.
        """
        if self._clock is None:
            return {}
        window, self._times, steps = self._clock.gather()
        if not window:
            return {}
        slowest = max(window, key=lambda each: each.own_s)
        values = {
            metrics.PERF_OWN_TIME_MAX_S: slowest.own_s,
            metrics.PERF_OWN_TIME_MEDIAN_S: statistics.median(each.own_s for each in window),
            metrics.PERF_SLOWEST_RANK: slowest.rank,
        }
        bubble = _bubble(window)
        if bubble is not None:
            values[metrics.PERF_BUBBLE_FRACTION] = bubble
        if self._run.engine.topology.rank == 0:
            self._write(steps)
        return values

    def after_step(self, step: int) -> None:
        """Write the histograms that are due.

        Collectives: those of `parameter_histograms`, every monitor.histogram_interval steps.
        """
        interval = self._monitor.histogram_interval
        if interval and step % interval == 0:
            with self._run.throughput.paused():
                found = parameter_histograms(self._run.engine)
                for writer in self._run.writers:
                    writer.histograms(step, found)

    def after_evaluation(self, step: int) -> None:
        """Write the samples.

        Collectives: many; every rank must call.
        """
        if self._run.samples is None:
            return
        with self._run.throughput.paused():
            for number, (prompt, written) in enumerate(self._run.samples(step)):
                for writer in self._run.writers:
                    writer.text(f"{SAMPLES_PREFIX}{number}", _markdown(prompt, written), step)

    def close(self) -> None:
        """Let go of what is watched, and show the times of the ranks."""
        if self._trace:
            self._trace.close()
        if self._clock:
            self._clock.close()
            self._show()

    def _show(self) -> None:
        if not self._times:
            return
        columns = ["rank", "host", "step s", "own s", "waiting s", "bubble"]
        rows = [
            [
                str(each.rank),
                each.host,
                *(f"{value:.4g}" for value in (each.step_s, each.own_s, each.waiting_s)),
                "" if each.bubble_fraction is None else f"{each.bubble_fraction:.3f}",
            ]
            for each in _slowest_first(self._times)[:_MOST_ROWS]
        ]
        self._run.console.table("Time of a step by rank, the slowest first", columns, rows)
        bubble = _bubble(self._times)
        if bubble is not None:
            self._run.console.message(f"pipeline bubble: {bubble:.3f} measured, {self._ideal_bubble():.3f} of 1F1B")

    def _ideal_bubble(self) -> float:
        """Compute (p - 1) / (m + p - 1) of full batches."""
        batch, topology = self._run.config.batch, self._run.engine.topology
        micro_batches = batch.global_batch_size // (batch.micro_batch_size * topology.dp_size)
        return (topology.pp_size - 1) / (micro_batches + topology.pp_size - 1)

    def _write(self, steps: int) -> None:
        found = {
            "step": self._run.progress.step,
            "steps": steps,
            "bubble_fraction": _bubble(self._times),
            "ideal_bubble_fraction": self._ideal_bubble(),
            "ranks": [asdict(each) for each in _slowest_first(self._times)],
        }
        try:
            with replaced(Path(self._run.config.output_dir) / STEP_TIMES) as file:
                file.write((json.dumps(found, indent=1) + "\n").encode())
        except OSError as error:
            _log.warning("%s cannot be written: %s", STEP_TIMES, error)


def _slowest_first(times: Sequence[RankTime]) -> list[RankTime]:
    return sorted(times, key=lambda each: -each.own_s)


def _bubble(times: Sequence[RankTime]) -> float | None:
    """Average the ranks' bubbles; None without a pipeline."""
    found = [each.bubble_fraction for each in times if each.bubble_fraction is not None]
    return statistics.fmean(found) if found else None


def _markdown(prompt: str, written: str) -> str:
    """Show texts as they are: indented, nothing in them is Markdown."""
    parts = (("prompt", prompt), ("written", written))
    return "\n\n".join(f"{name}\n\n{textwrap.indent(text, '    ', lambda line: True)}" for name, text in parts)
