"""How the model is laid out over the ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lmscale.config.base import Section


class ParallelConfig(Section):
    """Axes of parallelism. dp_size is what remains: ranks / (tp_size pp_size)."""

    tp_size: int = Field(1, gt=0)
    """Tensor parallelism: ranks that share each layer."""
    pp_size: int = Field(1, gt=0)
    """Pipeline parallelism: stages."""
    sequence_parallel: bool = False
    """Split norms, dropouts and residuals along the sequence over the tensor-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping: full keeps each layer's input alone; selective drops the feed-
    forward activation, and attention's scores where the kernel keeps them."""
