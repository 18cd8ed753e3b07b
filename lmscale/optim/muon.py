"""Muon over whole matrices, wherever tensor parallelism and ZeRO have put their parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from lmscale.optim.adafactor import Share
from lmscale.optim.adam import Adam

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen for a steep slope at 0: singular values end between 0.7 and 1.2, not at 1."""
NORM_EPS = 1.0e-7


class Muon(Adam):
    """Muon for the groups marked `is_hidden_matrix`, AdamW for the rest: embeddings, head, norms, biases.

    With G the gradient of a matrix W [m, n], NS the Newton-Schulz iteration that turns U S V^T into about U V^T:

        M <- momentum M + (1 - momentum) G
        N  = NS((1 - momentum) G + momentum M)         nesterov off: NS(M)
        W <- W - lr weight_decay W - lr scale N
        scale = 0.2 sqrt(max(m, n))                    "adamw": the root mean square of an AdamW update, so that both
                                                       kinds of groups take one rate
        scale = sqrt(max(1, m / n))                    "original"

    A matrix is what the model multiplies by, however it is stored: of a fused tensor (queries, keys and values; keys and
    values; gate and up), each is orthogonalized by itself.

    Where tensor parallelism cuts a matrix, or ZeRO has each rank update a flat range of it, the ranks send their parts to
    the one that owns the matrix for this step, in turn; it orthogonalizes the whole and sends the result back, of which
    each rank takes its part. Rows and columns of a whole may be in any order: orthogonalization commutes with their
    permutations. So no rank ever works on a piece of a matrix, and all ranks share the work.
    They send what the iteration reads and writes, in its dtype, so on every layout the owner reads the same numbers as
    one rank would. The gradients are overwritten.

    Args:
        params: groups, as of torch.optim; those with is_hidden_matrix True hold matrices.
        lr: the rate.
        momentum, nesterov, scale: as above.
        num_steps: Newton-Schulz iterations.
        dtype: of the iteration, and of what is sent.
        weight_decay: of the groups that do not say, decoupled.
        adam: betas, eps, bias_correction and raw_eps of the other groups.
    Collectives of step: for each matrix a reduce and a broadcast over the data-parallel group, and on a cut matrix's
        owners over the tensor-parallel group; every rank must call.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982 (the scale "adamw");
        momentum as in torch.optim.Muon, with which one rank agrees.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        num_steps: int = 5,
        scale: str = "adamw",
        dtype: torch.dtype = torch.bfloat16,
        **adam: Any,
    ):
        self._momentum, self._nesterov, self._num_steps = momentum, nesterov, num_steps
        self._scale, self._dtype = scale, dtype
        self._shares: dict[torch.Tensor, list[Share]] = {}
        self._tp_group: dist.ProcessGroup | None = None
        self._dp_group: dist.ProcessGroup | None = None
        super().__init__(params, lr=lr, weight_decay=weight_decay, **adam)
        for group in self.param_groups:
            group.setdefault("is_hidden_matrix", False)

    def describe(
        self, shares: Iterable[Share], tp_group: dist.ProcessGroup | None, dp_group: dist.ProcessGroup | None
    ) -> None:
        """Say what the tensors of the groups hold; left out, each is a whole parameter.

        Args:
            shares: of every parameter of this rank's part of the model, the empty ones included, in one order on all
                ranks of the two groups.
            tp_group: ranks that hold the slices of cut parameters; None on one rank.
            dp_group: ranks that update the ranges of one slice; None where each updates all of it.
        """
        self._tp_group, self._dp_group = tp_group, dp_group
        self._shares = {}
        for share in shares:
            self._shares.setdefault(share.key, []).append(share)

    def moments_of(self, key: torch.Tensor) -> tuple[str, ...]:
        """Name the state's tensors of a tensor of the groups."""
        if self._shares:
            is_matrix = self._shares[key][0].is_hidden_matrix
        else:
            is_matrix = any(g["is_hidden_matrix"] and any(p is key for p in g["params"]) for g in self.param_groups)
        return ("muon_momentum",) if is_matrix else Adam.moments

    def blank_state(self, key: torch.Tensor, step: int) -> dict[str, Any]:
        """Make the state of a tensor of the groups after `step` updates, its moments still zero."""
        return {"step": step, **{name: torch.zeros_like(key) for name in self.moments_of(key)}}

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Update parameters by their gradients."""
        if not group["is_hidden_matrix"]:
            super().update(group, parameters, states)
            return
        grads, momenta = [parameter.grad for parameter in parameters], [state["muon_momentum"] for state in states]
        torch._foreach_lerp_(momenta, grads, 1.0 - self._momentum)
        if self._nesterov:
            torch._foreach_lerp_(grads, momenta, self._momentum)
        else:
            torch._foreach_copy_(grads, momenta)
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        shares = [share for parameter in parameters for share in self._shares_of(parameter)]
        num_owners = _size(self._tp_group) * _size(self._dp_group)
        for first in range(0, len(shares), num_owners):
            self._orthogonalize(shares[first : first + num_owners], group["lr"])

    def _shares_of(self, key: torch.Tensor) -> list[Share]:
        if not self._shares:
            shape = tuple(key.shape)
            return [Share("parameter", shape, shape, None, 0, key.numel(), key, 0, is_hidden_matrix=True)]
        return self._shares[key]

    def _orthogonalize(self, shares: list[Share], lr: float) -> None:
        """Update matrices, of which each rank owns at most one; the owner alone keeps a whole one meanwhile."""
        wholes = [self._gather(share, index) for index, share in enumerate(shares)]
        # Before the first broadcast, so that no rank waits for another's matrix before it begins with its own.
        wholes = [
            None if whole is None else _orthogonal_parts(whole, share.parts, self._num_steps)
            for share, whole in zip(shares, wholes, strict=True)
        ]
        for index, (share, whole) in enumerate(zip(shares, wholes, strict=True)):
            update = self._scatter(share, index, whole)
            parameters, updates = share.by_part(share.of(share.key.data)), share.by_part(update)
            for (part, values), (_, change) in zip(parameters, updates, strict=True):
                values.add_(change, alpha=-lr * self._scale_of(share.part_rows[part], share.shape[1]))

    def _scale_of(self, rows: int, columns: int) -> float:
        return 0.2 * math.sqrt(max(rows, columns)) if self._scale == "adamw" else math.sqrt(max(1.0, rows / columns))

    def _owner(self, index: int) -> tuple[int, int]:
        """Return the ranks in the data-parallel and the tensor-parallel group that own a matrix."""
        return index % _size(self._dp_group), index // _size(self._dp_group)

    def _gather(self, share: Share, index: int) -> torch.Tensor | None:
        """Bring the parts of a matrix [m, n] to its owner; None on other ranks."""
        dp_owner, tp_owner = self._owner(index)
        part = share.of(share.key.grad).to(self._dtype)
        if self._dp_group is not None:
            mine, part = part, torch.zeros(math.prod(share.local_shape), dtype=self._dtype, device=part.device)
            part[share.start : share.end] = mine
            dist.reduce(part, group_dst=dp_owner, group=self._dp_group)
            if dist.get_rank(self._dp_group) != dp_owner:
                return None
        matrix = part.view(share.local_shape)
        if self._tp_group is None:
            return matrix
        if share.tp_dim is not None:
            mine, matrix = matrix, matrix.new_zeros(share.shape)
            self._slice(matrix, share).copy_(mine)
            dist.reduce(matrix, group_dst=tp_owner, group=self._tp_group)
        return matrix if dist.get_rank(self._tp_group) == tp_owner else None

    def _scatter(self, share: Share, index: int, whole: torch.Tensor | None) -> torch.Tensor:
        """Send the owner's matrix to all, and return this rank's range of it, 1-D."""
        dp_owner, tp_owner = self._owner(index)
        part = None
        if self._dp_group is None or dist.get_rank(self._dp_group) == dp_owner:
            if self._tp_group is not None:
                whole = self._blank(share, share.shape) if whole is None else whole.contiguous()
                dist.broadcast(whole, group_src=tp_owner, group=self._tp_group)
            assert whole is not None
            part = self._slice(whole, share).contiguous()
        if self._dp_group is not None:
            part = self._blank(share, share.local_shape) if part is None else part
            dist.broadcast(part, group_src=dp_owner, group=self._dp_group)
        assert part is not None
        return part.view(-1)[share.start : share.end]

    def _slice(self, whole: torch.Tensor, share: Share) -> torch.Tensor:
        """View the block of a matrix that stands for this rank's slice."""
        if share.tp_dim is None or self._tp_group is None:
            return whole
        size = share.local_shape[share.tp_dim]
        return whole.narrow(share.tp_dim, dist.get_rank(self._tp_group) * size, size)

    def _blank(self, share: Share, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=share.key.device)


def _orthogonal_parts(whole: torch.Tensor, parts: tuple[int, ...], num_steps: int) -> torch.Tensor:
    """Orthogonalize each matrix of a fused tensor [m, n], whose rows repeat in periods of sum(parts)."""
    if len(parts) < 2:
        return orthogonal(whole, num_steps)
    result = torch.empty_like(whole)
    matrices, changed = (tensor.view(-1, sum(parts), whole.size(1)).split(parts, dim=1) for tensor in (whole, result))
    for matrix, change in zip(matrices, changed, strict=True):
        change.copy_(orthogonal(matrix.reshape(-1, whole.size(1)), num_steps).view_as(matrix))
    return result


def orthogonal(matrix: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Turn a matrix U S V^T [m, n] into about U V^T, by the quintic Newton-Schulz iteration.

    X <- X / max(|X|, 1e-7);  then num_steps times, on the wider than high of X and X^T:
    X <- a X + (b A + c A A) X,  A = X X^T
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=NORM_EPS)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
