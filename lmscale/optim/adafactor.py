"""Adafactor over whole matrices, wherever tensor parallelism and ZeRO have put their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

ROW, COLUMN, SECOND = "row", "column", "second"
"""Kinds of the state's tensors: the factored second moment, and the full one."""


@dataclass(frozen=True)
class Share:
    """The range [start, end) of a flattened parameter that this rank updates; empty where other ranks have all of it.

    The parameter is `local_shape` of the logical tensor `shape`, cut along `tp_dim` by tensor parallelism (None: whole).
    The range lies in `key`, a tensor of the optimizer's groups, from `offset` on.
    """

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    tp_dim: int | None
    start: int
    end: int
    key: torch.Tensor
    offset: int

    @property
    def size(self) -> int:
        """Elements that this rank updates."""
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        """Elements of the logical tensor."""
        return torch.Size(self.shape).numel()

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the 1-D view of the range in `key`'s values or gradient."""
        return flat.view(-1).narrow(0, self.offset, self.size)


class Adafactor(torch.optim.Optimizer):
    """Adafactor without momentum, at a given rate.

    With G the gradient of a matrix W [m, n] at its t-th update, beta = 1 - t^-decay_exponent, and means over all of it:

        R <- beta R + (1 - beta) (row means of G^2 + eps1)         [m]
        C <- beta C + (1 - beta) (column means of G^2 + eps1)      [n]
        U  = G / sqrt(R C^T / mean(R))
        U <- U / max(1, RMS(U) / clip)
        W <- W - lr weight_decay W - lr max(eps2, RMS(W)) U        (scale_parameter off: - lr U)

    A tensor with a dimension below `min_dim`, or of other than two dimensions, keeps V <- beta V + (1 - beta) (G^2 + eps1)
    whole, and U = G / sqrt(V). A matrix is what one logical tensor holds: the fused queries, keys and values are one, and
    so are the two halves of a gated MLP's first layer.

    The state of a matrix is m + n numbers, and all sums run over the logical matrix. Where tensor parallelism cuts it, or
    ZeRO has each rank update a flat range of it, ranks sum what they see of the row and column sums; each then updates its
    own range by the formula above. Sums are fp64, so that a layout's order of summation does not show in the fp32 state
    and copies of a tied tensor stay alike. The gradients are overwritten by the updates.

    Args:
        params: groups, as of torch.optim.
        lr: the rate; it is read and never written.
        decay_exponent, eps1, eps2, clip: as above.
        scale_parameter: multiply the rate by max(eps2, RMS(W)).
        min_dim: smallest dimension of a matrix that is factored.
        weight_decay: of the groups that do not say.
    Collectives of step: sums over the groups that `describe` was given, one of m + n + 1 numbers for each matrix and one
        of a number for each tensor; every rank must call.
    Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4, in the parts and constants that Raffel et al. 2020,
        arXiv:1910.10683, sec. 3.1.2, used (Mesh TensorFlow's).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        *,
        decay_exponent: float = 0.8,
        eps1: float = 1.0e-30,
        eps2: float = 1.0e-3,
        clip: float = 1.0,
        scale_parameter: bool = True,
        min_dim: int = 128,
    ):
        self._decay_exponent, self._eps1, self._eps2, self._clip = decay_exponent, eps1, eps2, clip
        self._scale_parameter, self._min_dim = scale_parameter, min_dim
        self._shares: dict[torch.Tensor, list[Share]] = {}
        self._tp_group: dist.ProcessGroup | None = None
        self._dp_group: dist.ProcessGroup | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

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

    def shares_of(self, key: torch.Tensor) -> list[Share]:
        """List what a tensor of the groups holds."""
        if not self._shares:
            shape = tuple(key.shape)
            return [Share("parameter", shape, shape, None, 0, key.numel(), key, 0)]
        return self._shares[key]

    def is_factored(self, share: Share) -> bool:
        """Tell whether a parameter keeps row and column statistics in the place of its full second moment."""
        return len(share.shape) == 2 and min(share.shape) >= self._min_dim

    def blank_state(self, key: torch.Tensor, step: int) -> dict[str, Any]:
        """Make the state of a tensor of the groups after `step` updates, its statistics still zero.

        Returns: {"step": step, name of a parameter: {kind: fp32 tensor, 1-D}, ...}.
        """
        state: dict[str, Any] = {"step": step}
        for share in self.shares_of(key):
            if share.size:
                state[share.name] = {kind: key.new_zeros(n, dtype=torch.float32) for kind, n in self._sizes(share)}
        return state

    def _sizes(self, share: Share) -> list[tuple[str, int]]:
        if self.is_factored(share):
            return list(zip((ROW, COLUMN), share.local_shape, strict=True))
        return [(SECOND, share.size)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients."""
        loss = None if closure is None else closure()
        pairs = [(group, key) for group in self.param_groups for key in group["params"] if key.grad is not None]
        for _, key in pairs:
            if not self.state[key]:
                self.state[key] = self.blank_state(key, 0)
            self.state[key]["step"] += 1
        todo = [(group, share) for group, key in pairs for share in self.shares_of(key)]
        shares = [share for _, share in todo]
        parameter_squares = self._update_statistics(shares)
        update_squares = self._sum_over_ranks(
            [(self._make_update(share), share.tp_dim is not None) for share in shares]
        )
        for (group, share), of_parameter, of_update in zip(todo, parameter_squares, update_squares, strict=True):
            self._apply(group, share, of_parameter, of_update)
        return loss

    def _update_statistics(self, shares: list[Share]) -> list[torch.Tensor]:
        """Take the gradients into R, C and V; return the sums of squares of the logical parameters, fp64 [1]."""
        sums, widths = [], []
        for share in shares:
            is_cut = share.tp_dim is not None
            sums.append((_square(share.of(share.key.data)), is_cut))
            if self.is_factored(share):
                rows, columns = _square_sums(share.of(share.key.grad), share.start, share.local_shape)
                sums += [(rows, share.tp_dim == 1), (columns, share.tp_dim == 0)]
            widths.append(3 if self.is_factored(share) else 1)
        reduced = iter(self._sum_over_ranks(sums))
        squares = []
        for share, width in zip(shares, widths, strict=True):
            square, *factors = (next(reduced) for _ in range(width))
            squares.append(square)
            if share.size:
                self._decay(share, factors)
        return squares

    def _decay(self, share: Share, sums: list[torch.Tensor]) -> None:
        beta = 1.0 - self.state[share.key]["step"] ** -self._decay_exponent
        state = self.state[share.key][share.name]
        if not sums:
            grad = share.of(share.key.grad)
            state[SECOND].mul_(beta).add_(grad.square().add_(self._eps1), alpha=1.0 - beta)
            return
        for kind, total, others in zip((ROW, COLUMN), sums, reversed(share.shape), strict=True):
            state[kind].mul_(beta).add_((total / others + self._eps1).float(), alpha=1.0 - beta)

    def _make_update(self, share: Share) -> torch.Tensor:
        """Turn the gradient into U, before its clipping, and return the sum of its squares, fp64 [1]."""
        update = share.of(share.key.grad)
        if not share.size:
            return _square(update)
        state = self.state[share.key][share.name]
        if self.is_factored(share):
            row, column = state[ROW].double(), state[COLUMN]
            # Both have the mean of the whole; the one that tensor parallelism does not cut is here in full.
            mean = column.mean(dtype=torch.float64) if share.tp_dim == 0 else row.mean()
            row, column = (row / mean).rsqrt().float(), column.rsqrt()
            for rows, columns, block in _rectangles(update, share.start, share.local_shape[1]):
                block.mul_(row[rows, None]).mul_(column[columns])
        else:
            update.mul_(state[SECOND].rsqrt())
        return _square(update)

    def _apply(
        self, group: dict[str, Any], share: Share, parameter_square: torch.Tensor, update_square: torch.Tensor
    ) -> None:
        if not share.size:
            return
        rate = group["lr"] / ((update_square / share.num_elements).sqrt() / self._clip).clamp(min=1.0)
        if self._scale_parameter:
            rate = rate * (parameter_square / share.num_elements).sqrt().clamp(min=self._eps2)
        parameter = share.of(share.key.data)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.addcmul_(share.of(share.key.grad), rate.to(parameter.dtype), value=-1.0)

    def _sum_over_ranks(self, sums: list[tuple[torch.Tensor, bool]]) -> list[torch.Tensor]:
        """Sum 1-D tensors over the data-parallel ranks, and those marked True over the tensor-parallel ones too."""
        if (self._tp_group is None and self._dp_group is None) or not sums:
            return [values for values, _ in sums]
        order = sorted(range(len(sums)), key=lambda index: not sums[index][1])
        flat = torch.cat([sums[index][0] for index in order])
        if self._dp_group is not None:
            dist.all_reduce(flat, group=self._dp_group)
        num_cut = sum(values.numel() for values, is_cut in sums if is_cut)
        if self._tp_group is not None and num_cut:
            dist.all_reduce(flat[:num_cut], group=self._tp_group)
        parts = flat.split([sums[index][0].numel() for index in order])
        return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]


