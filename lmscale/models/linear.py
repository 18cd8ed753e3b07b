"""megatron-core's parallel linear layers, with the plain kernel where there is nothing to communicate.

On one tensor-parallel rank megatron-core multiplies, then adds the bias in a second pass over the output, inside an
autograd function that torch.compile cannot see through. There `F.linear` does the same in one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRowParallelLinear


class ColumnParallelLinear(MegatronColumnParallelLinear):
    """Y = X A^T + b with A split along its output rows."""

    def forward(
        self, input_: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply; return (output, bias still to be added or None)."""
        if self.tp_group.size() == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class RowParallelLinear(MegatronRowParallelLinear):
    """Y = X A^T + b with A split along its input columns."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply; return (output, bias still to be added or None)."""
        if self.tp_group.size() == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_)
