"""What a run shows beside its metrics, where it is asked to: histograms, samples."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lmscale.monitor.event_files import SAMPLES_PREFIX
from lmscale.train.histograms import parameter_histograms

if TYPE_CHECKING:
    from lmscale.train.loop import Run


class Watching:
    """Looks at a run between its steps. Every rank has one; what was not asked for costs a comparison of numbers."""

    def __init__(self, run: Run):
        self._run, self._monitor = run, run.config.monitor

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


def _markdown(prompt: str, written: str) -> str:
    """Show texts as they are: indented, nothing in them is Markdown."""
    parts = (("prompt", prompt), ("written", written))
    return "\n\n".join(f"{name}\n\n{textwrap.indent(text, '    ', lambda line: True)}" for name, text in parts)