def _square(values: torch.Tensor) -> torch.Tensor:
    """Sum the squares of 1-D values, fp64 [1]."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).square().reshape(1)


def _square_sums(flat: torch.Tensor, start: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the squares of a flat range of a matrix by its rows and its columns, fp64 [rows], [columns]."""
    row, column = (flat.new_zeros(size, dtype=torch.float64) for size in shape)
    for rows, columns, block in _rectangles(flat, start, shape[1]):
        squares = block.square()
        row[rows] += squares.sum(dim=1, dtype=torch.float64)
        column[columns] += squares.sum(dim=0, dtype=torch.float64)
    return row, column


def _rectangles(flat: torch.Tensor, start: int, width: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Cut the range of a flattened matrix that begins at `start` into the end of a row, whole rows, the start of a row.

    Yields: (rows, columns, 2-D view of flat); at most three.
    """
    end = start + flat.numel()
    head_end = min(end, -(-start // width) * width)
    body_end = max(head_end, end // width * width)
    for low, high in ((start, head_end), (head_end, body_end), (body_end, end)):
        if low < high:
            (row, column), num_rows = divmod(low, width), max(1, (high - low) // width)
            block = flat[low - start : high - start].view(num_rows, -1)
            yield slice(row, row + num_rows), slice(column, column + block.size(1)), block
