"""The loss of a task's head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lmscale.batch import LOSS_MASK
from lmscale.models.context import ModelContext
from lmscale.models.loss import Observer


class TaskLoss:
    """The summed loss of a micro batch times a weight, as `LanguageModelLoss` is for the language-model head.

    Cross entropy over the classes of a label (of span: over the places); the squared error of a value. Each counts as its
    loss_mask says.

    Attributes:
        observer: called with the outputs and the labels of each micro batch, where one is set.
    """

    def __init__(self, context: ModelContext):
        assert context.head is not None
        self._is_value = context.head.kind == "value"
        self.observer: Observer | None = None

    def counts(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count what the loss of a micro batch is a mean over: float32 [1]."""
        return batch[LOSS_MASK.name].sum().reshape(1)

    def __call__(self, outputs: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute the weighted loss.

        Shapes: outputs [b, l, c]; labels: (int64 [b, l], or targets float32 [b, l] of a value; loss_mask float32 [b, l];
            weight float32 [1 or 2]).
        Returns: float32 scalar, the same on every tensor-parallel rank.
        """
        targets, loss_mask, weight = labels
        if self.observer is not None:
            self.observer(outputs, labels)
        if self._is_value:
            losses = F.mse_loss(outputs.squeeze(-1).float(), targets, reduction="none")
        else:
            losses = F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (losses.view_as(loss_mask) * loss_mask).sum() * weight[0]
