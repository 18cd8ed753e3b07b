"""Whose code updates the parameters and whose normalizes: checked before any rank starts, chosen where the device is known."""

from __future__ import annotations

from dataclasses import dataclass

from lmscale.config.nvidia_apex import apex_problem
from lmscale.config.optim import OptimConfig
from lmscale.config.run import ZeroChoice
from lmscale.config.train import TrainConfig
from lmscale.errors import ConfigError


@dataclass(frozen=True)
class Implementation:
    """A choice and its reason."""

    name: str
    """apex, deepspeed or torch, the last with lmscale's own optimizers over torch."""
    because: str
    """Why, for the run's first lines."""


def choose_implementation(
    optim: OptimConfig, zero: ZeroChoice, *, has_gpu: bool | None, elsewhere: bool = False
) -> Implementation:
    """Choose the implementation of an optimizer.

    Args:
        optim: the settings.
        zero: what DeepSpeed's JSON says; state may be in host memory.
        has_gpu: whether ranks run on a GPU; None where that is not known yet, and is not a reason to refuse.
        elsewhere: the run is planned for other machines than this one, so what is installed here does not matter.

    Raises:
        ConfigError: if the one that is asked for cannot serve the settings, or is not installed.
    """
    if optim.implementation == "auto":
        return _choose(optim, zero, has_gpu)
    problem = _problem(optim.implementation, optim, zero, has_gpu, elsewhere)
    if problem is not None:
        raise ConfigError(
            problem, field="optim.implementation", value=optim.implementation, remedy="use auto, or torch"
        )
    return Implementation(optim.implementation, "optim.implementation asks for it")


def choose_norms(train: TrainConfig, *, has_gpu: bool | None, elsewhere: bool = False) -> Implementation:
    """Choose whose kernels normalize: apex or torch.

    Args:
        train: train.fused_norms and train.compile.
        has_gpu: whether ranks run on a GPU; None where that is not known yet, and is not a reason to refuse.
        elsewhere: as of choose_implementation.

    Raises:
        ConfigError: if apex is asked for and cannot serve.
    """
    if train.fused_norms == "torch":
        return Implementation("torch", "train.fused_norms asks for it")
    problem = "would cut the compiled layers" if train.compile else None
    if has_gpu is False:
        problem = "computes on a GPU, and the ranks run on the CPU"
    problem = problem or (None if elsewhere else apex_problem("norms"))
    if train.fused_norms == "auto":
        return (
            Implementation("apex", "it is installed") if problem is None else Implementation("torch", f"apex {problem}")
        )
    if problem is not None:
        raise ConfigError(problem, field="train.fused_norms", value="apex", remedy="use auto, or torch")
    return Implementation("apex", "train.fused_norms asks for it")


def _choose(optim: OptimConfig, zero: ZeroChoice, has_gpu: bool | None) -> Implementation:
    if optim.name not in ("adamw", "adam"):
        return Implementation("torch", f"{optim.name} has no other")
    if zero.offload_optimizer:
        problem = _problem("deepspeed", optim, zero, has_gpu)
        if problem is None:
            return Implementation("deepspeed", "the optimizer's state is in host memory")
        return Implementation("torch", f"DeepSpeed's {problem}")
    if not has_gpu:
        return Implementation("torch", "the ranks run on the CPU")
    problem = _problem("apex", optim, zero, has_gpu)
    return Implementation("apex", "it is installed") if problem is None else Implementation("torch", f"apex {problem}")


def _problem(
    name: str, optim: OptimConfig, zero: ZeroChoice, has_gpu: bool | None, elsewhere: bool = False
) -> str | None:
    """Say why an implementation cannot serve; None where it can."""
    if name == "torch":
        return None
    if optim.name not in ("adamw", "adam"):
        return (
            _NOT_DEEPSPEEDS.get(optim.name, f"has no {optim.name}") if name == "deepspeed" else f"has no {optim.name}"
        )
    if optim.adam_eps_mode == "raw":
        return "has no optim.adam_eps_mode: raw"
    if name == "deepspeed":
        return None
    if zero.offload_optimizer:
        return "updates on the GPU, and offload_optimizer keeps the state in host memory"
    if zero.stage == 3:
        return "counts updates by groups, which ZeRO 3 updates in parts: its bias correction would be wrong"
    if has_gpu is False:
        return "updates on a GPU, and the ranks run on the CPU"
    return None if elsewhere else apex_problem("adam")


_NOT_DEEPSPEEDS = {
    "lion": "moves values without a gradient in its Lion, against the paper",
    "muon": "has a Muon that is tied to its own engine's groups",
}
