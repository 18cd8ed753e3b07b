"""Adam as BERT and RoBERTa ran it, where that differs from torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Adam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, whose bias correction can be left out and whose eps can be put before it.

    With m, v the moments, c1 = 1 - beta1^t, c2 = 1 - beta2^t, at the t-th update:

        corrected eps       p <- p - lr (m / c1 / (sqrt(v / c2) + eps) + weight_decay p)      torch, the paper
        raw eps             p <- p - lr (m / c1 / ((sqrt(v) + eps) / sqrt(c2)) + weight_decay p)   fairseq
        no correction       p <- p - lr (m / (sqrt(v) + eps) + weight_decay p)                BERT

    Args:
        params: groups, as of torch.optim.
        lr: the rate.
        betas: decay of m and v.
        eps: epsilon.
        weight_decay: of the groups that do not say.
        bias_correction: divide by c1 and c2.
        raw_eps: add eps to the root of v before its correction.
    Source: Kingma and Ba 2015, arXiv:1412.6980; Devlin et al. 2019 (optimization.py); Ott et al. 2019 (fairseq).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1.0e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        raw_eps: bool = False,
    ):
        self._corrects, self._raw_eps = bias_correction, raw_eps
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            self._update(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        if not parameters:
            return
        states = [self._state_of(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        beta1, beta2 = group["betas"]
        grads = [parameter.grad for parameter in parameters]
        firsts, seconds = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(firsts, grads, 1.0 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1.0 - beta2)
        step = states[0]["step"]
        first, second = (1.0 - beta1**step, 1.0 - beta2**step) if self._corrects else (1.0, 1.0)
        roots = torch._foreach_sqrt(seconds)
        if self._raw_eps:
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(roots, second**0.5)
        else:
            torch._foreach_div_(roots, second**0.5)
            torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, firsts, roots, -group["lr"] / first)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        return state
