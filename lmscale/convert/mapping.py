"""The language of the tables: which tensors of theirs are which tensor of ours, and by what steps.

An entry is read in both directions. Its steps turn their tensors, in order, into the one of ours; each step has an
inverse that only moves values, so what is converted and converted back is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from lmscale.config.model import ModelConfig

Tensors = list[torch.Tensor]


class Step(Protocol):
    """A rearrangement of tensors that can be undone."""

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Rearrange theirs."""
        ...

    def to_theirs(self, tensors: Tensors) -> Tensors:
        """Undo `to_ours`."""
        ...


@dataclass(frozen=True)
class Transpose:
    """Swap rows and columns of matrices; leave vectors alone."""

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Transpose [a, b] -> [b, a]."""
        return [tensor.t() for tensor in tensors]

    def to_theirs(self, tensors: Tensors) -> Tensors:
        """Transpose [b, a] -> [a, b]."""
        return [tensor.t() for tensor in tensors]


@dataclass(frozen=True)
class Cut:
    """Cut one tensor of theirs into equal parts along its rows."""

    parts: int

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Cut one [parts a, ...] -> parts times [a, ...]."""
        (tensor,) = tensors
        return list(tensor.chunk(self.parts))

    def to_theirs(self, tensors: Tensors) -> Tensors:
        """Join parts times [a, ...] -> one [parts a, ...]."""
        return [torch.cat(tensors)]


@dataclass(frozen=True)
class Interleave:
    """Put tensors into one, group by group: of each group the rows of the first, then those of the second, and so on.

    rows: the rows of one group of each tensor.
    """

    groups: int
    rows: tuple[int, ...]

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Join [groups rows_i, ...] for each i -> one [groups sum(rows), ...]."""
        return [torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)]

    def to_theirs(self, tensors: Tensors) -> Tensors:
        """Cut one [groups sum(rows), ...] -> [groups rows_i, ...] for each i."""
        (tensor,) = tensors
        grouped = tensor.unflatten(0, (self.groups, sum(self.rows)))
        return [part.flatten(0, 1) for part in grouped.split(self.rows, dim=1)]


@dataclass(frozen=True)
class PadRows:
    """Add rows of zeros that theirs lack: of vocabulary at the end, of unused positions at the front.

    A negative number takes as many of their rows away; the way back gives zeros in their place.
    """

    front: int = 0
    end: int = 0

    def to_ours(self, tensors: Tensors) -> Tensors:
        """Pad [a, ...] -> [front + a + end, ...]."""
        return [_pad_rows(tensor, self.front, self.end) for tensor in tensors]

    def to_theirs(self, tensors: Tensors) -> Tensors:
        """Cut [front + a + end, ...] -> [a, ...]."""
        return [_pad_rows(tensor, -self.front, -self.end) for tensor in tensors]


def _pad_rows(tensor: torch.Tensor, front: int, end: int) -> torch.Tensor:
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (front, end)) if front or end else tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, the tensors of theirs that make it, and the steps from these to it."""

    ours: str
    theirs: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def to_ours(self, tensors: Tensors) -> torch.Tensor:
        """Make our tensor of theirs, which are in the order of `theirs`."""
        for step in self.steps:
            tensors = step.to_ours(tensors)
        (tensor,) = tensors
        return tensor

    def to_theirs(self, tensor: torch.Tensor) -> Tensors:
        """Make their tensors of ours, in the order of `theirs`."""
        tensors = [tensor]
        for step in reversed(self.steps):
            tensors = step.to_theirs(tensors)
        return tensors

    def their_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Compute the shapes of their tensors from that of ours."""
        return [tuple(tensor.shape) for tensor in self.to_theirs(torch.empty(shape, device="meta"))]


def entry(ours: str, theirs: str | Sequence[str], *steps: Step) -> Entry:
    """Write an entry of a table."""
    return Entry(ours, (theirs,) if isinstance(theirs, str) else tuple(theirs), steps)


def linear(ours: str, theirs: str | Sequence[str], *steps: Step, bias: bool = True) -> list[Entry]:
    """Write the entries of a layer's weight and, with `bias`, of its bias; a norm's are these two as well."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in names), steps) for kind in kinds]


def repeat(layer: Iterable[Entry], num_layers: int, ours: str, theirs: str) -> list[Entry]:
    """Repeat the entries of one layer under each layer's names, in which {} is its number."""
    entries = list(layer)
    return [
        replace(
            one,
            ours=f"{ours.format(index)}.{one.ours}",
            theirs=tuple(f"{theirs.format(index)}.{name}" for name in one.theirs),
        )
        for index in range(num_layers)
        for one in entries
    ]


def grouped_qkv(model: ModelConfig) -> Interleave:
    """Return the step from query, key and value to megatron-core's fused form: of each group its queries, key, value."""
    heads = model.num_attention_heads // model.query_groups
    return Interleave(model.query_groups, (heads * model.head_size, model.head_size, model.head_size))


def grouped_kv(model: ModelConfig) -> Interleave:
    """Return the step from key and value of cross-attention to the fused form: of each head its key, then its value."""
    return Interleave(model.query_groups, (model.head_size, model.head_size))


def stacked_gate(model: ModelConfig) -> Interleave:
    """Return the step from gate and up to [gate; up]."""
    return Interleave(1, (model.ffn_size, model.ffn_size))


def padded_vocabulary(model: ModelConfig) -> PadRows:
    """Return the step from a table of the vocabulary's rows to ours of padded rows."""
    return PadRows(end=model.padded_vocab_size - model.vocab_size)
