"""Adam in its published forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lmscale.optim.elementwise import Elementwise


class Adam(Elementwise):
    """Adam whose weight decay is decoupled or L2, whose bias correction can be left out and eps put before it.

    With m, v the moments, c1 = 1 - beta1^t, c2 = 1 - beta2^t, at the t-th update:

        corrected eps       p <- p - lr (m / c1 / (sqrt(v / c2) + eps) + weight_decay p)      torch, the paper
        raw eps             p <- p - lr (m / c1 / ((sqrt(v) + eps) / sqrt(c2)) + weight_decay p)   fairseq
        no correction       p <- p - lr (m / (sqrt(v) + eps) + weight_decay p)                BERT

    decoupled False: the term weight_decay p is added to the gradient instead, before the moments (L2; torch.optim.Adam).

    Args:
        params: groups, as of torch.optim.
        lr: the rate.
        betas: decay of m and v.
        eps: epsilon.
        weight_decay: of the groups that do not say.
        bias_correction: divide by c1 and c2.
        raw_eps: add eps to the root of v before its correction.
        decoupled: AdamW.
    Source: Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Devlin et al. 2019
        (optimization.py); Ott et al. 2019 (fairseq).
    """

    moments = ("exp_avg", "exp_avg_sq")

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
        decoupled: bool = True,
    ):
        self._corrects, self._raw_eps, self._decoupled = bias_correction, raw_eps, decoupled
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Update parameters by their gradients."""
        beta1, beta2 = group["betas"]
        grads = [parameter.grad for parameter in parameters]
        if group["weight_decay"] and not self._decoupled:
            torch._foreach_add_(grads, parameters, alpha=group["weight_decay"])
        firsts, seconds = ([state[name] for state in states] for name in Adam.moments)
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
        if self._decoupled:
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, firsts, roots, -group["lr"] / first)
