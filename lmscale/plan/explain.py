"""A plan's row in words and numbers: JSON, and the formulas with their sources, filled in."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lmscale.config.run import RunConfig
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.adapted_size import stage_sizes
from lmscale.plan.device_types import DeviceType
from lmscale.plan.flops import forward_flops_per_token, hardware_flops_per_token, model_flops_per_token
from lmscale.plan.memory import moment_width, zero_bytes
from lmscale.plan.params import num_parameters
from lmscale.plan.search import PlanRow
from lmscale.plan.step_time import LINK_FRACTION, MEMORY_FRACTION, link_rates

AXES = ("tensor", "pipeline", "data")
GIB = 2**30


def as_json(row: PlanRow) -> dict[str, Any]:
    """Return a row as plain values: bytes, seconds, fractions."""
    step, zero = row.candidate.step, row.candidate.zero
    return {
        "layout": {
            "tp_size": step.tp_size,
            "pp_size": step.pp_size,
            "dp_size": row.candidate.dp_size,
            "zero_stage": zero.stage,
            "micro_batch_size": step.micro_batch_size,
            "num_micro_batches": step.num_micro_batches,
            "recompute": step.recompute,
            "sequence_parallel": step.sequence_parallel,
            "offload_optimizer": zero.offload_optimizer,
            "offload_param": zero.offload_param,
        },
        "fullest_stage": row.stage,
        "device_bytes": {**asdict(row.memory), "total": row.memory.total},
        "step_seconds": {**asdict(row.time), "total": row.time.total},
        "bubble_fraction": row.bubble_fraction,
        "communication_bytes": {axis: row.axis_bytes(axis) for axis in AXES},
        "mfu_fraction": row.mfu_fraction,
        "tokens_per_second": row.tokens_per_second,
        "train_days": row.train_seconds / 86400,
        "device_hours": row.device_hours,
        "checkpoint_bytes": row.checkpoint_bytes,
    }


def explain(config: RunConfig, row: PlanRow, device: DeviceType) -> list[str]:
    """List the formulas behind a row, each with its numbers and its source."""
    return [
        f"layout: {row.candidate}",
        *_memory(config, row),
        *_time(config, row, device),
        *_communication(row, device),
        *_result(config, row, device),
    ]


def _memory(config: RunConfig, row: PlanRow) -> list[str]:
    step, zero = row.candidate.step, row.candidate.zero
    sizes = stage_sizes(config.model, config.optim, adaptation_of(config), step.tp_size, step.pp_size)
    size = sizes[row.stage]
    width = moment_width(config.optim, config.model)
    states = zero_bytes(
        size.held,
        row.candidate.dp_size,
        zero.stage,
        config.precision,
        moment_width=width,
        num_trainable=size.trained,
    )
    memory = row.memory
    trained = "" if size.trained == size.held else f", trained {size.trained:,}"
    lines = [
        f"memory of a device of stage {row.stage}, the fullest:",
        f"  parameters held N = {size.held:,} of {num_parameters(config.model, padded=True):,} (plan.stages){trained}",
        f"  states, ZeRO {zero.stage} over {row.candidate.dp_size}: parameters {_gib(states.parameters)}, gradients "
        f"{_gib(states.gradients)}, optimizer {_gib(states.optimizer)} (Rajbhandari et al. 2020, sec. 5; DeepSpeed's sums)",
        f"  activations of {min(step.pp_size - row.stage, step.num_micro_batches)} micro batches in flight, recompute "
        f"{step.recompute}: {_gib(memory.activations)}; logits {_gib(memory.logits)} (Korthikanti et al. 2022, sec. 4; "
        "plan.activations)",
        f"  communication buffers {_gib(memory.buffers)}, fragmentation {_gib(memory.allowance)}",
        f"  total {_gib(memory.total)}",
    ]
    if zero.offload_optimizer:
        lines.insert(-1, "  offloaded to the host: optimizer" + (" and parameters" if zero.offload_param else ""))
    return lines


def _time(config: RunConfig, row: PlanRow, device: DeviceType) -> list[str]:
    step, time = row.candidate.step, row.time
    peak = device.flops_per_second[config.precision]
    prefix = step.prefix_length
    forward = sum(forward_flops_per_token(config.model, step.lengths, prefix_length=prefix).values())
    training = model_flops_per_token(config.model, step.lengths, prefix_length=prefix)
    executed = hardware_flops_per_token(config.model, step.lengths, step.recompute, prefix_length=prefix)  # type: ignore[arg-type]
    repeats, stages = step.num_micro_batches, step.pp_size
    return [
        "seconds of a step = m beat + (p - 1) beat + data + optimizer (Narayanan et al. 2021, sec. 2.2):",
        f"  m = {repeats} micro batches, p = {stages} stages, beat = {time.beat / repeats:.4g} s",
        f"  FLOPs of a token: forward {forward:.4g}, training {training:.4g}, executed {executed:.4g} (PaLM, app. B)",
        f"  matmul {time.matmul:.4g} s, core attention {time.core:.4g} s: at {device.matmul_fraction} x {peak / 1e12:.0f} "
        f"TFLOP/s of {device.name}",
        f"  memory {time.memory:.4g} s: at {MEMORY_FRACTION} x {device.memory_bytes_per_second / 1e9:.0f} GB/s",
        f"  tensor {time.tensor:.4g} s, pipeline {time.pipeline:.4g} s, data {time.data:.4g} s, "
        f"optimizer {time.optimizer:.4g} s",
        f"  bubble (p - 1) / (m + p - 1) = {(stages - 1) / (repeats + stages - 1):.3f} of the beats: {time.bubble:.4g} s",
        f"  total {time.total:.4g} s",
    ]


def _communication(row: PlanRow, device: DeviceType) -> list[str]:
    rates = link_rates(row.candidate.step, device, row.candidate.dp_size)
    lines = [f"bytes that a rank sends in a step (plan.communication), at {LINK_FRACTION} x the links:"]
    for message in row.traffic:
        lines.append(
            f"  {message.axis}: {message.collective} of {message.num_bytes / 1e9:.4g} GB over {message.group_size} ranks, "
            f"{message.what}: {message.wire_bytes / 1e9:.4g} GB at {rates[message.axis] / 1e9:.0f} GB/s"
        )
    return lines if row.traffic else ["no communication: one rank"]


def _result(config: RunConfig, row: PlanRow, device: DeviceType) -> list[str]:
    batch, nominal = config.batch.global_batch_size, row.candidate.step.lengths.nominal
    return [
        f"tokens a second = {batch} x {nominal} / {row.time.total:.4g} = {row.tokens_per_second:,.0f}",
        f"MFU = training FLOPs of a token x tokens a second / (devices x peak) = {row.mfu_fraction:.3f}",
        f"days = {config.train.train_tokens:,} tokens / tokens a second = {row.train_seconds / 86400:.1f}; "
        f"{row.device_hours:,.0f} {device.name} hours",
        f"checkpoint = (4 + {moment_width(config.optim, config.model):.3g}) bytes a parameter = {_gib(row.checkpoint_bytes)}",
    ]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
