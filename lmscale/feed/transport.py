"""Hand batches from a worker process to the trainer through shared memory that is mapped once.

A tensor that torch sends from process to process is a new mapping each time: a file descriptor's passage, near a
millisecond, and a page fault for every 4 KiB on both sides. Here the workers write into slots that stay mapped, and
only the number of the slot travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmscale.errors import LmscaleError
from lmscale.objectives.base import Arrays

_ALIGNMENT = 64


@dataclass(frozen=True)
class Filled:
    """A slot with a batch in it: the name, dtype, shape and place in bytes of each array."""

    slot: int
    layout: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]


class Slots:
    """Memory for a few batches, each as large as `like`.

    Args:
        num_slots: batches that are on their way or being read at a time.
        like: the arrays of a batch; none is larger.
        shared: with worker processes.
    """

    def __init__(self, num_slots: int, like: Arrays, shared: bool):
        memory = torch.empty((num_slots, sum(map(_place, like.values()))), dtype=torch.uint8)
        self._memory = memory.share_memory_() if shared else memory
        self.num_slots = num_slots

    def fill(self, slot: int, arrays: Arrays) -> Filled:
        """Copy a batch into a slot."""
        layout, offset = [], 0
        for name, array in arrays.items():
            layout.append((name, array.dtype, array.shape, offset))
            self._view(slot, array.dtype, array.shape, offset)[...] = array
            offset += _place(array)
        return Filled(slot, tuple(layout))

    def take(self, filled: Filled, rows_each: int, pin: bool) -> Iterator[dict[str, torch.Tensor]]:
        """Copy a batch out of its slot, as micro batches of `rows_each` rows, in order.

        Args:
            filled: arrays with equal first dimensions, a multiple of rows_each.
            rows_each: rows of a micro batch.
            pin: into pinned memory, so that the copy to a CUDA device need not be waited for.
        """
        arrays = {name: torch.from_numpy(self._view(filled.slot, *place)) for name, *place in filled.layout}
        num_rows = len(next(iter(arrays.values())))
        for first in range(0, num_rows, rows_each):
            parts = {name: array[first : first + rows_each] for name, array in arrays.items()}
            yield {
                name: torch.empty(part.shape, dtype=part.dtype, pin_memory=pin).copy_(part)
                for name, part in parts.items()
            }

    def _view(self, slot: int, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
        size = int(np.prod(shape)) * dtype.itemsize
        view: NDArray[Any] = self._memory[slot].numpy()[offset : offset + size].view(dtype).reshape(shape)
        return view


def _place(array: NDArray[Any]) -> int:
    """Round the bytes of an array up, so that the next one is aligned."""
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


class SlotFiller:
    """The dataset of a torch data loader: makes batches into slots.

    Args:
        make: sample numbers, length to cut them to -> arrays.
        slots: where to put them.
    """

    def __init__(self, make: Callable[[NDArray[np.int64], int | None], Arrays], slots: Slots):
        self._make, self._slots = make, slots

    def __getitems__(self, message: tuple[int, Sequence[int], int | None]) -> Filled | LmscaleError:
        """Make a batch, or return the error: raised in a worker, it would reach the user inside a traceback."""
        slot, indices, seq_length = message
        try:
            return self._slots.fill(slot, self._make(np.asarray(indices, np.int64), seq_length))
        except LmscaleError as error:
            return error
