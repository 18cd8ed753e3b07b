"""Weights & Biases: the same tags as TensorBoard."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmscale.errors import ConfigError
from lmscale.monitor import metrics
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.metrics import Point, Record

_RUN_ID_FILE = "wandb-run-id"


class WandbWriter:
    """Log records to one W&B run per output directory.

    The run's id stays in output_dir/wandb-run-id, so a resumed run continues the same curves. W&B takes no step twice:
    steps that are trained again after a resume keep the values of their first time.

    Args:
        output_dir: the run's directory; its name is the run's name. The project is WANDB_PROJECT, or lmscale.
        resume_step: None is a new run; a step continues the run of the directory.
        series: as of `TensorBoardWriter`.

    Raises:
        ConfigError: if the wandb package is not installed.
    """

    def __init__(
        self,
        output_dir: Path,
        resume_step: int | None = None,
        series: Sequence[Callable[[Record], list[Point]]] = (metrics.points,),
    ):
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "needs the wandb package", field="monitor.wandb", value=True, remedy="pip install lmscale[wandb]"
            ) from None
        output_dir.mkdir(parents=True, exist_ok=True)
        self._series = series
        self._other_axis_tags: set[str] = set()
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lmscale"),
            name=output_dir.name,
            id=_run_id(output_dir, resume_step),
            dir=str(output_dir),
            resume="allow",
        )

    def write(self, record: Record) -> None:
        """Log a record at its step."""
        found = [point for series in self._series for point in series(record)]
        values: dict[str, float] = {point.tag: point.value for point in found}
        for point in found:
            if point.axis != "step":
                values[f"progress/consumed_{point.axis}"] = point.x
                self._define_axis(point)
        self._run.log(values, step=record.step)

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Keep a text in the run's config, under its tag; log that of a step at the step."""
        if step is None:
            self._run.config.update({tag: markdown}, allow_val_change=True)
        else:
            self._run.log({tag: markdown}, step=step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Log histograms at their step."""
        import wandb

        shown = {
            tag: wandb.Histogram(np_histogram=(list(histogram.counts), list(histogram.edges)))
            for tag, histogram in found.items()
        }
        self._run.log(shown, step=step)

    def close(self) -> None:
        """Send what is pending and end the W&B run."""
        self._run.finish()

    def _define_axis(self, point: Point) -> None:
        if point.tag not in self._other_axis_tags:
            self._other_axis_tags.add(point.tag)
            self._run.define_metric(point.tag, step_metric=f"progress/consumed_{point.axis}")


def _run_id(output_dir: Path, resume_step: int | None) -> str:
    path = output_dir / _RUN_ID_FILE
    if resume_step is not None and path.exists():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex[:8]
    path.write_text(run_id + "\n")
    return run_id
