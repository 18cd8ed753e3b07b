"""An optimizer's state as slices of logical tensors, of which checkpoints are made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lmscale.optim.adafactor import COLUMN, ROW, SECOND, Adafactor
from lmscale.optim.build import blank_state, moment_names
from lmscale.train.fragments import Fragment, LogicalTensor


@dataclass(frozen=True)
class Moment:
    """The range [start, end) of this rank's flattened slice of a logical tensor of the optimizer's state.

    tensor has the name of its parameter; values is the 1-D fp32 view of the range. Where `is_copy`, another
    data-parallel rank has the same.
    """

    kind: str
    tensor: LogicalTensor
    start: int
    end: int
    values: torch.Tensor
    is_copy: bool = False


def moments(optimizer: torch.optim.Optimizer, fragment: Fragment) -> list[Moment]:
    """List the state of a fragment; none before the first update."""
    state = optimizer.state.get(fragment.key)
    if not state:
        return []
    if isinstance(optimizer, Adafactor):
        return [_statistic(fragment, kind, values) for kind, values in state[fragment.tensor.name].items()]
    return [
        Moment(name, fragment.tensor, fragment.start, fragment.end, fragment.moment(optimizer, name))
        for name in moment_names(optimizer)
    ]


def blank_moments(optimizer: torch.optim.Optimizer, fragment: Fragment, step: int) -> list[Moment]:
    """List the state of a fragment after `step` updates, for a checkpoint's values to be put in."""
    if not optimizer.state.get(fragment.key):
        optimizer.state[fragment.key] = blank_state(optimizer, fragment.key, step)
    return moments(optimizer, fragment)


def _statistic(fragment: Fragment, kind: str, values: torch.Tensor) -> Moment:
    """Describe a statistic of Adafactor: of rows and columns, each rank that updates a part of the matrix has all."""
    tensor = fragment.tensor
    if kind == SECOND:
        return Moment(kind, tensor, fragment.start, fragment.end, values)
    dim = {ROW: 0, COLUMN: 1}[kind]
    is_cut = tensor.tp_dim == dim
    vector = replace(
        tensor,
        shape=(tensor.shape[dim],),
        local_shape=(tensor.local_shape[dim],),
        tp_dim=0 if is_cut else None,
        tp_stride=tensor.tp_stride if is_cut else 1,
    )
    return Moment(kind, vector, 0, values.numel(), values, is_copy=fragment.start > 0)
