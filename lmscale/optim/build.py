"""Config to a torch optimizer; DeepSpeed wraps it in ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from lmscale.config.optim import OptimConfig
from lmscale.log import get_logger
from lmscale.optim.adafactor import Adafactor
from lmscale.optim.adam import Adam

_log = get_logger(__name__)


def build_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device, offload: bool
) -> torch.optim.Optimizer:
    """Build the optimizer; its rate is written before each step, so it starts at 0.

    Args:
        groups: from `build_groups`.
        optim: the settings.
        device: where the parameters are.
        offload: its state lives in host memory: DeepSpeed's CPU Adam.
    """
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    if optim.name == "adafactor":
        return Adafactor(
            groups,
            decay_exponent=optim.adafactor_decay_exponent,
            eps1=optim.adafactor_eps1,
            eps2=optim.adafactor_eps2,
            clip=optim.adafactor_clip,
            scale_parameter=optim.adafactor_scale_parameter,
            min_dim=optim.adafactor_min_dim,
        )
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_eps,
    }
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if optim.adam_bias_correction and optim.adam_eps_mode == "corrected":
        return torch.optim.AdamW(groups, fused=True, **settings)
    return Adam(groups, bias_correction=optim.adam_bias_correction, raw_eps=optim.adam_eps_mode == "raw", **settings)


def set_rate(optimizer: Any, lr: float) -> None:
    """Write the rate of the next step to every group; `optimizer` is torch's or DeepSpeed's around it."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def blank_state(optimizer: torch.optim.Optimizer, key: torch.Tensor, step: int) -> dict[str, Any]:
    """Make the state that an optimizer keeps for one tensor after `step` updates, its moments still zero.

    An optimizer makes its state at its first update; a checkpoint is loaded before that.
    """
    if isinstance(optimizer, Adafactor):
        return optimizer.blank_state(key, step)
    moments = {name: torch.zeros_like(key, dtype=torch.float32) for name in moment_names(optimizer)}
    if not moments:
        return {}
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": torch.tensor(float(step), dtype=torch.float32, device=key.device), **moments}
    return {"step": step, **moments}


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name the tensors of an optimizer's state that have the shape of the parameters."""
    return () if isinstance(optimizer, torch.optim.SGD | Adafactor) else ("exp_avg", "exp_avg_sq")
