"""A timeline of some steps, operator by operator, for Perfetto (ui.perfetto.dev) or chrome://tracing: monitor.trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmscale.config.monitor import TraceConfig
from lmscale.log import get_logger

_log = get_logger(__name__)

DIRECTORY = "traces"


def trace_file(output_dir: Path, rank: int, first: int, last: int) -> Path:
    """Name a rank's timeline."""
    return output_dir / DIRECTORY / f"rank-{rank:04d}-steps-{first}-{last}.json.gz"


class Trace:
    """Records monitor.trace's steps on a rank that is asked to; torch's profiler exists for these and a step before.

    Args:
        config: which steps.
        output_dir: the run's directory.
        rank: this rank.
        device: of this rank.
        step: that the process begins behind; a run that goes on later than start_step records nothing.
    """

    def __init__(self, config: TraceConfig, output_dir: Path, rank: int, device: torch.device, step: int):
        self._config, self._output_dir, self._rank, self._device = config, output_dir, rank, device
        # The profiler warms up over the step before, where this process has it.
        self._begin = max(config.start_step - 1, step + 1)
        self._profiler: Any = None
        self._is_over = rank not in config.ranks or step >= config.start_step
        self._first = self._last = 0

    @property
    def _end(self) -> int:
        return self._config.start_step + self._config.num_steps - 1

    def before(self, step: int) -> None:
        """Begin to record, if this is the step, or the first behind it that is not skipped."""
        if self._profiler is not None and not self._last < step <= self._end:  # rewound, or the last step is skipped
            self._stop()
        if self._is_over or self._profiler is not None or not self._begin <= step <= self._end:
            return
        self._first = max(step, self._config.start_step)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        plan = torch.profiler.schedule(wait=0, warmup=self._first - step, active=self._end - self._first + 1, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profiler.start()

    def after(self, step: int) -> None:
        """Note that a step is done, and write the timeline behind the last one."""
        if self._profiler is None:
            return
        self._last = step
        self._profiler.step()
        if step >= self._end:
            self._stop()

    def close(self) -> None:
        """End the recording; what there is of it is written, and told where there is nothing."""
        if self._profiler is not None:
            self._stop()
        if not self._is_over:
            _log.warning("monitor.trace: none of the steps %d to %d was trained", self._config.start_step, self._end)
            self._is_over = True

    def _stop(self) -> None:
        self._profiler.stop()
        self._profiler, self._is_over = None, self._last >= self._first

    def _write(self, profiler: Any) -> None:
        if self._last < self._first:  # the profiler has only warmed up
            return
        path = trace_file(self._output_dir, self._rank, self._first, self._last)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _log.warning("%s cannot be written: %s; the run goes on without it", path, error)
        else:
            _log.info("timeline of steps %d to %d: %s", self._first, self._last, path)
