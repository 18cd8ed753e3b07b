"""An optimizer's state as slices of logical tensors, of which checkpoints are made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lmscale.optim.adafactor import COLUMN, ROW, Adafactor
from lmscale.optim.build import blank_state, moment_names
from lmscale.optim.row_adam import ENTRY_STEPS
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
    """List the state of a fragment; none before the first update, nor of a frozen one."""
    if fragment.is_frozen:
        return []
    state = optimizer.state.get(fragment.key)
    if not state:
        return []
    if isinstance(optimizer, Adafactor):
        return [_statistic(fragment, kind, values) for kind, values in state[fragment.tensor.name].items()]
    found = [
        Moment(name, fragment.tensor, fragment.start, fragment.end, fragment.moment(optimizer, name))
        for name in moment_names(optimizer, fragment.key)
    ]
    return [*found, _entry_steps(fragment, state[ENTRY_STEPS])] if ENTRY_STEPS in state else found


def blank_moments(optimizer: torch.optim.Optimizer, fragment: Fragment, step: int) -> list[Moment]:
    """List the state of a fragment after `step` updates, for a checkpoint's values to be put in."""
    if not fragment.is_frozen and not optimizer.state.get(fragment.key):
        optimizer.state[fragment.key] = blank_state(optimizer, fragment.key, step)
    return moments(optimizer, fragment)


def _entry_steps(fragment: Fragment, counts: torch.Tensor) -> Moment:
    """Describe the updates of each of several adaptations, [N], which every tensor-parallel rank counts alike."""
    shape = tuple(counts.shape)
    tensor = replace(fragment.tensor, shape=shape, local_shape=shape, tp_dim=None, tp_stride=1)
    return Moment(ENTRY_STEPS, tensor, 0, counts.numel(), counts)


def _statistic(fragment: Fragment, kind: str, values: torch.Tensor) -> Moment:
    """Describe a statistic of Adafactor: of rows and columns, each rank that updates a part of the matrix has all.

    Those of rows are a tensor [rows]; of columns [columns], of the columns of fused matrices [matrices, columns].
    """
    tensor, num_parts = fragment.tensor, fragment.share.num_parts
    if kind not in (ROW, COLUMN):
        return Moment(kind, tensor, fragment.start, fragment.end, values)
    dim = {ROW: 0, COLUMN: 1}[kind]
    is_cut = tensor.tp_dim == dim
    leading = (num_parts,) if kind == COLUMN and num_parts > 1 else ()
    statistics = replace(
        tensor,
        shape=(*leading, tensor.shape[dim]),
        local_shape=(*leading, tensor.local_shape[dim]),
        tp_dim=len(leading) if is_cut else None,
        tp_stride=tensor.tp_stride if is_cut else 1,
    )
    return Moment(kind, statistics, 0, values.numel(), values, is_copy=fragment.start > 0)
