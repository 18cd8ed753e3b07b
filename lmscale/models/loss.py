"""Cross entropy over a vocabulary that is split over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lmscale.batch import IS_RANDOM_NEXT, LOSS_MASK
from lmscale.config.objective import T5Config, TextToTextConfig
from lmscale.models.context import ModelContext

CHUNK_BYTES = 4 * 2**20
"""Logits worked on at a time, in fp32: they stay in a core's cache, and no second array of their size is made."""


Observer = Callable[[Any, tuple[torch.Tensor, ...]], None]
"""Called with the outputs and the labels of a micro batch, on the last stage, before the loss overwrites the logits."""


class Loss(Protocol):
    """What the engine asks of a loss."""

    observer: Observer | None

    def counts(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count what the losses of a micro batch are means over."""
        ...

    def __call__(self, outputs: Any, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute the weighted loss."""
        ...


class LanguageModelLoss:
    """The summed cross entropy of a micro batch times a weight, as a loss for DeepSpeed.

    The weight is dp_size * num_micro_batches / (labels that count in the global batch), so that the mean that DeepSpeed
    takes over micro batches and data-parallel ranks is the mean over the global batch's labels, however unevenly the
    masks are spread. A next-sentence loss is added, the mean over the global batch's pairs by a weight of its own.
    """

    def __init__(self, context: ModelContext):
        self.observer: Observer | None = None
        self._vocab_size = context.model.vocab_size
        self._tp_group = context.groups.tp
        objective = context.objective
        is_of_t5 = isinstance(objective, T5Config | TextToTextConfig)
        self._z_loss = objective.z_loss if is_of_t5 else 0.0
        self._counts_padding = is_of_t5 and objective.loss_denominator == "padded"
        self._smoothing = context.label_smoothing

    def counts(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Count what the losses of a micro batch are means over: float32 [1 or 2], labels and sentence pairs."""
        mask = batch[LOSS_MASK.name]
        labels = mask.new_tensor(mask.numel()) if self._counts_padding else mask.sum()
        if IS_RANDOM_NEXT.name not in batch:
            return labels.reshape(1)
        return torch.stack((labels, (batch[IS_RANDOM_NEXT.name] >= 0).sum().to(labels.dtype)))

    def __call__(
        self, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], labels: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Compute the weighted loss.

        Shapes: outputs: logits [b, l, v/t], and sentence logits [b, 2] where the model makes them; labels: (token ids
            int64 [b, l], loss_mask float32 [b, l], is_random_next int64 [b] beside sentence logits, weight float32 [1],
            or [2] with that of the sentence pairs).
        Returns: float32 scalar, the same on every tensor-parallel rank.
        Collectives: two all-reduces over the tensor-parallel group where it has several ranks.
        """
        logits, sentence_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        targets, loss_mask, *pairs, weight = labels
        if self.observer is not None:
            self.observer(outputs, labels)
        total: torch.Tensor = VocabParallelCrossEntropy.apply(
            logits, targets, loss_mask, self._vocab_size, self._tp_group, self._z_loss, self._smoothing
        )
        if sentence_logits is None:
            return total * weight[0]
        sentences = F.cross_entropy(sentence_logits.float(), pairs[0], ignore_index=-1, reduction="sum")
        return total * weight[0] + sentences * weight[1]


class VocabParallelCrossEntropy(torch.autograd.Function):
    """sum_i mask_i (log Z_i - sum_j p_ij z_ij + z_loss (log Z_i)^2), log Z_i = log sum_j exp(z_ij).

    p_ij is 1 - e for the target and e / v more for each of the v entries, e the label smoothing. The sums are over the first
    vocab_size logits; padded rows take no part. Smoothing and z-loss are of training only.

    Overwrites the logits with their gradient (softmax minus p, times the mask) while it computes the loss, so a
    training step holds one array of logits' size; with gradients off, the logits are left as they are.

    Source: Szegedy et al. 2016, arXiv:1512.00567, sec. 7, of label smoothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        loss_mask: torch.Tensor,
        vocab_size: int,
        tp_group: dist.ProcessGroup,
        z_loss: float = 0.0,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Compute the summed loss, and the gradient in place."""
        logits_2d = logits.detach().view(-1, logits.size(-1))
        shard = _Shard(logits_2d.size(1), vocab_size, tp_group)
        targets_1d, mask_1d = targets.reshape(-1), loss_mask.reshape(-1)
        needs_grad = ctx.needs_input_grad[0]
        if needs_grad:
            shard.z_loss, shard.smoothing = z_loss, smoothing
        if tp_group.size() == 1:
            total = _one_pass(logits_2d, targets_1d, mask_1d, shard, needs_grad)
        else:
            total = _two_passes(logits_2d, targets_1d, mask_1d, shard, needs_grad)
        ctx.save_for_backward(logits if needs_grad else None)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradient that forward left behind."""
        (grad_logits,) = ctx.saved_tensors
        return grad_logits.detach().mul_(grads[0]), None, None, None, None, None, None


class _Shard:
    """The columns of the vocabulary that this rank holds: [first, first + valid) of the true ones, then padding."""

    def __init__(self, columns: int, vocab_size: int, tp_group: dist.ProcessGroup):
        self.first = columns * tp_group.rank()
        self.valid = max(0, min(columns, vocab_size - self.first))
        self.columns = columns
        self.vocab_size = vocab_size
        self.tp_group = tp_group
        self.z_loss = 0.0
        self.smoothing = 0.0

    @property
    def share(self) -> float:
        """What label smoothing gives each entry."""
        return self.smoothing / self.vocab_size

    def chunks(self, rows: int) -> list[slice]:
        step = max(1, CHUNK_BYTES // (4 * self.columns))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def local(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each target, and whether it is this rank's (else column 0)."""
        column = targets - self.first
        mine = (column >= 0) & (column < self.valid)
        return column.masked_fill(~mine, 0), mine


def _one_pass(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, shard: _Shard, needs_grad: bool
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows in shard.chunks(logits.size(0)):
        block = logits[rows, : shard.valid]
        log_probs = torch.log_softmax(block, dim=-1, dtype=torch.float32)
        columns = targets[rows, None]
        chosen = log_probs.gather(1, columns).squeeze(1)
        likelihood = chosen
        if shard.smoothing:
            likelihood = (1.0 - shard.smoothing) * chosen + shard.share * log_probs.sum(dim=-1)
        total -= (likelihood * mask[rows]).sum()
        scale = None
        if shard.z_loss:
            log_normalizer = block.gather(1, columns).squeeze(1).float() - chosen
            total += shard.z_loss * (log_normalizer.square() * mask[rows]).sum()
            scale = 1.0 + 2.0 * shard.z_loss * log_normalizer[:, None]
        if needs_grad:
            grad = log_probs.exp_()
            if scale is not None:
                grad.mul_(scale)
            if shard.smoothing:
                grad.sub_(shard.share)
            grad.scatter_add_(1, columns, grad.new_full((), shard.smoothing - 1.0).expand(columns.shape))
            torch.mul(grad, mask[rows, None], out=block) if block.dtype == grad.dtype else block.copy_(
                grad.mul_(mask[rows, None])
            )
    if needs_grad and shard.valid < shard.columns:
        logits[:, shard.valid :] = 0.0
    return total


def _two_passes(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, shard: _Shard, needs_grad: bool
) -> torch.Tensor:
    """Statistics of this rank's columns, reduced over the group, then the gradient."""
    rows_total = logits.size(0)
    columns, mine = shard.local(targets)
    highest = logits.new_full((rows_total,), -torch.inf, dtype=torch.float32)
    if shard.valid:
        highest = logits[:, : shard.valid].amax(dim=-1).float()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.tp_group)
    sums = torch.zeros(2, rows_total, dtype=torch.float32, device=logits.device)  # of exp(z), of p z
    for rows in shard.chunks(rows_total) if shard.valid else []:
        block = logits[rows, : shard.valid].float() - highest[rows, None]
        sums[1, rows] = (1.0 - shard.smoothing) * block.gather(1, columns[rows, None]).squeeze(1) * mine[rows]
        if shard.smoothing:
            sums[1, rows] += shard.share * block.sum(dim=-1)
        sums[0, rows] = block.exp_().sum(dim=-1)
    dist.all_reduce(sums, group=shard.tp_group)
    log_normalizer = sums[0].log()
    shift = highest + log_normalizer
    if needs_grad:
        for rows in shard.chunks(rows_total) if shard.valid else []:
            block = logits[rows, : shard.valid]
            grad = (block.float() - shift[rows, None]).exp_()
            if shard.z_loss:
                grad.mul_(1.0 + 2.0 * shard.z_loss * shift[rows, None])
            if shard.smoothing:
                grad.sub_(shard.share)
            grad.scatter_add_(1, columns[rows, None], (shard.smoothing - 1.0) * mine[rows, None].float())
            block.copy_(grad.mul_(mask[rows, None]))
        logits[:, shard.valid :] = 0.0
    losses = log_normalizer - sums[1]
    if shard.z_loss:
        losses = losses + shard.z_loss * shift.square()
    return (losses * mask).sum()


@torch.no_grad()
def token_log_likelihoods(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup
) -> torch.Tensor:
    """Compute log p of each target; the logits are left as they are.

    Shapes: logits [b, l, v/t]; targets int64 [b, l]; result fp32 [b, l], the same on every tensor-parallel rank.
    Collectives: two all-reduces over the tensor-parallel group where it has several ranks.
    """
    rows = logits.view(-1, logits.size(-1))
    shard = _Shard(rows.size(1), vocab_size, tp_group)
    column, mine = shard.local(targets.reshape(-1))
    valid = rows[:, : shard.valid].float()
    highest = valid.amax(dim=-1) if shard.valid else rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
    if tp_group.size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp_group)
    sums = torch.zeros(2, len(rows), dtype=torch.float32, device=rows.device)
    if shard.valid:
        shifted = valid - highest[:, None]
        sums[0] = shifted.exp().sum(dim=-1)
        sums[1] = shifted.gather(1, column[:, None]).squeeze(1) * mine
    if tp_group.size() > 1:
        dist.all_reduce(sums, group=tp_group)
    return (sums[1] - sums[0].log()).view(targets.shape)
