"""What the planner said of a run beside what the run measures, once, some steps after its start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.adapted_size import stage_sizes
from lmscale.plan.candidates import Candidate
from lmscale.plan.device_types import DEVICE_TYPES, DeviceType, reported_type
from lmscale.plan.memory import DeviceBytes, StateBytes, device_bytes, moment_width, zero_bytes
from lmscale.plan.run_memory import chosen_layout, size
from lmscale.plan.stages import StageSize
from lmscale.plan.step_time import predict_step_seconds
from lmscale.train.engine import Engine
from lmscale.train.memory import state_bytes

REPORT_AT = 10
"""Steps of this process after which the plan is compared."""
_TIMED_FROM = 5
"""Steps before this one warm up."""


class Forecast:
    """Times the first steps of a process and then writes prediction and measurement side by side.

    On a GPU the measured memory is the most that torch has allocated, to be compared with the plan without its allowance
    for fragmentation. On a CPU nobody counts what torch has allocated, and the process's resident memory holds the
    interpreter and its libraries too: there the training state alone is compared, counted on its tensors.
    """

    def __init__(self, config: RunConfig, engine: Engine):
        self._config, self._engine = config, engine
        self._zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
        self._seconds: list[float] = []
        self._is_told = False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a step; it is over when a value of its has been read from the device."""
        if len(self._seconds) >= REPORT_AT:
            yield
            return
        start = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - start)

    def lines(self, batch_size: int) -> list[str]:
        """Return the comparison behind step REPORT_AT of this process, nothing behind every other.

        Args:
            batch_size: of the step just done.
        """
        if len(self._seconds) < REPORT_AT or self._is_told or self._config.data.seq_length_stages:
            return []  # a curriculum's first steps are shorter than what is planned
        self._is_told = True
        topology = self._engine.topology
        layout = chosen_layout(
            self._config, self._zero, topology.dp_size, device_type=topology.device.type, batch_size=batch_size
        )
        return list(filter(None, (self._memory(layout), self._time(layout))))

    def _memory(self, layout: Candidate) -> str:
        engine, topology = self._engine, self._engine.topology
        planned: DeviceBytes = device_bytes(
            self._config.model,
            layout.step,
            dp_size=layout.dp_size,
            zero_stage=layout.zero.stage,
            stage=topology.pp_rank,
            moment_width=moment_width(self._config.optim, self._config.model),
            offload_optimizer=layout.zero.offload_optimizer,
            offload_param=layout.zero.offload_param,
            reduce_bucket=layout.zero.reduce_bucket,
            live_parameters=layout.zero.live_parameters,
            size=self._size(layout),
        )
        held, states = state_bytes(engine), self._states(layout)
        expected = states.parameters + states.optimizer
        found = (
            f"plan: parameters and optimizer state on rank {topology.rank}: {size(expected)} predicted, "
            f"{size(held.parameters + held.optimizer)} measured on the tensors; "
        )
        if topology.device.type == "cuda":
            peak = planned.total - planned.allowance
            return found + f"peak of a step {size(peak)} predicted, {size(engine.peak_bytes())} allocated at most"
        beside = f"the process holds {size(engine.peak_bytes())}, interpreter and libraries included"
        return found + f"peak of a step {size(planned.total - planned.allowance)} predicted, {beside}"

    def _states(self, layout: Candidate) -> StateBytes:
        """Predict the training state, wherever it is kept."""
        size, width = self._size(layout), moment_width(self._config.optim, self._config.model)
        return zero_bytes(
            size.held,
            layout.dp_size,
            layout.zero.stage,
            layout.step.precision,
            moment_width=width,
            num_trainable=size.trained,
        )

    def _size(self, layout: Candidate) -> StageSize:
        config, step = self._config, layout.step
        sizes = stage_sizes(config.model, config.optim, adaptation_of(config), step.tp_size, step.pp_size)
        return sizes[self._engine.topology.pp_rank]

    def _time(self, layout: Candidate) -> str | None:
        kind = device_type_here(self._engine.topology.device)
        if kind is None:
            return None
        try:
            predicted = predict_step_seconds(
                self._config.model,
                layout.step,
                kind,
                dp_size=layout.dp_size,
                zero_stage=layout.zero.stage,
                moment_width=moment_width(self._config.optim, self._config.model),
                offload_optimizer=layout.zero.offload_optimizer,
                offload_param=layout.zero.offload_param,
            ).total
        except ConfigError:  # a precision that the table of devices does not have
            return None
        measured = statistics.median(self._seconds[_TIMED_FROM:REPORT_AT])
        name = "cpu, a core of an ordinary machine that is not calibrated" if kind.name == "cpu" else kind.name
        return f"plan: a step takes {predicted:.3g} s predicted for {name}, {measured:.3g} s measured"


def device_type_here(device: torch.device) -> DeviceType | None:
    """Find the planner's type of this rank's device: by its name, and of two sizes of one by its memory.

    A CPU is the planner's core of an ordinary machine. None for what the planner does not know.
    """
    if device.type == "cpu":
        return DEVICE_TYPES["cpu"]
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return reported_type(properties.name, properties.total_memory)
