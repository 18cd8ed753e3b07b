"""Config to a torch optimizer; DeepSpeed wraps it in ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from lmscale.config.optim import OptimConfig
from lmscale.log import get_logger

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
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_eps,
    }
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def set_rate(optimizer: Any, lr: float) -> None:
    """Write the rate of the next step to every group; `optimizer` is torch's or DeepSpeed's around it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
