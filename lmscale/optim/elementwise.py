"""Optimizers that treat each value by itself, so that a cut of a parameter is updated as the whole would be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Elementwise(torch.optim.Optimizer):
    """What SGD, Adam and Lion share: groups, and a state of a step count and moments of the parameter's shape and dtype.

    Right under every layout: tensor parallelism and ZeRO cut and flatten parameters, and no update looks at a neighbour.
    The gradients may be overwritten.
    """

    moments: tuple[str, ...] = ()
    """Names of the state's tensors; they begin at zero."""

    def blank_state(self, key: torch.Tensor, step: int) -> dict[str, Any]:
        """Make the state of a tensor of the groups after `step` updates, its moments still zero."""
        return {"step": step, **{name: torch.zeros_like(key) for name in self.moments}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(group, parameters, self.begin(parameters))
        return loss

    def begin(self, parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
        """Count an update of each parameter, and return their states."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.blank_state(parameter, 0)
            self.state[parameter]["step"] += 1
        return [self.state[parameter] for parameter in parameters]

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Update parameters by their gradients."""
        raise NotImplementedError


class SGD(Elementwise):
    """Gradient descent with momentum, as torch.optim.SGD.

        g <- g + weight_decay p
        b <- momentum b + g
        p <- p - lr b                        nesterov: p - lr (g + momentum b)

    The decay is added to the gradient and so goes through the momentum; with momentum 0 this is decoupled decay too.

    Args:
        params: groups, as of torch.optim.
        lr: the rate.
        momentum: 0 keeps no buffer.
        nesterov: look one step ahead.
        weight_decay: of the groups that do not say.
    Source: Sutskever et al. 2013 (momentum and Nesterov's in this form, but for the place of the rate).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
    ):
        self.moments = ("momentum_buffer",) if momentum else ()
        self._nesterov = nesterov
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Update parameters by their gradients."""
        grads = [parameter.grad for parameter in parameters]
        if group["weight_decay"]:
            torch._foreach_add_(grads, parameters, alpha=group["weight_decay"])
        if group["momentum"]:
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            if self._nesterov:
                torch._foreach_add_(grads, buffers, alpha=group["momentum"])
            else:
                grads = buffers
        torch._foreach_add_(parameters, grads, alpha=-group["lr"])


class Lion(Elementwise):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

        u <- sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g
        p <- p - lr (u + weight_decay p)

    sign(0) is 0: rows of the vocabulary that no token has touched stay where they are, but for the decay. DeepSpeed's
    Lion copies the sign bit, and moves them by lr at every update.

    Args:
        params: groups, as of torch.optim.
        lr: the rate; a tenth to a third of Adam's.
        betas: beta1 and beta2.
        weight_decay: of the groups that do not say; three to ten times Adam's.
    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    moments = ("lion_momentum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Update parameters by their gradients."""
        beta1, beta2 = group["betas"]
        grads, momenta = [parameter.grad for parameter in parameters], [state["lion_momentum"] for state in states]
        updates = torch._foreach_lerp(momenta, grads, 1.0 - beta1)
        torch._foreach_lerp_(momenta, grads, 1.0 - beta2)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
