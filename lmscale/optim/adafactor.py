"""Adafactor over whole matrices, wherever tensor parallelism and ZeRO have put their parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

ROW, COLUMN, SECOND, FIRST = "row", "column", "second", "first"
"""Kinds of the state's tensors: the factored second moment, the full one, and the first moment."""


@dataclass(frozen=True)
class Share:
    """The range [start, end) of a flattened parameter that this rank updates; empty where other ranks have all of it.

    The parameter is `local_shape` of the logical tensor `shape`, cut along `tp_dim` by tensor parallelism (None: whole).
    The range lies in `key`, a tensor of the optimizer's groups, from `offset` on.

    `parts` tells fused matrices apart: the local rows repeat in periods of sum(parts), of which the first parts[0] belong
    to the first matrix, the next parts[1] to the second, and so on; empty, all rows are of one matrix.
    """

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    tp_dim: int | None
    start: int
    end: int
    key: torch.Tensor
    offset: int
    parts: tuple[int, ...] = ()
    is_hidden_matrix: bool = False
    """A matrix of a transformer layer, not an embedding or a head."""

    @property
    def size(self) -> int:
        """Elements that this rank updates."""
        return self.end - self.start

    @property
    def num_parts(self) -> int:
        """Matrices that the parameter holds."""
        return max(1, len(self.parts))

    @functools.cached_property
    def part_rows(self) -> tuple[int, ...]:
        """Logical rows of each of its matrices."""
        rows = self.shape[0] if self.shape else 1
        return tuple(rows * part // sum(self.parts) for part in self.parts) or (rows,)

    @property
    def row_size(self) -> int:
        """Elements of a logical row."""
        return torch.Size(self.shape[1:]).numel()

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the 1-D view of the range in `key`'s values or gradient."""
        return flat.view(-1).narrow(0, self.offset, self.size)

    def by_part(self, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Cut the range into views of one matrix each.

        Yields: (number of the matrix, view of any shape); of a matrix several, or none.
        """
        if len(self.parts) < 2:
            yield 0, flat
            return
        for block in self.blocks(flat):
            yield block.part, block.view

    def blocks(self, flat: torch.Tensor) -> Iterator[Block]:
        """Cut the range into blocks of rows and columns; at most three times three of each matrix, however many rows."""
        width, rows = torch.Size(self.local_shape[1:]).numel(), self.local_shape[0]
        period = sum(self.parts) or rows
        for low, high in _cut(self.start, self.end, width):
            (row, column), num_rows = divmod(low, width), max(1, (high - low) // width)
            matrix = flat[low - self.start : high - self.start].view(num_rows, -1)
            columns = slice(column, column + matrix.size(1))
            for first, last in _cut(row, row + num_rows, period):
                group, start = divmod(first, period)
                body = matrix[first - row : last - row].view(max(1, (last - first) // period), -1, matrix.size(1))
                groups, offset = slice(group, group + body.size(0)), 0
                for part, size in enumerate(self.parts or (rows,)):
                    begin, end = max(offset, start), min(offset + size, start + body.size(1))
                    if begin < end:
                        view = body[:, begin - start : end - start]
                        yield Block(part, groups, slice(begin, end), columns, view)
                    offset += size


@dataclass(frozen=True)
class Block:
    """Rows `rows` of each of the periods `groups`, and columns of them: view [groups, rows, columns], of one matrix."""

    part: int
    groups: slice
    rows: slice
    columns: slice
    view: torch.Tensor


class Adafactor(torch.optim.Optimizer):
    """Adafactor, at a given rate.

    With G the gradient of a matrix W [m, n] at its t-th update, beta = 1 - t^-decay_exponent, and means over all of it:

        R <- beta R + (1 - beta) (row means of G^2 + eps1)         [m]
        C <- beta C + (1 - beta) (column means of G^2 + eps1)      [n]
        U  = G / sqrt(R C^T / mean(R))
        U <- U / max(1, RMS(U) / clip)
        D  = lr max(eps2, RMS(W)) U                                (scale_parameter off: lr U)
        M <- beta1 M + (1 - beta1) D                               (beta1 0: M = D, which is not kept)
        W <- W - lr weight_decay W - M

    A tensor with a dimension below `min_dim`, or of other than two dimensions, keeps V <- beta V + (1 - beta) (G^2 + eps1)
    whole, and U = G / sqrt(V).

    A matrix is what the paper multiplies by, however it is stored: of a fused tensor (queries, keys and values; keys and
    values; gate and up), each is a matrix with column statistics, RMS(U) and RMS(W) of its own. T5 draws queries smaller
    than keys by the root of the head's width: under one RMS of all three they would move as much as the keys. A fused
    tensor is factored where each of its matrices would be. The state of p fused matrices is m + p n numbers.

    All sums run over the logical matrix. Where tensor parallelism cuts it, or ZeRO has each rank update a flat range of it,
    ranks sum what they see of the row and column sums; each then updates its own range by the formula above. Sums are
    fp64, so that a layout's order of summation does not show in the fp32 state and copies of a tied tensor stay alike. The
    gradients are overwritten by the updates. Rows of padding of a vocabulary count like others.

    Args:
        params: groups, as of torch.optim.
        lr: the rate; it is read and never written.
        decay_exponent, eps1, eps2, clip: as above.
        scale_parameter: multiply the rate by max(eps2, RMS(W)).
        min_dim: smallest dimension of a matrix that is factored.
        beta1: decay of the first moment M, which costs a number for each parameter; 0: none.
        weight_decay: of the groups that do not say.
    Collectives of step: sums over the groups that `describe` was given, one of m + p n + p numbers for each tensor and one
        of p; every rank must call.
    Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4, in the parts and constants that Raffel et al. 2020,
        arXiv:1910.10683, sec. 3.1.2, used (Mesh TensorFlow's; M too). transformers multiplies the decay by
        max(eps2, RMS(W)) too; here, as in torch, it is lr weight_decay.
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
        beta1: float = 0.0,
    ):
        self._decay_exponent, self._eps1, self._eps2, self._clip = decay_exponent, eps1, eps2, clip
        self._scale_parameter, self._min_dim, self._beta1 = scale_parameter, min_dim, beta1
        self._shares: dict[torch.Tensor, list[Share]] = {}
        self._tp_group: dist.ProcessGroup | None = None
        self._dp_group: dist.ProcessGroup | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @property
    def moment_width(self) -> int:
        """Bytes of the state for each parameter, the second moments left out."""
        return 4 if self._beta1 else 0

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
        return len(share.shape) == 2 and min(*share.part_rows, share.shape[1]) >= self._min_dim

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
        first = [(FIRST, share.size)] if self._beta1 else []
        if self.is_factored(share):
            rows, columns = share.local_shape
            return [(ROW, rows), (COLUMN, share.num_parts * columns), *first]
        return [(SECOND, share.size), *first]

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
        of_parameters = self._update_statistics(shares)
        of_updates = self._sum_over_ranks([(self._make_update(share), share.tp_dim is not None) for share in shares])
        for (group, share), of_parameter, of_update in zip(todo, of_parameters, of_updates, strict=True):
            self._apply(group, share, of_parameter, of_update)
        return loss

    def _update_statistics(self, shares: list[Share]) -> list[torch.Tensor]:
        """Take the gradients into R, C and V; return the mean squares of the logical matrices, fp64 [parts] each."""
        sums, widths = [], []
        for share in shares:
            is_cut = share.tp_dim is not None
            sums.append((_mean_squares(share, share.of(share.key.data)), is_cut))
            if self.is_factored(share):
                rows, columns = _factors(share, share.of(share.key.grad))
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

    def _decay(self, share: Share, means: list[torch.Tensor]) -> None:
        beta = 1.0 - self.state[share.key]["step"] ** -self._decay_exponent
        state = self.state[share.key][share.name]
        if not means:
            grad = share.of(share.key.grad)
            state[SECOND].mul_(beta).add_(grad.square().add_(self._eps1), alpha=1.0 - beta)
            return
        for kind, mean in zip((ROW, COLUMN), means, strict=True):
            state[kind].mul_(beta).add_((mean + self._eps1).float(), alpha=1.0 - beta)

    def _make_update(self, share: Share) -> torch.Tensor:
        """Turn the gradient into U, before its clipping, and return the means of its squares, fp64 [parts]."""
        update = share.of(share.key.grad)
        if not share.size:
            return _mean_squares(share, update)
        state = self.state[share.key][share.name]
        if self.is_factored(share):
            groups, parts = share.local_shape[0] // (sum(share.parts) or share.local_shape[0]), share.num_parts
            row, column = state[ROW].view(groups, -1), state[COLUMN].view(parts, -1).double()
            # R and C have the same mean, that of G^2; the one that tensor parallelism does not cut is here in full.
            mean = column.mean(dim=1) if share.tp_dim != 1 else _part_means(share, row)
            row, column = row.rsqrt(), (column / mean[:, None]).rsqrt().float()
            for block in share.blocks(update):
                block.view.mul_(row[block.groups, block.rows, None]).mul_(column[block.part, block.columns])
        else:
            update.mul_(state[SECOND].rsqrt())
        return _mean_squares(share, update)

    def _apply(
        self, group: dict[str, Any], share: Share, parameter_square: torch.Tensor, update_square: torch.Tensor
    ) -> None:
        if not share.size:
            return
        rates = group["lr"] / (update_square.sqrt() / self._clip).clamp(min=1.0)
        if self._scale_parameter:
            rates = rates * parameter_square.sqrt().clamp(min=self._eps2)
        parameter, update = share.of(share.key.data), share.of(share.key.grad)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        rates, target, weight = rates.to(parameter.dtype), parameter, -1.0
        if self._beta1:
            target, weight = self.state[share.key][share.name][FIRST].mul_(self._beta1), 1.0 - self._beta1
        for (part, values), (_, changes) in zip(share.by_part(target), share.by_part(update), strict=True):
            values.addcmul_(changes, rates[part], value=weight)
        if self._beta1:
            parameter.sub_(target)

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


def _mean_squares(share: Share, flat: torch.Tensor) -> torch.Tensor:
    """Sum the squares of a range by matrix, over the elements of the logical matrix: what it adds to their mean.

    Returns: fp64 [parts].
    """
    sums = [flat.new_zeros((), dtype=torch.float64) for _ in range(share.num_parts)]
    for part, view in share.by_part(flat):
        sums[part] = sums[part] + torch.linalg.vector_norm(view, dtype=torch.float64).square()
    elements = [rows * share.row_size for rows in share.part_rows]
    return torch.stack([total / count for total, count in zip(sums, elements, strict=True)])


def _factors(share: Share, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the squares of a range by row and by column of each matrix: what it adds to the logical means.

    Returns: fp64 [rows], [parts * columns].
    """
    rows, width = share.local_shape
    row = flat.new_zeros(rows // (sum(share.parts) or rows), sum(share.parts) or rows, dtype=torch.float64)
    column = flat.new_zeros(share.num_parts, width, dtype=torch.float64)
    for block in share.blocks(flat):
        squares = block.view.square()
        row[block.groups, block.rows] += squares.sum(dim=2, dtype=torch.float64) / share.shape[1]
        column[block.part, block.columns] += squares.sum(dim=(0, 1), dtype=torch.float64) / share.part_rows[block.part]
    return row.view(-1), column.view(-1)


def _part_means(share: Share, row: torch.Tensor) -> torch.Tensor:
    """Average the row statistics [groups, period] of each matrix, fp64 [parts]."""
    parts = row.double().split(share.parts or (row.size(1),), dim=1)
    return torch.stack([part.mean() for part in parts])


def _cut(start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) into what ends at the next multiple of width, whole widths, and the rest; at most three."""
    head_end = min(end, -(-start // width) * width)
    body_end = max(head_end, end // width * width)
    for low, high in ((start, head_end), (head_end, body_end), (body_end, end)):
        if low < high:
            yield low, high
