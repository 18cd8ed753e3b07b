"""megatron-core's parallel linear layers, with the plain kernel where there is nothing to communicate.

On one tensor-parallel rank megatron-core multiplies, then adds the bias in a second pass over the output, inside an
autograd function that torch.compile cannot see through. There `F.linear` does the same in one kernel.

On a CPU without half-precision instructions torch multiplies bf16 and fp16 in a loop of its own, 5 to 40 times slower
than fp32. There the operands are widened for each multiplication and the result is rounded back: the same rounding of
the same sums, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRowParallelLinear

from lmscale.parallel.device import multiplies_slowly


class ColumnParallelLinear(MegatronColumnParallelLinear):
    """Y = X A^T + b with A split along its output rows; plus what `lora` makes of X and what `row_bias` adds to rows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_module("lora", None)
        self.register_module("row_bias", None)

    def forward(
        self, input_: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply; return (output, bias still to be added or None)."""
        if self.tp_group.size() == 1:
            out, bias = linear(input_, self.weight, self.bias), None
        else:
            out, bias = super().forward(input_, *args, **kwargs)
        out = out if self.lora is None else out + self.lora(input_)
        return (out if self.row_bias is None else out + self.row_bias()), bias

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Multiply; megatron-core's kernel for a frozen matrix gives the bias that it adds no gradient, so it is added here."""
        bias = kwargs.get("bias")
        if weight.requires_grad or bias is None or not bias.requires_grad:
            made: torch.Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return made
        return super()._forward_impl(input, weight, *args, **{**kwargs, "bias": None}) + bias


class RowParallelLinear(MegatronRowParallelLinear):
    """Y = X A^T + b with A split along its input columns; plus what `lora` makes of X and what `row_bias` adds to rows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_module("lora", None)
        self.register_module("row_bias", None)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply; return (output, bias still to be added or None)."""
        if self.tp_group.size() == 1:
            out, bias = linear(input_, self.weight, self.bias), None
        else:
            out, bias = super().forward(input_)
        out = out if self.lora is None else out + self.lora(input_)
        return (out if self.row_bias is None else out + self.row_bias()), bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x weight^T + bias by the fastest kernel that the device has for the dtype."""
    if multiplies_slowly(x):
        widened: torch.Tensor = _WidenedLinear.apply(x, weight, bias)
        return widened
    return F.linear(x, weight, bias)


class _WidenedLinear(torch.autograd.Function):
    """F.linear over half-precision tensors, multiplied in fp32; backward keeps the half-precision operands."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        rows = grad.reshape(-1, grad.size(-1))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.size(-1)).float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias
