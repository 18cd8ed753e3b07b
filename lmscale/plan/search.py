"""Every legal layout of a run on a number of devices: which fit the memory, and how long a step takes on them.

Left out, because another row is at least as good: more recompute than the memory asks for, and offload where the memory
does without.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.model import ModelConfig
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.adapted_size import stage_sizes
from lmscale.plan.candidates import Candidate, Refusal, Shape, shapes, step_shape, with_micro_batch, zero_choices
from lmscale.plan.communication import Traffic, step_traffic
from lmscale.plan.device_types import DeviceType
from lmscale.plan.flops import model_flops_per_token
from lmscale.plan.memory import DeviceBytes, device_bytes, moment_width, zero_bytes
from lmscale.plan.params import num_parameters
from lmscale.plan.stages import StageSize, stage_parameters
from lmscale.plan.step_time import StepTime, predict_step_seconds

CONTEXT_BYTES = 1.5e9
"""Memory of a GPU that driver, kernels and communication library take, and no tensor can have."""
_NEAR, _MOST_TRIED = 64, 16_384
RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True)
class PlanRow:
    """A layout that fits, and what it costs."""

    candidate: Candidate
    stage: int
    """The stage whose devices are fullest."""
    memory: DeviceBytes
    """What each of them holds."""
    time: StepTime
    model: ModelConfig
    mfu_fraction: float
    tokens_per_second: float
    train_seconds: float
    """For train.train_tokens."""
    device_hours: float
    checkpoint_bytes: int
    """Master weights and moments, as checkpoints hold them."""

    @functools.cached_property
    def traffic(self) -> list[Traffic]:
        """What a rank in the middle of the pipeline sends in a step."""
        step, middle = self.candidate.step, self.candidate.step.pp_size // 2
        return step_traffic(
            self.model,
            step,
            dp_size=self.candidate.dp_size,
            zero_stage=self.candidate.zero.stage,
            stage=middle,
            num_parameters=stage_parameters(self.model, step.tp_size, step.pp_size)[middle],
        )

    @property
    def bubble_fraction(self) -> float:
        """Share of the step that a pipeline's devices stand idle."""
        return self.time.bubble / self.time.total

    def axis_bytes(self, axis: str) -> float:
        """Bytes that a rank sends on an axis in a step."""
        return sum(message.wire_bytes for message in self.traffic if message.axis == axis)


@dataclass
class Search:
    """What a search found."""

    rows: list[PlanRow]
    """Those that fit, the fastest first."""
    num_looked_at: int = 0
    nearest: tuple[Candidate, float, str] | None = None
    """Of the layouts that do not fit, the one that exceeds a memory least, by how many bytes, and which memory."""
    refusal: ConfigError | None = None
    """Why no shape is legal."""

    def missed(self, candidate: Candidate, excess: float, memory: str) -> None:
        """Note a layout that does not fit."""
        if self.nearest is None or excess < self.nearest[1]:
            self.nearest = (candidate, excess, memory)


def usable_bytes(device: DeviceType) -> float:
    """Return what tensors can have of a device's memory."""
    return device.memory_bytes - (0 if device.name == "cpu" else CONTEXT_BYTES)


def search(config: RunConfig, num_devices: int, device: DeviceType, *, stop_at_first: bool = False) -> Search:
    """Rank the legal layouts of a run by the predicted time of a step.

    Args:
        config: the run; its layout, micro batch, recompute and ZeRO stage are not read.
        num_devices: ranks.
        device: what they run on.
        stop_at_first: only ask whether one fits.

    Raises:
        ConfigError: if the device does not compute in the run's precision.
    """
    found = Search([])
    own = check_deepspeed(load_deepspeed(config.deepspeed), config)
    legal, refusals = shapes(config, num_devices, device.devices_per_node)
    if not legal:
        found.refusal = _nearest_refusal(config, num_devices, device, refusals)
    for shape in legal:
        for choices in zero_choices(shape, own):
            for row in _rows(shape, choices, device, found):
                found.rows.append(row)
                if stop_at_first:
                    return found
    found.rows.sort(key=lambda row: row.time.total)
    return found


def no_layout(found: Search, num_devices: int, device: DeviceType) -> ConfigError:
    """Say why a search came back empty: which constraint failed for the nearest layout."""
    if found.nearest is None:
        return found.refusal or ConfigError("has no legal layout", field="--devices", value=num_devices)
    candidate, excess, memory = found.nearest
    return ConfigError(
        f"no layout fits {device.name}: the nearest, {candidate}, needs {excess / 2**30:.1f} GiB more than {memory}",
        field="--devices",
        value=num_devices,
        remedy="use more or larger devices (--fewest finds how many), or a smaller model (--largest finds which)",
    )


