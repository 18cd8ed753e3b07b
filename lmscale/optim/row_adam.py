"""AdamW over several adaptations side by side, each of which is updated as if it were trained alone."""

from __future__ import annotations

from typing import Any

import torch

from lmscale.optim.adam import Adam
from lmscale.optim.elementwise import Elementwise

ENTRY_STEPS = "entry_steps"
"""Name of the state that counts the updates of each adaptation: fp32 [N], one for each parameter."""


class RowAdam(Elementwise):
    """AdamW by the rows of parameters [N, ...]: only the adaptations that have a row in the batch move.

    Adaptation n has its own count t_n of updates, which its bias correction reads; decay and moments of the others stay. A
    step of N adaptations therefore is N steps of N runs, of those that the batch holds.

    Args:
        params: groups, as of torch.optim; every parameter has the adaptations along its first dimension.
        lr: the rate.
        betas: decay of the moments.
        eps: epsilon.
        weight_decay: of the groups that do not say.

    Attributes:
        present: bool [N], the adaptations that the batch holds; set before each step.
    """

    moments = Adam.moments

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1.0e-8,
        weight_decay: float = 0.0,
    ):
        self.present: torch.Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def blank_state(self, key: torch.Tensor, step: int) -> dict[str, Any]:
        """Make the state of a parameter after `step` updates, its moments and counts still zero."""
        counts = torch.zeros(key.size(0), dtype=torch.float32, device=key.device)
        return {**super().blank_state(key, step), ENTRY_STEPS: counts}

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Update the rows of the adaptations that are present."""
        if self.present is None:
            raise AssertionError("nobody said which adaptations the batch holds")
        rows = self.present.nonzero().squeeze(1)
        if not rows.numel():
            return
        for parameter, state in zip(parameters, states, strict=True):
            if parameter.size(0) == self.present.numel():  # a pipeline stage's idle parameter has no adaptations
                _update_rows(group, parameter, state, rows)


def _update_rows(group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any], rows: torch.Tensor) -> None:
    beta1, beta2 = group["betas"]
    assert parameter.grad is not None
    values, grad = parameter[rows], parameter.grad[rows]
    first, second = (state[name][rows] for name in RowAdam.moments)
    state[ENTRY_STEPS][rows] += 1.0
    shape = (-1, *[1] * (grad.dim() - 1))
    steps = state[ENTRY_STEPS][rows].view(shape)
    first.lerp_(grad, 1.0 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    root = (second / (1.0 - beta2**steps)).sqrt_().add_(group["eps"])
    values.mul_(1.0 - group["lr"] * group["weight_decay"])
    values.sub_(group["lr"] * (first / (1.0 - beta1**steps)) / root)
    for whole, part in (
        (parameter, values),
        *zip((state[name] for name in RowAdam.moments), (first, second), strict=True),
    ):
        whole[rows] = part
