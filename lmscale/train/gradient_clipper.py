"""The global gradient norm under ZeRO 0, where DeepSpeed measures none, or a wrong one under pipelines."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lmscale.models.context import ModelContext


class GradientClipper:
    """Measures and clips the global gradient norm under ZeRO 0, before the plain optimizer's step.

    Parameters that tensor-parallel ranks replicate count on the first of them, tied ones on their first stage.
    """

    def __init__(self, model: nn.Module, context: ModelContext, max_grad_norm: float):
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._context, self._max_norm = context, max_grad_norm
        self.norm = 0.0

    @torch.no_grad()
    def measure(self) -> float:
        """Measure the norm, and keep it; it is nan where any gradient is, those too that count elsewhere.

        Collectives: a sum over the ranks of the model.
        """
        with_grad = [p for p in self._parameters if p.grad is not None]
        mine = [p.grad for p in with_grad if self._counts(p)]
        others = [p.grad for p in with_grad if not self._counts(p)]
        device = self._context.topology.device
        square = torch.zeros((), dtype=torch.float32, device=device)
        if mine:
            square = torch.stack(torch._foreach_norm(mine)).square().sum()
        if others:
            square = square + 0.0 * torch.stack(torch._foreach_norm(others)).sum()
        dist.all_reduce(square, group=self._context.topology.model_group)
        self.norm = float(square.sqrt())
        return self.norm

    @torch.no_grad()
    def clip(self) -> None:
        """Scale the gradients down to max_grad_norm, by the norm measured last."""
        if self._max_norm and self.norm > self._max_norm:
            grads = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(grads, self._max_norm / (self.norm + 1.0e-6))

    def _counts(self, parameter: nn.Parameter) -> bool:
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return bool(getattr(parameter, "tensor_model_parallel", False)) or self._context.topology.tp_rank == 0
