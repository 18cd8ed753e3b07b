"""Which range of which logical tensor each rank of a layout writes, as numbers: what fragments and slices find in an engine.

The rules are DeepSpeed's. Below ZeRO 1 the first data-parallel rank writes everything. ZeRO 1 and 2 lay the parameters of a
group one after another, fill up to a multiple of 2 dp_size, and cut that evenly. ZeRO 3 cuts each parameter evenly, rounded
up. Parameters that are not trained are whole on every rank, and under ZeRO 3 cut as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmscale.train.simulate import HeldParameter

_ALIGNMENT = 2
"""DeepSpeed's nccl_start_alignment_factor."""


@dataclass(frozen=True)
class Sizes:
    """A layout, as far as a checkpoint depends on it."""

    tp_size: int
    pp_size: int
    dp_size: int
    zero_stage: int

    def rank(self, stage: int, dp_rank: int, tp_rank: int) -> int:
        """Return the number of a rank: tensor-, then data-, then pipeline-parallel."""
        return (stage * self.dp_size + dp_rank) * self.tp_size + tp_rank


@dataclass(frozen=True)
class Range:
    """The range [start, end) of a parameter's flattened tensor-parallel slice that a data-parallel rank writes."""

    dp_rank: int
    start: int
    end: int


def local_size(parameter: HeldParameter, tp_size: int) -> int:
    """Count the values of a tensor-parallel rank's slice."""
    return math.prod(parameter.shape) // (tp_size if parameter.tp_dim is not None else 1)


def stage_ranges(
    parameters: Sequence[HeldParameter], sizes: Sizes, group_of: Callable[[HeldParameter], str | None]
) -> Iterator[tuple[HeldParameter, list[Range]]]:
    """Yield the parameters that the ranks of a stage write, in the order of their files, with the ranges of each.

    Args:
        parameters: of a rank of the stage, in the order of the model.
        sizes: the layout.
        group_of: the name of the optimizer's group; None where it is not trained.
    """
    flat: dict[str, int] = {}
    offsets = []
    for parameter in parameters:
        group = group_of(parameter)
        offsets.append(flat.get(group, 0) if group is not None else None)
        if group is not None:
            flat[group] = flat.get(group, 0) + local_size(parameter, sizes.tp_size)
    for parameter, offset in zip(parameters, offsets, strict=True):
        if parameter.is_tied_copy:
            continue
        size, group = local_size(parameter, sizes.tp_size), group_of(parameter)
        if sizes.zero_stage == 3:
            yield parameter, list(_cut(size, 0, -(-size // sizes.dp_size), sizes.dp_size))
        elif sizes.zero_stage == 0 or group is None or offset is None:
            yield parameter, [Range(0, 0, size)]
        else:
            step = _ALIGNMENT * sizes.dp_size
            yield parameter, list(_cut(size, offset, _ALIGNMENT * -(-flat[group] // step), sizes.dp_size))


def _cut(size: int, offset: int, part: int, num_parts: int) -> Iterator[Range]:
    """Cut what lies at [offset, offset + size) of a buffer at the multiples of part."""
    for number in range(num_parts):
        start, end = max(0, number * part - offset), min(size, (number + 1) * part - offset)
        if start < end:
            yield Range(number, start, end)
