"""Config to a torch optimizer; DeepSpeed wraps it in ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from lmscale.config.implementation import choose_implementation
from lmscale.config.optim import OptimConfig
from lmscale.config.run import ZeroChoice
from lmscale.optim.adafactor import Adafactor
from lmscale.optim.adam import Adam
from lmscale.optim.elementwise import SGD, Elementwise, Lion
from lmscale.optim.muon import Muon
from lmscale.optim.row_adam import RowAdam


def build_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device, zero: ZeroChoice, entries: int = 1
) -> torch.optim.Optimizer:
    """Build the optimizer; its rate is written before each step, so it starts at 0.

    Args:
        groups: from `build_groups`.
        optim: the settings.
        device: where the parameters are.
        zero: whether its state lives in host memory, and the stage.
        entries: adaptations side by side; above 1, each is updated by its own rows alone.

    Raises:
        ConfigError: if optim.implementation cannot serve.
    """
    implementation = choose_implementation(optim, zero, has_gpu=device.type == "cuda").name
    if entries > 1 and optim.name == "adamw":
        return RowAdam(groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
    if optim.name in ("adamw", "adam"):
        in_host_memory = zero.offload_optimizer or device.type == "cpu"
        return _build_adam(groups, optim, implementation, in_host_memory)
    if optim.name == "sgd":
        return SGD(groups, momentum=optim.sgd_momentum, nesterov=optim.sgd_nesterov)
    if optim.name == "lion":
        return Lion(groups, betas=(optim.lion_beta1, optim.lion_beta2))
    if optim.name == "muon":
        return _build_muon(groups, optim)
    return Adafactor(
        groups,
        decay_exponent=optim.adafactor_decay_exponent,
        eps1=optim.adafactor_eps1,
        eps2=optim.adafactor_eps2,
        clip=optim.adafactor_clip,
        scale_parameter=optim.adafactor_scale_parameter,
        min_dim=optim.adafactor_min_dim,
        beta1=optim.adafactor_beta1,
    )


def _build_adam(
    groups: list[dict[str, Any]], optim: OptimConfig, implementation: str, in_host_memory: bool
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": 0.0, "betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_eps}
    is_decoupled, corrects = optim.name == "adamw", optim.adam_bias_correction
    if implementation == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=is_decoupled, bias_correction=corrects, **settings)
    if implementation == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if in_host_memory:
            return DeepSpeedCPUAdam(groups, adamw_mode=is_decoupled, bias_correction=corrects, **settings)
        return FusedAdam(groups, adam_w_mode=is_decoupled, bias_correction=corrects, **settings)
    raw_eps = optim.adam_eps_mode == "raw"
    if corrects and not raw_eps:
        kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam
        return kind(groups, fused=True, **settings)
    return Adam(groups, bias_correction=corrects, raw_eps=raw_eps, decoupled=is_decoupled, **settings)


def _build_muon(groups: list[dict[str, Any]], optim: OptimConfig) -> Muon:
    return Muon(
        groups,
        momentum=optim.muon_momentum,
        nesterov=optim.muon_nesterov,
        num_steps=optim.muon_steps,
        scale=optim.muon_scale,
        dtype=torch.bfloat16 if optim.muon_precision == "bf16" else torch.float32,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        bias_correction=optim.adam_bias_correction,
        raw_eps=optim.adam_eps_mode == "raw",
    )


def set_rate(optimizer: Any, lr: float) -> None:
    """Write the rate of the next step to every group, times the group's multiplier.

    `optimizer` is torch's or DeepSpeed's around it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def set_weight_decay(optimizer: Any, weight_decay: float) -> None:
    """Write the weight decay of the next step to every group, times the group's multiplier (see `build_groups`)."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]


def blank_state(optimizer: torch.optim.Optimizer, key: torch.Tensor, step: int) -> dict[str, Any]:
    """Make the state that an optimizer keeps for one tensor after `step` updates, its moments still zero.

    An optimizer makes its state at its first update; a checkpoint is loaded before that.
    """
    if isinstance(optimizer, Adafactor | Elementwise):
        return optimizer.blank_state(key, step)
    moments = {name: torch.zeros_like(key, dtype=torch.float32) for name in moment_names(optimizer, key)}
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam):
        return {"step": torch.tensor(float(step), dtype=torch.float32, device=key.device), **moments}
    if _is_apex(optimizer):
        for group in optimizer.param_groups:
            group["step"] = step
        return moments
    return {"step": step, **moments}


def moment_names(optimizer: torch.optim.Optimizer, key: torch.Tensor) -> tuple[str, ...]:
    """Name the tensors of an optimizer's state of `key` that have its shape; Adafactor's have shapes of their own."""
    if isinstance(optimizer, Muon):
        return optimizer.moments_of(key)
    return optimizer.moments if isinstance(optimizer, Elementwise) else Adam.moments


def update_count(optimizer: torch.optim.Optimizer) -> int:
    """Count the updates that an optimizer has made: steps less the skipped ones."""
    counters = [*optimizer.state.values(), *(optimizer.param_groups if _is_apex(optimizer) else ())]
    return max((int(counter["step"]) for counter in counters if "step" in counter), default=0)


def _is_apex(optimizer: torch.optim.Optimizer) -> bool:
    """Tell apex's Adam, which counts updates in its groups."""
    return type(optimizer).__module__.partition(".")[0] == "apex"
