"""Files of fp32 tensors in the safetensors format, written as a stream and hashed on the way.

safetensors' own writer takes all tensors at once and has to be read again for a hash. The format is simple: eight bytes
with the header's length, a JSON header with dtype, shape and byte range of each tensor, and the bytes. All sizes are known
before the first byte, so that one tensor, or a part of one, is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

_BLOCK_BYTES = 1 << 22
_BLOCKS_AHEAD = 8
_ITEM_BYTES = 4
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class FileLayout:
    """Where each tensor of a file lies.

    Attributes:
        header: the bytes before the first tensor.
        offsets: first byte of each tensor, from the file's start; a multiple of eight but for the sizes before it.
        num_bytes: of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    num_bytes: int


class TensorFile:
    """A file of fp32 tensors that is read a range at a time, into memory that the caller has.

    Mapped instead, all that was ever read of it would count as this process's memory. It is closed with the object.

    Raises:
        OSError: here and in `read_into`, if it cannot be read.
        ValueError: if it is no file of fp32 tensors in the safetensors format.
    """

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        size = int.from_bytes(os.pread(self._descriptor, _LENGTH_BYTES, 0), "little")
        if size > os.fstat(self._descriptor).st_size:
            raise ValueError("its header is longer than the file")
        self._places = {}
        for key, entry in json.loads(os.pread(self._descriptor, size, _LENGTH_BYTES)).items():
            if key == "__metadata__":
                continue
            if entry["dtype"] != "F32":
                raise ValueError(f"{key} is {entry['dtype']}, not F32")
            first, behind = entry["data_offsets"]
            self._places[key] = _LENGTH_BYTES + size + first, (behind - first) // _ITEM_BYTES

    def read_into(self, key: str, start: int, values: torch.Tensor) -> None:
        """Read the values from `start` on of a flattened tensor into a contiguous fp32 tensor on the CPU."""
        if key not in self._places:
            raise ValueError(f"it has no {key}")
        offset, count = self._places[key]
        if start + values.numel() > count:
            raise ValueError(f"{key} has {count} values, and {start + values.numel()} are asked for")
        left, offset = memoryview(values.view(-1).numpy()).cast("B"), offset + start * _ITEM_BYTES
        while left:
            done = os.preadv(self._descriptor, [left], offset)
            if not done:
                raise ValueError("it ends too soon")
            left, offset = left[done:], offset + done


@dataclass(frozen=True)
class Written:
    """A file that is on disk."""

    num_bytes: int
    sha256: str


def file_layout(shapes: Mapping[str, tuple[int, ...]]) -> FileLayout:
    """Lay out fp32 tensors one after another, in the order given."""
    entries, ends = {}, {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _ITEM_BYTES
        entries[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        ends[key] = start
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, {key: len(header) + start for key, start in ends.items()}, len(header) + end)


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], parts: Iterable[torch.Tensor]) -> Written:
    """Write a file of fp32 tensors.

    Args:
        path: the file; replaced where it exists.
        shapes: of the tensors, by key, in the order of their bytes.
        parts: the values, in that order, as any cut of the tensors into flat pieces, on any device and in any precision.

    Raises:
        OSError: if it cannot be written.
        ValueError: if the parts are more or less than the shapes say.
    """
    layout = file_layout(shapes)
    with HashedFile(path) as file:
        file.write(layout.header)
        for part in parts:
            file.write(_bytes_of(part))
    if file.written.num_bytes != layout.num_bytes:
        raise ValueError(f"{path}: {file.written.num_bytes} bytes were given of {layout.num_bytes}")
    return file.written


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the fp32 values of a tensor as bytes, without a copy where they are that on the CPU already."""
    flat = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
    return memoryview(flat.numpy()).cast("B")


class HashedFile:
    """A file that a second thread hashes while it is written; flushed to the disk when it is closed.

    Attributes:
        written: its size and hash, once it is closed.
    """

    written: Written

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._hash, self._num_bytes = hashlib.sha256(), 0
        self._blocks: queue.Queue[memoryview | None] = queue.Queue(_BLOCKS_AHEAD)
        self._hasher = threading.Thread(target=self._hash_blocks, name="hash", daemon=True)
        self._hasher.start()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they must not change until the file is closed."""
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._blocks.put(block)
            left = block
            while left:
                left = left[self._file.write(left) :]
            self._num_bytes += len(block)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._blocks.put(None)
        try:
            if error is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            self._hasher.join()
        if error is None:
            self.written = Written(self._num_bytes, self._hash.hexdigest())

    def _hash_blocks(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._hash.update(block)
