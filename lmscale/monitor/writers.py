"""Where metrics go: metrics.jsonl always, TensorBoard, W&B and Prometheus by config. Rank 0 alone has writers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lmscale.config.monitor import MonitorConfig
from lmscale.monitor import megatron_names, metrics
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.hparams import HParam
from lmscale.monitor.jsonl_writer import JsonlWriter
from lmscale.monitor.metrics import Record
from lmscale.monitor.prometheus_writer import PrometheusWriter
from lmscale.monitor.tensorboard_writer import TensorBoardWriter
from lmscale.monitor.tolerant import Tolerant
from lmscale.monitor.wandb_writer import WandbWriter

__all__ = ["JsonlWriter", "PrometheusWriter", "TensorBoardWriter", "WandbWriter", "Writer", "build_writers"]


class Writer(Protocol):
    """A destination for metrics."""

    def write(self, record: Record) -> None:
        """Write the metrics of a step; one record per step, in the order of the steps."""

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Write a text: of a step, or, without one, for this start of the run: the resolved config, the environment."""

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Write histograms of a step, by tag."""

    def close(self) -> None:
        """Write what is pending; nothing may be written afterwards."""


def build_writers(
    monitor: MonitorConfig,
    output_dir: Path | str,
    resume_step: int | None = None,
    hparams: Mapping[str, HParam] | None = None,
) -> list[Writer]:
    """Open the writers of a run, after cutting what they hold back to the step that the run continues from.

    From then on a record that cannot be written is told and ends nothing.

    Args:
        monitor: which writers, and whether Megatron-DeepSpeed's names are written beside ours.
        output_dir: the run's directory: metrics.jsonl and tensorboard/ are in it.
        resume_step: the checkpoint's step; None for a new run, which keeps no record of an earlier one.
        hparams: what a sweep may vary, for TensorBoard's table of runs.

    Raises:
        ConfigError: if W&B or Prometheus is asked for and not installed, or the port is taken.
        OutputError: if metrics.jsonl cannot be written.
    """
    directory = Path(output_dir)
    series = [metrics.points, megatron_names.points] if monitor.megatron_names else [metrics.points]
    writers: list[Writer] = []
    # First those that may be missing, or whose port may be taken: nothing is cut back before that is known.
    if monitor.wandb:
        writers.append(WandbWriter(directory, resume_step, series))
    if monitor.prometheus_port is not None:
        writers.append(PrometheusWriter(directory.resolve().name, monitor.prometheus_port, monitor.prometheus_host))
    writers.append(JsonlWriter(directory / "metrics.jsonl", resume_step))
    if monitor.tensorboard:
        writers.append(TensorBoardWriter(directory / "tensorboard", resume_step, series, hparams))
    return [Tolerant(writer) for writer in writers]
