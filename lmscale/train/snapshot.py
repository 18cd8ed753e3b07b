"""A copy of a rank's state in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import torch


class Snapshot:
    """Holds the copy; its memory is allocated with the first one and used again.

    Args:
        device: of the state; memory is pinned where that is a GPU.
    """

    def __init__(self, device: torch.device):
        self._pins = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.float32)

    def take(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copy 1-D tensors, and return the copies, fp32 on the CPU; the next call overwrites them."""
        total = sum(part.numel() for part in values)
        if self._memory.numel() != total:
            self._memory = torch.zeros(total, dtype=torch.float32, pin_memory=self._pins)
        copies = list(self._memory.split([part.numel() for part in values]))
        if values:
            torch._foreach_copy_(copies, values, non_blocking=True)
        if self._pins:
            torch.cuda.current_stream().synchronize()
        return copies
