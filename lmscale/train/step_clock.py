"""What a step takes on each rank, how much of that the rank waits for others, and the pipeline's bubble: monitor.step_times.

All ranks end a step together, so the time of a step names no slow one. What differs is a rank's own time:

    own = step - waiting

with waiting the time in torch.distributed's Work.wait, through which every collective and every transfer of this stack
passes. On a CPU that is the host's time; on a GPU, whose work runs behind the host, it is what the stream stands still,
between two events around the wait. The slowest rank is the one of the largest own time: the others wait for it.

    bubble of a rank = 1 - busy / span

with busy the time of its forward and backward passes and span the longest time of a rank from the first instruction of the
schedule to the end of its last backward pass. 1F1B of equal stages has (p - 1) / (m + p - 1) on each rank, with m micro
batches and p stages (Narayanan et al. 2021, arXiv:2104.04473, sec. 2.2); communication and unequal stages add to it.
"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lmscale.train.engine import Engine

_WARM_UP_STEPS = 1
"""Of a process: buffers are made and kernels chosen in them."""
_FIELDS = ("steps", "step_s", "waiting_s", "busy_s", "span_s")


@dataclass(frozen=True)
class RankTime:
    """Means over the measured steps of a rank.

    bubble_fraction is None without a pipeline.
    """

    rank: int
    host: str
    step_s: float
    own_s: float
    waiting_s: float
    bubble_fraction: float | None


class StepClock:
    """Measures the steps of this rank while it is open.

    Args:
        engine: of the run.

    Collectives: a gather of the hosts' names; every rank must make one, and `close` it.
    """

    def __init__(self, engine: Engine):
        topology = engine.topology
        self._engine, self._timer = engine, _Timer(topology.device)
        self._is_pipeline = topology.pp_size > 1
        self._hosts: list[str] = [""] * topology.world_size
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._left_to_warm_up = _WARM_UP_STEPS
        self._window = dict.fromkeys(_FIELDS, 0.0)
        self._totals = torch.zeros(topology.world_size, len(_FIELDS), dtype=torch.float64)
        self._is_open = False
        self._wait = dist.Work.wait
        dist.Work.wait = self._timed_wait(dist.Work.wait)
        if self._is_pipeline:
            self._time_instructions()

    def close(self) -> None:
        """Leave torch.distributed and the engine as they were."""
        dist.Work.wait = self._wait
        if self._is_pipeline:
            del self._engine.deepspeed._INSTRUCTION_MAP  # the class's own shows again

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a step in this."""
        self._timer.clear()
        self._is_open = True
        try:
            with self._timer.measured("step"):
                yield
        finally:
            self._is_open = False
        if self._left_to_warm_up:
            self._left_to_warm_up -= 1
            return
        found = self._timer.read()
        self._window["steps"] += 1
        self._window["step_s"] += sum(found.get("step", ()))
        self._window["waiting_s"] += sum(found.get("wait", ()))
        self._window["busy_s"] += sum(found.get("busy", ()))
        self._window["span_s"] += self._timer.span("instruction", "busy")

    def gather(self) -> tuple[list[RankTime], list[RankTime], int]:
        """Bring the times of all ranks together, and begin a new window.

        Returns:
            (by rank, of the window; by rank, of all windows; measured steps of those); empty lists without a step.
        Collectives: a gather of five numbers; every rank must call.
        """
        ours = torch.tensor([self._window[name] for name in _FIELDS], dtype=torch.float64)
        self._window = dict.fromkeys(_FIELDS, 0.0)
        device = self._engine.topology.device
        gathered = [torch.zeros_like(ours, device=device) for _ in self._hosts]
        dist.all_gather(gathered, ours.to(device))
        window = torch.stack(gathered).cpu()
        self._totals += window
        return self._ranks(window), self._ranks(self._totals), int(self._totals[0, 0])

    def _ranks(self, sums: torch.Tensor) -> list[RankTime]:
        steps = float(sums[0, 0])
        if not steps:
            return []
        span_s = float(sums[:, 4].max())
        return [
            RankTime(
                rank,
                self._hosts[rank],
                step_s / steps,
                (step_s - waiting_s) / steps,
                waiting_s / steps,
                1 - busy_s / span_s if self._is_pipeline and span_s else None,
            )
            for rank, (_, step_s, waiting_s, busy_s, _) in enumerate(sums.tolist())
        ]

    def _timed_wait(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(wait)
        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._is_open:
                return wait(work, *args, **kwargs)
            with self._timer.measured("wait"):
                return wait(work, *args, **kwargs)

        return timed

    def _time_instructions(self) -> None:
        from deepspeed.runtime.pipe import schedule

        busy = {schedule.ForwardPass, schedule.BackwardPass}
        behind = {schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep}

        def timed(kind: type, run: Callable[..., Any]) -> Callable[..., Any]:
            if kind in behind:
                return run
            name = "busy" if kind in busy else "instruction"

            @functools.wraps(run)
            def run_timed(engine: Any, *args: Any, **kwargs: Any) -> Any:
                with self._timer.measured(name):
                    return run(engine, *args, **kwargs)

            return run_timed

        engine = self._engine.deepspeed
        engine._INSTRUCTION_MAP = {kind: timed(kind, run) for kind, run in engine._INSTRUCTION_MAP.items()}


class _Timer:
    """Marks moments: of the host on a CPU, of the current stream on a GPU, which are read when the step is done."""

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def clear(self) -> None:
        """Forget what was measured."""
        self._marks.clear()

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure the block."""
        start = self._now()
        try:
            yield
        finally:
            self._marks.append((name, start, self._now()))

    def read(self) -> dict[str, list[float]]:
        """Return the seconds of each block, by name. A GPU is waited for."""
        if self._is_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for name, start, end in self._marks:
            found.setdefault(name, []).append(self._between(start, end))
        return found

    def span(self, *names: str) -> float:
        """Return the seconds from the beginning of the first to the end of the last of some blocks; 0 without any."""
        marks = [(start, end) for name, start, end in self._marks if name in names]
        return self._between(marks[0][0], marks[-1][1]) if marks else 0.0

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._is_gpu else end - start
