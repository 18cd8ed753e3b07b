"""The planner's bytes for a run whose layout is chosen, and the lines that say them."""

from __future__ import annotations

from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.plan.candidates import Candidate, step_shape
from lmscale.plan.memory import DeviceBytes

_MIB, _GIB = 2**20, 2**30


def chosen_layout(
    config: RunConfig, zero: ZeroChoice, dp_size: int, *, device_type: str, batch_size: int | None = None
) -> Candidate:
    """Describe a run's own layout to the planner.

    Args:
        config: the run.
        zero: what its DeepSpeed keys say about the layout.
        dp_size: data-parallel ranks.
        device_type: cuda or cpu.
        batch_size: of the step, in a batch ramp; left out, batch.global_batch_size.
    """
    return Candidate(step_shape(config, dp_size, device_type=device_type, batch_size=batch_size), dp_size, zero)


def memory_line(memory: DeviceBytes, stage: int, pp_size: int) -> str:
    """Write the bytes of a device by kind: "memory: 3.21 GiB a device (parameters 1.02 GiB, ...)"."""
    where = f" of stage {stage}, the fullest," if pp_size > 1 else ""
    kinds = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
        "buffers": memory.buffers,
        "allowance": memory.allowance,
    }
    parts = ", ".join(f"{kind} {size(count)}" for kind, count in kinds.items() if count)
    return f"memory: a device{where} needs {size(memory.total)} by the plan ({parts})"


def size(count: float) -> str:
    """Write bytes with their unit, to three figures."""
    return f"{count / _GIB:.3g} GiB" if count >= _GIB else f"{count / _MIB:.3g} MiB"