def _nearest_refusal(
    config: RunConfig, num_devices: int, device: DeviceType, refusals: list[Refusal]
) -> ConfigError | None:
    """Name the rule that the nearest shape breaks, and the numbers of devices near to this one that have a legal shape.

    Nearest is what divides the model and leaves the fewest data-parallel ranks to divide the batch by. A rule that all
    shapes break in the same words is one of the run, which no number of devices mends: it is the answer itself.
    """
    if not refusals:
        return None
    if len({str(error) for _, error in refusals}) == 1:
        return refusals[0][1]
    of_batch = [refusal for refusal in refusals if (refusal[1].field or "").startswith("batch.")]
    name, error = (of_batch or refusals)[-1]
    near = _NEAR if num_devices <= _MOST_TRIED else 0
    others = [
        next((number for number in numbers if shapes(config, number, device.devices_per_node)[0]), None)
        for numbers in (
            range(num_devices - 1, max(0, num_devices - near), -1),
            range(num_devices + 1, num_devices + near),
        )
    ]
    counts = " or ".join(str(number) for number in others if number is not None)
    return ConfigError(
        f"no layout is legal; the nearest is {name}, and {error.field} = {error.value} {error.rule}",
        field="--devices",
        value=num_devices,
        remedy=f"use {counts} devices" if counts else "--fewest finds how many serve",
    )


def _rows(shape: Shape, choices: list[ZeroChoice], device: DeviceType, found: Search) -> Iterator[PlanRow]:
    """Yield what fits of a ZeRO stage: each micro batch with the least recompute; offload where nothing fits without."""
    for zero in choices:
        fits = False
        for micro in shape.micro_batch_sizes:
            row = _with_least_recompute(shape, zero, micro, device, found)
            if row is None:
                break  # a larger micro batch holds more
            fits = True
            yield row
        if fits:
            return


def _with_least_recompute(
    shape: Shape, zero: ZeroChoice, micro: int, device: DeviceType, found: Search
) -> PlanRow | None:
    config = shape.config
    kind = "cpu" if device.name == "cpu" else "cuda"
    step = step_shape(with_micro_batch(config, micro), shape.dp_size, device_type=kind)
    for recompute in RECOMPUTES:
        candidate = Candidate(replace(step, recompute=recompute), shape.dp_size, zero)
        stage, memory = fullest_stage(config, candidate)
        found.num_looked_at += 1
        lacks_host = host_bytes(config, candidate) - device.host_memory_bytes
        if memory.total <= usable_bytes(device) and lacks_host <= 0:
            return plan_row(config, candidate, device, stage, memory)
    lacks = memory.total - usable_bytes(device)
    if lacks >= lacks_host:
        found.missed(candidate, lacks, f"the {usable_bytes(device) / 2**30:.1f} GiB that a device has for tensors")
    else:
        found.missed(candidate, lacks_host, f"a device's {device.host_memory_bytes / 2**30:.1f} GiB of host memory")
    return None


def host_bytes(config: RunConfig, candidate: Candidate) -> int:
    """Count what a device offloads to its host: optimizer state and fp32 gradients, and the parameters."""
    step, zero = candidate.step, candidate.zero
    if not zero.offload_optimizer:
        return 0
    sizes = stage_sizes(config.model, config.optim, adaptation_of(config), step.tp_size, step.pp_size)
    width = moment_width(config.optim, config.model)

    def of_stage(size: StageSize) -> int:
        states = zero_bytes(
            size.held, candidate.dp_size, zero.stage, config.precision, moment_width=width, num_trainable=size.trained
        )
        gradients = 4 * size.trained // candidate.dp_size
        return states.optimizer + gradients + (states.parameters if zero.offload_param else 0)

    return max(of_stage(size) for size in sizes)


def fullest_stage(config: RunConfig, candidate: Candidate) -> tuple[int, DeviceBytes]:
    """Find the pipeline stage whose devices hold most: an end, or where the decoder begins."""
    pp_size, zero = candidate.step.pp_size, candidate.zero
    sizes = stage_sizes(config.model, config.optim, adaptation_of(config), candidate.step.tp_size, pp_size)
    stages = {
        stage: device_bytes(
            config.model,
            candidate.step,
            dp_size=candidate.dp_size,
            zero_stage=zero.stage,
            stage=stage,
            moment_width=moment_width(config.optim, config.model),
            offload_optimizer=zero.offload_optimizer,
            offload_param=zero.offload_param,
            reduce_bucket=zero.reduce_bucket,
            live_parameters=zero.live_parameters,
            size=sizes[stage],
        )
        for stage in sorted({0, pp_size // 2, pp_size - 1})
    }
    return max(stages.items(), key=lambda item: item[1].total)


def plan_row(config: RunConfig, candidate: Candidate, device: DeviceType, stage: int, memory: DeviceBytes) -> PlanRow:
    """Predict what a layout costs in time."""
    step, zero, model = candidate.step, candidate.zero, config.model
    width = moment_width(config.optim, config.model)
    time = predict_step_seconds(
        model,
        step,
        device,
        dp_size=candidate.dp_size,
        zero_stage=zero.stage,
        moment_width=width,
        offload_optimizer=zero.offload_optimizer,
        offload_param=zero.offload_param,
    )
    num_devices = step.tp_size * step.pp_size * candidate.dp_size
    tokens_per_second = config.batch.global_batch_size * step.lengths.nominal / time.total
    peak = device.flops_per_second[config.precision] * num_devices
    train_seconds = config.train.train_tokens / tokens_per_second
    return PlanRow(
        candidate=candidate,
        stage=stage,
        memory=memory,
        time=time,
        model=model,
        mfu_fraction=model_flops_per_token(model, step.lengths, prefix_length=step.prefix_length)
        * tokens_per_second
        / peak,
        tokens_per_second=tokens_per_second,
        train_seconds=train_seconds,
        device_hours=train_seconds / 3600 * num_devices,
        checkpoint_bytes=round((4 + width) * num_parameters(model, padded=True)),
    )
