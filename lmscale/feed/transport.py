"""Carry batches from a worker process in one piece of shared memory.

A tensor that crosses processes costs a file descriptor's passage, close to a millisecond, and its bytes cost page
faults. So the arrays of several micro batches travel as one buffer, integers as int32, and are cut, widened and, for a
CUDA device, pinned on arrival.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmscale.objectives.base import Arrays

_CARRIED_AS: dict[type[Any], type[Any]] = {np.int64: np.int32, np.float32: np.float32}
_DELIVERED_AS = {np.int64: torch.int64, np.float32: torch.float32}


@dataclass(frozen=True)
class Packed:
    """Arrays in one buffer, behind each other.

    Attributes:
        buffer: uint8, flat.
        layout: for each array its name, its dtype on delivery and its shape.
    """

    buffer: torch.Tensor
    layout: tuple[tuple[str, type[Any], tuple[int, ...]], ...]


def pack(arrays: Arrays) -> Packed:
    """Pack arrays of int64, whose values fit into 32 bits as token ids and positions do, and float32."""
    pieces: list[NDArray[np.uint8]] = []
    for array in arrays.values():
        carried = array.astype(_CARRIED_AS[array.dtype.type], order="C", copy=False)
        pieces.append(np.ascontiguousarray(carried).reshape(-1).view(np.uint8))
    layout = tuple((name, array.dtype.type, array.shape) for name, array in arrays.items())
    return Packed(torch.from_numpy(np.concatenate(pieces)), layout)


def unpack(packed: Packed, rows_each: int, pin: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Deliver micro batches: `rows_each` rows of every array at a time, in order.

    Args:
        packed: arrays with equal first dimensions, a multiple of rows_each.
        rows_each: rows of a micro batch.
        pin: in pinned memory, so that the copy to a CUDA device need not be waited for.

    Returns:
        Contiguous tensors in the dtypes that were packed.
    """
    carried: dict[str, torch.Tensor] = {}
    offset = 0
    for name, dtype, shape in packed.layout:
        kind = torch.int32 if _CARRIED_AS[dtype] is np.int32 else torch.float32
        size = int(np.prod(shape)) * kind.itemsize
        carried[name] = packed.buffer[offset : offset + size].view(kind).view(shape)
        offset += size
    dtypes = {name: _DELIVERED_AS[dtype] for name, dtype, _ in packed.layout}
    for first in range(0, packed.layout[0][2][0], rows_each):
        yield {
            name: torch.empty((rows_each, *array.shape[1:]), dtype=dtypes[name], pin_memory=pin).copy_(
                array[first : first + rows_each]
            )
            for name, array in carried.items()
        }
