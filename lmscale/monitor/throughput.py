"""How fast the run trains: tokens and model FLOPs per second over a logging window, and what it waits for.

    step_time_s                 = active_s / steps
    tokens_per_second           = tokens / active_s               over all devices
    ..._per_device              = that / num_devices
    model_flops_per_second_...  = tokens_per_second_per_device * model_flops_per_token, each step with its own length
    mfu_fraction                = that / peak of one device
    hfu_fraction                = tokens_per_second_per_device * hardware_flops_per_token / peak
    data_wait_fraction          = waiting_s / active_s

active_s is the window's wall time without what was spent in `paused()`: evaluation and saving. A GPU runs behind the
host, so close a window only after reading a value from the device (the loss does), or its last step is cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lmscale.monitor import metrics


@dataclass(frozen=True)
class Work:
    """What a token costs, on what; from plan.flops and plan.devices."""

    num_devices: int
    model_flops_per_token: float
    hardware_flops_per_token: float
    peak_flops_per_second_per_device: float | None = None
    """None, where the device's peak is unknown: no MFU and no HFU are reported."""


class Throughput:
    """Measure windows of steps. A window begins with the object and with each `window()`.

    Args:
        work: devices and FLOPs per token.
        clock: seconds, monotonic; a test puts its own here.
    """

    def __init__(self, work: Work, clock: Callable[[], float] = time.perf_counter):
        self._work = work
        self._clock = clock
        self._pause_depth = 0
        self._paused_since_s = 0.0
        self.trained_s = 0.0
        """Seconds of all closed windows together."""
        self.restart()

    def restart(self) -> None:
        """Begin a new window now and forget the open one: after start-up, when its time says nothing."""
        self._start_s = self._clock()
        self._paused_s = self._waiting_s = 0.0
        self._steps = self._tokens = 0
        self._model_flops = self._hardware_flops = 0.0

    def step_done(self, tokens: int, work: Work | None = None) -> None:
        """Count a step.

        Args:
            tokens: tokens of the step over all devices: global batch size x nominal length.
            work: what a token of this step costs, where its length is not the run's.
        """
        work = work or self._work
        self._steps += 1
        self._tokens += tokens
        self._model_flops += tokens * work.model_flops_per_token
        self._hardware_flops += tokens * work.hardware_flops_per_token

    def pause(self) -> None:
        """Stop the clock; pauses nest."""
        if self._pause_depth == 0:
            self._paused_since_s = self._clock()
        self._pause_depth += 1

    def resume(self) -> None:
        """Let the clock run again."""
        self._pause_depth -= 1
        if self._pause_depth == 0:
            self._paused_s += self._clock() - self._paused_since_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the window: evaluation, saving."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting for data, which is part of the window. In a pause it does not count."""
        start_s = self._clock()
        try:
            yield
        finally:
            if self._pause_depth == 0:
                self._waiting_s += self._clock() - start_s

    def window(self) -> dict[str, float]:
        """Close the window, begin the next, and return the closed one's metrics by tag.

        Returns:
            This rank's perf/ tags; empty if the window holds no step. perf/data_wait_fraction is to be reduced over
            ranks by its maximum.
        """
        active_s = self._clock() - self._start_s - self._paused_s
        self.trained_s += active_s if self._steps else 0.0
        found = self._metrics(active_s) if self._steps and active_s > 0 else {}
        self.restart()
        return found

    def _metrics(self, active_s: float) -> dict[str, float]:
        work = self._work
        tokens_per_second = self._tokens / active_s
        per_device = tokens_per_second / work.num_devices
        model_flops, hardware_flops = (
            flops / active_s / work.num_devices for flops in (self._model_flops, self._hardware_flops)
        )
        found = {
            metrics.PERF_TOKENS_PER_SECOND: tokens_per_second,
            metrics.PERF_TOKENS_PER_SECOND_PER_DEVICE: per_device,
            metrics.PERF_MODEL_FLOPS_PER_SECOND_PER_DEVICE: model_flops,
            metrics.PERF_STEP_TIME_S: active_s / self._steps,
            metrics.PERF_DATA_WAIT_FRACTION: self._waiting_s / active_s,
        }
        peak = work.peak_flops_per_second_per_device
        if peak is not None:
            found[metrics.PERF_MFU_FRACTION] = model_flops / peak
            found[metrics.PERF_HFU_FRACTION] = hardware_flops / peak
        return found
