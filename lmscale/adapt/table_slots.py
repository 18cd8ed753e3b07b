"""What stands in a layer's slots while a batch is computed whose rows have adaptations of their own.

Each holds parts: a module of a bank, the rows that it is for and the entries that they name. Rows that no part names come
out as they went in.

Shapes: b rows, s tokens; the first dimension is the rows'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lmscale.models.context import Rows
from lmscale.models.norm import Norm


@dataclass(frozen=True)
class Part:
    """A bank's module, and whose it is.

    Attributes:
        module: with an entry for each slot of the table.
        rows: int64 [n], those of the batch; None is all of them, in order.
        ids: int64 [n], the entry that each names.
    """

    module: nn.Module
    rows: torch.Tensor | None
    ids: torch.Tensor

    def __call__(self, rows: Rows, *tensors: Any) -> Any:
        """Compute with the module, for its rows."""
        mine = [tensor if self.rows is None or not torch.is_tensor(tensor) else tensor[self.rows] for tensor in tensors]
        rows.ids = self.ids
        out = self.module(*mine)
        rows.ids = None
        return out


class BaseRows:
    """A vector of the base, a bias or a norm's, of which each slot may have values of its own.

    Shapes: values [slots, n].
    """

    def __init__(self, base: nn.Parameter, slots: int):
        self.base = base.detach()
        self.values = self.base.expand(slots, -1).clone()
        self.rows = self.ids = torch.empty(0, dtype=torch.int64)

    def set(self, slot: int, values: torch.Tensor) -> None:
        """Fill a slot."""
        self.values[slot].copy_(values)

    def of_rows(self, rows: torch.Tensor, ids: torch.Tensor) -> BaseRows:
        """Return a view for rows of a batch."""
        made: BaseRows = object.__new__(BaseRows)
        made.base, made.values, made.rows, made.ids = self.base, self.values, rows, ids
        return made


class _Slot(nn.Module):
    def __init__(self, rows: Rows, parts: list[Part]):
        super().__init__()
        self._rows, self._parts = rows, tuple(parts)


class _Sum(_Slot):
    """Add up what the parts make of their rows; the other rows get 0."""

    def __init__(self, rows: Rows, parts: list[Part], size: int):
        super().__init__(rows, parts)
        self._size = size

    def _total(self, *inputs: Any) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for part in self._parts:
            made = part(self._rows, *inputs)
            if part.rows is not None:
                total = made.new_zeros(self._size, *made.shape[1:]) if total is None else total
                total.index_copy_(0, part.rows, made)  # a row is of one part
            else:
                total = made
        return total


class Added(_Sum):
    """Beside a linear layer or the word table: LoRA, and biases of the rows' own less the base's."""

    def __init__(self, rows: Rows, parts: list[Part], size: int, bias: BaseRows | None = None):
        super().__init__(rows, parts, size)
        self.bias = bias

    def forward(self, x: torch.Tensor, *options: Any) -> torch.Tensor:
        """Compute what is added to the layer's output."""
        total = self._total(x, *options)
        if self.bias is None:
            assert total is not None
            return total
        delta = self.bias.values[self.bias.ids] - self.bias.base
        added = delta.new_zeros(self._size, delta.size(1)).index_copy_(0, self.bias.rows, delta)[:, None]
        return added if total is None else total + added


class Beside(_Sum):
    """Beside the feed-forward."""

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        """Compute what is added to its output."""
        total = self._total(entering)
        assert total is not None
        return total


class Behind(_Slot):
    """Behind a sub-layer, before the residual is added."""

    def forward(self, out: torch.Tensor, residual: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Change the output of the rows that have something there."""
        changed = out
        for part in self._parts:
            own: Any = norm
            if isinstance(norm, RowNorm) and part.rows is not None:
                own = norm.of_rows(part.rows)
            made = part(self._rows, out, residual, own)
            changed = made if part.rows is None else changed.index_copy(0, part.rows, made)
        return changed


class Prompts(_Slot):
    """In the input embedding."""

    def forward(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Put the rows' vectors in their places."""
        changed = hidden
        for part in self._parts:
            made = part(self._rows, hidden, places)
            changed = made if part.rows is None else changed.index_copy(0, part.rows, made)
        return changed


class Prefixes(_Slot):
    """In a core attention: keys and values of different lengths, filled up with zeros that no query sees."""

    def __init__(self, rows: Rows, parts: list[Part], is_there: torch.Tensor | None, size: int):
        super().__init__(rows, parts)
        self._is_there, self._size = is_there, size

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys and values [b, g/t, p, d], and which of them are there, bool [b, p]."""
        made = [part(self._rows)[:2] for part in self._parts]
        if self._is_there is None:
            keys, values = made[0]
            return keys, values, None
        first, length = made[0][0], self._is_there.size(1)
        keys, values = (first.new_zeros(self._size, first.size(1), length, first.size(3)) for _ in range(2))
        for part, (own_keys, own_values) in zip(self._parts, made, strict=True):
            for whole, own in ((keys, own_keys), (values, own_values)):
                padded = F.pad(own, (0, 0, 0, length - own.size(2)))
                whole.index_copy_(0, part.rows, padded) if part.rows is not None else whole.copy_(padded)
        return keys, values, self._is_there


class RowNorm(nn.Module):
    """In the place of a norm: rows with a weight or bias of their own get them, the others what the base's norm gives."""

    def __init__(self, inner: Norm, own: dict[str, BaseRows], rows: torch.Tensor):
        super().__init__()
        self.inner, self._own, self._rows = inner, own, rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        return self._normed(hidden, self._rows, slice(None))

    def of_rows(self, rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the norm of some rows of the batch, to be called with them alone."""
        is_among = (self._rows[:, None] == rows[None]).any(dim=1)
        places = (self._rows[is_among][:, None] == rows[None]).int().argmax(dim=1)
        return lambda hidden: self._normed(hidden, places, is_among)

    def _normed(self, hidden: torch.Tensor, rows: torch.Tensor, chosen: Any) -> torch.Tensor:
        out: torch.Tensor = self.inner(hidden)
        if not len(rows):
            return out
        mine, eps = hidden[rows], self.inner.eps
        plain = F.rms_norm(mine, mine.shape[-1:], None, eps)
        if self.inner.bias is not None:
            plain = F.layer_norm(mine, mine.shape[-1:], None, None, eps)
        weight, bias = self._values("weight", chosen), self._values("bias", chosen)
        made = plain * weight if bias is None else plain * weight + bias
        return out.index_copy(0, rows, made.to(out.dtype))

    def _values(self, kind: str, chosen: Any) -> torch.Tensor | None:
        own = self._own.get(kind)
        if own is not None:
            return own.values[own.ids[chosen]][:, None]
        return getattr(self.inner, kind)
